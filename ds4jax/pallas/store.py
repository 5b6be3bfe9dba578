"""Writing rows into a cache, in place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.pallas.ptx import Instructions, i32, launch, load, next_power, store

PART = 1024  # values that a program takes


def store_rows(live: Array, rows: Array, sequence: Array, place: Array, target: Array, *, interpret: bool) -> Array:
    """Kernel of `ops.store.store`: the result shares the memory of `target`."""
    total, width = rows.shape
    size = min(PART, next_power(width))

    def kernel(ptx: Instructions, live: Any, rows: Any, sequence: Any, place: Any, target: Any, out: Any) -> None:
        row, part = pl.program_id(0), pl.program_id(1)
        exists, b, where = live[row], sequence[row], place[row]

        @pl.when(exists != 0)
        def _() -> None:
            at = part * size + jnp.arange(size, dtype=i32)
            mask = at < width
            value = load(rows, row, at, mask=mask).astype(out.dtype)
            store(out, value, b, where, at, mask=mask)

    return launch(
        kernel,
        jax.ShapeDtypeStruct(target.shape, target.dtype),
        (total, -(-width // size)),
        live.astype(i32),
        rows,
        sequence,
        place,
        target,
        name="store",
        warps=1,
        interpret=interpret,
        aliases={4: 0},
    )
