"""Hyper-connections: partial sums of the mix, then its few numbers and the collapse; the return to the streams."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ds4jax.pallas.dots import partial_dots
from ds4jax.pallas.ptx import Instructions, f32, i32, launch, load, next_power, store
from ds4jax.pallas.rows import add_in_tree, part_size, pick, when_live

PART = 256  # features that a program collapses
POST_PART = 128  # features that a program of `hyper_post` returns to the streams

Matrix = list[list[Array]]
"""Elements `[H][H]`, each the same in all lanes of a warp: small enough to live in registers."""


def sigmoid(x: Array) -> Array:
    """The form of `ops.hyper.sigmoid`."""
    return 1.0 / (1.0 + jnp.exp(-x))


def sinkhorn(ptx: Instructions, logits: Matrix, iters: int, eps: float) -> Matrix:
    """`ops.hyper.sinkhorn` of one matrix."""
    size, e = len(logits), jnp.float32(eps)

    def rows(m: Matrix) -> Matrix:
        inverse = [ptx.reciprocal(add_in_tree(row) + e) for row in m]
        return [[v * i for v in row] for row, i in zip(m, inverse, strict=True)]

    def columns(m: Matrix) -> Matrix:
        inverse = [ptx.reciprocal(add_in_tree([row[k] for row in m]) + e) for k in range(size)]
        return [[v * i for v, i in zip(row, inverse, strict=True)] for row in m]

    def softmax(row: list[Array]) -> list[Array]:
        peak = row[0]
        for v in row[1:]:
            peak = jnp.maximum(peak, v)
        exps = [jnp.exp(v - peak) for v in row]
        inverse = ptx.reciprocal(add_in_tree(exps))
        return [v * inverse + e for v in exps]

    first = columns([softmax(row) for row in logits])
    return lax.fori_loop(0, iters - 1, lambda _, m: columns(rows(m)), first)


def mix(ptx: Instructions, parts: Any, row: Any, outputs: int, width: int, eps: float) -> Array:
    """Projections of a row's normalised streams, from the partial sums of `partial_dots` with squares."""
    lane = jnp.arange(next_power(outputs + 1), dtype=i32)
    total = add_in_tree([load(parts, row, part, lane, mask=lane <= outputs) for part in range(parts.shape[1])])
    return total * lax.rsqrt(pick(total, outputs) * jnp.float32(1 / width) + jnp.float32(eps))


def collapse(streams: list[Array], weights: list[Array]) -> Array:
    """Weighted sum of the streams in order."""
    return functools.reduce(jnp.add, [weight * stream for weight, stream in zip(weights, streams, strict=True)])


