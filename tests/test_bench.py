"""The bench: the synthetic model has the real file's tensors, steps are those of the model, and failures are told."""

import csv
import dataclasses
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from ds4jax import cli, load_numerics, ops
from ds4jax.bench import decode, synthetic
from ds4jax.bench.cases import CASES
from ds4jax.bench.cases_attention import chosen
from ds4jax.bench.machine import driver_version
from ds4jax.checkpoint_table import trunk_slots
from ds4jax.errors import ConfigError
from ds4jax.model.cache import Cache
from ds4jax.ops.rows import Live
from ds4jax.quants import QTensor

PERF = load_numerics("perf")
PERF = PERF.replace(xla=())  # options of the GPU compiler only
TINY = dataclasses.replace(
    synthetic.FLASH,
    vocab_size=64,
    hidden_size=256,
    num_hidden_layers=2,
    compress_ratios=(4, 8),
    num_hash_layers=1,
    hc_sinkhorn_iters=2,
    num_attention_heads=2,
    head_dim=128,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=32,
    sliding_window=8,
    index_n_heads=2,
    index_head_dim=64,
    index_topk=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    swiglu_limit=(10.0,) * 3,
    swiglu_limit_shared=(10.0,) * 3,
    max_position_embeddings=256,
)


def test_tensors_of_the_real_file():
    """Its published census: tensors by type, and the sizes of the quantised types in GiB."""
    params = jax.eval_shape(lambda: synthetic.make_params(synthetic.FLASH, 0))
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QTensor))
    names = {"float32": "F32", "float16": "F16", "int32": "I32"}
    types = [x.format if isinstance(x, QTensor) else names[x.dtype.name] for x in leaves]
    assert Counter(types) == {"F32": 492, "F16": 359, "Q8_0": 345, "IQ2_XXS": 86, "Q2_K": 43, "I32": 3}
    sizes: Counter[str] = Counter()
    for kind, leaf in zip(types, leaves, strict=True):
        sizes[kind] += synthetic.nbytes(leaf)
    assert round(sizes["Q8_0"] / 2**30, 2) == 6.15
    assert round(sizes["F16"] / 2**30, 2) == 2.04
    assert round((sizes["IQ2_XXS"] * 66 / 70 + sizes["Q2_K"]) / 2**30, 2) == 72.56  # 70 bytes for 66 on the device


@pytest.mark.parametrize("layers", [4, 9, 43])
def test_fewer_layers_keep_every_kind(layers):
    config = synthetic.parse(f"flash:{layers}")
    assert config.compress_ratios == synthetic.FLASH.compress_ratios[:layers]
    assert set(config.compress_ratios) == {0, 4, 128}
    assert {config.is_hash_layer(layer) for layer in range(layers)} == {True, False}
    assert synthetic.parse("flash") == synthetic.parse("flash:43") == synthetic.FLASH


@pytest.mark.parametrize("text", ["flash:3", "flash:44", "flash:x", "flash:-4", "pro"])
def test_other_names(text):
    with pytest.raises(ConfigError, match="expected"):
        synthetic.parse(text)


@pytest.fixture(scope="module")
def tiny():
    return synthetic.make_params(TINY, 0)


def test_weights_repeat_by_seed(tiny):
    def differing(seed: int) -> int:
        made = synthetic.make_params(TINY, seed)
        pairs = zip(jax.tree.leaves(made), jax.tree.leaves(tiny), strict=True)
        return sum(not np.array_equal(a, b) for a, b in pairs)

    assert differing(0) == 0
    assert differing(1) == len(jax.tree.leaves(tiny))


def test_experts_of_tokens_differ(tiny):
    table = np.asarray(tiny["layers_0"]["moe"]["tid2eid"])
    assert table.shape == (64, 2) and set(table.flat) == set(range(8))
    assert (table[:, 0] != table[:, 1]).all()
    assert len({tuple(row) for row in table.tolist()}) > 20


def test_bytes_of_a_step(tiny):
    """Two rows read twice as many experts and embeddings as one, and everything else once."""
    every = synthetic.nbytes(tiny)
    one, two = (synthetic.weight_bytes(tiny, TINY, rows) for rows in (1, 2))
    experts = sum(synthetic.nbytes(tiny[f"layers_{n}"]["moe"][w]) for n in range(2) for w in ("w1", "w2", "w3"))
    by_token = synthetic.nbytes((tiny["embed"], tiny["layers_0"]["moe"]["tid2eid"]))
    assert one == every - experts * 3 // 4 - by_token * 63 // 64
    assert two - one == experts // 4 + by_token // 64
    everything = synthetic.weight_bytes({**tiny, "mtp": tiny["layers_0"]}, TINY, 64)
    assert everything == every, "more rows than experts read each once; the MTP block takes no part"


