"""Attention over the raw window and compressed rows: parts of the keys in parallel, then their combination.

The keys of a row are cut into parts, counted from the oldest place of its own window and from its first compressed
row, so the result depends neither on capacities nor on other rows. A part is one step of `PART` keys; if a row sees
more than `MOST` times as many compressed rows, a part of them is as many steps as it takes.

A program is one chain of waits: what it is told, then the keys, then scores, their maximum, weights and values. All
keys of a step are on their way before the first is used, and serve scores and values.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ds4jax.activation import Q8, Activation
from ds4jax.pallas.norm import row_shapes
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
from ds4jax.pallas.quantise import quantise, store_q8
from ds4jax.pallas.rope import angles, swapped, turn
from ds4jax.pallas.rows import ROWS, part_size, when_live

HEADS = 8  # of a program: the fewest that tensor cores take (`dot_stacked`)
LISTED_HEADS = 16  # of a program where rows are listed: so many keys are better read for more heads at a time

# The definition of the result: which scores and values are added up first. The order within a tile is the compiler's,
# for which the number of heads may count too.
PART = 32  # keys of a step: the fewest that give each of four warps a tile of scores
MOST = 32  # parts of the compressed rows
FEATURES = 128  # of a tile
LISTED_FIRST, FIRST = 16, 4  # parts of compressed rows that the combination takes with those of the window
STEP = 32  # parts that it takes at once after those

WORKSPACE = 1 << 26  # bytes of partial results at a time, unless one row needs more

State = tuple[Array, Array, list[Array]]
"""Of some keys: highest score and sum of exponentials `[group]`, weighted values by tiles `[group, chunk]`."""

Combined = tuple[Array, Array, Array]
"""Of the parts of one head so far: the same as scalars, and some features `[chunk]`."""


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
    cos: Any,
    sin: Any,
    maximum: Any,
    total: Any,
    acc: Any,
    out: Any,
    *codes: Any,
    near: int,
    groups: int,
    chunk: int,
) -> None:
    """Some features of one row and head: its parts added up, rotated back, and their codes.

    Parts of the window and the first of the compressed rows are read in one wait, before it is known how many there
    are.
    """
    head, piece, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    heads, splits = maximum.shape[1:]
    depth, per_group = acc.shape[3], heads // groups
    feature, tail = piece * chunk + jnp.arange(chunk, dtype=i32), depth - 2 * cos.shape[1]

    @when_live(live, row)
    def _() -> None:
        count = None if visible is None else visible[row]

        def exists(part: Array) -> Array:
            there = part < splits  # more are visible only to a row that does not exist
            return there if count is None else there & ((part - near) * PART * steps_of(count) < count)

        def add(state: Combined, *parts: tuple[Array, Array, Array]) -> Combined:
            """Adds parts: their numbers, which of them can be read, and which there are."""
            values = [
                load(acc, row, part[:, None], head, feature[None], mask=mask[:, None], early=True)
                for part, mask, _ in parts
            ]
            # Maxima last: as nothing can be computed without them, no load is put off until registers are free.
            sums, peaks = (
                [load(ref, row, head, part, mask=mask, early=True) for part, mask, _ in parts]
                for ref in (total, maximum)
            )
            peaks = [jnp.where(there, peak, -jnp.inf) for peak, (_, _, there) in zip(peaks, parts, strict=True)]
            before, denominator, value = state
            highest = functools.reduce(jnp.maximum, map(jnp.max, peaks), before)
            old = jnp.exp(before - highest)
            denominator, value = denominator * old, value * old
            for peak, some, tile in zip(peaks, sums, values, strict=True):
                weight, full = jnp.exp(peak - highest), peak > -jnp.inf  # a part without keys has no sums
                denominator += jnp.sum(jnp.where(full, weight * some, 0.0))
                value += jnp.sum(jnp.where(full[:, None], weight[:, None] * tile, 0.0), axis=0)
            return highest, denominator, value

        factors = angles(cos, sin, row, feature - tail, inverse=True)
        window = jnp.arange(next_power(near), dtype=i32)
        known = [(window, window < near, window < near)]
        begin = near + (LISTED_FIRST if visible is None else FIRST)
        if splits > near:
            part = jnp.arange(near, begin, dtype=i32)
            known.append((part, part < splits, exists(part)))
        state = add((sink[head], f32(1.0), jnp.zeros(chunk, f32)), *known)
        if splits > begin:

            def step(index: Array, state: Combined) -> Combined:
                part = begin + index * STEP + jnp.arange(STEP, dtype=i32)
                return add(state, (part, exists(part), exists(part)))

            most = jnp.int32(-(-(splits - begin) // STEP))
            steps = jnp.where(exists(jnp.int32(begin)), most, jnp.int32(0))
            state = lax.fori_loop(0, steps, step, state)
        _, denominator, value = state
        y = value / denominator
        y = jnp.where(feature >= tail, turn(y, swapped(y), *factors), y)
        group, place = row * groups + head // per_group, head % per_group * depth + piece * chunk
        store(out, y, group, pl.ds(place, chunk))
        if codes:
            store_q8(ptx, codes[0], codes[1], y, group, place // 32)


def attention(
    live: Array,
    q: Array,
    cos: Array,
    sin: Array,
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
    groups: int,
    act: str,
    interpret: bool,
) -> Activation:
    """Kernel of `ops.attention.attention`.

    Scores and values come from tensor cores: keys in float16 as they are, queries and softmax weights in two float16
    parts (`dot_stacked`); float32 keys are multiplied in float32. Many rows take turns in one `WORKSPACE`.
    """
    heads, d = q.shape[1:]
    group = HEADS if ids is None else LISTED_HEADS
    near, chunk, width = -(-window // PART), part_size(d, FEATURES), heads * d // groups
    if ids is not None:
        splits = near + -(-ids.shape[1] // PART)
    else:
        splits = near + (0 if rows is None else min(-(-rows.shape[1] // PART), MOST))
    coded = act == "q8" and d % 32 == 0  # otherwise a block of codes may be of two heads

    def parts(ptx: Instructions, *refs: Any) -> None:
        _parts(ptx, *refs, group=group, near=near, window=window, first=first)

    def combine(ptx: Instructions, *refs: Any) -> None:
        _combine(ptx, *refs, near=near, groups=groups, chunk=chunk)

    def run(
        live: Array, q: Array, cos: Array, sin: Array, position: Array, sequence: Array, ids: Any, visible: Any
    ) -> Activation:
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
        planes = launch(
            combine,
            row_shapes(total * groups, width, coded),
            (heads, d // chunk, total),
            live,
            visible,
            sink,
            cos,
            sin,
            *partial,
            name="attention",
            warps=1,
            interpret=interpret,
        )
        y, *codes = (plane.reshape(total, groups, *plane.shape[1:]) for plane in planes)
        return Activation(y, Q8(*codes)) if coded else quantise(live, y, act=act, interpret=interpret)

    args = (live.astype(i32), q, cos, sin, position, sequence, ids, None if ids is not None else visible)
    total = len(live)
    turns = -(-total // max(WORKSPACE // (splits * heads * d * 4), 1))
    if turns == 1:
        return run(*args)
    size = -(-total // turns)

    def take(index: Array, out: Activation) -> Activation:
        start = jnp.minimum(index * size, total - size)  # the last may repeat rows
        rows = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size), args)
        return jax.tree.map(lambda o, v: lax.dynamic_update_slice_in_dim(o, v, start, 0), out, run(*rows))

    some = jax.eval_shape(run, *jax.tree.map(lambda a: a[:size], args))
    return lax.fori_loop(0, turns, take, jax.tree.map(lambda a: jnp.zeros((total, *a.shape[1:]), a.dtype), some))
