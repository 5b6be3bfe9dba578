"""int8 activations: kernels, and the pieces that other kernels end with."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.activation import Q8, Q8K, Activation
from ds4jax.pallas.ptx import Instructions, f32, i32, launch, load, store
from ds4jax.pallas.rows import part_size

PART = 1024  # values that a program takes; a part never splits a block


def _pack(codes: Array) -> Array:
    """Codes [..., 4] as words, the lowest byte first."""
    shift = 8 * jax.lax.broadcasted_iota(i32, codes.shape, codes.ndim - 1)
    return jnp.sum((codes & 255) << shift, axis=-1)


def store_q8(ptx: Instructions, word: Any, scale: Any, x: Array, row: Any, group: Any) -> None:
    """Writes the codes of `x [n]`, n a multiple of 32, as groups `group ...` of a row (`ops.quantise.act_q8`)."""
    v = x.reshape(-1, 32)
    d = ptx.divide(jnp.max(jnp.abs(v), axis=1), jnp.full(v.shape[0], 127.0, f32))
    inverse = jnp.where(d > 0, 1.0 / jnp.where(d > 0, d, 1.0), 0.0)
    codes = jnp.clip(ptx.rint(v * inverse[:, None]), -128, 127)
    words = _pack(codes.reshape(-1, 8, 4))
    groups = group + jnp.arange(v.shape[0], dtype=i32)
    store(scale, d, row, groups)
    store(word, words, row, jnp.arange(8, dtype=i32)[None], groups[:, None])


def _q8_part(ptx: Instructions, live: Any, x: Any, word: Any, scale: Any, *, size: int) -> None:
    row, part = pl.program_id(0), pl.program_id(1)

    @pl.when(live[row] != 0)
    def _() -> None:
        store_q8(ptx, word, scale, load(x, row, pl.ds(part * size, size)), row, part * (size // 32))


def _q8k_part(ptx: Instructions, live: Any, x: Any, word: Any, scale: Any, sums: Any) -> None:
    """One super-block (`ops.quantise.act_q8k`)."""
    row, block = pl.program_id(0), pl.program_id(1)

    @pl.when(live[row] != 0)
    def _() -> None:
        v = load(x, row, pl.ds(block * 256, 256))
        place = jnp.arange(256, dtype=i32)
        size = jnp.abs(v)
        first = jnp.min(jnp.where(size == jnp.max(size), place, 256))
        peak = jnp.sum(jnp.where(place == first, v, 0.0))
        nonzero = peak != 0
        inverse = jnp.where(nonzero, -127.0 / jnp.where(nonzero, peak, 1.0), 0.0)
        codes = jnp.clip(ptx.rint(inverse * v), -128, 127)
        word_place = jnp.arange(64, dtype=i32)
        half, quarter, i = word_place >> 5, (word_place >> 3) & 3, word_place & 7
        store(word, _pack(codes.reshape(64, 4)), row, quarter, block * 16 + half * 8 + i)
        sub = jnp.arange(16, dtype=i32)
        half, quarter, k = sub >> 3, (sub >> 1) & 3, sub & 1
        store(sums, jnp.sum(codes.reshape(16, 16), axis=1), row, block * 16 + half * 8 + k * 4 + quarter)
        scale[row, block] = jnp.where(nonzero, 1.0 / jnp.where(nonzero, inverse, 1.0), 0.0)


def act_q8(live: Array, x: Array, *, interpret: bool) -> Q8:
    """Kernel of `ops.quantise.act_q8` for rows `[T, K]`."""
    rows, width = x.shape
    size = part_size(width, PART)
    shapes = [((rows, 8, width // 32), i32), ((rows, width // 32), f32)]

    def kernel(ptx: Instructions, live: Any, x: Any, word: Any, scale: Any) -> None:
        _q8_part(ptx, live, x, word, scale, size=size)

    word, scale = launch(
        kernel,
        tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes),
        (rows, width // size),
        live,
        x,
        name="act_q8",
        warps=1,
        interpret=interpret,
    )
    return Q8(word, scale)


def act_q8k(live: Array, x: Array, *, interpret: bool) -> Q8K:
    """Kernel of `ops.quantise.act_q8k` for rows `[T, K]`."""
    rows, width = x.shape
    shapes = [((rows, 4, width // 16), i32), ((rows, width // 256), f32), ((rows, width // 16), i32)]
    word, scale, sums = launch(
        _q8k_part,
        tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes),
        (rows, width // 256),
        live.astype(i32),
        x,
        name="act_q8k",
        warps=1,
        interpret=interpret,
    )
    return Q8K(word, scale, sums)


def flatten_rows(live: Array, x: Array) -> tuple[Array, Array]:
    """Rows `[T, *lead, K]` as `[T * lead, K]`, with the mask of the flat rows as i32."""
    inner = math.prod(x.shape[1:-1])
    return jnp.repeat(live.astype(i32), inner), x.reshape(-1, x.shape[-1])


def quantise(live: Array, x: Array, *, act: str, interpret: bool) -> Activation:
    """Kernel of `ops.quantise.quantise`."""
    if act != "q8" or x.shape[-1] % 32:
        return Activation(x, None)
    flat = act_q8(*flatten_rows(live, x), interpret=interpret)
    lead = x.shape[:-1]
    return Activation(x, jax.tree.map(lambda plane: plane.reshape(*lead, *plane.shape[1:]), flat))
