"""Hyper-connections between two sub-layers: the collapse of the streams, its norm and its codes; and what returns.

The sub-layer waits for the collapse alone. The Sinkhorn iterations, whose result is needed after it, are a launch
beside it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ds4jax.activation import Q8, Activation
from ds4jax.pallas.norm import row_shapes
from ds4jax.pallas.ptx import Instructions, f32, i32, launch, load, next_power, store
from ds4jax.pallas.quantise import store_q8
from ds4jax.pallas.rows import LANES, ROWS, add_in_tree, part_size, pick
from ds4jax.pallas.streams import Pending, collapse, hyper_mix

PART = 512  # features that a program writes
STEPS = 32  # of the sum of squares that a program loads at once
WARPS = 4  # a lane of each has one running sum of squares

Matrix = list[list[Array]]
"""Elements `[H][H]`, each the same in all lanes: small enough to live in registers."""


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


def logits(leaves: Any, scale: Any, base: Any, row: Any, width: int, eps: float) -> Callable[[], Array]:
    """Projections of a row's normalised streams by `hyper_mix`, scaled and shifted, one per lane: `[H | H | H H]`.

    Loads at once what the returned function adds up.
    """
    outputs, lane = leaves.shape[2] - 1, jnp.arange(next_power(leaves.shape[2]), dtype=i32)
    terms = [load(leaves, row, leaf, lane, mask=lane <= outputs) for leaf in range(leaves.shape[1])]
    h = outputs if scale.shape[0] == 1 else math.isqrt(outputs + 1) - 1
    factor = load(scale, jnp.where(lane < h, 0, jnp.where(lane < 2 * h, 1, 2)), mask=lane < outputs)
    offset = load(base, lane, mask=lane < outputs)

    def values() -> Array:
        total = add_in_tree(terms)
        mean = pick(total, outputs) * jnp.float32(1 / width)
        return total * lax.rsqrt(mean + jnp.float32(eps)) * factor + offset

    return values


def _returning(
    live: Array,
    leaves: Array,
    scale: Array,
    base: Array,
    *,
    width: int,
    iters: int,
    eps: float,
    hc_eps: float,
    interpret: bool,
) -> tuple[Array, Array]:
    """Weights `[T, H]` of the sub-layer's output, and the mixing matrix `[T, H, H]`."""
    rows, h = leaves.shape[0], math.isqrt(leaves.shape[2]) - 1
    lanes, tile = next_power(leaves.shape[2]), max(32, next_power(h * h))

    def kernel(ptx: Instructions, live: Any, leaves: Any, scale: Any, base: Any, post: Any, mixing: Any) -> None:
        row = pl.program_id(0)
        exists, numbers = live[row] != 0, logits(leaves, scale, base, row, width, eps)
        ptx.fence()

        @pl.when(exists)
        def _() -> None:
            values, lane = numbers(), jnp.arange(lanes, dtype=i32)
            store(post, 2.0 * sigmoid(values), row, lane - h, mask=(lane >= h) & (lane < 2 * h))
            # Instructions are for tiles: every lane iterates on the whole matrix and keeps one element.
            start = [jnp.broadcast_to(pick(values, 2 * h + index), (tile,)) for index in range(h * h)]
            rows_of = [start[index : index + h] for index in range(0, h * h, h)]
            result, place = jnp.zeros(tile, f32), jnp.arange(tile, dtype=i32)
            for index, v in enumerate(itertools.chain(*sinkhorn(ptx, rows_of, iters, hc_eps))):
                result = jnp.where(place == index, v, result)
            store(mixing, result, row, place, mask=place < h * h)

    post, mixing = launch(
        kernel,
        tuple(jax.ShapeDtypeStruct((rows, n), f32) for n in (h, h * h)),
        (rows,),
        live.astype(i32),
        leaves,
        scale,
        base,
        name="hyper_return",
        warps=1,
        interpret=interpret,
    )
    return post, mixing.reshape(rows, h, h)


