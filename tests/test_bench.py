"""The bench: the synthetic model has the real files' tensors, and cases are calls of operations."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PERF, TINY
from typer.testing import CliRunner

from ds4jax import cli, ops
from ds4jax.bench import synthetic
from ds4jax.bench.cases import CASES
from ds4jax.bench.cases_attention import chosen
from ds4jax.bench.machine import driver_version
from ds4jax.checkpoint_table import trunk_slots
from ds4jax.errors import ConfigError
from ds4jax.ops.rows import Live
from ds4jax.quants import QTensor


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


def test_tensors_of_the_real_mtp_file():
    """Its published census."""
    config = dataclasses.replace(synthetic.FLASH, has_mtp=True)
    block = jax.eval_shape(lambda: synthetic.make_params(config, 0))["mtp"]
    leaves = jax.tree.leaves(block, is_leaf=lambda x: isinstance(x, QTensor))
    types = [x.format if isinstance(x, QTensor) else x.dtype.name for x in leaves]
    assert Counter(types) == {"float32": 19, "Q8_0": 10, "Q4_K": 3}
    assert round(synthetic.nbytes(block) / 2**30, 3) == 3.546


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


def test_bytes_of_drafts():
    """Of the real file, in GB: a draft reads 0.83, of which the head is 0.56; storing rows of the block reads 0.04."""
    config = dataclasses.replace(synthetic.FLASH, has_mtp=True)
    params = jax.eval_shape(lambda: synthetic.make_params(config, 0))
    trunk, one, two = (synthetic.weight_bytes(params, config, 3, drafts) for drafts in (0, 1, 2))
    assert round((two - one) / 1e9, 2) == 0.83
    assert round((one - trunk - (two - one)) / 1e9, 2) == 0.04
    assert round(synthetic.nbytes(params["head"]) / 1e9, 2) == 0.56


def test_filled_cache():
    cache = synthetic.make_cache(TINY, PERF, 64, 2)
    deviations = [float(jnp.std(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(cache.layers)]
    assert min(deviations) > 0.9 and max(deviations) < 1.1
    assert cache.length.tolist() == [0]


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernels",), "expected an NVIDIA GPU, found cpu"),
        (("kernels", "nonsense"), "unknown cases"),
        (("kernels", "--rows", "1;2"), "expected whole numbers"),
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
