"""int8 activations: kernels, and the pieces that other kernels end with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.activation import Q8, Q8K, Activation
from ds4jax.pallas.ptx import Instructions, f32, i32, launch, load, store
from ds4jax.pallas.rows import part_size, segments, when_live

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


def _q8_part(ptx: Instructions, x: Any, outs: tuple[Any, ...], row: Any, part: Any, size: int) -> None:
    word, scale = outs
    store_q8(ptx, word, scale, load(x, row, pl.ds(part * size, size)), row, part * (size // 32))


def _q8k_block(ptx: Instructions, x: Any, outs: tuple[Any, ...], row: Any, block: Any) -> None:
    """One super-block (`ops.quantise.act_q8k`)."""
    word, scale, sums = outs
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


def _shapes(form: str, rows: int, width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    planes = {
        "q8": [((8, width // 32), i32), ((width // 32,), f32)],
        "q8k": [((4, width // 16), i32), ((width // 256,), f32), ((width // 16,), i32)],
    }
    return tuple(jax.ShapeDtypeStruct((rows, *tail), dtype) for tail, dtype in planes[form])


def act_codes(live: Array, rows: Sequence[tuple[Array, str]], *, interpret: bool) -> list[Q8 | Q8K]:
    """Codes of arrays of rows in one launch: kernel of `ops.quantise.act_q8` and `act_q8k`.

    Args:
        live: which of T rows exist.
        rows: arrays `[R, K]`, R a multiple of T (the first R / T belong to the first row), and their forms: "q8" for
            `Q8`, "q8k" for `Q8K`.
    """
    sizes = [256 if form == "q8k" else part_size(x.shape[1], PART) for x, form in rows]
    parts = [x.shape[1] // size for (x, _), size in zip(rows, sizes, strict=True)]
    programs = [x.shape[0] * count for (x, _), count in zip(rows, parts, strict=True)]

    def kernel(ptx: Instructions, live: Any, xs: Any, *outs: Any) -> None:
        program = pl.program_id(0)

        def array(index: int, begin: int) -> None:
            row, part = (program - begin) // parts[index], (program - begin) % parts[index]

            @when_live(live, row // (rows[index][0].shape[0] // live.shape[0]))
            def _() -> None:
                if rows[index][1] == "q8":
                    _q8_part(ptx, xs[index], outs[index], row, part, sizes[index])
                else:
                    _q8k_block(ptx, xs[index], outs[index], row, part)

        segments(program, [(count, functools.partial(array, index)) for index, count in enumerate(programs)])

    made = launch(
        kernel,
        [_shapes(form, *x.shape) for x, form in rows],
        (sum(programs),),
        live.astype(i32),
        [x for x, _ in rows],
        name="act_codes",
        warps=1,
        interpret=interpret,
    )
    return [Q8(*planes) if form == "q8" else Q8K(*planes) for planes, (_, form) in zip(made, rows, strict=True)]


def quantise(live: Array, x: Array, *, act: str, interpret: bool) -> Activation:
    """Kernel of `ops.quantise.quantise`."""
    if act != "q8" or x.shape[-1] % 32:
        return Activation(x, None)
    (flat,) = act_codes(live, [(x.reshape(-1, x.shape[-1]), "q8")], interpret=interpret)
    lead = x.shape[:-1]
    return Activation(x, jax.tree.map(lambda plane: plane.reshape(*lead, *plane.shape[1:]), flat))
