"""Rotary embedding: the norm and the rotation of queries and raw rows, and pieces for the kernels that rotate back.

A rotated feature is `x cos + partner sin` with the sine negated in the first of a pair: every lane has one feature,
and loads its partner once more where features come from memory, so nothing moves between lanes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ds4jax.pallas.norm import inverse_rms
from ds4jax.pallas.ptx import Instructions, f32, i32, launch, load, store
from ds4jax.pallas.rows import ring_place, when_live
from ds4jax.pallas.simulate import FP8_BLOCK, fp8_round_trip

HEAD_PART = 128  # features that a program of `q_norm_rope` takes


def turn(x: Array, partner: Array, cos: Array, sin: Array) -> Array:
    """Rotated features."""
    return x * cos + partner * sin


def signed(sin: Array, offset: Array, inverse: bool = False) -> Array:
    """The sine that a feature's partner is multiplied with."""
    first = (offset & 1) == (1 if inverse else 0)
    return jnp.where(first, -sin, sin)


def angles(cos: Any, sin: Any, row: Any, offset: Array, inverse: bool = False) -> tuple[Array, Array]:
    """Cosine and signed sine for features `offset` of the rotated ones; nothing is loaded for others."""
    rotated = (offset >= 0) & (offset < 2 * cos.shape[1])
    c, s = (load(table, row, offset >> 1, mask=rotated, early=True) for table in (cos, sin))
    return c, signed(s, offset, inverse)


def partner_of(place: Array, offset: Array) -> Array:
    """Where the other feature of a pair is."""
    return place + 1 - 2 * (offset & 1)


def swapped(x: Array) -> Array:
    """The other feature of every pair, to the bit."""
    pairs = lax.bitcast_convert_type(x, i32).reshape(-1, 2)
    others = jnp.sum(pairs, axis=1)[:, None] - pairs
    return lax.bitcast_convert_type(others.reshape(x.shape), f32)


def norm_rope(
    live: Array,
    x: Array,
    cos: Array,
    sin: Array,
    weight: Array | None,
    *,
    size: int,
    eps: float,
    simulate: bool,
    name: str,
    interpret: bool,
    where: tuple[Array, Array, Array] | None = None,
    ring: Array | None = None,
) -> Array:
    """Norm and rotation of rows `[M, d]`, M a multiple of the rows of the table; `size` features a program.

    With a ring, rows go into its memory; `where`: which of them exist (i32), their sequence and place.
    """
    rows, width = x.shape
    heads, tail = rows // cos.shape[0], width - 2 * cos.shape[1]

    def kernel(
        ptx: Instructions, ring: Any, live: Any, where: Any, x: Any, cos: Any, sin: Any, weight: Any, out: Any
    ) -> None:
        row, part = pl.program_id(0), pl.program_id(1)

        @when_live(live, row // heads)
        def _() -> None:
            exists, target = (True, (row,)) if where is None else ring_place(where, row)
            place = part * size + jnp.arange(size, dtype=i32)
            offset = place - tail
            inside = place < width

            def factors(place: Array, mask: Array) -> list[Array]:
                return [load(x, row, place, mask=mask)] + ([] if weight is None else [load(weight, place, mask=mask)])

            own, other = factors(place, inside), factors(partner_of(place, offset), inside & (offset >= 0))
            c, s = angles(cos, sin, row // heads, offset)
            scale = inverse_rms(ptx, x, row, eps)
            y, partner = (functools.reduce(jnp.multiply, [v * scale, *weights]) for v, *weights in (own, other))
            turned = turn(y, partner, c, s)
            y = jnp.where(offset >= 0, turned, fp8_round_trip(ptx, y) if simulate else y)
            store(out, y.astype(out.dtype), *target, place, mask=inside & exists)

    return launch(
        kernel,
        jax.ShapeDtypeStruct(x.shape, f32) if ring is None else jax.ShapeDtypeStruct(ring.shape, ring.dtype),
        (rows, -(-width // size)),
        ring,
        live.astype(i32),
        where,
        x,
        cos,
        sin,
        weight,
        name=name,
        warps=1,
        interpret=interpret,
        aliases=None if ring is None else {0: 0},
    )


def q_norm_rope(live: Array, q: Array, cos: Array, sin: Array, *, eps: float, interpret: bool) -> Array:
    """Kernel of `ops.rope.q_norm_rope`."""
    flat = q.reshape(-1, q.shape[-1])
    out = norm_rope(
        live, flat, cos, sin, None, size=HEAD_PART, eps=eps, simulate=False, name="q_norm_rope", interpret=interpret
    )
    return out.reshape(q.shape)


def kv_store(
    live: Array,
    kv: Array,
    cos: Array,
    sin: Array,
    sequence: Array,
    place: Array,
    weight: Array,
    ring: Array,
    *,
    eps: float,
    simulate: bool,
    interpret: bool,
) -> Array:
    """Kernel of `ops.store.kv_store`: a program per block of the FP8 grid."""
    return norm_rope(
        live,
        kv,
        cos,
        sin,
        weight,
        size=FP8_BLOCK,
        eps=eps,
        simulate=simulate,
        name="kv_store",
        interpret=interpret,
        where=(live.astype(i32), sequence, place),
        ring=ring,
    )
