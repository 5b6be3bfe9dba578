"""Mixture of experts: router, routed experts and the shared expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ds4jax.activation import Activation
from ds4jax.ops.linear import Weight, float_dot, matvec, terms
from ds4jax.ops.quantise import quantise
from ds4jax.ops.sums import joint_sum, ordered_sum
from ds4jax.quants import QTensor

MIN_WEIGHT_SUM = 2.0**-14  # guard of ds4 and llama.cpp against a zero sum; never active with a trained router


def router_scores(x: Float[Array, "T D"], gate: Float[Array, "E D"], *, precision: str) -> Float[Array, "T E"]:
    """`sqrt(softplus(x . gate^T))`, the affinity of every expert; softplus is `max(z, 0) + log1p(exp(-|z|))`."""
    z = float_dot(x, gate, precision)
    return jnp.sqrt(jnp.maximum(z, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(z))))


def route(
    a: Activation,
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
    on a tie. The weights are the unbiased scores, normalised to sum `scale`: each times one factor.
    """
    scores = router_scores(a.x, gate, precision=precision)
    if ids is None:
        ranked = scores if bias is None else scores + bias
        ids = lax.top_k(ranked, top_k)[1]
    chosen = jnp.take_along_axis(scores, ids, axis=-1)
    factor = jnp.float32(scale) / jnp.maximum(ordered_sum(chosen), MIN_WEIGHT_SUM)
    return ids, chosen * factor[:, None]


def swiglu(gate: Float[Array, "*s F"], up: Float[Array, "*s F"], limit: float) -> Float[Array, "*s F"]:
    """`silu(gate) * up` with the gate clamped above and `up` on both sides at `limit`; 0 means no clamp."""
    if limit > 0:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate / (1.0 + jnp.exp(-gate)) * up


def _take(w: Weight, ids: Int[Array, " K"]) -> Weight:
    return w.take(ids) if isinstance(w, QTensor) else jnp.take(w, ids, axis=0)


def _sum_of_products(hidden: Activation, w: Weight, precision: str) -> Float[Array, " N"]:
    """`sum_k hidden_k . w_k^T` for `hidden [1, K, F]`, `w [K, N, F]`: quantised, the `joint_sum` of the terms of all k;
    with floats, products added in the order of k."""
    parts = terms(hidden, w) if isinstance(w, QTensor) else None
    if parts is not None:
        return joint_sum(parts[0])
    products = float_dot(hidden.x, w, precision)[0]
    total = products[0]
    for k in range(1, products.shape[0]):
        total = total + products[k]
    return total


def routed_experts(
    a: Activation,
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
    """Sum of K SwiGLU experts; the router weight multiplies before `w2`.

    `w1` (gate) and `w3` (up) are `[E, F, D]`, `w2` (down) is `[E, D, F]`. Rows are taken one by one: each reads only
    its own experts.
    """
    top_k = ids.shape[1]

    def row(args: tuple[Activation, Array, Array]) -> Array:
        one, chosen, weight = args
        inputs = jax.tree.map(lambda v: jnp.broadcast_to(v, (1, top_k, *v.shape)), one)
        gate = matvec(inputs, _take(w1, chosen), precision=precision)
        up = matvec(inputs, _take(w3, chosen), precision=precision)
        hidden = swiglu(gate, up, limit) * weight[None, :, None]
        return _sum_of_products(quantise(hidden, act=act), _take(w2, chosen), precision)

    if ids.shape[0] == 1:
        return row(jax.tree.map(lambda v: v[0], (a, ids, weights)))[None]
    return lax.map(row, (a, ids, weights))


def shared_expert(
    a: Activation, w1: Weight, w3: Weight, w2: Weight, *, limit: float, act: str, precision: str
) -> Float[Array, "T D"]:
    """The expert every row passes through: `w1`, `w3` `[F, D]`, `w2` `[D, F]`, weight one."""
    hidden = swiglu(matvec(a, w1, precision=precision), matvec(a, w3, precision=precision), limit)
    return matvec(quantise(hidden, act=act), w2, precision=precision)


def experts(
    a: Activation,
    ids: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    w1: Weight,
    w3: Weight,
    w2: Weight,
    shared_w1: Weight,
    shared_w3: Weight,
    shared_w2: Weight,
    *,
    limit: float,
    shared_limit: float,
    act: str,
    precision: str,
) -> Float[Array, "T D"]:
    """The sum of the routed experts plus the shared expert: weights as in `routed_experts` and `shared_expert`."""
    settings = {"act": act, "precision": precision}
    routed = routed_experts(a, ids, weights, w1, w3, w2, limit=limit, **settings)
    return routed + shared_expert(a, shared_w1, shared_w3, shared_w2, limit=shared_limit, **settings)
