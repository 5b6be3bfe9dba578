"""Rows of the embedding table, and the angles of the rotary embedding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.pallas.ptx import Instructions, f32, launch, load, store
from ds4jax.pallas.rows import part_size
from ds4jax.quants import QTensor, dequantize

PART = 1024  # features that a program copies


def embed(live: Array, tokens: Array, table: Array | QTensor, *, interpret: bool) -> Array:
    """Kernel of `ops.linear.embed`; a quantised table is decoded by XLA, value by value."""
    if isinstance(table, QTensor):
        return dequantize(table.take(tokens))
    rows, width = tokens.shape[0], table.shape[1]
    size = part_size(width, PART)

    def kernel(ptx: Instructions, tokens: Any, table: Any, out: Any) -> None:
        row, part = pl.program_id(0), pl.ds(pl.program_id(1) * size, size)
        token = jnp.clip(tokens[row], 0, table.shape[0] - 1)  # an absent row holds any number
        store(out, load(table, token, part).astype(f32), row, part)

    shape = jax.ShapeDtypeStruct((rows, width), f32)
    return launch(kernel, shape, (rows, width // size), tokens, table, name="embed", warps=1, interpret=interpret)


def rope_table(live: Array, position: Array, frequencies: Array, *, interpret: bool) -> tuple[Array, Array]:
    """Kernel of `ops.rope.rope_table`."""
    rows, half = position.shape[0], frequencies.shape[0]
    size = part_size(half, PART)

    def kernel(ptx: Instructions, position: Any, frequencies: Any, cos: Any, sin: Any) -> None:
        row, part = pl.program_id(0), pl.ds(pl.program_id(1) * size, size)
        angle = position[row].astype(f32) * load(frequencies, part)
        store(cos, jnp.cos(angle), row, part)
        store(sin, jnp.sin(angle), row, part)

    shape = jax.ShapeDtypeStruct((rows, half), f32)
    grid = (rows, half // size)
    return launch(kernel, (shape, shape), grid, position, frequencies, name="rope_table", warps=1, interpret=interpret)
