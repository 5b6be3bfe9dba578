"""Hadamard transform and FP4 grid of the indexer inside kernels."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array, lax

from ds4jax.pallas.ptx import Instructions, f32, i32
from ds4jax.pallas.simulate import pow2_scale

FP4_MAX = 6.0
FP4_BLOCK = 32


def hadamard(x: Array) -> Array:
    """Orthonormal Hadamard transform of `x [n]`, in the order of `ops.simulate.hadamard`."""
    n, stride = x.shape[0], 1
    while stride < n:
        pairs = x.reshape(n // (2 * stride), 2, stride)
        second = lax.broadcasted_iota(i32, pairs.shape, 1) == 1
        total = jnp.sum(pairs, axis=1)
        difference = jnp.sum(jnp.where(second, -pairs, pairs), axis=1)
        x = jnp.where(second, difference[:, None], total[:, None]).reshape(n)
        stride *= 2
    return x * jnp.float32(1 / math.sqrt(n))


def fp4_round_trip(ptx: Instructions, x: Array) -> Array:
    """E2M1 round trip of `x [n]` with a scale per 32 values (`ops.simulate.fp4_round_trip`).

    The grid 0, 0.5 .. 2, 3, 4, 6 has steps of 0.5 below 2, of 1 below 4, and of 2 above; even codes are even steps.
    """
    y = x.reshape(-1, FP4_BLOCK)
    amax = jnp.maximum(jnp.max(jnp.abs(y), axis=1), FP4_MAX * 2.0**-126)
    scale = jnp.broadcast_to(pow2_scale(amax * jnp.float32(1 / FP4_MAX))[:, None], y.shape)
    size = jnp.minimum(jnp.abs(ptx.divide(y, scale)), FP4_MAX)
    per_step = jnp.where(size < 2, 2.0, jnp.where(size < 4, 1.0, 0.5))
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    value = ptx.rint(size * per_step).astype(f32) * step * scale
    return jnp.where(y < 0, -value, value).reshape(x.shape)
