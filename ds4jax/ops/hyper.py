"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): H residual streams mixed by learned matrices."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ds4jax.activation import Activation
from ds4jax.ops.linear import float_dot
from ds4jax.ops.norm import norm
from ds4jax.ops.sums import ordered_sum, parted_sum


def sigmoid(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`1 / (1 + exp(-x))`, in this form everywhere."""
    return 1.0 / (1.0 + jnp.exp(-x))


def sinkhorn(logits: Float[Array, "T H H"], iters: int, eps: float) -> Float[Array, "T H H"]:
    """Doubly stochastic matrix from logits: row softmax, then alternating normalisation ending on the columns.

    Sums are an `ordered_sum`; a division is a product with the reciprocal of the sum.
    """
    e = jnp.float32(eps)

    def rows(m: Array) -> Array:
        return m * (1.0 / (ordered_sum(m) + e))[..., :, None]

    def columns(m: Array) -> Array:
        return m * (1.0 / (ordered_sum(jnp.swapaxes(m, -2, -1)) + e))[..., None, :]

    exps = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    m = columns(exps * (1.0 / ordered_sum(exps))[..., None] + e)
    return lax.fori_loop(0, iters - 1, lambda _, m: columns(rows(m)), m)


def _mix(x: Float[Array, "T H D"], fn: Float[Array, "M HD"], eps: float, precision: str) -> Float[Array, "T M"]:
    """Projection of the flattened streams, then their RMS normalisation: it is the same factor for every output."""
    flat = x.reshape(x.shape[0], -1)
    mean = parted_sum(flat * flat) * jnp.float32(1 / flat.shape[-1])
    return float_dot(flat, fn, precision) * lax.rsqrt(mean + jnp.float32(eps))[:, None]


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
    pre = sigmoid(mix[:, :h] * scale[0] + base[:h]) + jnp.float32(hc_eps)
    post = 2.0 * sigmoid(mix[:, h : 2 * h] * scale[1] + base[h : 2 * h])
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
    weights = sigmoid(_mix(x, fn, eps, precision) * scale[0] + base) + jnp.float32(hc_eps)
    return _collapse(weights, x)


def hyper_enter(
    x: Float[Array, "T H D"],
    pending: tuple[Float[Array, "T D"], Float[Array, "T H"], Float[Array, "T H H"]] | None,
    fn: Float[Array, "M HD"],
    scale: Float[Array, " 3"],
    base: Float[Array, " M"],
    weight: Float[Array, " D"],
    *,
    iters: int,
    eps: float,
    hc_eps: float,
    act: str,
    precision: str,
) -> tuple[Float[Array, "T H D"], Activation, Float[Array, "T H"], Float[Array, "T H H"]]:
    """From one sub-layer into the next: `hyper_post` of what is pending (None: nothing), `hyper_pre`, `norm`.

    `pending` is the last sub-layer's output `[T, D]` with its weights `[T, H]` and mixing `[T, H, H]`. Returns the new
    streams, the next sub-layer's input, and its weights and mixing.
    """
    if pending is not None:
        out, post, mixing = pending
        x = hyper_post(out, x, post, mixing)
    y, post, mixing = hyper_pre(x, fn, scale, base, iters=iters, eps=eps, hc_eps=hc_eps, precision=precision)
    return x, norm(y, weight, eps=eps, act=act), post, mixing


def hyper_leave(
    x: Float[Array, "T H D"],
    fn: Float[Array, "H HD"],
    scale: Float[Array, " 1"],
    base: Float[Array, " H"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    hc_eps: float,
    act: str,
    precision: str,
) -> Activation:
    """From the streams to the vocabulary head: `hyper_head`, `norm`."""
    return norm(hyper_head(x, fn, scale, base, eps=eps, hc_eps=hc_eps, precision=precision), weight, eps=eps, act=act)
