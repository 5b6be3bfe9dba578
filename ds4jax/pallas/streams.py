"""The streams of hyper-connections after a sub-layer, and the sums of their mix for the next one.

Sums are those of `ops.sums.parted_sum`. A program has a branch of a part's tree, `SHARE` running sums, for `GROUP`
outputs; it makes the new streams anew where it needs them instead of waiting for another launch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.pallas.ptx import Instructions, f32, i32, launch, load, next_power, store
from ds4jax.pallas.rows import LANES, ROWS, part_size

POST_PART = 128  # features that a program of `hyper_post` returns to the streams
PART = 1024  # columns of a part
SHARE = 32  # running sums of a part that a program has
GROUP = 4  # outputs that a program adds up, at most: their weights are all on the way at once

Pending = tuple[Array, Array, Array] | None
"""Output `[T, D]` of a sub-layer, its weights `[T, H]` and the mixing `[T, H, H]`; None where nothing is pending."""


def collapse(streams: list[Array], weights: list[Array]) -> Array:
    """Weighted sum of the streams in order."""
    return functools.reduce(jnp.add, [weight * stream for weight, stream in zip(weights, streams, strict=True)])


def post_weights(pending: Any, row: Any, k: Any) -> list[Array]:
    """What a sub-layer's output and the old streams count in new stream k."""
    _, post, mixing = pending
    return [load(post, row, k), *(load(mixing, row, j, k) for j in range(mixing.shape[1]))]


def post_inputs(pending: Any, x: Any, row: Any, place: Any) -> list[Array]:
    """A sub-layer's output and the old streams at some features."""
    return [load(pending[0], row, place), *(load(x, row, j, place) for j in range(x.shape[1]))]


def hyper_post(live: Array, out: Array, x: Array, post: Array, mixing: Array, *, interpret: bool) -> Array:
    """Kernel of `ops.hyper.hyper_post`."""
    rows, h, depth = x.shape
    size = part_size(depth, POST_PART)

    def kernel(ptx: Instructions, live: Any, pending: Any, x: Any, streams: Any) -> None:
        row, place = pl.program_id(0), pl.ds(pl.program_id(1) * size, size)
        exists = live[row] != 0
        inputs, weights = post_inputs(pending, x, row, place), [post_weights(pending, row, k) for k in range(h)]
        ptx.fence()

        @pl.when(exists)
        def _() -> None:
            for k, total in enumerate([collapse(inputs, each) for each in weights]):
                store(streams, total, row, k, place)

    return launch(
        kernel,
        jax.ShapeDtypeStruct(x.shape, f32),
        (rows, depth // size),
        live.astype(i32),
        (out, post, mixing),
        x,
        name="hyper_post",
        warps=1,
        interpret=interpret,
    )


def hyper_mix(live: Array, x: Array, pending: Pending, fn: Array, *, interpret: bool) -> tuple[Array, Array]:
    """The streams `[T, H, D]` with what is pending returned to them, and the sums of their mix.

    Sums are `[T, leaves, N + 1]`: products with `fn [N, H D]`, and squares. What is left to do is to add neighbours.
    """
    rows, h, depth = x.shape
    if pending is not None and (depth % LANES or rows > ROWS):  # a step in several streams; many rows to share `fn`
        x, pending = hyper_post(live, pending[0], x, *pending[1:], interpret=interpret), None
    leaves, *streams = _mix(live, x, pending, fn, interpret=interpret)
    return (streams[0] if streams else x), leaves


def _mix(live: Array, x: Array, pending: Pending, fn: Array, *, interpret: bool) -> tuple[Array, ...]:
    """The sums, and the new streams if something is pending."""
    (rows, h, depth), outputs = x.shape, fn.shape[0]
    width = h * depth
    parts, lanes = -(-width // PART), min(LANES, next_power(width))
    share, tile = min(SHARE, lanes), ROWS if rows > ROWS else 1
    shares, tiles = lanes // share, -(-rows // tile)
    group = max(size for size in range(1, GROUP + 1) if outputs % size == 0)
    ragged = width % (PART if parts > 1 else lanes) != 0
    same = math.gcd(depth, PART)  # so many columns of a part in a row are of one stream

    def kernel(ptx: Instructions, live: Any, x: Any, fn: Any, pending: Any, leaves: Any, *streams: Any) -> None:
        rows_from, leaf, first = pl.program_id(0) * tile, pl.program_id(1), pl.program_id(2) * group
        origin = leaf // shares * PART + leaf % shares * share
        columns = [origin + start for start in range(0, min(PART, width), lanes)]
        masks = [column + jnp.arange(share, dtype=i32) < width if ragged else None for column in columns]

        def read(ref: Any, lead: Any) -> list[Array]:
            if not ragged:
                return [load(ref, lead, pl.ds(column, share)) for column in columns]
            lane = jnp.arange(share, dtype=i32)
            return [load(ref, lead, c + lane, mask=mask) for c, mask in zip(columns, masks, strict=True)]

        def values(row: Any) -> Callable[[], list[Array]]:
            """Columns of the new streams; loads at once what the returned function needs."""
            if pending is None:
                loaded = read(x, row)
                return lambda: loaded
            new = [jnp.minimum(column // depth, h - 1) for column in columns[:: same // lanes]]
            weights = [post_weights(pending, row, k) for k in new]
            inputs = [post_inputs(pending, x, row, pl.ds(column % depth, share)) for column in columns]

            def made() -> list[Array]:
                sums = [collapse(each, weights[n // (same // lanes)]) for n, each in enumerate(inputs)]
                return [v if mask is None else jnp.where(mask, v, 0.0) for v, mask in zip(sums, masks, strict=True)]

            return made

        def total(products: list[Array]) -> Array:
            return ptx.tree_sum(functools.reduce(jnp.add, products))

        def dots(row: Any, factors: list[list[Array]], own: list[Array]) -> None:
            sums = [total([a * b.astype(f32) for a, b in zip(own, each, strict=True)]) for each in factors]
            for n, value in enumerate(sums):
                leaves[row, leaf, first + n] = value

        def squares(row: Any, own: list[Array]) -> None:
            leaves[row, leaf, outputs] = total([v * v for v in own])
            for stream in streams:
                for column, v, mask in zip(columns, own, masks, strict=True):
                    k = jnp.minimum(column // depth, h - 1)
                    store(stream, v, row, k, column % depth + jnp.arange(share, dtype=i32), mask=mask)

        def for_every_row(body: Callable[[Any, list[Array]], None]) -> None:
            if tile > 1:

                def one(row: Any) -> None:
                    body(row, values(row)())

                for m in range(tile):
                    pl.when(live[rows_from + m] != 0)(functools.partial(one, rows_from + m))
                return
            exists, own = live[rows_from] != 0, values(rows_from)
            ptx.fence()
            pl.when(exists)(lambda: body(rows_from, own()))

        @pl.when(first < outputs)
        def _() -> None:
            factors = [read(fn, first + n) for n in range(group)]  # first: they come from farthest away
            for_every_row(lambda row, own: dots(row, factors, own))

        pl.when(first == outputs)(lambda: for_every_row(squares))

    shapes = [(rows, parts * shares, outputs + 1), *([x.shape] if pending is not None else [])]
    return tuple(
        launch(
            kernel,
            tuple(jax.ShapeDtypeStruct(shape, f32) for shape in shapes),
            (tiles, parts * shares, outputs // group + 1),
            jnp.pad(live.astype(i32), (0, tiles * tile - rows)),
            x if pending is not None else x.reshape(rows, width),
            fn,
            pending,
            name="hyper_mix",
            warps=1,
            interpret=interpret,
        )
    )
