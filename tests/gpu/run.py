"""Every kernel and whole generations on a GPU: `PYTHONPATH=.:tests python tests/gpu/run.py [--help]`.

Kernels are compared with their references on the same card at the full model's shapes; the demonstration model then
generates with and without drafts. Prints a line per check and exits with the number of failed ones.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absent import spoiled

import ds4jax
from ds4jax import checkpoint_upload
from ds4jax.activation import Activation
from ds4jax.bench.cases import CASES
from ds4jax.bench.cases_glue import BOUNDS as GLUE_BOUNDS
from ds4jax.checkpoint_gguf import TensorInfo
from ds4jax.checkpoint_table import Slot
from ds4jax.ops.quantise import act_q8
from ds4jax.ops.rows import Live
from ds4jax.ops.simulate import fp4_round_trip, fp8_round_trip
from ds4jax.pallas.ptx import Emulated, Native, launch
from ds4jax.quants import block_size, pack
from gpu import contraction

STRICT = ds4jax.load_numerics("strict")
KERNELS = STRICT.replace(impl=tuple((op, "pallas") for op, _ in STRICT.impl))
REFERENCE = STRICT.replace(impl=tuple((op, "xla") for op, _ in STRICT.impl), rows="batch")
BOUNDS = {
    **GLUE_BOUNDS,
    **{name: 2e-6 for name in CASES if name.startswith("compressor")},  # float dots of 4096 products in another order
    **{name: 3e-6 for name in CASES if name.startswith("attention")},  # softmax in parts, see attention
}
"""Largest difference relative to the largest result; what is not listed must be equal bit for bit."""

TEXT = "The old man looked at the sea for a long time. Then he took his hat, and walked slowly down to the boats."
PROMPTS = {"tale": "Once upon a time there was a fox who", "dialogue": '"Where are you going?" asked the'}


class Report:
    """Prints checks as they are made and counts failures."""

    failed = 0

    def check(self, name: str, function: Callable[[], tuple[bool, str]]) -> None:
        begun = time.perf_counter()
        try:
            passed, detail = function()
        except Exception as error:
            passed, detail = False, f"{type(error).__name__}: {str(error)[:400]}"
        self.failed += not passed
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {detail} [{time.perf_counter() - begun:.1f} s]", flush=True)


def on_card() -> bool:
    """Says what the checks run on, and whether it is a GPU."""
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    return device.platform == "gpu"


def loading() -> tuple[bool, str]:
    """Tensors that the card rearranges, slab by slab, against the host's planes, on random bytes."""
    rng, wrong = np.random.default_rng(0), []
    for format in ("Q8_0", "IQ2_XXS", "Q2_K", "Q4_K"):
        values, size = block_size(format)
        shape = (100, 256, 4096)
        raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // values * size), np.uint8)
        tensor = TensorInfo(format, format, shape, raw.reshape(-1), Path(format))
        assert tensor.nbytes > checkpoint_upload.SLAB_BYTES
        ((_, leaf),) = checkpoint_upload.upload(
            [(tensor, Slot(format, (("leaf",),), "matrix", shape))], jax.local_devices()[0]
        )
        planes = pack(format, raw, shape).planes
        wrong += [
            f"{format} {name}" for name in planes if np.asarray(leaf.planes[name]).tobytes() != planes[name].tobytes()
        ]
    return not wrong, f"differing planes {wrong}"


def instructions() -> tuple[bool, str]:
    """PTX instructions against their emulations on random words."""
    rng = np.random.default_rng(0)
    words = [jnp.asarray(rng.integers(-(2**31), 2**31, 1024).astype(np.int32)) for _ in range(3)]
    values = [jnp.asarray((rng.standard_normal(1024) * 1000).astype(np.float32)) for _ in range(2)]

    def results(ptx: Any, a: Any, b: Any, c: Any, x: Any, y: Any) -> tuple[Any, ...]:
        return (ptx.dp4a(a, b, c), ptx.permute(0x002B1908, 0x00D5E7F8, a & 0x77777777), ptx.rint(x), ptx.divide(x, y))

    def kernel(ptx: Any, *refs: Any) -> None:
        for ref, value in zip(refs[5:9], results(ptx, *(ref[...] for ref in refs[:5])), strict=True):
            ref[...] = value
        refs[9][0] = ptx.tree_sum(refs[3][...])

    kinds = [jnp.int32, jnp.int32, jnp.int32, jnp.float32]
    shapes = (*(jax.ShapeDtypeStruct((1024,), kind) for kind in kinds), jax.ShapeDtypeStruct((1,), jnp.float32))
    got = launch(kernel, shapes, (1,), *words, *values, name="instructions", warps=4, interpret=False)
    want = jax.jit(lambda *args: (*results(Emulated(), *args), Emulated().tree_sum(args[3])[None]))(*words, *values)
    wrong = [int(jnp.sum(a != b)) for a, b in zip(got, want, strict=True)]
    assert isinstance(Native(), Emulated.__bases__)
    return not any(wrong), f"different results of dp4a, permute, rint, divide, tree_sum: {wrong}"


