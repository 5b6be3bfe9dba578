"""The whole model against vectors of other implementations: logits, every layer's tensors, and every choice exactly.

One shot, odd chunks and token by token; rows in a loop and rows in a batch.
"""

from __future__ import annotations

import functools

import golden
import jax.numpy as jnp
import numpy as np
import pytest
from golden import EXACT, QUICK, Golden
from runs import Run, chunks, run

ODD = (7, 1, 5, 1)
TOLERANCE = 1e-4
SIMULATED = 1e-3

MODELS = pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
ROWS = pytest.mark.parametrize("rows", ["loop", "batch"])


def close(got, want, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=tolerance)


def load(name: str) -> Golden:
    """tiny_b's matrices stay float16, in which they are exact: stored types must not narrow the arithmetic."""
    return golden.load(name, dtype="float16" if name == "tiny_b" else "float32")


@functools.cache
def observed(name: str, rows: str, sim_kv: bool = False, sim_index: bool = False) -> Run:
    """One shot with every layer's results."""
    model = load(name)
    numerics = (QUICK if sim_kv or sim_index else EXACT).replace(rows=rows, sim_kv=sim_kv, sim_index=sim_index)
    return run(model.config, numerics, model.params, model.ids, [len(model.ids)], observe=True)


# ------------------------------------------------------------------------------------------------------ logits


@MODELS
@ROWS
def test_one_shot(name, rows):
    close(observed(name, rows).logits, load(name).arrays["logits"])


@pytest.mark.parametrize("name, rows", [("tiny_a", "loop"), ("tiny_b", "batch"), ("tiny_c", "loop")])
@pytest.mark.parametrize("sizes", [ODD, (1,), (6, 2, 7)], ids=["odd", "ones", "uneven"])
def test_chunks_with_absent_rows(name, rows, sizes):
    """Calls of seven rows of which some are absent."""
    model = load(name)
    pieces = chunks(len(model.ids), sizes)
    result = run(model.config, QUICK.replace(rows=rows), model.params, model.ids, pieces, rows=7)
    close(result.logits, model.arrays["logits"])
    assert np.asarray(result.cache.length).tolist() == [len(model.ids)]


@pytest.mark.parametrize("name, rows", [("tiny_a", "batch"), ("tiny_b", "loop")])
def test_token_by_token(name, rows):
    model = load(name)
    pieces = [1] * len(model.ids)
    close(run(model.config, QUICK.replace(rows=rows), model.params, model.ids, pieces).logits, model.arrays["logits"])


# ------------------------------------------------------------------------------------------- layer by layer


def layers(model: Golden) -> list[int]:
    return list(range(model.config.num_hidden_layers))


@MODELS
@ROWS
def test_streams_before_every_layer_and_after_the_last(name, rows):
    model, seen = load(name), observed(name, rows).seen
    for layer in layers(model):
        close(seen[f"layers_{layer}/hc_attn/enter"][0], model.arrays[f"l{layer}/input"])
    close(observed(name, rows).streams, model.arrays["final_streams"])


@MODELS
@ROWS
def test_attention_and_experts_of_every_layer(name, rows):
    model, seen = load(name), observed(name, rows).seen
    for layer in layers(model):
        close(seen[f"layers_{layer}/attn/__call__"][0], model.arrays[f"l{layer}/attn_out"])
        close(seen[f"layers_{layer}/moe/__call__"], model.arrays[f"l{layer}/moe_out"])


@MODELS
@ROWS
@pytest.mark.parametrize("half", ["attn", "ffn"])
def test_hyper_connections_of_every_layer(name, rows, half):
    model, seen = load(name), observed(name, rows).seen
    for layer in layers(model):
        _, _, post, mixing = seen[f"layers_{layer}/hc_{half}/enter"]
        close(post, model.arrays[f"l{layer}/{half}_hc_post"])
        close(mixing, model.arrays[f"l{layer}/{half}_hc_comb"])


@MODELS
@ROWS
def test_experts_are_chosen_exactly(name, rows):
    """Ids equal, weights close; the order within a row is the implementation's own."""
    model, seen = load(name), observed(name, rows).seen
    for layer in layers(model):
        ids, weights = (np.asarray(part) for part in seen[f"layers_{layer}/moe/route"])
        want, want_weights = model.arrays[f"l{layer}/router_ids"], model.arrays[f"l{layer}/router_weights"]
        order, want_order = ids.argsort(1), want.argsort(1)
        np.testing.assert_array_equal(np.take_along_axis(ids, order, 1), np.take_along_axis(want, want_order, 1))
        close(np.take_along_axis(weights, order, 1), np.take_along_axis(want_weights, want_order, 1))


