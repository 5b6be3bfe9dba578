"""Simulated low-precision formats of the DeepSeek-V4 cache: the values the model was trained to see.

All round trips act on the last axis, are exact at run time, and pass gradients straight through.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

FP8_MAX = 448.0
FP4_MAX = 6.0


def pow2_scale(ratio: Float[Array, ...]) -> Float[Array, ...]:
    """Smallest power of two >= ratio, from the float32 bits (`exp2(ceil(log2(x)))` is inexact under XLA).

    `ratio` must be a positive normal float32 below 2^127.
    """
    bits = lax.bitcast_convert_type(ratio, jnp.int32)
    exponent = (bits >> 23) + jnp.where((bits & 0x7FFFFF) != 0, 1, 0).astype(jnp.int32)
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)


def _straight_through(function):  # type: ignore[no-untyped-def]
    """Identity derivative: a rounding step has none of its own."""
    wrapped = jax.custom_jvp(function, nondiff_argnums=(1,))
    wrapped.defjvp(lambda block, primals, tangents: (function(primals[0], block), tangents[0]))
    return functools.wraps(function)(lambda x, block: wrapped(x, block))


@_straight_through
def _fp8(x: Float[Array, "... n"], block: int) -> Float[Array, "... n"]:
    y = x.reshape(*x.shape[:-1], -1, block)
    amax = jnp.maximum(jnp.max(jnp.abs(y), axis=-1, keepdims=True), 1e-4)
    scale = jnp.broadcast_to(pow2_scale(amax * jnp.float32(1 / FP8_MAX)), y.shape)
    codes = lax.optimization_barrier(jnp.clip(y / scale, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn))
    return (codes.astype(jnp.float32) * scale).reshape(x.shape)


@_straight_through
def _fp4(x: Float[Array, "... n"], block: int) -> Float[Array, "... n"]:
    y = x.reshape(*x.shape[:-1], -1, block)
    amax = jnp.maximum(jnp.max(jnp.abs(y), axis=-1, keepdims=True), FP4_MAX * 2.0**-126)
    scale = jnp.broadcast_to(pow2_scale(amax * jnp.float32(1 / FP4_MAX)), y.shape)
    codes = lax.optimization_barrier(jnp.clip(y / scale, -FP4_MAX, FP4_MAX).astype(jnp.float4_e2m1fn))
    return (codes.astype(jnp.float32) * scale).reshape(x.shape)


def fp8_round_trip(x: Float[Array, "... n"], block: int = 64) -> Float[Array, "... n"]:
    """E4M3 round trip with one power-of-two scale per `block` values (DeepSeek-V4 `act_quant`, ue8m0 scales)."""
    return _fp8(x, block)


def fp4_round_trip(x: Float[Array, "... n"], block: int = 32) -> Float[Array, "... n"]:
    """E2M1 round trip with one power-of-two scale per `block` values (DeepSeek-V4 `fp4_act_quant`)."""
    return _fp4(x, block)


def hadamard(x: Float[Array, "... n"]) -> Float[Array, "... n"]:
    """Orthonormal Hadamard transform in Sylvester order; n must be a power of two."""
    n = x.shape[-1]
    assert n & (n - 1) == 0, f"{n=} must be a power of two"
    y, stride = x, 1
    while stride < n:
        pairs = y.reshape(*x.shape[:-1], n // (2 * stride), 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([a + b, a - b], axis=-2).reshape(x.shape)
        stride *= 2
    return y * jnp.float32(1 / math.sqrt(n))
