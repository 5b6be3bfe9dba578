"""Strict numerics on the XLA path: a row's bits depend on its own past alone."""

import dataclasses
import functools
import os
import subprocess
import sys

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

    return jax.jit(step, compiler_options=STRICT.compiler_options)


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


def test_rejected_rows_leave_no_trace():
    """Every count of kept rows at every phase of every window: logits and visible state as if never written.

    Four rows are evaluated, of which the last ones are wrong and not committed, even if they completed a window. The
    rings hold exactly what the widest call needs.
    """
    model = golden.load("tiny_c")
    config, ids, step = model.config, model.ids, stepper(model.config)

    def feed(cache, tokens):
        padded = np.full((1, 4), 5, np.int32)
        padded[0, : len(tokens)] = tokens
        return step(model.params, jnp.asarray(padded), cache, jnp.asarray([len(tokens)], jnp.int32))

    serial, expected = [init_cache(config, STRICT, batch=1, context=64, rows=4)], []
    for token in ids[:32]:
        logits, cache = feed(serial[-1], [token])
        serial.append(cache)
        expected.append(np.asarray(logits)[0, 0])
    period = max(config.compress_ratios)
    for start in range(2 * period, 3 * period):
        for kept in range(1, 5):
            wrong = (ids[start + kept : start + 4] + 7) % config.vocab_size
            logits, cache = feed(serial[start], [*ids[start : start + kept], *wrong])
            np.testing.assert_array_equal(np.asarray(logits)[0, :kept], expected[start : start + kept])
            length = start + kept
            cache = commit(cache, jnp.asarray([length], jnp.int32))
            both = zip(visible(cache, config, length), visible(serial[length], config, length), strict=True)
            for got, want in both:
                np.testing.assert_array_equal(got, want, err_msg=f"start {start}, kept {kept}")
            again, _ = feed(cache, ids[length : length + 4])
            np.testing.assert_array_equal(np.asarray(again)[0], expected[length : length + 4])


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


AS_USERS_RUN_IT = """
import numpy as np
import ds4jax

text = "The Fox said to the Crow, \'How well you look to-day: how glossy your feathers; how bright your eye.\'"
scores = [ds4jax.load(context=128, chunk=chunk).logprobs(text) for chunk in (8, 3)]
np.testing.assert_array_equal(*scores)
print(len(scores[0]), "equal")
"""


def test_quantised_weights_and_the_users_own_machine_code():
    """The demonstration model in two chunk sizes, without this suite's restriction to instructions without FMA."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run([sys.executable, "-c", AS_USERS_RUN_IT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("equal\n")
