"""Projections: every output row of a weight is read once for up to eight activation rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.activation import Activation
from ds4jax.pallas.formats import FORMATS, Term, planes, steps
from ds4jax.pallas.ptx import Instructions, f32, i32, launch
from ds4jax.pallas.quantise import act_q8k
from ds4jax.quants import QTensor

ROWS = 8  # activation rows of a program


def tile_rows(format: str, rows: int, width: int) -> int:
    """Output rows of a program: short rows share one, so that enough loads are in flight (does not change results)."""
    wanted = {"Q8_0": 4 if width <= 1024 else 1, "float": 1}.get(format, 2)
    return math.gcd(rows, wanted)


def form(format: str, a: Activation) -> str:
    """The form in which a weight's terms read these activations."""
    takes = FORMATS[format].takes
    return takes if takes == "x" or a.q8 is not None else f"{takes} float"


def activation_planes(live: Array, a: Activation, forms: set[str], interpret: bool) -> dict[str, dict[str, Array]]:
    """The arrays that terms read, by form."""
    given: dict[str, dict[str, Array]] = {}
    if "x" in forms:
        given["x"] = {"x": a.x}
    if "q8" in forms:
        assert a.q8 is not None
        given["q8"] = {"word": a.q8.word, "scale": a.q8.scale}
    if "q8k" in forms:
        q = act_q8k(live, a.x, interpret=interpret)
        given["q8k"] = {"word": q.word, "scale": q.scale, "sums": q.sums}
    return given


def accumulate(terms: Sequence[Term], a: Any, m: Any) -> Array:
    """Running sums of the lanes over the steps of a row, f32 [lanes]."""
    total = terms[0](a, m)
    for term in terms[1:]:
        total = total + term(a, m)
    return total


def project(
    live: Array,
    a: Activation,
    ws: Sequence[Array | QTensor],
    act_row: Callable[[Any, Any, int], Any],
    *,
    name: str,
    interpret: bool,
) -> tuple[Array, ...]:
    """Products of rows `[T, K]` of activations with weights `[N, K]` in one launch.

    Args:
        live: which of the output's rows exist, i32 [T'].
        act_row: (output row, weight row, N) -> activation row.
    """
    total = live.shape[0]
    rows = min(total, ROWS)
    tiles = -(-total // rows)
    read = [planes(w) for w in ws]
    sizes = [(w.shape[0], tile_rows(format, *w.shape)) for w, (format, _) in zip(ws, read, strict=True)]
    forms = [form(format, a) for format, _ in read]
    programs = [n // tile for n, tile in sizes]
    mask = jnp.pad(live, (0, tiles * rows - total))

    def kernel(ptx: Instructions, live: Any, acts: Any, weights: Any, *outs: Any) -> None:
        column, first = pl.program_id(1), pl.program_id(0) * rows

        def segment(index: int, begin: int) -> None:
            (format, _), (n, tile), width = read[index], sizes[index], ws[index].shape[1]
            act, out = acts[forms[index]], outs[index]
            weight_rows = [(column - begin) * tile + i for i in range(tile)]
            terms = [
                [FORMATS[format].read(ptx, weights[index], (row,), lanes) for lanes in steps(format, width)]
                for row in weight_rows
            ]

            def one(m: Any) -> None:
                for row, parts in zip(weight_rows, terms, strict=True):
                    out[m, row] = ptx.tree_sum(accumulate(parts, act, act_row(m, row, n)))

            if tiles == 1:
                one(0)  # a call without any row does not happen, and a branch costs time
            for m in range(1 if tiles == 1 else 0, rows):
                pl.when(live[first + m] != 0)(lambda m=m: one(first + m))

        begin = 0
        for index, count in enumerate(programs):
            here = (column >= begin) & (column < begin + count)
            if len(programs) == 1:
                segment(index, begin)
            else:
                pl.when(here)(lambda index=index, begin=begin: segment(index, begin))
            begin += count

    return launch(
        kernel,
        tuple(jax.ShapeDtypeStruct((total, n), f32) for n, _ in sizes),
        (tiles, sum(programs)),
        mask,
        activation_planes(live, a, set(forms), interpret),
        [arrays for _, arrays in read],
        name=name,
        warps=1,
        interpret=interpret,
    )


def linear(live: Array, a: Activation, *ws: Array | QTensor, interpret: bool) -> tuple[Array, ...]:
    """Kernel of `ops.linear.linear`."""
    return project(live.astype(i32), a, ws, lambda m, row, n: m, name="linear", interpret=interpret)


def grouped_linear(live: Array, a: Activation, w: Array | QTensor, *, interpret: bool) -> Array:
    """Kernel of `ops.linear.grouped_linear`."""
    groups = a.x.shape[1]
    flat = jax.tree.map(lambda plane: plane.reshape(-1, *plane.shape[2:]), a)

    def act_row(m: Any, row: Any, n: int) -> Any:
        return m * groups + row // (n // groups)

    return project(live.astype(i32), flat, (w,), act_row, name="grouped_linear", interpret=interpret)[0]
