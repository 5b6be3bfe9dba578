"""Simulated low-precision formats inside kernels."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from ds4jax.pallas.ptx import Instructions, f32, i32

FP8_MAX = 448.0
FP8_BLOCK = 64


def pow2_scale(ratio: Array) -> Array:
    """Smallest power of two >= ratio (`ops.simulate.pow2_scale`)."""
    bits = lax.bitcast_convert_type(ratio, i32)
    exponent = (bits >> 23) + jnp.where((bits & 0x7FFFFF) != 0, 1, 0).astype(i32)
    return lax.bitcast_convert_type(exponent << 23, f32)


def fp8_round_trip(ptx: Instructions, x: Array) -> Array:
    """E4M3 round trip of one block `[64]` (`ops.simulate.fp8_round_trip`)."""
    ratio = jnp.maximum(jnp.max(jnp.abs(x)), 1e-4) * jnp.float32(1 / FP8_MAX)
    scale = pow2_scale(jnp.broadcast_to(ratio, x.shape))
    limited = jnp.minimum(jnp.maximum(ptx.divide(x, scale), -FP8_MAX), FP8_MAX)
    return limited.astype(jnp.float8_e4m3fn).astype(f32) * scale