def visible_rows(ids: np.ndarray, count: int) -> np.ndarray:
    """[T, count] from lists of row indices; indices at or beyond `count` are empty places."""
    visible = np.zeros((len(ids), count), bool)
    token, place = np.nonzero(ids < count)
    visible[token, ids[token, place]] = True
    return visible


@MODELS
@ROWS
def test_indexer_chooses_the_same_rows(name, rows):
    model, seen = load(name), observed(name, rows).seen
    csa = [layer for layer in layers(model) if model.config.compress_ratios[layer] == 4]
    assert csa
    for layer in csa:
        want = model.arrays[f"l{layer}/visible"]
        ids = np.asarray(seen[f"layers_{layer}/attn/indexer/__call__"][0])
        assert (np.sort(ids, axis=1) == ids).all()
        np.testing.assert_array_equal(visible_rows(ids, want.shape[1]), want)


@MODELS
@ROWS
def test_compressed_rows_in_the_cache(name, rows):
    """After the last token, whatever is still pending."""
    model, cache = load(name), observed(name, rows).cache
    for layer, ratio in enumerate(model.config.compress_ratios):
        if ratio:
            want = model.arrays[f"l{layer}/compressed"]
            assert len(want) == len(model.ids) // ratio
            close(cache.layers[layer].compressor.rows[0, : len(want)], want)
        if ratio == 4:
            want = model.arrays[f"l{layer}/index_rows"]
            close(cache.layers[layer].indexer.rows[0, : len(want)], want)


@MODELS
def test_unwritten_places_stay_empty(name):
    """Chunks with absent rows write the rows that exist, and nothing else."""
    model = load(name)
    rows, total = {"tiny_a": "loop", "tiny_b": "batch"}[name], len(model.ids) - 3
    cache = run(
        model.config, QUICK.replace(rows=rows), model.params, model.ids[:total], chunks(total, ODD), rows=7
    ).cache
    for layer, ratio in enumerate(model.config.compress_ratios):
        if ratio:
            assert not np.asarray(cache.layers[layer].compressor.rows[0, total // ratio :]).any()


# ------------------------------------------------------------------------------------- simulated quantisation

FLAGS = pytest.mark.parametrize(
    "key, flags",
    [
        ("logits_sim_kv", {"sim_kv": True}),
        ("logits_sim_index", {"sim_index": True}),
        ("logits_sim", {"sim_kv": True, "sim_index": True}),
    ],
)


@FLAGS
def test_simulated_quantisation(key, flags):
    close(observed("tiny_c", "batch", **flags).logits, load("tiny_c").arrays[key], SIMULATED)


def test_simulated_rows():
    """Rows sit on the grid of the reference, element for element, but for the float32 noise beneath it."""
    model, result = load("tiny_c"), observed("tiny_c", "batch", sim_kv=True, sim_index=True)
    total = len(model.ids)
    for layer, ratio in enumerate(model.config.compress_ratios):
        state = result.cache.layers[layer]
        close(state.raw[0, :total], model.arrays[f"sim/l{layer}/kv"])
        if ratio:
            close(state.compressor.rows[0, : total // ratio], model.arrays[f"sim/l{layer}/compressed"])
        if ratio == 4:
            close(state.indexer.rows[0, : total // ratio], model.arrays[f"sim/l{layer}/index_rows"])
            want = model.arrays[f"sim/l{layer}/visible"]
            ids = np.asarray(result.seen[f"layers_{layer}/attn/indexer/__call__"][0])
            np.testing.assert_array_equal(visible_rows(ids, want.shape[1]), want)


def test_simulated_quantisation_token_by_token():
    model = load("tiny_c")
    numerics = QUICK.replace(rows="loop", sim_kv=True, sim_index=True)
    result = run(model.config, numerics, model.params, model.ids, [1] * len(model.ids))
    close(result.logits, model.arrays["logits_sim"], SIMULATED)


def test_half_precision_cache_is_near():
    """Float16 rows move the logits a little, and are stored as such."""
    model = load("tiny_c")
    numerics = QUICK.replace(rows="batch", cache="f16")
    result = run(model.config, numerics, model.params, model.ids, chunks(len(model.ids), ODD), rows=7)
    assert result.cache.layers[1].compressor.rows.dtype == jnp.float16
    error = np.abs(result.logits - model.arrays["logits"])
    assert 1e-5 < error.max() < 2e-2