def _normed(
    live: Array,
    x: Array,
    leaves: Array,
    scale: Array,
    base: Array,
    weight: Array,
    *,
    eps: float,
    hc_eps: float,
    act: str,
    name: str,
    interpret: bool,
) -> Activation:
    """The normed collapse. Every program adds up the squares of the whole row, and writes its own part."""
    rows, h, depth = x.shape
    size = part_size(depth, PART if rows <= ROWS else 4 * PART)
    coded = act == "q8" and depth % 32 == 0
    lanes = min(LANES, next_power(depth))
    count = -(-depth // lanes)
    steps = max(n for n in range(1, STEPS + 1) if count % n == 0)

    def kernel(
        ptx: Instructions, live: Any, x: Any, leaves: Any, scale: Any, base: Any, weight: Any, y: Any, *codes: Any
    ) -> None:
        row, part = pl.program_id(0), pl.program_id(1)

        def streams(turn: Any) -> list[list[Array]]:
            places = [(turn * steps + n) * lanes + jnp.arange(lanes, dtype=i32) for n in range(steps)]
            masks = [None if depth % lanes == 0 else place < depth for place in places]
            return [
                [load(x, row, k, place, mask=mask) for k in range(h)] for place, mask in zip(places, masks, strict=True)
            ]

        # All loads are on their way before the first wait.
        exists, place = live[row] != 0, pl.ds(part * size, size)
        values = logits(leaves, scale, base, row, h * depth, eps)
        first, own, factor = streams(0), [load(x, row, k, place) for k in range(h)], load(weight, place)
        ptx.fence()

        @pl.when(exists)
        def _() -> None:
            gates = sigmoid(values())
            weights = [pick(gates, k) + jnp.float32(hc_eps) for k in range(h)]

            def add(loaded: list[list[Array]], total: Array) -> Array:
                made = [collapse(each, weights) for each in loaded]
                return functools.reduce(jnp.add, [v * v for v in made], total)

            total = add(first, jnp.zeros(lanes, f32))
            total = lax.fori_loop(1, count // steps, lambda turn, total: add(streams(turn), total), total)
            mean = ptx.tree_sum(total) * jnp.float32(1 / depth)
            normed = collapse(own, weights) * lax.rsqrt(mean + jnp.float32(eps)) * factor
            store(y, normed, row, place)
            if coded:
                store_q8(ptx, codes[0], codes[1], normed, row, part * (size // 32))

    y, *codes = launch(
        kernel,
        row_shapes(rows, depth, coded),
        (rows, depth // size),
        live.astype(i32),
        x,
        leaves,
        scale,
        base,
        weight,
        name=name,
        warps=WARPS,
        interpret=interpret,
    )
    return Activation(y, Q8(*codes) if coded else None)


def hyper_enter(
    live: Array,
    x: Array,
    pending: Pending,
    fn: Array,
    scale: Array,
    base: Array,
    weight: Array,
    *,
    iters: int,
    eps: float,
    hc_eps: float,
    act: str,
    interpret: bool,
) -> tuple[Array, Activation, Array, Array]:
    """Kernel of `ops.hyper.hyper_enter`."""
    _, h, depth = x.shape
    x, leaves = hyper_mix(live, x, pending, fn, interpret=interpret)
    numbers: Any = {"eps": eps, "hc_eps": hc_eps, "interpret": interpret}
    a = _normed(live, x, leaves, scale, base, weight, act=act, name="hyper_enter", **numbers)
    return x, a, *_returning(live, leaves, scale, base, width=h * depth, iters=iters, **numbers)


def hyper_leave(
    live: Array,
    x: Array,
    fn: Array,
    scale: Array,
    base: Array,
    weight: Array,
    *,
    eps: float,
    hc_eps: float,
    act: str,
    interpret: bool,
) -> Activation:
    """Kernel of `ops.hyper.hyper_leave`."""
    x, leaves = hyper_mix(live, x, None, fn, interpret=interpret)
    return _normed(
        live,
        x,
        leaves,
        scale,
        base,
        weight,
        eps=eps,
        hc_eps=hc_eps,
        act=act,
        name="hyper_leave",
        interpret=interpret,
    )
