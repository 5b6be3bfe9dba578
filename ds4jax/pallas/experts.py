"""Routed experts and the shared expert: gate and up with SwiGLU in one launch, down with the sums in another.

A routed pair (row, expert) reads its expert's weights by itself; pairs of the same expert meet in the cache. Each dot
is the one of `linear`, whatever the number of rows. Routed programs wait for the expert's number, then for its weights:
the shared expert's weights are read meanwhile.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.activation import Activation
from ds4jax.pallas.formats import FORMATS, planes, steps
from ds4jax.pallas.linear import (
    ROWS,
    Dots,
    activation_planes,
    form,
    lane_sums,
    project,
    row_numbers,
    row_planes,
    row_tiles,
    tile_rows,
)
from ds4jax.pallas.ptx import Instructions, f32, i32, launch, load
from ds4jax.pallas.quantise import quantise
from ds4jax.pallas.rows import segments
from ds4jax.quants import QTensor

Weight = Array | QTensor
Matrices = tuple[Weight, Weight, Weight]
"""Gate, up and down of all routed experts, or of the shared one."""

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
    experts: Matrices,
    shared: Matrices,
    *,
    limits: tuple[float, float],
    interpret: bool,
) -> tuple[Array, Array]:
    """`swiglu(x . w1^T, x . w3^T)` of every pair, times its weight, f32 `[T, K, F]`, and of the shared expert `[T, F]`.

    A slice of the grid has the programs of both kinds for the same share of the output rows, the routed ones first:
    they live longer, and what limits them is not what limits the others.
    """
    (rows, top_k), tiles = ids.shape, row_tiles(ids.shape[0], SHARED_ROWS)[1]
    kinds = [[_Read.of(w, a.q8 is not None) for w in matrices[:2]] for matrices in (experts, shared)]
    wide = [matrices[0].shape[-2] for matrices in (experts, shared)]
    tile = [math.gcd(*(w.tile for w in pair)) for pair in kinds]
    slices = math.gcd(*(n // size for n, size in zip(wide, tile, strict=True)))
    each = [n // size // slices for n, size in zip(wide, tile, strict=True)]
    programs = [rows * top_k * each[0], tiles * each[1]]

    def kernel(ptx: Instructions, live: Any, ids: Any, weights: Any, acts: Any, refs: Any, *outs: Any) -> None:
        column, share = pl.program_id(0), pl.program_id(1)

        def hidden(kind: int, lead: tuple[Any, ...], chosen: list[Any], ms: list[Any]) -> list[list[Array]]:
            """For each of some activation rows the values of the chosen output rows."""
            pair = zip(kinds[kind], refs[kind], strict=True)
            sums = lane_sums([w.dots(ptx, ref, lead, chosen, acts[w.form]) for w, ref in pair], ms)
            values = [[ptx.tree_sum(x) for x in lanes] for lanes in sums]
            return [
                [_swiglu(g, u, limits[kind]) for g, u in zip(row[: tile[kind]], row[tile[kind] :], strict=True)]
                for row in values
            ]

        def place(kind: int, begin: int) -> tuple[Any, list[Any]]:
            """Which pair or tile of rows a program takes, and its output rows."""
            number = column - begin
            part = share * each[kind] + number % each[kind]
            return number // each[kind], [part * tile[kind] + i for i in range(tile[kind])]

        def routed(begin: int) -> None:
            pair, chosen = place(0, begin)
            t, k = pair // top_k, pair % top_k
            exists, expert, weight = live[t] != 0, ids[t, k], weights[t, k]  # one wait for all of them

            @pl.when(exists)
            def _() -> None:
                (values,) = hidden(0, (expert,), chosen, [t])
                for row, value in zip(chosen, values, strict=True):
                    outs[0][t, k, row] = value * weight

        def shared(begin: int) -> None:
            number, chosen = place(1, begin)
            ms = row_numbers(number, rows, SHARED_ROWS)
            for m, values in zip(ms, hidden(1, (), chosen, ms), strict=True):
                for row, value in zip(chosen, values, strict=True):
                    outs[1][m, row] = value

        segments(column, list(zip(programs, (routed, shared), strict=True)))

    return launch(
        kernel,
        (
            jax.ShapeDtypeStruct((rows, top_k, wide[0]), f32),
            jax.ShapeDtypeStruct((rows, wide[1]), f32),
        ),
        (sum(programs), slices),
        live.astype(i32),
        ids,
        weights,
        activation_planes(live, a, {w.form for pair in kinds for w in pair}, interpret),
        [[w.arrays for w in pair] for pair in kinds],
        name="experts_gate_up",
        warps=1,
        interpret=interpret,
    )


def _down(
    live: Array, hidden: Sequence[Array], ids: Array, w2: Weight, shared_w2: Weight, *, act: str, interpret: bool
) -> Array:
    """`sum_k hidden_k . w2_k^T`, the lanes of all k in one running sum, plus the shared expert's product, f32 `[T, D]`.

    With few rows the shared product of a row is part of its programs: the second row finds the weights in the cache.
    With many it is a launch before, in which a weight's row is read once for eight.
    """
    (rows, top_k), n = ids.shape, w2.shape[-2]
    routed, shared = _Read.of(w2, act == "q8"), _Read.of(shared_w2, act == "q8")
    flat, few = hidden[0].reshape(rows * top_k, -1), rows <= ROWS
    source: Any
    if few:
        acts, shared_acts = row_planes(live, [(flat, routed.form), (hidden[1], shared.form)], interpret)
        source = shared.arrays, shared_acts
    else:
        (acts,) = row_planes(live, [(flat, routed.form)], interpret)
        a = quantise(live, hidden[1], act=act, interpret=interpret)
        (source,) = project(live, a, rows, (shared_w2,), lambda m, row, n: m, name="shared_down", interpret=interpret)

    def kernel(ptx: Instructions, live: Any, ids: Any, acts: Any, w2: Any, source: Any, out: Any) -> None:
        t = pl.program_id(0)
        exists, experts = live[t] != 0, [ids[t, k] for k in range(top_k)]
        chosen = [pl.program_id(1) * routed.tile + i for i in range(routed.tile)]
        if few:  # these loads need not wait for the expert numbers
            arrays, shared_acts = source
            (added,) = lane_sums([shared.dots(ptx, arrays, (), chosen, shared_acts)], [t])
        else:
            added = [load(source, t, pl.ds(row, 1)) for row in chosen]

        @pl.when(exists)
        def _() -> None:
            totals: list[Array] = []
            for k in range(top_k):
                dots = routed.dots(ptx, w2, (experts[k],), chosen, acts)
                for step in dots.steps:  # one running sum over the steps of all k
                    (fresh,) = lane_sums([dataclasses.replace(dots, steps=[step])], [t * top_k + k])
                    totals = [a + b for a, b in zip(totals, fresh, strict=True)] if totals else fresh
            for row, lanes, more in zip(chosen, totals, added, strict=True):
                out[t, row] = ptx.tree_sum(lanes) + ptx.tree_sum(more)

    return launch(
        kernel,
        jax.ShapeDtypeStruct((rows, n), f32),
        (rows, n // routed.tile),
        live.astype(i32),
        ids,
        acts,
        routed.arrays,
        source,
        name="experts_down",
        warps=1,
        interpret=interpret,
    )


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
    limits, shared = (limit, shared_limit), (shared_w1, shared_w3, shared_w2)
    hidden = _gate_up(live, a, ids, weights, (w1, w3, w2), shared, limits=limits, interpret=interpret)
    return _down(live, hidden, ids, w2, shared_w2, act=act, interpret=interpret)
