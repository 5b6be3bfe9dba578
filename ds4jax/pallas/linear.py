"""Projections: every output row of a weight is read once for up to eight activation rows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.activation import Activation
from ds4jax.pallas.formats import FORMATS, Lanes, Term, planes, steps
from ds4jax.pallas.ptx import Instructions, f32, i32, launch, store
from ds4jax.pallas.quantise import act_codes
from ds4jax.pallas.rows import LANES, ring_place, segments
from ds4jax.quants import QTensor

ROWS = 8  # activation rows of a program
HELD = 144  # registers for what a program loads before its first wait: with more, too few programs fit


def tile_rows(format: str, rows: int, width: int) -> int:
    """Output rows of a program: short rows share one, so that enough loads are in flight (does not change results)."""
    wanted = {"Q8_0": 4 if width <= 1024 else 1, "float": 1}.get(format, 2)
    return math.gcd(rows, wanted)


def form(format: str, coded: bool) -> str:
    """The form in which a weight's terms read activations, which may have codes."""
    takes = FORMATS[format].takes
    return takes if takes == "x" or coded else f"{takes} float"


def _float_planes(x: Array, form: str) -> dict[str, Array]:
    if form == "q8 float":  # value of the group, group
        return {"x": jnp.swapaxes(x.reshape(x.shape[0], -1, 32), 1, 2)}
    if form == "q8k float":  # quarter and byte, word of the quarter
        parts = x.reshape(x.shape[0], -1, 2, 4, 8, 4).transpose(0, 3, 5, 1, 2, 4)
        return {"x": parts.reshape(x.shape[0], 16, -1)}
    return {"x": x}


def row_planes(live: Array, rows: Sequence[tuple[Array, str]], interpret: bool) -> list[dict[str, Array]]:
    """The arrays that terms read of rows `[R, K]` in some form; all codes are made in one launch (`act_codes`)."""
    coded = [(x, form) for x, form in rows if form in ("q8", "q8k")]
    codes = iter(act_codes(live, coded, interpret=interpret) if coded else [])
    return [vars(next(codes)) if form in ("q8", "q8k") else _float_planes(x, form) for x, form in rows]


def activation_planes(live: Array, a: Activation, forms: set[str], interpret: bool) -> dict[str, dict[str, Array]]:
    """The arrays that terms read, by form."""
    given = {"q8": vars(a.q8)} if a.q8 is not None and "q8" in forms else {}
    made = sorted(forms - set(given))
    return given | dict(zip(made, row_planes(live, [(a.x, form) for form in made], interpret), strict=True))


