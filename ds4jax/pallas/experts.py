"""Routed experts and the shared expert: gate and up with SwiGLU in one launch, down with the sum in another.

A routed pair (row, expert) reads its expert's weights by itself; pairs of the same expert meet in the cache. Each dot
is the one of `linear`, whatever the number of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.activation import Activation
from ds4jax.pallas.formats import FORMATS, planes, steps
from ds4jax.pallas.linear import (
    Dots,
    activation_planes,
    form,
    lane_sums,
    project,
    row_numbers,
    row_sums,
    row_tiles,
    tile_rows,
)
from ds4jax.pallas.ptx import Instructions, f32, i32, launch
from ds4jax.pallas.quantise import flatten_rows, quantise
from ds4jax.quants import QTensor

Weight = Array | QTensor


def _swiglu(gate: Array, up: Array, limit: float) -> Array:
    """`ops.moe.swiglu`."""
    if limit > 0:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate / (1.0 + jnp.exp(-gate)) * up


def _dots(ptx: Instructions, w: tuple[str, Any], width: int, lead: tuple[Any, ...], rows: list[Any], acts: Any) -> Dots:
    """Rows of a weight (format and references), behind leading indices."""
    format, refs = w
    reads = [functools.partial(FORMATS[format].read, ptx, refs, (*lead, row)) for row in rows]
    return Dots(steps(format, width), reads, lambda _, m: (acts, m))


def _gate_up(
    live: Array, a: Activation, ids: Array, weights: Array, w1: Weight, w3: Weight, *, limit: float, interpret: bool
) -> Array:
    """`swiglu(x . w1^T, x . w3^T) * weight` of every pair, f32 `[T, K, F]`."""
    (rows, top_k), (_, wide, width) = ids.shape, w1.shape
    (format1, planes1), (format3, planes3) = planes(w1), planes(w3)
    tile = math.gcd(tile_rows(format1, wide, width), tile_rows(format3, wide, width))
    forms = form(format1, a), form(format3, a)

    def kernel(ptx: Instructions, live: Any, ids: Any, weights: Any, acts: Any, w1: Any, w3: Any, out: Any) -> None:
        pair = pl.program_id(0)
        t, k = pair // top_k, pair % top_k
        exists, expert, weight = live[t] != 0, ids[t, k], weights[t, k]  # one wait for all of them
        chosen = [pl.program_id(1) * tile + i for i in range(tile)]

        @pl.when(exists)
        def _() -> None:
            gate = _dots(ptx, (format1, w1), width, (expert,), chosen, acts[forms[0]])
            up = _dots(ptx, (format3, w3), width, (expert,), chosen, acts[forms[1]])
            (lanes,) = lane_sums([gate, up], [t])
            values = [ptx.tree_sum(x) for x in lanes]
            for row, g, u in zip(chosen, values[:tile], values[tile:], strict=True):
                out[t, k, row] = _swiglu(g, u, limit) * weight

    return launch(
        kernel,
        jax.ShapeDtypeStruct((rows, top_k, wide), f32),
        (rows * top_k, wide // tile),
        live.astype(i32),
        ids,
        weights,
        activation_planes(live, a, set(forms), interpret),
        planes1,
        planes3,
        name="experts_gate_up",
        warps=1,
        interpret=interpret,
    )


def _down(live: Array, a: Activation, ids: Array, w2: Weight, *, interpret: bool) -> Array:
    """`sum_k hidden_k . w2_k^T` with the lanes of all k in one running sum, f32 `[T, D]`."""
    (rows, top_k), (_, n, width) = ids.shape, w2.shape
    format2, planes2 = planes(w2)
    tile, taken = tile_rows(format2, n, width), form(format2, a)
    mask, _ = flatten_rows(live, a.x)
    flat = jax.tree.map(lambda plane: plane.reshape(-1, *plane.shape[2:]), a)

    def kernel(ptx: Instructions, live: Any, ids: Any, acts: Any, w2: Any, out: Any) -> None:
        t = pl.program_id(0)
        exists, experts = live[t] != 0, [ids[t, k] for k in range(top_k)]
        chosen = [pl.program_id(1) * tile + i for i in range(tile)]

        @pl.when(exists)
        def _() -> None:
            totals: list[Array] = []
            for k in range(top_k):
                dots = _dots(ptx, (format2, w2), width, (experts[k],), chosen, acts[taken])
                for step in dots.steps:  # one running sum over the steps of all k
                    (fresh,) = lane_sums([dataclasses.replace(dots, steps=[step])], [t * top_k + k])
                    totals = [a + b for a, b in zip(totals, fresh, strict=True)] if totals else fresh
            for row, lanes in zip(chosen, totals, strict=True):
                out[t, row] = ptx.tree_sum(lanes)

    return launch(
        kernel,
        jax.ShapeDtypeStruct((rows, n), f32),
        (rows, n // tile),
        live.astype(i32),
        ids,
        activation_planes(mask, flat, {taken}, interpret),
        planes2,
        name="experts_down",
        warps=1,
        interpret=interpret,
    )


def routed_experts(
    live: Array,
    a: Activation,
    ids: Array,
    weights: Array,
    w1: Weight,
    w3: Weight,
    w2: Weight,
    *,
    limit: float,
    act: str,
    interpret: bool,
) -> Array:
    """Kernel of `ops.moe.routed_experts`."""
    hidden = _gate_up(live, a, ids, weights, w1, w3, limit=limit, interpret=interpret)
    return _down(live, quantise(live, hidden, act=act, interpret=interpret), ids, w2, interpret=interpret)


def shared_expert(
    live: Array, a: Activation, w1: Weight, w3: Weight, w2: Weight, *, limit: float, act: str, interpret: bool
) -> Array:
    """Kernel of `ops.moe.shared_expert`."""
    total, (wide, width) = live.shape[0], w1.shape
    (format1, planes1), (format3, planes3) = planes(w1), planes(w3)
    tile = math.gcd(tile_rows(format1, wide, width), tile_rows(format3, wide, width))
    forms = form(format1, a), form(format3, a)

    def kernel(ptx: Instructions, acts: Any, w1: Any, w3: Any, out: Any) -> None:
        chosen = [pl.program_id(1) * tile + i for i in range(tile)]
        gate = _dots(ptx, (format1, w1), width, (), chosen, acts[forms[0]])
        up = _dots(ptx, (format3, w3), width, (), chosen, acts[forms[1]])

        ms = row_numbers(total)
        for m, values in zip(ms, row_sums(ptx, [gate, up], ms), strict=True):
            for row, g, u in zip(chosen, values[:tile], values[tile:], strict=True):
                out[m, row] = _swiglu(g, u, limit)

    hidden = launch(
        kernel,
        jax.ShapeDtypeStruct((total, wide), f32),
        (row_tiles(total)[1], wide // tile),
        activation_planes(live, a, set(forms), interpret),
        planes1,
        planes3,
        name="shared_gate_up",
        warps=1,
        interpret=interpret,
    )
    codes = quantise(live, hidden, act=act, interpret=interpret)
    return project(live, codes, total, (w2,), lambda m, row, n: m, name="shared_down", interpret=interpret)[0]
