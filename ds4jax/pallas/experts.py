"""Routed experts and the shared expert: gate and up with SwiGLU in one launch, down with the sums in another.

A routed pair (row, expert) reads its expert's weights by itself; pairs of the same expert meet in the cache. Each dot
is the one of `linear`, whatever the number of rows. The shared expert's launches wait for nobody's choice: they run
beside the router and beside the routed experts, which leave much of the memory's time unused.
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
    project,
    row_numbers,
    row_planes,
    row_tiles,
    tile_rows,
    with_sums,
)
from ds4jax.pallas.ptx import Instructions, f32, i32, launch
from ds4jax.pallas.quantise import quantise
from ds4jax.quants import QTensor

Weight = Array | QTensor
SHARED_ROWS = 4  # rows of a program of the shared gate and up: eight need so many registers that fewer programs fit


@dataclasses.dataclass(frozen=True)
class _Read:
    """How programs read a weight `[*lead, N, K]`: its arrays, the form of activations it takes, rows of a program."""

    format: str
    arrays: dict[str, Array]
    width: int
    form: str
    tile: int

    @staticmethod
    def of(w: Weight, coded: bool) -> _Read:
        format, arrays = planes(w)
        return _Read(format, arrays, w.shape[-1], form(format, coded), tile_rows(format, *w.shape[-2:]))

    def dots(self, ptx: Instructions, refs: Any, lead: tuple[Any, ...], rows: list[Any], acts: Any) -> Dots:
        """Some rows, behind leading indices, for activations of this form."""
        reads = [functools.partial(FORMATS[self.format].read, ptx, refs, (*lead, row)) for row in rows]
        return Dots(steps(self.format, self.width), reads, lambda _, m: (acts, m))


def _swiglu(gate: Array, up: Array, limit: float) -> Array:
    """`ops.moe.swiglu`."""
    if limit > 0:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate / (1.0 + jnp.exp(-gate)) * up


def _gate_up(
    live: Array,
    a: Activation,
    ids: Array,
    weights: Array,
    w1: Weight,
    w3: Weight,
    *,
    limit: float,
    interpret: bool,
) -> Array:
    """`swiglu(x . w1^T, x . w3^T)` of every pair, times its weight, f32 `[T, K, F]`."""
    (rows, top_k), wide = ids.shape, w1.shape[-2]
    pair_of = [_Read.of(w, a.q8 is not None) for w in (w1, w3)]
    tile = math.gcd(*(w.tile for w in pair_of))

    def kernel(ptx: Instructions, live: Any, ids: Any, weights: Any, acts: Any, refs: Any, out: Any) -> None:
        pair = pl.program_id(0)
        t, k = pair // top_k, pair % top_k
        exists, expert, weight = live[t] != 0, ids[t, k], weights[t, k]  # one wait for all of them
        chosen = [pl.program_id(1) * tile + i for i in range(tile)]

        @pl.when(exists)
        def _() -> None:
            # All loads are on their way before the first wait.
            terms = [
                [[read(step)(acts[w.form], t) for step in dots.steps] for read in dots.reads]
                for w, ref in zip(pair_of, refs, strict=True)
                for dots in [w.dots(ptx, ref, (expert,), chosen, acts[w.form])]
            ]
            ptx.fence()

            @pl.when(expert >= 0)  # always so
            def _() -> None:
                gates, ups = (
                    [ptx.tree_sum(functools.reduce(jnp.add, [finish() for finish in row])) for row in each]
                    for each in terms
                )
                for row, gate, up in zip(chosen, gates, ups, strict=True):
                    out[t, k, row] = _swiglu(gate, up, limit) * weight

    return launch(
        kernel,
        jax.ShapeDtypeStruct((rows, top_k, wide), f32),
        (rows * top_k, wide // tile),
        live.astype(i32),
        ids,
        weights,
        activation_planes(live, a, {w.form for w in pair_of}, interpret),
        [w.arrays for w in pair_of],
        name="experts_gate_up",
        warps=1,
        interpret=interpret,
    )


def _down(live: Array, hidden: Array, ids: Array, w2: Weight, shared: Array, *, act: str, interpret: bool) -> Array:
    """`sum_k hidden_k . w2_k^T`, the lanes of all k in one running sum, plus what the shared expert makes, `[T, D]`."""
    (rows, top_k), n = ids.shape, w2.shape[-2]
    routed = _Read.of(w2, act == "q8")
    (acts,) = row_planes(live, [(hidden.reshape(rows * top_k, -1), routed.form)], interpret)

    def kernel(ptx: Instructions, live: Any, ids: Any, acts: Any, w2: Any, shared: Any, out: Any) -> None:
        t = pl.program_id(0)
        exists, experts = live[t] != 0, [ids[t, k] for k in range(top_k)]
        chosen = [pl.program_id(1) * routed.tile + i for i in range(routed.tile)]
        added = [shared[t, row] for row in chosen]

        @pl.when(exists)
        def _() -> None:
            # The steps of all k in order, of each the terms of all output rows: every weight is on its way at once.
            terms = [
                (t * top_k + k, [read(step) for read in dots.reads])
                for k, expert in enumerate(experts)
                for dots in [routed.dots(ptx, w2, (expert,), chosen, acts)]
                for step in dots.steps
            ]
            ptx.fence()

            @pl.when(experts[0] >= 0)  # always so
            def _() -> None:
                steps = [[term(acts, m)() for term in each] for m, each in terms]
                totals = [functools.reduce(jnp.add, lanes) for lanes in zip(*steps, strict=True)]
                for row, lanes, more in zip(chosen, totals, added, strict=True):
                    out[t, row] = ptx.tree_sum(lanes) + more

    return launch(
        kernel,
        jax.ShapeDtypeStruct((rows, n), f32),
        (rows, n // routed.tile),
        live.astype(i32),
        ids,
        acts,
        routed.arrays,
        shared,
        name="experts_down",
        warps=1,
        interpret=interpret,
    )


def _shared(
    live: Array, a: Activation, w1: Weight, w3: Weight, w2: Weight, *, limit: float, act: str, interpret: bool
) -> Array:
    """Kernel of `ops.moe.shared_expert`."""
    total, wide = live.shape[0], w1.shape[0]
    pair_of = [_Read.of(w, a.q8 is not None) for w in (w1, w3)]
    tile = math.gcd(*(w.tile for w in pair_of))

    def kernel(ptx: Instructions, live: Any, acts: Any, refs: Any, out: Any) -> None:
        chosen = [pl.program_id(1) * tile + i for i in range(tile)]
        ms = row_numbers(pl.program_id(0), total, SHARED_ROWS)
        dots = [w.dots(ptx, ref, (), chosen, acts[w.form]) for w, ref in zip(pair_of, refs, strict=True)]

        def write(sums: list[list[Array]]) -> None:
            for m, values in zip(ms, sums, strict=True):
                for row, gate, up in zip(chosen, values[:tile], values[tile:], strict=True):
                    out[m, row] = _swiglu(gate, up, limit)

        with_sums(ptx, live, dots, ms, write)

    hidden = launch(
        kernel,
        jax.ShapeDtypeStruct((total, wide), f32),
        (row_tiles(total, SHARED_ROWS)[1], wide // tile),
        live.astype(i32),
        activation_planes(live, a, {w.form for w in pair_of}, interpret),
        [w.arrays for w in pair_of],
        name="shared_gate_up",
        warps=1,
        interpret=interpret,
    )
    codes = quantise(live, hidden, act=act, interpret=interpret)
    return project(live, codes, total, (w2,), lambda m, row, n: m, name="shared_down", interpret=interpret)[0]


def experts(
    live: Array,
    a: Activation,
    ids: Array,
    weights: Array,
    w1: Weight,
    w3: Weight,
    w2: Weight,
    shared_w1: Weight,
    shared_w3: Weight,
    shared_w2: Weight,
    *,
    limit: float,
    shared_limit: float,
    act: str,
    interpret: bool,
) -> Array:
    """Kernel of `ops.moe.experts`."""
    shared = _shared(live, a, shared_w1, shared_w3, shared_w2, limit=shared_limit, act=act, interpret=interpret)
    hidden = _gate_up(live, a, ids, weights, w1, w3, limit=limit, interpret=interpret)
    return _down(live, hidden, ids, w2, shared, act=act, interpret=interpret)