def row_tiles(total: int, most: int = ROWS) -> tuple[int, int]:
    """Rows of a program, and the number of programs that share the rows of a call."""
    tiles = -(-total // most)
    return -(-total // tiles), tiles


def row_numbers(program: Any, total: int, most: int = ROWS) -> list[Any]:
    """The rows of one of these programs; beyond the last row, the last one again."""
    rows, tiles = row_tiles(total, most)
    first = program * rows
    return [first + m if tiles * rows == total else jnp.minimum(first + m, total - 1) for m in range(rows)]


@dataclasses.dataclass(frozen=True)
class Dots:
    """Rows of one weight that a program multiplies: its format and steps, and for each row how to read a step of it.

    act: (number of the row here, activation row) -> the references that its terms read, and the row in them.
    """

    format: str
    steps: Sequence[Lanes]
    reads: Sequence[Callable[[Lanes], Term]]
    act: Callable[[int, Any], tuple[Any, Any]]

    def registers(self, rows: int) -> tuple[int, int]:
        """What a thread needs for all that is loaded of the weight, and of so many activation rows."""
        weight, act = FORMATS[self.format].registers
        share = sum(step.count for step in self.steps) / LANES
        return round(share * weight * len(self.reads)), round(share * act * rows)


@dataclasses.dataclass(frozen=True)
class Reader:
    """How programs read a weight `[*lead, N, K]`: its arrays, the form of activations it takes, rows of a program."""

    format: str
    arrays: dict[str, Array]
    rows: int
    width: int
    form: str
    tile: int

    @staticmethod
    def of(w: Array | QTensor, coded: bool) -> Reader:
        """For activations that may have codes."""
        format, arrays = planes(w)
        rows, width = w.shape[-2:]
        return Reader(format, arrays, rows, width, form(format, coded), tile_rows(format, rows, width))

    def dots(self, ptx: Instructions, refs: Any, rows: Sequence[tuple[Any, ...]], act: Any) -> Dots:
        """Some rows, each given by all its indices; see `Dots` for `act`."""
        reads = [functools.partial(FORMATS[self.format].read, ptx, refs, row) for row in rows]
        return Dots(self.format, steps(self.format, self.width), reads, act)


Step = Callable[[], list[list[Array]]]
"""Terms of a step for each activation row and each weight row."""


def load_steps(weight: Dots, ms: Sequence[Any], activations: bool) -> Iterator[Step]:
    """Loads the weight step by step, and activations with it or when the terms are made."""
    for lanes in weight.steps:
        terms = [read(lanes) for read in weight.reads]
        if activations:
            ready = [[term(*weight.act(i, m)) for i, term in enumerate(terms)] for m in ms]
            yield functools.partial(lambda ready: [[finish() for finish in row] for row in ready], ready)
        else:
            yield functools.partial(
                lambda terms: [[term(*weight.act(i, m))() for i, term in enumerate(terms)] for m in ms], terms
            )


def added(steps: Iterable[Step]) -> list[list[Array]]:
    """Running sums of the lanes over steps in order, f32 [lanes], for each activation row and each weight row.

    What is not loaded yet is loaded before the caller's first store: beyond a store, it would be loaded again.
    """

    def add(left: list[list[Array]], right: list[list[Array]]) -> list[list[Array]]:
        return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]

    return functools.reduce(add, (step() for step in steps))


def with_sums(
    ptx: Instructions,
    known: Any,
    weights: Sequence[Dots],
    ms: Sequence[Any],
    body: Callable[[list[list[Array]]], None],
) -> None:
    """Calls `body` with the sums for each activation row and each weight row, the weights one after another.

    If registers do for all that is loaded, it is on its way before the first wait. `known` is a loaded value: the sums
    are in a branch on it, behind a fence, or the compiler would spread the loads over them. Otherwise they are made
    whatever it is, step by step: a branch before the loads costs more than the arithmetic of absent rows.
    """
    needs = [weight.registers(len(ms)) for weight in weights]
    held = sum(own for own, _ in needs) + max(act for _, act in needs) <= HELD

    def finish(steps: Sequence[Iterable[Step]]) -> None:
        parts = [added(each) for each in steps]
        body([[ptx.tree_sum(x) for part in parts for x in part[k]] for k in range(len(ms))])

    if not held:
        finish([load_steps(weight, ms, activations=False) for weight in weights])
        return
    ready = [list(load_steps(weight, ms, activations=True)) for weight in weights]
    ptx.fence()
    pl.when(known)(functools.partial(finish, ready))


def project(
    live: Array,
    a: Activation,
    total: int,
    ws: Sequence[Array | QTensor],
    act_row: Callable[[Any, Any, int], Any],
    *,
    name: str,
    interpret: bool,
    where: tuple[Array, Array, Array] | None = None,
    rings: Sequence[Array] = (),
    wanted: Sequence[Array] = (),
) -> tuple[Array, ...]:
    """Products of rows `[T, K]` of activations with weights `[N, K]` in one launch.

    Args:
        live: which activation rows exist `[T]`, those of an output row all or none.
        total: output rows.
        act_row: (output row, weight row, N) -> activation row.
        where: which output rows exist (i32), their sequence, and their place in the rings.
        rings: take the products of the last weights, in their memory.
        wanted: for the first weights, output rows whose products are wanted (bool `[total]`). Programs that share none
            of them end there; those of the other weights do not wait for this.
    """
    tiles = row_tiles(total)[1]
    readers = [Reader.of(w, a.q8 is not None) for w in ws]
    programs = [reader.rows // reader.tile for reader in readers]
    returned = len(ws) - len(rings)

    def kernel(
        ptx: Instructions, rings: Any, live: Any, where: Any, wanted: Any, acts: Any, weights: Any, *outs: Any
    ) -> None:
        column, ms = pl.program_id(1), row_numbers(pl.program_id(0), total)

        def products(index: int, begin: int) -> None:
            reader, out = readers[index], outs[index]
            targets = [(None, (m,)) if index < returned else ring_place(where, m) for m in ms]
            chosen = [(column - begin) * reader.tile + i for i in range(reader.tile)]

            def act(i: int, m: Any) -> tuple[Any, Any]:
                return acts[reader.form], act_row(m, chosen[i], reader.rows)

            def write(sums: list[list[Array]]) -> None:
                for (exists, target), values in zip(targets, sums, strict=True):
                    for row, value in zip(chosen, values, strict=True):
                        store(out, value.astype(out.dtype), *target, row, mask=exists)

            dots = reader.dots(ptx, weights[index], [(row,) for row in chosen], act)
            with_sums(ptx, functools.reduce(jnp.maximum, [live[m] for m in ms]) != 0, [dots], ms, write)

        def segment(index: int, begin: int) -> None:
            if index < len(wanted):
                some = functools.reduce(jnp.maximum, [wanted[index][m] for m in ms]) != 0
                pl.when(some)(functools.partial(products, index, begin))
            else:
                products(index, begin)

        segments(column, [(count, functools.partial(segment, index)) for index, count in enumerate(programs)])

    shapes = [jax.ShapeDtypeStruct((total, reader.rows), f32) for reader in readers[:returned]]
    return launch(
        kernel,
        (*shapes, *(jax.ShapeDtypeStruct(ring.shape, ring.dtype) for ring in rings)),
        (tiles, sum(programs)),
        tuple(rings),
        live.astype(i32)[:: live.shape[0] // total],
        where,
        [rows.astype(i32) for rows in wanted],
        activation_planes(live, a, {reader.form for reader in readers}, interpret),
        [reader.arrays for reader in readers],
        name=name,
        warps=1,
        interpret=interpret,
        aliases={i: returned + i for i in range(len(rings))},
    )


def linear(
    live: Array, a: Activation, wanted: tuple[Array, ...], *ws: Array | QTensor, interpret: bool
) -> tuple[Array, ...]:
    """Kernel of `ops.linear.linear`."""
    return project(live, a, live.shape[0], ws, lambda m, row, n: m, name="linear", interpret=interpret, wanted=wanted)


def linear_store(
    live: Array,
    a: Activation,
    sequence: Array,
    place: Array,
    returned: tuple[Array | QTensor, ...],
    stored: tuple[Array | QTensor, ...],
    rings: tuple[Array, ...],
    *,
    interpret: bool,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Kernel of `ops.store.linear_store`."""
    results = project(
        live,
        a,
        live.shape[0],
        (*returned, *stored),
        lambda m, row, n: m,
        name="linear_store",
        interpret=interpret,
        where=(live.astype(i32), sequence, place),
        rings=rings,
    )
    return results[: len(returned)], results[len(returned) :]


def grouped_linear(live: Array, a: Activation, w: Array | QTensor, *, interpret: bool) -> Array:
    """Kernel of `ops.linear.grouped_linear`."""
    groups = a.x.shape[1]
    flat = jax.tree.map(lambda plane: plane.reshape(-1, *plane.shape[2:]), a)

    def act_row(m: Any, row: Any, n: int) -> Any:
        return m * groups + row // (n // groups)

    every = jnp.repeat(live, groups)
    return project(every, flat, live.shape[0], (w,), act_row, name="grouped_linear", interpret=interpret)[0]
