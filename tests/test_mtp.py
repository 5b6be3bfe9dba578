"""The multi-token-prediction block against golden vectors and llama.cpp: rows, streams, logits, chained drafts."""

from __future__ import annotations

import functools
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import QUICK
from runs import empty_cache

from ds4jax.config import ModelConfig, Numerics
from ds4jax.model.cache import Cache
from ds4jax.model.transformer import DeepSeekV4
from ds4jax.ops.rope import rope_frequencies, rope_table, rotate

TOLERANCE = 1e-4
ROWS = pytest.mark.parametrize("rows", ["loop", "batch"])
GOLDEN = golden.load("tiny_a", mtp=True)


def close(got, want, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=tolerance)


@functools.cache
def method(config: ModelConfig, numerics: Numerics, name: str) -> Any:
    model = DeepSeekV4(config, numerics)
    return jax.jit(
        lambda params, *arguments: model.apply({"params": params}, *arguments, method=name),
        compiler_options=numerics.compiler_options,
    )


class Block:
    """One sequence's MTP block, fed with pairs in calls of `rows` rows; `position` is that of the next token."""

    def __init__(self, config: ModelConfig, params: Any, numerics: Numerics, rows: int, context: int) -> None:
        self.config, self.params, self.numerics, self.rows = config, params, numerics, rows
        self.cache: Cache = empty_cache(config, numerics, context, rows)
        self.position = 1

    def _call(self, name: str, tokens: np.ndarray, streams: np.ndarray) -> Any:
        count, shape = len(tokens), (1, self.rows, *streams.shape[1:])
        padded, pairs = np.zeros((1, self.rows), np.int32), np.full(shape, np.nan, np.float32)
        padded[0, :count], pairs[0, :count] = tokens, streams
        start, live = jnp.asarray([self.position], jnp.int32), jnp.asarray([count], jnp.int32)
        self.position += count
        call = method(self.config, self.numerics, name)
        return call(self.params, jnp.asarray(padded), jnp.asarray(pairs), self.cache, start, live)

    def draft(self, tokens: np.ndarray, streams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits [T, V] and the block's own streams [T, H, D]."""
        logits, out, self.cache = self._call("draft", tokens, streams)
        return np.asarray(logits)[0, : len(tokens)], np.asarray(out)[0, : len(tokens)]

    def prefill(self, tokens: np.ndarray, streams: np.ndarray) -> None:
        self.cache = self._call("draft_prefill", tokens, streams)

    def raw(self, positions: np.ndarray) -> np.ndarray:
        """Stored rows of the given positions [n, d]."""
        assert self.cache.mtp is not None
        ring = np.asarray(self.cache.mtp.raw)[0]
        return ring[positions % len(ring)]


def block(rows: str, width: int = 7) -> Block:
    return Block(GOLDEN.config, GOLDEN.params, QUICK.replace(rows=rows), width, 48)


def pairs(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and the trunk's recorded streams of rows first .. last - 1."""
    return GOLDEN.arrays["mtp/pair_ids"][first:last], GOLDEN.arrays["final_streams"][first:last]


def feed(target: Block, sizes: tuple[int, ...], last: int = 41) -> tuple[np.ndarray, np.ndarray]:
    """Drafts rows 0 .. last - 1 in calls of the given sizes, repeated."""
    results, done, turn = [], 0, 0
    while done < last:
        size = min(sizes[turn % len(sizes)], last - done)
        results.append(target.draft(*pairs(done, done + size)))
        done, turn = done + size, turn + 1
    return np.concatenate([r[0] for r in results]), np.concatenate([r[1] for r in results])


# ---------------------------------------------------------------------------------------------- golden vectors


@ROWS
@pytest.mark.parametrize("sizes", [(7,), (7, 1, 5, 1)], ids=["full", "odd"])
def test_every_pair(rows, sizes):
    logits, streams = feed(block(rows), sizes)
    close(logits, GOLDEN.arrays["mtp/logits"])
    close(streams, GOLDEN.arrays["mtp/out_streams"])


@ROWS
def test_stored_rows(rows):
    """A row belongs to its token's position, one beyond that of the recorded pair: one more step of rotation."""
    target = block(rows)
    feed(target, (7,))
    frequencies = jnp.asarray(rope_frequencies(GOLDEN.config, compressed=False))
    recorded = jnp.asarray(GOLDEN.arrays["mtp/kv"])
    want = np.asarray(rotate(recorded, *rope_table(jnp.ones(len(recorded), jnp.int32), frequencies)))
    kept = np.arange(41 - GOLDEN.config.sliding_window, 41)
    close(target.raw(kept + 1), want[kept])


@ROWS
def test_chained_drafts(rows):
    """The second draft takes the block's own streams and the next position."""
    target = block(rows)
    feed(target, (7,))
    token = GOLDEN.arrays["mtp/chain_first"]
    assert token == GOLDEN.arrays["logits"][-1].argmax()
    logits, streams = target.draft(token[None], GOLDEN.arrays["final_streams"][41:])
    close(logits[0], GOLDEN.arrays["mtp/chain_logits1"])
    close(streams[0], GOLDEN.arrays["mtp/chain_streams1"])
    assert logits[0].argmax() == GOLDEN.arrays["mtp/chain_d1"]
    logits, _ = target.draft(logits.argmax(1), streams)
    close(logits[0], GOLDEN.arrays["mtp/chain_logits2"])
    assert logits[0].argmax() == GOLDEN.arrays["mtp/chain_d2"]


@ROWS
def test_prefill_stores_what_drafting_stores(rows):
    """Only the last window of pairs, without running the block: the next drafts cannot tell the difference."""
    full, cheap = block(rows), block(rows)
    feed(full, (7,), last=35)
    window = GOLDEN.config.sliding_window
    cheap.position += 35 - window
    for first in range(35 - window, 35, 7):
        cheap.prefill(*pairs(first, min(first + 7, 35)))
    kept = np.arange(35 - window, 35) + 1
    close(cheap.raw(kept), full.raw(kept), 1e-6)
    logits, streams = cheap.draft(*pairs(35, 41))
    close(logits, GOLDEN.arrays["mtp/logits"][35:])
    close(streams, GOLDEN.arrays["mtp/out_streams"][35:])


def test_positions_are_relative():
    """Every row moved by the same distance: nothing changes once the window holds only moved rows."""
    target, full = block("batch"), GOLDEN.config.sliding_window - 1
    target.position = 1000
    logits, _ = feed(target, (7,))
    close(logits[full:], GOLDEN.arrays["mtp/logits"][full:])


# --------------------------------------------------------------------------------------------------- llama.cpp


@pytest.mark.parametrize(
    "main, mtp, recorded, length",
    [
        ("tiny-f32", "tiny-f32-mtp", "tiny-f32-mtp", 40),
        ("tiny-f32", "tiny-f32-mtp-ds4", "tiny-f32-mtp", 200),
        ("tiny-q", "tiny-q-mtp-ds4", "tiny-q-mtp-deq", 40),
    ],
)
def test_llama_cpp(main, mtp, recorded, length):
    """Both namings of the file; recorded streams go in, so that only the block is on trial. Three chained drafts."""
    config, params = golden.oracle(main, mtp)
    arrays = golden.read(f"oracle/logits_{recorded}.npz")
    tokens = arrays[f"tokens_{length}"]
    streams = arrays[f"streams_{length}"].reshape(length, config.hc_mult, config.hidden_size)
    target = Block(config, params, QUICK.replace(rows="batch"), 40, length + 4)
    logits, out = [], np.zeros(0)
    for first in range(0, length - 1, 40):
        last = min(first + 40, length - 1)
        result, out = target.draft(tokens[first + 1 : last + 1], streams[first:last])
        logits.append(result)
        close(out.reshape(last - first, -1), arrays[f"mtp_streams_{length}"][first:last], 1e-3)
    got, want = np.concatenate(logits), arrays[f"mtp_logits_{length}"]
    close(got, want, 1e-3)
    np.testing.assert_array_equal(got.argmax(1), want.argmax(1))
    drafted, hidden = got[-1:].argmax(1), out[-1:]
    for step in range(3):
        assert drafted[0] == arrays[f"draft_ids_{length}"][step]
        result, hidden = target.draft(drafted, hidden)
        close(result[0], arrays[f"draft_logits_{length}"][step], 1e-3)
        drafted = result.argmax(1)