def grids() -> tuple[bool, str]:
    """The simulated formats change values, and storing them changes nothing more: no cast is optimised away."""
    x = jax.random.normal(jax.random.key(0), (64, 512))
    options = STRICT.compiler_options
    fp8, fp4 = (jax.jit(f, compiler_options=options)(x) for f in (fp8_round_trip, fp4_round_trip))
    half = jax.jit(
        lambda x: jax.lax.optimization_barrier(x.astype(jnp.float16)).astype(jnp.float32), compiler_options=options
    )(x)
    changed = [float(jnp.mean(y != x)) for y in (fp8, fp4, half)]
    idempotent = all(bool(jnp.array_equal(f(y), y)) for f, y in ((fp8_round_trip, fp8), (fp4_round_trip, fp4)))
    return min(changed) > 0.5 and idempotent, f"share of values on another place: fp8, fp4, f16 {changed}"


def contracted() -> tuple[bool, str]:
    """The fused rotation is the two-step one, and a fused multiply-add in it would be seen."""
    fused, variant = contraction.differences()
    return fused == 0 and variant > 0, f"fused against two steps {fused}, with fma {variant} elements differ"


def same(left: Any, right: Any) -> bool:
    """Whether all arrays of two results are equal."""
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def take(results: Any, row: int) -> Any:
    """Results of one row."""
    return jax.tree.map(lambda a: a[row], results)


def uncoded(results: Any) -> tuple[Any, bool]:
    """Results without the codes of activations, and whether these are the codes of their own floats, to the bit."""
    fitting = True

    def floats(leaf: Any) -> Any:
        nonlocal fitting
        if not isinstance(leaf, Activation):
            return leaf
        if leaf.q8 is not None:
            fitting &= same(leaf.q8, jax.jit(act_q8, compiler_options=STRICT.compiler_options)(leaf.x))
        return leaf.x

    floats_only = jax.tree.map(floats, results, is_leaf=lambda leaf: isinstance(leaf, Activation))
    return floats_only, fitting


def kernel(name: str, rows: int) -> tuple[bool, str]:
    """One case: equal to the reference, the same alone as among others, and the same again."""
    case = CASES[name]
    row_args = jax.jit(case.rows, static_argnums=1)(jax.random.key(2), rows)
    weights, caches = case.parted(jax.jit(case.shared)(jax.random.key(1)))

    def program(numerics: Any) -> Callable[[Live, Any, Any], tuple[list[Any], Any]]:
        function = jax.jit(functools.partial(case.call, numerics), compiler_options=numerics.compiler_options)
        return lambda live, row_args, caches: function(live, row_args, weights, caches)

    run, every = program(KERNELS), Live.all(rows)
    results = run(every, row_args, caches)
    want = program(REFERENCE)(every, row_args, caches)
    equal = same(results, want)
    # Codes of floats that are only near cannot be compared.
    floats, fitting = uncoded(results)
    both = zip(jax.tree.leaves(floats), jax.tree.leaves(uncoded(want)[0]), strict=True)
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in both]
    worst = max(float(np.max(np.abs(a.astype(float) - b)) / max(float(np.max(np.abs(b))), 1e-30)) for a, b in pairs)
    again = same(run(every, row_args, caches), results)
    alone = among = True
    got, written = results
    alone_written = among_written = caches
    for row in range(rows):
        single = jax.tree.map(lambda v, row=row: v[row : row + 1], row_args)
        found, alone_written = run(Live.all(1), single, alone_written)
        alone &= same(take(got, row), take(found, 0))
        only = jnp.arange(rows) == row
        found, among_written = run(Live.of(only), spoiled(row_args, only), among_written)
        among &= same(take(got, row), take(found, row))
    # Rows that are written one after another leave what they leave together.
    alone &= same(alone_written, written)
    among &= same(among_written, written)
    good = (equal or worst <= BOUNDS.get(name, 0.0)) and fitting and alone and among and again
    near = "equal to the reference" if equal else f"within {worst:.1e} of the reference, codes fit {fitting}"
    return good, f"{near}; rows alone {alone}, beside absent ones {among}, repeated {again}"


