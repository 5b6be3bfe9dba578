"""Products with float weights that are too few to fill a GPU: every row of a weight is split over several programs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.pallas.ptx import Instructions, f32, i32, launch, load, next_power
from ds4jax.pallas.rows import LANES, ROWS

PART = 1024  # columns that a program adds up (`ops.sums.parted_sum`)


def partial_dots(live: Array, x: Array, w: Array, *, name: str, interpret: bool) -> Array:
    """Products of `x [T, K]` with `w [N, K]`, added up per part of 1024 columns: `[T, parts, N]`."""
    (total, width), outputs = x.shape, w.shape[0]
    rows = min(total, ROWS)
    tiles, parts = -(-total // rows), -(-width // PART)
    lanes = min(LANES, next_power(width))
    ragged = width % (PART if parts > 1 else lanes) != 0
    mask = jnp.pad(live.astype(i32), (0, tiles * rows - total))

    def kernel(ptx: Instructions, live: Any, x: Any, w: Any, out: Any) -> None:
        first, part, column = pl.program_id(0) * rows, pl.program_id(1), pl.program_id(2)
        places = [part * PART + s + jnp.arange(lanes, dtype=i32) for s in range(0, min(PART, width), lanes)]

        def values(ref: Any, row: Any) -> list[Array]:
            return [load(ref, row, place, mask=place < width if ragged else None).astype(f32) for place in places]

        factors = values(w, column)

        def total_of(m: Any) -> Array:
            return ptx.tree_sum(functools.reduce(jnp.add, [a * b for a, b in zip(values(x, m), factors, strict=True)]))

        def one_row(m: Any) -> None:
            out[m, part, column] = total_of(m)

        if tiles == 1:
            for m, value in enumerate([total_of(m) for m in range(rows)]):
                out[m, part, column] = value
        else:
            for m in range(rows):
                pl.when(live[first + m] != 0)(functools.partial(one_row, first + m))

    return launch(
        kernel,
        jax.ShapeDtypeStruct((total, parts, outputs), f32),
        (tiles, parts, outputs),
        mask,
        x,
        w,
        name=name,
        warps=1,
        interpret=interpret,
    )
