"""Rotary position embedding on interleaved pairs of the last features, with YaRN on compressed layers."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ds4jax.activation import Activation
from ds4jax.config import ModelConfig
from ds4jax.ops.norm import rms_norm
from ds4jax.ops.quantise import quantise
from ds4jax.ops.simulate import fp8_round_trip


def rope_frequencies(config: ModelConfig, compressed: bool) -> np.ndarray:
    """Angles per position, float32 `[r/2]`, computed in float64.

    Window-only layers use `rope_theta`; compressed layers use `compress_rope_theta` and YaRN interpolation
    (arXiv 2309.00071) without its attention factor.
    """
    r = config.qk_rope_head_dim
    pair = np.arange(r // 2, dtype=np.float64)
    if not compressed:
        return (config.rope_theta ** (-2.0 * pair / r)).astype(np.float32)
    theta, context = config.compress_rope_theta, config.original_seq_len
    frequencies = theta ** (-2.0 * pair / r)

    def correction(beta: float) -> float:
        return r * math.log(context / (2 * math.pi * beta)) / (2 * math.log(theta))

    low = max(math.floor(correction(config.beta_fast)), 0)
    high: float = min(math.ceil(correction(config.beta_slow)), r - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((pair - low) / (high - low), 0.0, 1.0)
    return (frequencies * ((1.0 - ramp) + ramp / config.rope_factor)).astype(np.float32)


def rope_table(
    position: Int[Array, " T"], frequencies: Float[Array, " r2"]
) -> tuple[Float[Array, "T r2"], Float[Array, "T r2"]]:
    """Cosine and sine of `float32(position) * frequency`, the float32 angle of the reference implementations."""
    angle = position.astype(jnp.float32)[:, None] * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "T *heads e"], cos: Float[Array, "T r2"], sin: Float[Array, "T r2"], inverse: bool = False
) -> Float[Array, "T *heads e"]:
    """Rotates pairs `(2i, 2i+1)` of the last `r` features of every row; `inverse` rotates back."""
    r = 2 * cos.shape[-1]
    shape = (cos.shape[0], *(1,) * (x.ndim - 2), cos.shape[-1])
    c, s = cos.reshape(shape), sin.reshape(shape)
    if inverse:
        s = -s
    head, tail = x[..., :-r], x[..., -r:]
    pairs = tail.reshape(*tail.shape[:-1], r // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * c - b * s, a * s + b * c], axis=-1).reshape(tail.shape)
    return jnp.concatenate([head, turned], axis=-1)


def unrotate(
    o: Float[Array, "T N d"], cos: Float[Array, "T r2"], sin: Float[Array, "T r2"], *, groups: int, act: str
) -> Activation:
    """Takes the rotation of attention outputs back; heads in `groups` `[T, G, N d / G]` for the output projection."""
    return quantise(rotate(o, cos, sin, inverse=True).reshape(o.shape[0], groups, -1), act=act)


def q_norm_rope(
    q: Float[Array, "T N d"], cos: Float[Array, "T r2"], sin: Float[Array, "T r2"], *, eps: float
) -> Float[Array, "T N d"]:
    """Unweighted RMS norm of every query head, then rotation."""
    return rotate(rms_norm(q, None, eps), cos, sin)


def kv_norm_rope(
    kv: Float[Array, "T d"],
    cos: Float[Array, "T r2"],
    sin: Float[Array, "T r2"],
    weight: Float[Array, " d"],
    *,
    eps: float,
    simulate: bool,
) -> Float[Array, "T d"]:
    """RMS norm of the shared key-value row, rotation, then the FP8 grid on the features that are not rotated."""
    row = rotate(rms_norm(kv, weight, eps), cos, sin)
    return simulate_kv(row, 2 * cos.shape[-1]) if simulate else row


def simulate_kv(row: Float[Array, "T d"], rotary: int) -> Float[Array, "T d"]:
    """FP8 round trip of the features of an attention row that carry no rotation."""
    return jnp.concatenate([fp8_round_trip(row[..., :-rotary]), row[..., -rotary:]], axis=-1)