class Stub:
    """A model that chooses token + position + number of rows."""

    def __init__(self, config, numerics):
        self.size = config.vocab_size

    def apply(self, variables, *arguments, method="trunk"):
        if method == "logits":
            streams, live = arguments
            return jnp.where(live[..., None], jax.nn.one_hot(streams[..., 0, 0] % self.size, self.size), jnp.nan)
        tokens, cache, start, count = arguments
        position = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return (tokens + position + count[:, None])[..., None, None], cache


def test_steps_feed_on_their_choices(monkeypatch):
    """Each step continues where the last ended, with its choices spread over the vocabulary."""
    monkeypatch.setattr(decode, "DeepSeekV4", Stub)
    cache, want = Cache(synthetic.at_length(30), (), None), np.array([5, 9])
    loop = jax.jit(decode.decode_loop(TINY, PERF, 2))
    got, after = loop({}, jnp.asarray(want[None], jnp.int32), cache, jnp.int32(3))
    for start in (30, 32, 34):
        position = start + np.arange(2)
        want = ((want + position + 2) % 64 + decode.SPREAD * (position + 1)) % 64
    assert got.tolist() == [want.tolist()]
    assert after.length.tolist() == [36]


def test_filled_cache():
    cache = synthetic.make_cache(TINY, PERF, 64, 2)
    deviations = [float(jnp.std(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(cache.layers)]
    assert min(deviations) > 0.9 and max(deviations) < 1.1
    assert cache.length.tolist() == [0]


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def test_command(monkeypatch, tmp_path):
    """A line and a CSV row for every context; a number of rows that fails is told, and the others are measured."""
    loop = decode.decode_loop

    def some(config, numerics, rows):
        if rows == 1:
            return lambda *args: 1 / 0
        return loop(config, numerics, rows)

    monkeypatch.setattr(decode, "decode_loop", some)
    monkeypatch.setattr(synthetic, "parse", lambda text: TINY)
    monkeypatch.setattr("ds4jax.cli_bench.read_run", lambda *_: SimpleNamespace(numerics=PERF))
    file = tmp_path / "steps.csv"
    arguments = ("--synthetic", "tiny", "--context", "40,64", "--rows", "1,2", "--steps", "3", "-N", "perf")
    result = run("decode", *arguments, "--csv", file)
    assert result.exit_code == 2 and "1 of 2 row counts failed" in result.output
    assert "rows 1: failed: ZeroDivisionError" in result.output
    lines = list(csv.DictReader(file.read_text().splitlines()))
    assert [(line["rows"], line["context"], line["capacity"]) for line in lines] == [
        ("2", "40", "64"),
        ("2", "64", "64"),
    ]
    assert all(float(line["milliseconds"]) > 0 for line in lines)
    assert {line["card"] for line in lines} == {"cpu"} and lines[0]["numerics"].startswith("perf ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernels",), "expected an NVIDIA GPU, found cpu"),
        (("kernels", "nonsense"), "unknown cases"),
        (("kernels", "--rows", "1;2"), "expected whole numbers"),
        (("decode", "--context", "20"), "context = 20: expected"),
        (("decode", "--synthetic", "flash", "-m", "file.gguf"), "both given"),
        (("decode", "--synthetic", "flash", "--rows", "0"), "expected at least 1"),
    ],
)
def test_errors_are_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1] and len(result.stderr.splitlines()) == 1


def test_selected_rows_differ_and_are_seen():
    seen = [0, 1, 7, 8, 9, 1000]
    ids = np.asarray(chosen(jax.random.key(0), jnp.asarray(seen, jnp.int32), 8, 5000))
    for row, count in zip(ids, seen, strict=True):
        mine = row[: min(count, 8)]
        assert (np.diff(mine) > 0).all() and (mine < count).all() and (row[len(mine) :] == 5000).all()


def test_cases_name_operations_and_their_settings():
    """Every case's arguments have shapes that its reference takes."""
    for case in CASES.values():
        arguments = jax.eval_shape(lambda key, case=case: (case.rows(key, 2), case.shared(key)), jax.random.key(0))
        jax.eval_shape(
            lambda rows, shared, case=case: ops.call(case.op, PERF, Live.all(2), rows, shared, **case.settings),
            *arguments,
        )
        if case.active is not None:
            assert 0 < case.active(1) <= case.active(2)
    assert set(dict(PERF.impl)) == {case.op for case in CASES.values()}


def test_slots_cover_every_parameter():
    paths = [path for slot in trunk_slots(TINY) for path in slot.paths]
    assert len(paths) == len(set(paths))


def test_driver_version(tmp_path):
    file = tmp_path / "version"
    assert driver_version(file) == "unknown"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\nGCC 12\n")
    assert driver_version(file) == "570.124.06"
