"""Attention over the raw window and compressed rows: parts of the keys in parallel, then their combination.

The keys of a row are cut into parts, counted from the oldest place of its own window and from its first compressed
row, so the result depends neither on capacities nor on other rows. A part is one step of `PART` keys; if a row sees
more than `MOST` times as many compressed rows, a part of them is as many steps as it takes.

A program is one chain of waits: what it is told, then the keys, then scores, their maximum, weights and values. All
keys of a step are on their way before the first is used, and serve scores and values.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ds4jax.pallas.ptx import (
    STACK,
    Instructions,
    dot_stacked,
    f32,
    i32,
    launch,
    load,
    next_power,
    stack_f16,
    stacked,
    store,
)
from ds4jax.pallas.rows import ROWS, part_size, when_live

# Part of the definition of the result.
HEADS = 8  # of a program: the fewest that tensor cores take (`dot_stacked`)
LISTED_HEADS = 16  # of a program where rows are listed: so many keys are better read for more heads at a time
PART = 32  # keys of a step: the fewest that give each of four warps a tile of scores
MOST = 32  # parts of the compressed rows
FEATURES = 128  # of a tile
STEP = 16  # parts that the combination takes at once

WORKSPACE = 1 << 26  # bytes of partial results at a time, unless one row needs more

State = tuple[Array, Array, list[Array]]
"""Of some keys: highest score and sum of exponentials `[group]`, weighted values by tiles `[group, chunk]`."""


def steps_of(visible: Array) -> Array:
    """Steps of a part of the compressed rows."""
    return jnp.maximum((visible + PART * MOST - 1) // (PART * MOST), 1)


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
    group: int,
    near: int,
    window: int,
    first: int,
) -> None:
    """One part of the keys of one row for `group` heads; a part without keys has no highest score."""
    tile, split, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    heads, d = q.shape[1:]
    chunk = part_size(d, FEATURES)
    features = [start + jnp.arange(chunk, dtype=i32) for start in range(0, d, chunk)]
    head, each = tile * group + jnp.arange(group, dtype=i32), tile * group + stacked(group)
    within, key = head < heads, jnp.arange(PART, dtype=i32)
    # What the addresses of keys depend on, and the queries.
    exists, newest, b = live[row] != 0, position[row], sequence[row]
    count = None if visible is None else visible[row]
    listed = (split - near) * PART + key
    index = None if ids is None else load(ids, row, jnp.clip(listed, 0, ids.shape[1] - 1))
    query = [load(q, row, each[:, None], f[None], mask=(each < heads)[:, None]) for f in features]
    ptx.fence()
    query = [stack_f16(part, raw.dtype) for part in query]
    # Always so, but in a branch, or the compiler would have every warp split the queries.
    wanted, steps, end = tile * group < heads, jnp.int32(1), jnp.int32(1)
    if count is not None:
        steps = steps_of(count)
        begin = (split - near) * steps
        wanted &= exists & (begin * PART < count)
        end = jnp.where(split < near, 1, jnp.minimum(steps, (count + PART - 1) // PART - begin))
    elif live.shape[0] > ROWS:
        wanted &= exists

    def read(keys: Any, place: Array, seen: Array) -> list[Array]:
        tiles = [load(keys, b, place[:, None], f[None], mask=seen[:, None]) for f in features]
        ptx.fence()
        return tiles

    def keys_of(step: Array) -> tuple[list[Array], Array]:
        """Keys of a step, zeros where there are none, and where there are."""
        number = (split - near) * steps + step  # among the steps of compressed rows; below zero in the window
        there = newest - window + 1 + split * PART + key
        seen = exists & (there >= first) & (there <= newest)
        place = jnp.where(seen, there, 0) % raw.shape[1]
        if rows is None:
            nothing = [jnp.zeros((PART, chunk), raw.dtype) for _ in features]
            return lax.cond(number < 0, lambda: read(raw, place, seen), lambda: nothing), seen
        if index is not None:
            at, known = index, exists & (listed < ids.shape[1]) & (index < rows.shape[1])
        else:
            at = number * PART + key
            known = exists & (at < count)
        seen, at = jnp.where(number < 0, seen, known), jnp.where(known, at, 0)
        return lax.cond(number < 0, lambda: read(raw, place, seen), lambda: read(rows, at, seen)), seen

    def attend(step: Array) -> State:
        keys, seen = keys_of(step)
        scores = sum(dot_stacked(part, lax.transpose(k, (1, 0))) for part, k in zip(query, keys, strict=True))
        scores = jnp.where(seen[None], scores * f32(1 / math.sqrt(d)), -jnp.inf)
        highest = jnp.max(scores, axis=1)
        weight = jnp.exp(scores - highest[:, None])
        both = jnp.broadcast_to(weight.reshape(-1, 1, STACK, PART), (group // STACK, 2, STACK, PART))
        both = stack_f16(both.reshape(2 * group, PART), raw.dtype)
        return highest, jnp.sum(weight, axis=1), [dot_stacked(both, k) for k in keys]

    def add(step: Array, old: State) -> State:
        fresh = attend(step)
        highest = jnp.maximum(old[0], fresh[0])
        left, right = jnp.exp(old[0] - highest), jnp.exp(fresh[0] - highest)
        values = [u * left[:, None] + v * right[:, None] for u, v in zip(old[2], fresh[2], strict=True)]
        return highest, old[1] * left + fresh[1] * right, values

    @pl.when(wanted)
    def _() -> None:
        if visible is None:
            highest, sums, values = attend(jnp.int32(0))
        else:
            nothing = [jnp.zeros((group, chunk), f32) for _ in features]
            start = (jnp.full(group, -jnp.inf, f32), jnp.zeros(group, f32), nothing)
            highest, sums, values = lax.fori_loop(jnp.int32(0), end, add, start)
        store(maximum, highest, row, head, split, mask=within)
        store(total, sums, row, head, split, mask=within)
        for f, value in zip(features, values, strict=True):
            store(acc, value, row, split, head[:, None], f[None], mask=within[:, None])


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
    near: int,
    chunk: int,
) -> None:
    """Parts of one row and head: those of the window, then the others, `STEP` at a time."""
    head, piece, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    feature = piece * chunk + jnp.arange(chunk, dtype=i32)
    far = maximum.shape[2] - near
    if visible is not None:
        span = PART * steps_of(visible[row])
        far = jnp.clip((visible[row] + span - 1) // span, 0, far)  # of a row that does not exist, anything

    def add(state: tuple[Array, Array, Array], start: Any, size: int, end: Any) -> tuple[Array, Array, Array]:
        before, denominator, value = state
        at = start + jnp.arange(size, dtype=i32)
        there = at < end
        peak = jnp.where(there, load(maximum, row, head, at, mask=there), -jnp.inf)
        sums = load(total, row, head, at, mask=there)
        values = load(acc, row, at[:, None], head, feature[None], mask=there[:, None])
        highest = jnp.maximum(before, jnp.max(peak))
        weight, old = jnp.exp(peak - highest), jnp.exp(before - highest)
        full = peak > -jnp.inf  # a part without keys has no sums
        denominator = denominator * old + jnp.sum(jnp.where(full, weight * sums, 0.0))
        fresh = jnp.sum(jnp.where(full[:, None], weight[:, None] * values, 0.0), axis=0)
        return highest, denominator, value * old + fresh

    @when_live(live, row)
    def _() -> None:
        state = add((sink[head], f32(1.0), jnp.zeros(chunk, f32)), 0, next_power(near), near)
        groups = (far + STEP - 1) // STEP
        state = lax.fori_loop(0, groups, lambda i, s: add(s, near + i * STEP, STEP, near + far), state)
        _, denominator, value = state
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
    parts (`dot_stacked`); float32 keys are multiplied in float32. Many rows take turns in one `WORKSPACE`.
    """
    heads, d = q.shape[1:]
    group = HEADS if ids is None else LISTED_HEADS
    near, chunk = -(-window // PART), part_size(d, FEATURES)
    if ids is not None:
        splits = near + -(-ids.shape[1] // PART)
    else:
        splits = near + (0 if rows is None else min(-(-rows.shape[1] // PART), MOST))

    def parts(ptx: Instructions, *refs: Any) -> None:
        _parts(ptx, *refs, group=group, near=near, window=window, first=first)

    def combine(ptx: Instructions, *refs: Any) -> None:
        _combine(ptx, *refs, near=near, chunk=chunk)

    def run(live: Array, q: Array, position: Array, sequence: Array, ids: Any, visible: Any) -> Array:
        total = live.shape[0]
        shapes = (total, heads, splits), (total, heads, splits), (total, splits, heads, d)
        partial = launch(
            parts,
            tuple(jax.ShapeDtypeStruct(shape, f32) for shape in shapes),
            (-(-heads // group), splits, total),
            live,
            q,
            position,
            sequence,
            ids,
            visible,
            raw,
            rows,
            name="attention_parts",
            warps=4,
            interpret=interpret,
        )
        return launch(
            combine,
            jax.ShapeDtypeStruct(q.shape, f32),
            (heads, d // chunk, total),
            live,
            visible,
            sink,
            *partial,
            name="attention",
            warps=1,
            interpret=interpret,
        )

    args = (live.astype(i32), q, position, sequence, ids, None if ids is not None else visible)
    total = len(live)
    turns = -(-total // max(WORKSPACE // (splits * heads * d * 4), 1))
    if turns == 1:
        return run(*args)
    size = -(-total // turns)

    def turn(index: Array, out: Array) -> Array:
        start = jnp.minimum(index * size, total - size)  # the last may repeat rows
        rows = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size), args)
        return lax.dynamic_update_slice_in_dim(out, run(*rows), start, 0)

    return lax.fori_loop(0, turns, turn, jnp.zeros(q.shape, f32))
