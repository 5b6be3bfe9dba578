"""Quantised values of weights inside jit, for quantisation-aware training with straight-through gradients.

The searches are those of the encoders, so `encode(type, w)` decodes to `FAKE[type](w)` up to float reassociation.
Training adds `stop_gradient(fake(w) - w)` to the weights and refreshes that difference every few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from tools.demo_model import blockfit

CHUNK = 4096  # super-blocks fitted at once: 128 MiB of codebook products


def fake_iq2_xxs(w: Float[Array, "*rows K"]) -> Float[Array, "*rows K"]:
    """The values that IQ2_XXS stores for w f32; K a multiple of 256."""
    return _in_chunks(lambda x: blockfit.iq2_xxs_values(blockfit.fit_iq2_xxs(x, jnp, _f16), jnp), w)


def fake_q2_k(w: Float[Array, "*rows K"]) -> Float[Array, "*rows K"]:
    """The values that Q2_K stores for w f32; K a multiple of 256."""
    return _in_chunks(lambda x: blockfit.affine_values(blockfit.fit_affine(x, blockfit.Q2_K, jnp, _f16)), w)


def fake_q4_k(w: Float[Array, "*rows K"]) -> Float[Array, "*rows K"]:
    """The values that Q4_K stores for w f32; K a multiple of 256."""
    return _in_chunks(lambda x: blockfit.affine_values(blockfit.fit_affine(x, blockfit.Q4_K, jnp, _f16)), w)


def fake_q8_0(w: Float[Array, "*rows K"]) -> Float[Array, "*rows K"]:
    """The values that Q8_0 stores for w f32; K a multiple of 32."""
    x = w.reshape(*w.shape[:-1], -1, 32)
    d = jnp.abs(x).max(-1, keepdims=True) / 127
    scaled = x * jnp.where(d == 0, 0, 1 / jnp.where(d == 0, 1, d))
    code = jnp.sign(scaled) * jnp.floor(jnp.abs(scaled) + 0.5)  # half away from zero, as ggml rounds
    return (_f16(d) * code).reshape(w.shape)


FAKE: dict[str, Callable[[Array], Array]] = {
    "IQ2_XXS": fake_iq2_xxs,
    "Q2_K": fake_q2_k,
    "Q4_K": fake_q4_k,
    "Q8_0": fake_q8_0,
}
"""GGML type name to the function that returns its values."""


def fake_all(weights: Mapping[str, Array], types: Mapping[str, str]) -> dict[str, Array]:
    """Stored values of every weight named in `types`; one search per type, so that compiling stays short."""
    values: dict[str, Array] = {}
    for kind in sorted(set(types.values())):
        names = [name for name in sorted(types) if types[name] == kind]
        # Rows are whole blocks, so weights of one type can be laid end to end.
        flat = FAKE[kind](jnp.concatenate([weights[name].reshape(-1) for name in names]))
        ends = np.cumsum([weights[name].size for name in names])[:-1]
        for name, part in zip(names, jnp.split(flat, ends), strict=True):
            values[name] = part.reshape(weights[name].shape)
    return values


def _f16(x: Array) -> Array:
    # The barrier keeps XLA from deleting the pair of casts.
    return lax.optimization_barrier(x.astype(jnp.float16)).astype(jnp.float32)


def _in_chunks(fit: Callable[[Array], Array], w: Array) -> Array:
    blocks = w.reshape(-1, blockfit.SUPER_BLOCK)
    count = blocks.shape[0]
    chunk = min(CHUNK, count)
    padded = jnp.pad(blocks, ((0, -count % chunk), (0, 0))).reshape(-1, chunk, blockfit.SUPER_BLOCK)
    with jax.default_matmul_precision("highest"):
        values = lax.map(fit, padded)
    return values.reshape(-1, blockfit.SUPER_BLOCK)[:count].reshape(w.shape)
