"""Mixture of experts: router, routed experts and the shared expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ds4jax.ops.linear import Weight, float_dot, matvec
from ds4jax.quants import QTensor

MIN_WEIGHT_SUM = 2.0**-14  # guard of ds4 and llama.cpp against a zero sum; never active with a trained router


def router_scores(x: Float[Array, "T D"], gate: Float[Array, "E D"], *, precision: str) -> Float[Array, "T E"]:
    """`sqrt(softplus(x . gate^T))`, the affinity of every expert."""
    return jnp.sqrt(jnp.logaddexp(float_dot(x, gate, precision), 0.0))


def route(
    x: Float[Array, "T D"],
    ids: Int[Array, "T K"] | None,
    gate: Float[Array, "E D"],
    bias: Float[Array, " E"] | None,
    *,
    top_k: int,
    scale: float,
    precision: str,
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    """Experts of each row and their weights.

    `ids` are given on hash layers; otherwise the `top_k` largest of score + bias are taken, the lower expert first
    on a tie. The weights are the unbiased scores, normalised to sum `scale`.
    """
    scores = router_scores(x, gate, precision=precision)
    if ids is None:
        ranked = scores if bias is None else scores + bias
        ids = lax.top_k(ranked, top_k)[1]
    chosen = jnp.take_along_axis(scores, ids, axis=-1)
    total = jnp.maximum(jnp.sum(chosen, axis=-1, keepdims=True), MIN_WEIGHT_SUM)
    return ids, chosen / total * jnp.float32(scale)


def swiglu(gate: Float[Array, "*s F"], up: Float[Array, "*s F"], limit: float) -> Float[Array, "*s F"]:
    """`silu(gate) * up` with the gate clamped above and `up` on both sides at `limit`; 0 means no clamp."""
    if limit > 0:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(gate) * up


def _take(w: Weight, ids: Int[Array, " K"]) -> Weight:
    return w.take(ids) if isinstance(w, QTensor) else jnp.take(w, ids, axis=0)


def routed_experts(
    x: Float[Array, "T D"],
    ids: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    w1: Weight,
    w3: Weight,
    w2: Weight,
    *,
    limit: float,
    act: str,
    precision: str,
) -> Float[Array, "T D"]:
    """Sum of K SwiGLU experts in the order k = 0 .. K-1; the router weight multiplies before `w2`.

    `w1` (gate) and `w3` (up) are `[E, F, D]`, `w2` (down) is `[E, D, F]`. Rows are taken one by one: each reads only
    its own experts.
    """

    def row(args: tuple[Array, Array, Array]) -> Array:
        xr, chosen, weight = args
        inputs = jnp.broadcast_to(xr, (1, chosen.shape[0], xr.shape[0]))
        gate = matvec(inputs, _take(w1, chosen), act=act, precision=precision)
        up = matvec(inputs, _take(w3, chosen), act=act, precision=precision)
        hidden = swiglu(gate, up, limit) * weight[None, :, None]
        down = matvec(hidden, _take(w2, chosen), act=act, precision=precision)[0]
        total = down[0]
        for k in range(1, down.shape[0]):
            total = total + down[k]
        return total

    if x.shape[0] == 1:
        return row((x[0], ids[0], weights[0]))[None]
    return lax.map(row, (x, ids, weights))


def shared_expert(
    x: Float[Array, "T D"], w1: Weight, w3: Weight, w2: Weight, *, limit: float, act: str, precision: str
) -> Float[Array, "T D"]:
    """The expert every row passes through: `w1`, `w3` `[F, D]`, `w2` `[D, F]`, weight one."""
    gate = matvec(x, w1, act=act, precision=precision)
    up = matvec(x, w3, act=act, precision=precision)
    return matvec(swiglu(gate, up, limit), w2, act=act, precision=precision)
