"""RMS normalisation: every program adds up the squares of the whole row and writes its own part of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ds4jax.activation import Q8, Activation
from ds4jax.pallas.formats import Lanes
from ds4jax.pallas.ptx import Instructions, f32, i32, launch, load, next_power, store
from ds4jax.pallas.quantise import store_q8
from ds4jax.pallas.rows import LANES, part_size, when_live

PART = 256  # values that a program writes


def inverse_rms(ptx: Instructions, x: Any, row: Any, eps: float) -> Array:
    """`rsqrt(mean(x^2) + eps)` of one row of `x [M, K]`, with the sum of `ops.norm.rms_norm`."""
    width = x.shape[1]
    lanes = min(LANES, next_power(width))
    steps = [Lanes(start, lanes, width).load(x, row) for start in range(0, width, lanes)]
    total = functools.reduce(jnp.add, [v * v for v in steps])
    return lax.rsqrt(ptx.tree_sum(total) * jnp.float32(1 / width) + jnp.float32(eps))


def row_shapes(rows: int, width: int, coded: bool) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of rows `[M, K]`, and of their int8 codes if wanted."""
    codes = (((rows, 8, width // 32), i32), ((rows, width // 32), f32))
    return tuple(jax.ShapeDtypeStruct(*shape) for shape in (((rows, width), f32), *(codes if coded else ())))


def norm(live: Array, x: Array, weight: Array, *, eps: float, act: str, interpret: bool) -> Activation:
    """Kernel of `ops.norm.norm`."""
    rows, width = x.shape
    size = part_size(width, PART)
    coded = act == "q8" and width % 32 == 0

    def kernel(ptx: Instructions, live: Any, x: Any, weight: Any, out: Any, *codes: Any) -> None:
        row, part = pl.program_id(0), pl.program_id(1)

        @when_live(live, row)
        def _() -> None:
            place = pl.ds(part * size, size)
            v, w = load(x, row, place), load(weight, place)
            y = v * inverse_rms(ptx, x, row, eps) * w
            store(out, y, row, place)
            if codes:
                store_q8(ptx, codes[0], codes[1], y, row, part * (size // 32))

    y, *codes = launch(
        kernel,
        row_shapes(rows, width, coded),
        (rows, width // size),
        live.astype(i32),
        x,
        weight,
        name="norm",
        warps=1,
        interpret=interpret,
    )
    return Activation(y, Q8(*codes) if coded else None)