def hyper_pre(
    live: Array,
    x: Array,
    fn: Array,
    scale: Array,
    base: Array,
    *,
    iters: int,
    eps: float,
    hc_eps: float,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """Kernel of `ops.hyper.hyper_pre`: the last program of a row has the Sinkhorn iterations, the others its parts."""
    (rows, h, depth), outputs = x.shape, fn.shape[0]
    size = part_size(depth, PART)
    parts = partial_dots(live, x.reshape(rows, -1), fn, squares=True, name="hyper_mix", interpret=interpret)

    def kernel(ptx: Instructions, live: Any, parts: Any, x: Any, scale: Any, base: Any, *outs: Any) -> None:
        row, part = pl.program_id(0), pl.program_id(1)
        collapsed, post, mixing = outs

        @when_live(live, row)
        def _() -> None:
            lane = jnp.arange(next_power(outputs + 1), dtype=i32)

            def logits() -> Array:
                kind = jnp.where(lane < h, 0, jnp.where(lane < 2 * h, 1, 2))
                factor, offset = load(scale, kind), load(base, lane, mask=lane < outputs)
                return mix(ptx, parts, row, outputs, h * depth, eps) * factor + offset

            @pl.when(part < depth // size)
            def _() -> None:
                place = pl.ds(part * size, size)
                streams, gates = [load(x, row, stream, place) for stream in range(h)], sigmoid(logits())
                weights = [pick(gates, stream) + jnp.float32(hc_eps) for stream in range(h)]
                store(collapsed, collapse(streams, weights), row, place)

            @pl.when(part == depth // size)
            def _() -> None:
                values = logits()
                store(post, 2.0 * sigmoid(values), row, lane - h, mask=(lane >= h) & (lane < 2 * h))
                # Instructions are for tiles: every lane iterates on the whole matrix and keeps one element.
                tile = (max(32, next_power(h * h)),)
                start = [jnp.broadcast_to(pick(values, 2 * h + index), tile) for index in range(h * h)]
                rows_of = [start[index : index + h] for index in range(0, h * h, h)]
                result, place = jnp.zeros(tile, f32), jnp.arange(tile[0], dtype=i32)
                for index, weight in enumerate(itertools.chain(*sinkhorn(ptx, rows_of, iters, hc_eps))):
                    result = jnp.where(place == index, weight, result)
                store(mixing, result, row, place, mask=place < h * h)

    collapsed, post, mixing = launch(
        kernel,
        tuple(jax.ShapeDtypeStruct(shape, f32) for shape in ((rows, depth), (rows, h), (rows, h * h))),
        (rows, depth // size + 1),
        live.astype(i32),
        parts,
        x,
        scale,
        base,
        name="hyper_pre",
        warps=1,
        interpret=interpret,
    )
    return collapsed, post, mixing.reshape(rows, h, h)


def hyper_head(
    live: Array, x: Array, fn: Array, scale: Array, base: Array, *, eps: float, hc_eps: float, interpret: bool
) -> Array:
    """Kernel of `ops.hyper.hyper_head`."""
    rows, h, depth = x.shape
    size = part_size(depth, PART)
    parts = partial_dots(live, x.reshape(rows, -1), fn, squares=True, name="hyper_mix", interpret=interpret)

    def kernel(ptx: Instructions, live: Any, parts: Any, x: Any, scale: Any, base: Any, out: Any) -> None:
        row, part = pl.program_id(0), pl.program_id(1)

        @when_live(live, row)
        def _() -> None:
            lane, place = jnp.arange(next_power(h + 1), dtype=i32), pl.ds(part * size, size)
            streams, offset = [load(x, row, stream, place) for stream in range(h)], load(base, lane, mask=lane < h)
            gates = sigmoid(mix(ptx, parts, row, h, h * depth, eps) * scale[0] + offset)
            weights = [pick(gates, stream) + jnp.float32(hc_eps) for stream in range(h)]
            store(out, collapse(streams, weights), row, place)

    return launch(
        kernel,
        jax.ShapeDtypeStruct((rows, depth), f32),
        (rows, depth // size),
        live.astype(i32),
        parts,
        x,
        scale,
        base,
        name="hyper_head",
        warps=1,
        interpret=interpret,
    )


def hyper_post(live: Array, out: Array, x: Array, post: Array, mixing: Array, *, interpret: bool) -> Array:
    """Kernel of `ops.hyper.hyper_post`."""
    rows, h, depth = x.shape
    size = part_size(depth, POST_PART)

    def kernel(ptx: Instructions, live: Any, out: Any, x: Any, post: Any, mixing: Any, streams: Any) -> None:
        row, part = pl.program_id(0), pl.program_id(1)

        @when_live(live, row)
        def _() -> None:
            place = pl.ds(part * size, size)
            inputs = [load(out, row, place), *(load(x, row, j, place) for j in range(h))]
            weights = [[post[row, k], *(mixing[row, j, k] for j in range(h))] for k in range(h)]
            for k, total in enumerate([collapse(inputs, each) for each in weights]):
                store(streams, total, row, k, place)

    return launch(
        kernel,
        jax.ShapeDtypeStruct(x.shape, f32),
        (rows, depth // size),
        live.astype(i32),
        out,
        x,
        post,
        mixing,
        name="hyper_post",
        warps=1,
        interpret=interpret,
    )
