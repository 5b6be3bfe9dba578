"""Hyper-connections, and the decoder layer that they hold together.

Every layer has two forms. `__call__` is inference: rows of any sequences against the cache. `sequence` is training:
whole sequences from position 0, no cache, differentiable, the same weights and operations.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from ds4jax.model.attention import Attention, Keys
from ds4jax.model.base import Layer, Table
from ds4jax.model.cache import LayerCache, Rows
from ds4jax.model.experts import MoE
from ds4jax.ops.rows import Live


class HyperConnection(Layer):
    """The mixing around one sub-layer."""

    def setup(self) -> None:
        h = self.config.hc_mult
        self.fn = self.weight("fn", (2 + h) * h, h * self.config.hidden_size)
        self.base = self.weight("base", (2 + h) * h, init=nn.initializers.zeros)
        self.scale = self.weight("scale", 3)

    def pre(self, x: Float[Array, "T H D"], live: Live) -> tuple[Array, Array, Array]:
        """Collapsed input, output weights and mixing matrix."""
        c = self.config
        return self.op(
            "hyper_pre",
            live,
            (x,),
            (self.fn, self.scale, self.base),
            iters=c.hc_sinkhorn_iters,
            eps=c.rms_norm_eps,
            hc_eps=c.hc_eps,
            precision=self.numerics.precision,
        )

    def post(self, out: Array, x: Array, post: Array, mixing: Array, live: Live) -> Float[Array, "T H D"]:
        """The streams after the sub-layer."""
        return self.op("hyper_post", live, (out, x, post, mixing))


class HyperHead(Layer):
    """Collapse of the streams before the final norm."""

    def setup(self) -> None:
        h = self.config.hc_mult
        self.fn = self.weight("fn", h, h * self.config.hidden_size)
        self.base = self.weight("base", h, init=nn.initializers.zeros)
        self.scale = self.weight("scale", 1)

    def __call__(self, x: Float[Array, "T H D"], live: Live) -> Float[Array, "T D"]:
        c = self.config
        return self.op(
            "hyper_head",
            live,
            (x,),
            (self.fn, self.scale, self.base),
            eps=c.rms_norm_eps,
            hc_eps=c.hc_eps,
            precision=self.numerics.precision,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """What the training form of a layer hands on besides its streams: `Keys` and the expert shares `[E]`."""

    keys: Keys
    load: Float[Array, " E"]


class DecoderLayer(Layer):
    """Attention and experts, each wrapped in its hyper-connection."""

    layer: int
    ratio: int

    def setup(self) -> None:
        c, num = self.config, self.numerics
        self.hc_attn, self.hc_ffn = HyperConnection(c, num), HyperConnection(c, num)
        self.attn_norm = self.weight("attn_norm", c.hidden_size)
        self.ffn_norm = self.weight("ffn_norm", c.hidden_size)
        self.attn = Attention(c, num, self.ratio)
        self.moe = MoE(c, num, self.layer)

    def __call__(
        self,
        x: Float[Array, "T H D"],
        tokens: Int[Array, " T"],
        rows: Rows,
        cache: LayerCache,
        table: Table,
        frequencies: Array,
        first: int = 0,
    ) -> tuple[Float[Array, "T H D"], LayerCache]:
        live = rows.live
        y, post, mixing = self.hc_attn.pre(x, live)
        out, cache = self.attn(self.normed(y, self.attn_norm, live), rows, cache, table, frequencies, first)
        x = self.hc_attn.post(out, x, post, mixing, live)
        y, post, mixing = self.hc_ffn.pre(x, live)
        out = self.moe(self.normed(y, self.ffn_norm, live), tokens, live)
        return self.hc_ffn.post(out, x, post, mixing, live), cache

    def append(self, x: Float[Array, "T H D"], rows: Rows, cache: LayerCache, table: Table) -> LayerCache:
        """Only what later rows need of these: their raw rows."""
        y, _, _ = self.hc_attn.pre(x, rows.live)
        return self.attn.append(self.normed(y, self.attn_norm, rows.live), rows, cache, table)

    def sequence(
        self,
        x: Float[Array, "B S H D"],
        tokens: Int[Array, "B S"],
        table: Table,
        frequencies: Array,
        earlier: Float[Array, "B S d"] | None = None,
    ) -> tuple[Float[Array, "B S H D"], Aux]:
        batch, s = tokens.shape
        live = Live.all(batch * s)
        x = x.reshape(batch * s, *x.shape[2:])
        y, post, mixing = self.hc_attn.pre(x, live)
        y = self.normed(y, self.attn_norm, live).x.reshape(batch, s, -1)
        out, keys = self.attn.sequence(y, table, frequencies, earlier)
        x = self.hc_attn.post(out.reshape(batch * s, -1), x, post, mixing, live)
        y, post, mixing = self.hc_ffn.pre(x, live)
        out, load = self.moe.sequence(self.normed(y, self.ffn_norm, live), tokens.reshape(-1))
        x = self.hc_ffn.post(out, x, post, mixing, live)
        return x.reshape(batch, s, *x.shape[1:]), Aux(keys, load)
