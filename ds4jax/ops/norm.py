"""RMS normalisation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"] | None, eps: float) -> Float[Array, "... D"]:
    """`x / sqrt(mean(x^2) + eps)`, times `weight` if given (arXiv 1910.07467)."""
    y = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.float32(eps))
    return y if weight is None else y * weight
