"""RMS normalisation."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ds4jax.activation import Activation
from ds4jax.ops.quantise import quantise
from ds4jax.ops.sums import ordered_sum


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"] | None, eps: float) -> Float[Array, "... D"]:
    """`x * rsqrt(mean(x^2) + eps)`, times `weight` if given (arXiv 1910.07467); the mean is an `ordered_sum`."""
    mean = ordered_sum(x * x) * jnp.float32(1 / x.shape[-1])
    y = x * lax.rsqrt(mean + jnp.float32(eps))[..., None]
    return y if weight is None else y * weight


def norm(x: Float[Array, "T D"], weight: Float[Array, " D"], *, eps: float, act: str) -> Activation:
    """Weighted `rms_norm`, with the codes of the result where activations are quantised."""
    return quantise(rms_norm(x, weight, eps), act=act)
