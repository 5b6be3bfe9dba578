"""Mixture of experts: router, routed experts and the shared expert."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ds4jax.activation import Activation
from ds4jax.model.base import Layer
from ds4jax.ops.linear import Weight, dense
from ds4jax.ops.moe import shared_expert, swiglu
from ds4jax.ops.rows import Live


class SharedExpert(Layer):
    """Weights of the expert that every token passes through."""

    def setup(self) -> None:
        c = self.config
        self.w1 = self.weight("w1", c.moe_intermediate_size, c.hidden_size)
        self.w3 = self.weight("w3", c.moe_intermediate_size, c.hidden_size)
        self.w2 = self.weight("w2", c.hidden_size, c.moe_intermediate_size)

    def __call__(self) -> tuple[Weight, Weight, Weight]:
        return self.w1, self.w3, self.w2


class MoE(Layer):
    """Router, routed experts and the shared expert. `layer` counts decoder layers; the MTP block is number L."""

    layer: int

    def setup(self) -> None:
        c = self.config
        experts, wide = c.n_routed_experts, c.moe_intermediate_size
        self.gate = self.weight("gate", experts, c.hidden_size)
        self.hashed = c.is_hash_layer(self.layer)
        if self.hashed:
            shape = (c.vocab_size, c.num_experts_per_tok)
            self.tid2eid = self.weight("tid2eid", *shape, init=lambda key, shape, dtype: _even_table(shape, experts))
        else:
            self.bias = self.weight("bias", experts, init=nn.initializers.zeros)
        self.w1 = self.weight("w1", experts, wide, c.hidden_size)
        self.w3 = self.weight("w3", experts, wide, c.hidden_size)
        self.w2 = self.weight("w2", experts, c.hidden_size, wide)
        self.shared = SharedExpert(c, self.numerics)

    def route(self, a: Activation, tokens: Array, live: Live) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
        """Expert ids and weights of every row."""
        c = self.config
        ids = jnp.take(self.tid2eid, tokens, axis=0) if self.hashed else None
        return self.op(
            "router",
            live,
            (a, ids),
            (self.gate, None if self.hashed else self.bias),
            top_k=c.num_experts_per_tok,
            scale=c.routed_scaling_factor,
            precision=self.numerics.precision,
        )

    def __call__(self, a: Activation, tokens: Int[Array, " T"], live: Live) -> Float[Array, "T D"]:
        ids, weights = self.route(a, tokens, live)
        return self.op(
            "experts",
            live,
            (a, ids, weights),
            (self.w1, self.w3, self.w2, *self.shared()),
            limit=self.config.swiglu_limit[self.layer],
            shared_limit=self.config.swiglu_limit_shared[self.layer],
            act=self.numerics.act,
            precision=self.numerics.precision,
        )

    def sequence(self, a: Activation, tokens: Int[Array, " T"]) -> tuple[Array, Float[Array, " E"]]:
        """All experts for every row, weighted by zero where not chosen; also the share of rows each expert got."""
        x, live = a.x, Live.all(a.x.shape[0])
        ids, weights = self.route(a, tokens, live)
        chosen = jax.nn.one_hot(ids, self.config.n_routed_experts)
        share = jnp.einsum("tk,tke->te", weights, chosen)
        w1, w3, w2 = dense(self.w1), dense(self.w3), dense(self.w2)
        precision = self.numerics.precision
        gate = jnp.einsum("td,efd->tef", x, w1, precision=precision)
        up = jnp.einsum("td,efd->tef", x, w3, precision=precision)
        hidden = swiglu(gate, up, self.config.swiglu_limit[self.layer]) * share[..., None]
        routed = jnp.einsum("tef,edf->td", hidden, w2, precision=precision)
        limit, act = self.config.swiglu_limit_shared[self.layer], self.numerics.act
        shared = shared_expert(a, *self.shared(), limit=limit, act=act, precision=precision)
        return routed + shared, jnp.mean(chosen, axis=(0, 1))


def _even_table(shape: tuple[int, int], experts: int) -> Int[Array, "V K"]:
    """A token table that spreads tokens evenly; trained models bring their own."""
    token, k = jnp.arange(shape[0], dtype=jnp.int32)[:, None], jnp.arange(shape[1], dtype=jnp.int32)
    return (token + k) % experts
