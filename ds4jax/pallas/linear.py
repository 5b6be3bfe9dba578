"""Projections: every output row of a weight is read once for up to eight activation rows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.activation import Activation
from ds4jax.pallas.formats import FORMATS, Lanes, Term, planes, steps
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


def row_tiles(live: Array) -> tuple[int, int, Array]:
    """Rows of a program, programs that share the rows of a call, and the mask of whole tiles, i32."""
    total = live.shape[0]
    rows = min(total, ROWS)
    tiles = -(-total // rows)
    return rows, tiles, jnp.pad(live.astype(i32), (0, tiles * rows - total))


@dataclasses.dataclass(frozen=True)
class Dots:
    """Rows of one weight that a program multiplies: its steps, and for each row how to read a step of it.

    act: (number of the row here, activation row) -> the references that its terms read, and the row in them.
    """

    steps: Sequence[Lanes]
    reads: Sequence[Callable[[Lanes], Term]]
    act: Callable[[int, Any], tuple[Any, Any]]


def lane_sums(weights: Sequence[Dots], ms: Sequence[Any], here: Sequence[Any] | None = None) -> list[list[Array]]:
    """Running sums of the lanes, f32 [lanes], for each activation row and each weight row (all weights in a row).

    `here` says which of the rows `ms` exist; None: all of them. A step of a weight is read once.
    """
    totals: list[list[Array]] = [[] for _ in ms]
    for weight in weights:
        for number, lanes in enumerate(weight.steps):
            terms = [read(lanes) for read in weight.reads]
            for row, m in enumerate(ms):

                def fresh(terms: list[Term] = terms, m: Any = m, weight: Dots = weight) -> list[Array]:
                    return [term(*weight.act(i, m)) for i, term in enumerate(terms)]

                def nothing(count: int = lanes.count, rows: int = len(terms)) -> list[Array]:
                    return [jnp.zeros(count, f32)] * rows

                values = fresh() if here is None else jax.lax.cond(here[row], fresh, nothing)
                done = len(totals[row]) - len(terms) if number else len(totals[row])
                before = totals[row][done:]
                totals[row][done:] = [a + b for a, b in zip(before, values, strict=True)] if number else values
    return totals


def each_row(
    ptx: Instructions,
    live: Any,
    first: Any,
    rows: int,
    weights: Sequence[Dots],
    done: Callable[[Any, list[Array]], None],
) -> None:
    """Calls `done` with the activation rows among `first .. first + rows - 1` that exist, and their sums.

    All rows at once if all exist, so that their loads overlap; otherwise absent ones are jumped over.
    """
    ms = [first + m for m in range(rows)]
    here = [live[m] != 0 for m in ms]

    def all_of_them() -> None:
        # All sums before the first store: beyond a store, activations would be loaded again.
        totals = lane_sums(weights, ms)
        for m, lanes in zip(ms, totals, strict=True):
            done(m, [ptx.tree_sum(x) for x in lanes])

    def some_of_them() -> None:
        totals = lane_sums(weights, ms, here)
        for m, exists, lanes in zip(ms, here, totals, strict=True):

            @pl.when(exists)
            def _(m: Any = m, lanes: list[Array] = lanes) -> None:
                done(m, [ptx.tree_sum(x) for x in lanes])

    if MODE == "none":
        all_of_them()
    elif MODE == "cond":
        some_of_them()
    else:
        everyone = functools.reduce(jnp.logical_and, here)
        pl.when(everyone)(all_of_them)
        if rows > 1:
            pl.when(jnp.logical_not(everyone))(some_of_them)


MODE = "both"


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
        live: which of the output's rows exist `[T']`.
        act_row: (output row, weight row, N) -> activation row.
    """
    total = live.shape[0]
    rows, tiles, mask = row_tiles(live)
    read = [planes(w) for w in ws]
    sizes = [(w.shape[0], tile_rows(format, *w.shape)) for w, (format, _) in zip(ws, read, strict=True)]
    forms = [form(format, a) for format, _ in read]
    programs = [n // tile for n, tile in sizes]

    def kernel(ptx: Instructions, live: Any, acts: Any, weights: Any, *outs: Any) -> None:
        column, first = pl.program_id(1), pl.program_id(0) * rows

        def segment(index: int, begin: int) -> None:
            (format, _), (n, tile), width = read[index], sizes[index], ws[index].shape[1]
            act, out = acts[forms[index]], outs[index]
            chosen = [(column - begin) * tile + i for i in range(tile)]
            reads = [functools.partial(FORMATS[format].read, ptx, weights[index], (row,)) for row in chosen]
            dots = Dots(steps(format, width), reads, lambda i, m: (act, act_row(m, chosen[i], n)))

            def done(m: Any, values: list[Array]) -> None:
                for row, value in zip(chosen, values, strict=True):
                    out[m, row] = value

            each_row(ptx, live, first, rows, [dots], done)

        begin = 0
        for index, count in enumerate(programs):
            if len(programs) == 1:
                segment(index, begin)
            else:
                here = (column >= begin) & (column < begin + count)
                pl.when(here)(functools.partial(segment, index, begin))
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
    return project(live, a, ws, lambda m, row, n: m, name="linear", interpret=interpret)


def grouped_linear(live: Array, a: Activation, w: Array | QTensor, *, interpret: bool) -> Array:
    """Kernel of `ops.linear.grouped_linear`."""
    groups = a.x.shape[1]
    flat = jax.tree.map(lambda plane: plane.reshape(-1, *plane.shape[2:]), a)

    def act_row(m: Any, row: Any, n: int) -> Any:
        return m * groups + row // (n // groups)

    return project(live, flat, (w,), act_row, name="grouped_linear", interpret=interpret)[0]
