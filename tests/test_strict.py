"""Strict numerics on the XLA path: a row's bits depend on its own past alone."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from ds4jax.model import Cache, DeepSeekV4, commit, init_cache
from ds4jax.ops.rows import Live, map_rows

STRICT = dataclasses.replace(golden.EXACT, act="q8", sim_kv=True, sim_index=True, cache="f16")


@functools.cache
def stepper(config):
    """The jitted step over `[B, R]` tokens: logits, nothing, and the committed cache."""
    model = DeepSeekV4(config, STRICT)

    def step(params, tokens, cache, count):
        streams, moved = model.apply({"params": params}, tokens, cache, cache.length, count)
        logits = model.apply({"params": params}, streams, jnp.ones(tokens.shape, bool), method="logits")
        return logits, commit(moved, cache.length + count)

    return jax.jit(step)


def visible(cache: Cache, config, length: int) -> list[np.ndarray]:
    """What later rows can see of one sequence of the given length, layer by layer, in the order of positions."""
    seen = []
    for ratio, layer in zip(config.compress_ratios, cache.layers, strict=True):
        ring = np.asarray(layer.raw[0])
        seen.append(ring[np.arange(max(0, length - config.sliding_window + 1), length) % len(ring)])
        for state in (layer.compressor, layer.indexer):
            if state is None:
                continue
            seen.append(np.asarray(state.rows[0, : length // ratio]))
            past = length // ratio * ratio - (ratio if ratio == 4 else 0)
            pending = np.arange(max(0, past), length)
            for ring in (np.asarray(state.values[0]), np.asarray(state.gates[0])):
                seen.append(ring[pending % len(ring)])
    return seen


@pytest.mark.parametrize("sizes", [(7, 1, 5, 1), (1,), (3, 2)])
def test_any_chunking_gives_the_same_bits(sizes):
    model = golden.load("tiny_c")
    total = len(model.ids)
    whole = runs.run(model.config, STRICT, model.params, model.ids, [total])
    parts = runs.run(model.config, STRICT, model.params, model.ids, runs.chunks(total, sizes))
    np.testing.assert_array_equal(whole.logits, parts.logits)
    np.testing.assert_array_equal(whole.streams, parts.streams)
    states = [visible(run.cache, model.config, total) for run in (whole, parts)]
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one, other)


def test_sequences_in_one_call_do_not_touch_each_other():
    model = golden.load("tiny_c")
    config, lengths = model.config, (23, 9)
    alone = [runs.run(config, STRICT, model.params, model.ids[:n], [n]).logits for n in lengths]
    rows = 12
    cache = init_cache(config, STRICT, batch=2, context=64, rows=rows)
    step, done = stepper(config), np.zeros(2, np.int32)
    got: list[list[np.ndarray]] = [[], []]
    for counts in ((12, 2), (5, 7), (6, 0)):
        tokens = np.zeros((2, rows), np.int32)
        for b, n in enumerate(counts):
            tokens[b, :n] = model.ids[done[b] : done[b] + n]
        logits, cache = step(model.params, jnp.asarray(tokens), cache, jnp.asarray(counts, jnp.int32))
        for b, n in enumerate(counts):
            got[b].append(np.asarray(logits)[b, :n])
        done += counts
    for b in range(2):
        np.testing.assert_array_equal(np.concatenate(got[b]), alone[b])


def test_two_runs_agree():
    model = golden.load("tiny_c")
    first = runs.run(model.config, STRICT, model.params, model.ids, [len(model.ids)])
    second = runs.run(model.config, STRICT, model.params, model.ids, [len(model.ids)])
    np.testing.assert_array_equal(first.logits, second.logits)


def test_capacities_do_not_change_bits():
    model = golden.load("tiny_c")
    pieces = runs.chunks(len(model.ids), (8,))
    small = runs.run(model.config, STRICT, model.params, model.ids, pieces, context=64)
    large = runs.run(model.config, STRICT, model.params, model.ids, pieces, context=3000)
    np.testing.assert_array_equal(small.logits, large.logits)


def test_a_rejected_row_leaves_no_trace():
    """Rows written beyond the committed length, even ones that completed a window, are invisible afterwards."""
    model = golden.load("tiny_c")
    config, ids = model.config, model.ids
    plain = runs.run(config, STRICT, model.params, ids[:24], [1] * 24, rows=4).logits
    cache = init_cache(config, STRICT, batch=1, context=64, rows=4)
    step, got, at = stepper(config), [], 0
    while at < 24:
        keep = min(1 + at % 4, 24 - at)
        tokens = np.full((1, 4), 5, np.int32)
        tokens[0, :keep] = ids[at : at + keep]
        logits, cache = step(model.params, jnp.asarray(tokens), cache, jnp.asarray([4], jnp.int32))
        got.append(np.asarray(logits)[0, :keep])
        at += keep
        cache = commit(cache, jnp.asarray([at], jnp.int32))
    np.testing.assert_array_equal(np.concatenate(got), plain)


def test_absent_rows_are_not_computed():
    calls = []

    def row(x):
        jax.debug.callback(lambda v: calls.append(float(v[0, 0])), x)
        return x * 2.0

    live = jnp.asarray([True, False, True])
    out = jax.jit(lambda x: map_rows(row, Live.of(live), x))(jnp.arange(6.0).reshape(3, 2))
    jax.effects_barrier()
    np.testing.assert_array_equal(np.asarray(out), [[0, 2], [0, 0], [8, 10]])
    assert sorted(calls) == [0.0, 4.0]


def test_every_forward_is_one_program_for_any_count():
    model = golden.load("tiny_c")
    step = stepper(model.config)
    before = step._cache_size()
    cache = init_cache(model.config, STRICT, batch=1, context=64, rows=3)
    for count in (1, 2, 3, 0):
        _, cache = step(model.params, jnp.zeros((1, 3), jnp.int32), cache, jnp.asarray([count], jnp.int32))
    assert step._cache_size() == before + 1