FLOATS = {"act": "f32", "sim_kv": False, "sim_index": False, "cache": "f32"}
"""Numerics without a coarse grid."""


def cpu_logprobs(changes: dict[str, Any]) -> np.ndarray:
    """Log-probabilities of `TEXT` by the reference on the CPU, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cpu.npy"
        numerics = f"ds4jax.load_numerics('strict').replace(**{changes!r})"
        code = (
            f"import ds4jax, numpy as np; np.save({str(file)!r}, ds4jax.load(numerics={numerics}).logprobs({TEXT!r}))"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        return np.load(file)


def _differ(changes: dict[str, Any], worst: float, mean: float) -> tuple[bool, str]:
    """The demonstration model's log-probabilities on the GPU against the CPU's."""
    found = np.abs(ds4jax.load(numerics=STRICT.replace(**changes)).logprobs(TEXT) - cpu_logprobs(changes))
    good = float(found.max()) < worst and float(found.mean()) < mean
    return good, f"log-probabilities differ by at most {found.max():.1e}, on average {found.mean():.1e}"


def cpu_floats() -> tuple[bool, str]:
    """GPU against CPU without grids. The CPU differs from itself, multiply-adds fused or not, by 3e-6 at most."""
    return _differ(FLOATS, 3e-4, 3e-5)


def cpu_strict() -> tuple[bool, str]:
    """The same as it is meant to run: values on the edge of a step of the int8, FP8 or FP4 grids fall to either side.

    The CPU differs from itself by 0.36 then, and by 0.043 on average.
    """
    return _differ({}, 1.0, 0.1)


def streams(drafts: list[str], tokens: int) -> tuple[bool, str]:
    """Strict texts, greedy and sampled, with every number of drafts; and a table of speeds."""
    answers: dict[tuple[str, str, str], list[int]] = {}
    good = True
    for preset in ("strict", "perf"):
        for draft in drafts:
            begun = time.perf_counter()
            engine = ds4jax.load(numerics=preset, speculative=int(draft) if draft.isdigit() else draft, context=1024)
            line = []
            for kind, prompt in PROMPTS.items():
                for heat in (0.0, 0.8):
                    options: Any = {"sampling": ds4jax.Sampling(temperature=heat), "seed": 3, "max_new_tokens": tokens}
                    engine.generate(prompt, **options)
                    result = engine.generate(prompt, **options)
                    same = answers.setdefault((preset, kind, str(heat)), result.tokens) == result.tokens
                    good &= same or preset == "perf"
                    stats = result.stats
                    rate = f"{stats.decode_rate:.0f} t/s, {stats.tokens_per_step:.2f} per step"
                    line.append(f"{kind} T={heat} {rate}, {'same' if same else 'other'}")
            print(f"     {preset} drafts {draft}: {'; '.join(line)} [{time.perf_counter() - begun:.0f} s]", flush=True)
    return good, f"strict texts of {len(answers) // 2} requests are the same with drafts {', '.join(drafts)}: {good}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", help="names of kernel cases; default: all")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--drafts", nargs="*", default=["off", "1", "2", "3", "auto"])
    parser.add_argument("--tokens", type=int, default=200)
    given = parser.parse_args()
    report = Report()
    if not on_card():
        return 1
    report.check("instructions", instructions)
    report.check("loading", loading)
    report.check("simulated formats", grids)
    report.check("contraction", contracted)
    for name in CASES if given.cases is None else given.cases:
        report.check(name, lambda name=name: kernel(name, given.rows))
    if given.drafts:
        report.check("GPU against CPU, floats", cpu_floats)
        report.check("GPU against CPU", cpu_strict)
        report.check("streams", lambda: streams(given.drafts, given.tokens))
    print(f"{report.failed} failed")
    return report.failed


if __name__ == "__main__":
    sys.exit(main())
