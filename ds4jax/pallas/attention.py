"""Attention over the raw window and compressed rows: parts of the keys in parallel, then their combination.

The keys of a row are cut into parts of a fixed number of keys, counted from the oldest place of its own window and
from its first compressed row, so the result depends neither on capacities nor on other rows.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ds4jax.pallas.ptx import Instructions, dot_split, f32, i32, launch, load, next_power, store
from ds4jax.pallas.rows import part_size

# Part of the definition of the result.
HEADS = 16  # of a program: the fewest that tensor cores take
SELECTED_PART = 64  # keys of a part: many small ones where there are few keys
VISIBLE_PART = 128
FEATURES = 128  # of a step
STEP = 16  # parts that the combination takes at once


def _parts(
    ptx: Instructions,
    live: Any,
    q: Any,
    position: Any,
    sequence: Any,
    ids: Any,
    visible: Any,
    raw: Any,
    rows: Any,
    maximum: Any,
    total: Any,
    acc: Any,
    *,
    part: int,
    near: int,
    window: int,
    first: int,
) -> None:
    """One part of the keys of one row for a tile of heads: highest score, sum of exponentials, weighted values."""
    tile, split, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    heads, d = q.shape[1:]
    chunk = part_size(d, FEATURES)
    head = tile * HEADS + jnp.arange(HEADS, dtype=i32)
    within = head < heads
    offset = jnp.arange(part, dtype=i32)
    exists, newest, b = live[row], position[row], sequence[row]  # together: a load waits for those before a branch

    def attend(keys: Any, place: Array, seen: Array) -> None:
        def read(start: int) -> Array:
            feature = start + jnp.arange(chunk, dtype=i32)
            return load(keys, b, place[:, None], feature[None], mask=seen[:, None])

        scores = jnp.zeros((HEADS, part), f32)
        for start in range(0, d, chunk):
            feature = start + jnp.arange(chunk, dtype=i32)
            query = load(q, row, head[:, None], feature[None], mask=within[:, None])
            scores = scores + dot_split(query, lax.transpose(read(start), (1, 0)))
        scores = jnp.where(seen[None], scores * f32(1 / math.sqrt(d)), -jnp.inf)
        highest = jnp.max(scores, axis=1)
        weight = jnp.exp(scores - highest[:, None])
        store(maximum, highest, row, split, head, mask=within)
        store(total, jnp.sum(weight, axis=1), row, split, head, mask=within)
        for start in range(0, d, chunk):
            feature = start + jnp.arange(chunk, dtype=i32)
            fresh = dot_split(weight, read(start))
            store(acc, fresh, row, split, head[:, None], feature[None], mask=within[:, None])

    def nothing() -> None:
        store(maximum, jnp.full(HEADS, -jnp.inf, f32), row, split, head, mask=within)

    def among_window() -> None:
        at = split * part + offset
        there = newest - window + 1 + at
        seen = (at < window) & (there >= first)
        some = newest - window + jnp.minimum(split * part + part, window) >= first
        pl.when(some)(lambda: attend(raw, jnp.where(seen, there, 0) % raw.shape[1], seen))
        pl.when(jnp.logical_not(some))(nothing)

    def among_chosen() -> None:
        n, places = rows.shape[1], ids.shape[1]
        at = (split - near) * part + offset
        index = load(ids, row, jnp.minimum(at, places - 1))
        seen = (at < places) & (index < n)
        some = jnp.min(index) < n
        pl.when(some)(lambda: attend(rows, jnp.where(seen, index, 0), seen))
        pl.when(jnp.logical_not(some))(nothing)

    def among_visible() -> None:
        count, start = visible[row], (split - near) * part
        at = start + offset
        # The combination does not look at parts beyond the visible rows.
        pl.when(start < count)(lambda: attend(rows, at, at < count))

    @pl.when(exists != 0)
    def _() -> None:
        if rows is None:
            among_window()
        else:
            pl.when(split < near)(among_window)
            pl.when(split >= near)(among_visible if ids is None else among_chosen)


def _combine(
    ptx: Instructions,
    live: Any,
    visible: Any,
    sink: Any,
    maximum: Any,
    total: Any,
    acc: Any,
    out: Any,
    *,
    part: int,
    near: int,
    chunk: int,
) -> None:
    """Parts of one row and head, `STEP` at a time."""
    head, piece, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    capacity = maximum.shape[1]
    feature = piece * chunk + jnp.arange(chunk, dtype=i32)
    exists, sink_score = live[row], sink[head]
    count = jnp.int32(capacity) if visible is None else near + (visible[row] + part - 1) // part

    @pl.when(exists != 0)
    def _() -> None:
        every = jnp.arange(next_power(capacity), dtype=i32)
        peaks = load(maximum, row, every, head, mask=every < count)
        highest = jnp.maximum(jnp.max(jnp.where(every < count, peaks, -jnp.inf)), sink_score)

        def step(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            denominator, value = carry
            at = index * STEP + jnp.arange(STEP, dtype=i32)
            peak = jnp.where(at < count, load(maximum, row, at, head, mask=at < count), -jnp.inf)
            full = peak > -jnp.inf
            weight = jnp.where(full, jnp.exp(peak - highest), 0.0)
            denominator = denominator + jnp.sum(weight * load(total, row, at, head, mask=full))
            values = load(acc, row, at[:, None], head, feature[None], mask=full[:, None])
            return denominator, value + jnp.sum(weight[:, None] * values, axis=0)

        start = (jnp.exp(sink_score - highest), jnp.zeros(chunk, f32))
        denominator, value = lax.fori_loop(jnp.int32(0), (count + STEP - 1) // STEP, step, start)
        store(out, value / denominator, row, head, feature)


def attention(
    live: Array,
    q: Array,
    position: Array,
    sequence: Array,
    ids: Array | None,
    visible: Array | None,
    raw: Array,
    rows: Array | None,
    sink: Array,
    *,
    window: int,
    first: int,
    interpret: bool,
) -> Array:
    """Kernel of `ops.attention.attention`.

    Scores and values come from tensor cores: keys in float16 as they are, queries and softmax weights in two float16
    parts (`dot_split`); float32 keys are multiplied in float32.
    """
    count, heads, d = q.shape
    mask = live.astype(i32)
    part = VISIBLE_PART if rows is not None and ids is None else SELECTED_PART
    near = -(-window // part)
    more = 0 if rows is None else rows.shape[1] if ids is None else ids.shape[1]
    splits = near + -(-more // part)

    def parts(ptx: Instructions, *refs: Any) -> None:
        _parts(ptx, *refs, part=part, near=near, window=window, first=first)

    shapes = [(count, splits, heads), (count, splits, heads), (count, splits, heads, d)]
    maximum, total, acc = launch(
        parts,
        tuple(jax.ShapeDtypeStruct(shape, f32) for shape in shapes),
        (-(-heads // HEADS), splits, count),
        mask,
        q,
        position,
        sequence,
        ids,
        visible,
        raw,
        rows,
        name="attention_parts",
        warps=part // 16,
        interpret=interpret,
    )
    chunk = part_size(d, FEATURES)

    def combine(ptx: Instructions, *refs: Any) -> None:
        _combine(ptx, *refs, part=part, near=near, chunk=chunk)

    return launch(
        combine,
        jax.ShapeDtypeStruct(q.shape, f32),
        (heads, d // chunk, count),
        mask,
        None if ids is not None else visible,
        sink,
        maximum,
        total,
        acc,
        name="attention",
        warps=2,
        interpret=interpret,
    )
