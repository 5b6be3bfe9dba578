"""The indexer: queries on their grid, scores of all visible rows, and the exact best of them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ds4jax.pallas.fp4 import fp4_round_trip, hadamard
from ds4jax.pallas.ptx import Instructions, f32, i32, launch, load, next_power, split_f16, store
from ds4jax.pallas.rope import angles, partner_of, turn
from ds4jax.pallas.rows import LOWEST, ordered

KEYS = 128  # rows that a program scores
CHUNK = 4096  # candidates of which a program selects the best, unless they are fewer than two lists
HIGHEST = 2**31 - 1
NEAR = 2**25  # keys of positive scores within a factor of 16: mostly the best are so near the highest


def _query(
    ptx: Instructions, live: Any, visible: Any, q: Any, cos: Any, sin: Any, out: Any, *, simulate: bool, top_k: int
) -> None:
    """One head of one row (`ops.attention.index_query`), unless all that it sees is chosen."""
    head, row = pl.program_id(0), pl.program_id(1)
    width, size = q.shape[2], out.shape[2]
    tail = width - 2 * cos.shape[1]
    exists, length = live[row], visible[row]
    place = jnp.arange(size, dtype=i32)
    inside, offset = place < width, place - tail
    rotated = inside & (offset >= 0)
    y = load(q, row, head, place, mask=inside)
    partner = load(q, row, head, partner_of(place, offset), mask=rotated)
    c, s = angles(cos, sin, row, offset)
    ptx.fence()

    @pl.when((exists != 0) & (length > top_k))
    def _() -> None:
        turned = jnp.where(rotated, turn(y, partner, c, s), y)
        done = fp4_round_trip(ptx, hadamard(turned)).astype(out.dtype) if simulate else turned
        store(out, done, row, head, place)


def _scores(
    ptx: Instructions,
    live: Any,
    q: Any,
    weights: Any,
    sequence: Any,
    visible: Any,
    rows: Any,
    out: Any,
    *,
    scale: float,
    top_k: int,
) -> None:
    """Scores of `KEYS` rows for one query, unless all that it sees is chosen; of invisible rows none, or any."""
    row, start = pl.program_id(0), pl.program_id(1) * KEYS
    heads, size = weights.shape[1], q.shape[2]
    head = jnp.arange(max(next_power(heads), 16), dtype=i32)
    feature = jnp.arange(size, dtype=i32)
    exists, length, b = live[row], visible[row], sequence[row]
    weight = load(weights, row, head, mask=head < heads) * jnp.float32(scale)
    ptx.fence()

    @pl.when((exists != 0) & (start < length) & (length > top_k))
    def _() -> None:
        at = start + jnp.arange(KEYS, dtype=i32)
        there = (at < rows.shape[1])[:, None] & (feature < rows.shape[2])[None]
        query = load(q, row, head[None], feature[:, None], mask=(head < heads)[None])
        keys = load(rows, b, at[:, None], feature[None], mask=there)
        if q.dtype == jnp.bfloat16:
            dots = jnp.dot(keys.astype(jnp.bfloat16), query, preferred_element_type=f32)
        elif keys.dtype == jnp.float16:
            high, low = split_f16(query)
            dots = jnp.dot(keys, high, preferred_element_type=f32)
            dots = dots + jnp.dot(keys, low, preferred_element_type=f32) * 2.0**-11
        else:
            dots = jnp.dot(keys, query, precision=lax.Precision.HIGHEST)
        store(out, ptx.tree_sum(weight[None] * jnp.maximum(dots, 0.0)), row, at, mask=at < rows.shape[1])


def _reaching(key: Array, threshold: Any) -> Array:
    """The number of keys >= -1 that are not below a threshold > 0.

    By the signs of differences, an instruction to subtract and one to shift and add; a comparison takes three, in turn.
    """
    return -jnp.sum((threshold - 1 - key) >> 31)


def _range(key: Array, total: Array, top_k: int) -> tuple[Array, Array, Array, Array]:
    """Where to search for the `top_k`-th of `total` keys, of which the highest is `HIGHEST`; others are `LOWEST`.

    Returns:
        Keys of at least -1, in the same order as far as they are in the range, less below it, the highest above it; its
        first key, 0 or more; how many reach it, at least `top_k` if there are so many; and the bit that halves it.
    """
    upper = jnp.maximum(key, -1)
    found = _reaching(upper, HIGHEST - NEAR + 1)
    near = found >= top_k

    def anywhere() -> tuple[Array, Array]:
        positive, lower = jnp.sum((key >= 0).astype(i32)), jnp.where(key < 0, (key & HIGHEST) - 1, HIGHEST)
        enough = positive >= top_k
        return jnp.where(enough, upper, lower), jnp.where(enough, positive, total)

    key, count = lax.cond(near, lambda: (upper, found), anywhere)
    near = near.astype(i32)  # Triton does not take a choice between two constants
    return key, near * (HIGHEST - NEAR + 1), count, near * (NEAR.bit_length() - 2) + (1 - near) * 30


def _select(
    ptx: Instructions,
    live: Any,
    visible: Any,
    scores: Any,
    ids: Any,
    best: Any,
    best_scores: Any,
    *,
    level: int,
    chunk: int,
    size: int,
    top_k: int,
    empty: int,
) -> None:
    """The `top_k` best of a `chunk` in ascending order, the lower index first among equal scores.

    The k-th largest key is found bit by bit, from the number of keys that are not below a candidate.
    """
    part, row = pl.program_id(0), pl.program_id(1)
    at = part * chunk + jnp.arange(size, dtype=i32)
    inside = at < scores.shape[1]
    exists, length = live[row], visible[row]
    score = load(scores, row, at, mask=inside)
    index = at if ids is None else load(ids, row, at, mask=inside)
    ptx.fence()
    for _level in range(level):  # the best of a chunk fill a list, but for those of the last chunk
        length = length // chunk * top_k + jnp.minimum(length % chunk, top_k)

    @pl.when((exists != 0) & (part == 0) & (length <= top_k))
    def _() -> None:
        store(best, jnp.where(at < length, index, empty), row, at, mask=at < top_k)  # scores are not asked for again

    @pl.when((exists != 0) & (part * chunk < length) & (length > top_k))
    def _() -> None:
        valid = at < length
        key = jnp.where(valid, ordered(score), LOWEST)
        key = jnp.where(valid, key + (HIGHEST - jnp.max(key)), LOWEST)  # distances stay
        key, low, count, bit = _range(key, jnp.minimum(length - part * chunk, size), top_k)

        def bisect(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            bit, low, count = state
            candidate = low + (jnp.int32(1) << bit)
            found = _reaching(key, candidate)
            enough = found >= top_k
            return bit - 1, jnp.where(enough, candidate, low), jnp.where(enough, found, count)

        def undecided(state: tuple[Array, Array, Array]) -> Array:
            return (state[0] >= 0) & (state[2] > top_k)

        _, low, count = lax.while_loop(undecided, bisect, (bit, low, count))

        def first_of_equal() -> Array:
            above, equal = key > low, key == low
            wanted = top_k - jnp.sum(above.astype(i32))
            return (above | (equal & (jnp.cumsum(equal.astype(i32)) <= wanted))).astype(i32)

        chosen = lax.cond(count > top_k, first_of_equal, lambda: (key >= low).astype(i32))
        rank = jnp.cumsum(chosen) - 1
        # The others behind them: the interpreter writes every place, where masked what it holds.
        slot = jnp.where(chosen != 0, rank, top_k + jnp.arange(size, dtype=i32) - rank)
        store(best, index, row, part * top_k + slot, mask=slot < top_k)
        if best_scores is not None:
            store(best_scores, score, row, part * top_k + slot, mask=slot < top_k)


def select(live: Array, visible: Array, scores: Array, *, top_k: int, interpret: bool) -> Array:
    """Indices of the `top_k` best of the first `visible` scores `[T, n]`, ascending, then n in unused places.

    A tournament: the best of every chunk of `CHUNK` candidates, then the best of those, until one chunk is left.
    """
    chunk = max(CHUNK, next_power(2 * top_k))  # a round at least halves the candidates
    total, n = scores.shape
    ids, length, level = None, n, 0
    while True:
        parts = -(-length // chunk)
        size = min(chunk, next_power(length))
        settings = {"level": level, "chunk": chunk, "size": size, "top_k": top_k, "empty": n}
        slots = (total, parts * top_k)
        shapes = (jax.ShapeDtypeStruct(slots, i32), jax.ShapeDtypeStruct(slots, f32))

        def kernel(ptx: Instructions, *refs: Any, settings: dict[str, int] = settings, last: bool = parts == 1) -> None:
            _select(ptx, *refs, *([None] if last else []), **settings)

        best = launch(
            kernel,
            shapes[:1] if parts == 1 else shapes,
            (parts, total),
            live,
            visible,
            scores,
            ids,
            name="indexer_select",
            warps=8,
            interpret=interpret,
        )
        if parts == 1:
            return best[0]
        (ids, scores), length, level = best, parts * top_k, level + 1


def indexer(
    live: Array,
    q: Array,
    cos: Array,
    sin: Array,
    weights: Array,
    sequence: Array,
    visible: Array,
    rows: Array,
    *,
    top_k: int,
    simulate: bool,
    interpret: bool,
) -> Array:
    """Kernel of `ops.attention.indexer`.

    Values on the FP4 grid are exact in bfloat16, their products and, unless the scales of a row's blocks are more than
    2^9 apart, the sums of a dot product in float32: scores then have the bits of the reference. Queries that are not
    simulated must be below 65504; with float16 rows they are represented within max(2^-22 |q|, 2^-36).
    """
    total, heads, width = q.shape
    n, size, mask = rows.shape[1], max(next_power(width), 16), live.astype(i32)
    top_k = min(top_k, n)

    def query(ptx: Instructions, *refs: Any) -> None:
        _query(ptx, *refs, simulate=simulate, top_k=top_k)

    prepared = launch(
        query,
        jax.ShapeDtypeStruct((total, heads, size), jnp.bfloat16 if simulate else f32),
        (heads, total),
        mask,
        visible,
        q,
        cos,
        sin,
        name="indexer_query",
        warps=1,
        interpret=interpret,
    )

    def score(ptx: Instructions, *refs: Any) -> None:
        _scores(ptx, *refs, scale=1 / math.sqrt(heads * width), top_k=top_k)

    scores = launch(
        score,
        jax.ShapeDtypeStruct((total, n), f32),
        (total, -(-n // KEYS)),
        mask,
        prepared,
        weights,
        sequence,
        visible,
        rows,
        name="indexer_scores",
        warps=4,
        interpret=interpret,
    )
    return select(mask, visible, scores, top_k=top_k, interpret=interpret)
