"""int8 activations: codes and scales of rows that meet weights of quantised formats."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from ds4jax.activation import Q8, Q8K, Activation


def pack_words(codes: Int8[Array, "*n 4"]) -> Int[Array, "*n"]:
    """Four int8 codes as one word, the lowest byte first."""
    return lax.bitcast_convert_type(codes, jnp.int32)


def word_codes(words: Int[Array, "*n"]) -> Int8[Array, "*n 4"]:
    """The int8 codes of words, the lowest byte first."""
    return lax.bitcast_convert_type(words, jnp.int8)


def act_q8(x: Float[Array, "*rows K"]) -> Q8:
    """int8 codes and a float32 scale per 32 values: `scale = max|x| / 127`, `code = rint(x / scale)` (ggml Q8_0)."""
    v = x.reshape(*x.shape[:-1], -1, 32)
    amax = jnp.max(jnp.abs(v), axis=-1)
    # XLA turns a division by a constant or a broadcast scalar into a product with its reciprocal, which rounds twice.
    scale = amax / lax.optimization_barrier(jnp.full(amax.shape, 127.0, jnp.float32))
    inverse = jnp.where(scale > 0, 1.0 / jnp.where(scale > 0, scale, 1.0), 0.0)
    codes = jnp.clip(jnp.rint(v * inverse[..., None]), -128, 127).astype(jnp.int8)
    return Q8(jnp.swapaxes(pack_words(codes.reshape(*v.shape[:-1], 8, 4)), -2, -1), scale)


def act_q8k(x: Float[Array, "*rows K"]) -> Q8K:
    """int8 codes, a float32 scale per 256 values, and sums of 16 codes (ggml Q8_K).

    The value of largest magnitude, the first one on a tie, maps to -127.
    """
    v = x.reshape(*x.shape[:-1], -1, 256)
    lead = v.shape[:-2]
    first = jnp.argmax(jnp.abs(v), axis=-1, keepdims=True)
    peak = jnp.take_along_axis(v, first, axis=-1)
    nonzero = peak != 0
    inverse = jnp.where(nonzero, -127.0 / jnp.where(nonzero, peak, 1.0), 0.0)
    codes = jnp.clip(jnp.rint(inverse * v), -128, 127).astype(jnp.int8)
    scale = jnp.where(nonzero, 1.0 / jnp.where(nonzero, inverse, 1.0), 0.0)[..., 0]
    word = jnp.moveaxis(pack_words(codes.reshape(*v.shape[:-1], 2, 4, 8, 4)), -2, -4)  # [..., 4, B, 2, 8]
    sums = jnp.sum(codes.astype(jnp.int32).reshape(*v.shape[:-1], 2, 4, 2, 16), axis=-1)  # [..., B, half, quarter, 2]
    return Q8K(word.reshape(*lead, 4, -1), scale, jnp.swapaxes(sums, -2, -1).reshape(*lead, -1))


def quantise(x: Float[Array, "*rows K"], *, act: str) -> Activation:
    """Rows with int8 codes where `act` is "q8" and their length is a multiple of 32."""
    return Activation(x, act_q8(x) if act == "q8" and x.shape[-1] % 32 == 0 else None)
