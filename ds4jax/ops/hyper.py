"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): H residual streams mixed by learned matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ds4jax.ops.linear import float_dot
from ds4jax.ops.norm import rms_norm


def sinkhorn(logits: Float[Array, "T H H"], iters: int, eps: float) -> Float[Array, "T H H"]:
    """Doubly stochastic matrix from logits: row softmax, then alternating normalisation ending on the columns."""
    e = jnp.float32(eps)
    m = jax.nn.softmax(logits, axis=-1) + e
    m = m / (jnp.sum(m, axis=-2, keepdims=True) + e)

    def iteration(_: Array, m: Array) -> Array:
        m = m / (jnp.sum(m, axis=-1, keepdims=True) + e)
        return m / (jnp.sum(m, axis=-2, keepdims=True) + e)

    return lax.fori_loop(0, iters - 1, iteration, m)


def _mix(x: Float[Array, "T H D"], fn: Float[Array, "M HD"], eps: float, precision: str) -> Float[Array, "T M"]:
    """Projection of the flattened, normalised streams."""
    flat = rms_norm(x.reshape(x.shape[0], -1), None, eps)
    return float_dot(flat, fn, precision)


def _collapse(weights: Float[Array, "T H"], x: Float[Array, "T H D"]) -> Float[Array, "T D"]:
    """Weighted sum of the streams in order."""
    total = weights[:, 0, None] * x[:, 0]
    for h in range(1, x.shape[1]):
        total = total + weights[:, h, None] * x[:, h]
    return total


def hyper_pre(
    x: Float[Array, "T H D"],
    fn: Float[Array, "M HD"],
    scale: Float[Array, " 3"],
    base: Float[Array, " M"],
    *,
    iters: int,
    eps: float,
    hc_eps: float,
    precision: str,
) -> tuple[Float[Array, "T D"], Float[Array, "T H"], Float[Array, "T H H"]]:
    """Input of a sub-layer and the weights that return its output to the streams.

    Returns the collapsed input `[T, D]`, the output weight of each stream `[T, H]`, and the mixing matrix
    `[T, source, destination]`.
    """
    rows, h, _ = x.shape
    mix = _mix(x, fn, eps, precision)
    pre = jax.nn.sigmoid(mix[:, :h] * scale[0] + base[:h]) + jnp.float32(hc_eps)
    post = 2.0 * jax.nn.sigmoid(mix[:, h : 2 * h] * scale[1] + base[h : 2 * h])
    logits = (mix[:, 2 * h :] * scale[2] + base[2 * h :]).reshape(rows, h, h)
    return _collapse(pre, x), post, sinkhorn(logits, iters, hc_eps)


def hyper_post(
    out: Float[Array, "T D"], x: Float[Array, "T H D"], post: Float[Array, "T H"], mixing: Float[Array, "T H H"]
) -> Float[Array, "T H D"]:
    """New streams: `post_k * out + sum_j mixing[j, k] * x_j`, summed in that order."""
    total = post[:, :, None] * out[:, None, :]
    for j in range(x.shape[1]):
        total = total + mixing[:, j, :, None] * x[:, j, None, :]
    return total


def hyper_head(
    x: Float[Array, "T H D"],
    fn: Float[Array, "H HD"],
    scale: Float[Array, " 1"],
    base: Float[Array, " H"],
    *,
    eps: float,
    hc_eps: float,
    precision: str,
) -> Float[Array, "T D"]:
    """Collapse of the streams before the final norm."""
    weights = jax.nn.sigmoid(_mix(x, fn, eps, precision) * scale[0] + base) + jnp.float32(hc_eps)
    return _collapse(weights, x)
