"""Hyper-connections, and the decoder layer that they hold together.

Every layer has two forms. `__call__` is inference: rows of any sequences against the cache. `sequence` is training:
whole sequences from position 0, no cache, differentiable, the same weights and operations.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from ds4jax.activation import Activation
from ds4jax.model.attention import Attention, Keys
from ds4jax.model.base import Layer, Table
from ds4jax.model.cache import LayerCache, Rows
from ds4jax.model.experts import MoE
from ds4jax.ops.rows import Live


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """The residual streams `[T, H, D]`, and what is still to be returned to them (None: nothing).

    pending: output `[T, D]` of the last sub-layer, its weights `[T, H]` and the mixing `[T, H, H]`. The next sub-layer
        returns it to the streams and reads them in one go.
    """

    streams: Float[Array, "T H D"]
    pending: tuple[Float[Array, "T D"], Float[Array, "T H"], Float[Array, "T H H"]] | None = None


class HyperConnection(Layer):
    """The mixing around one sub-layer."""

    def setup(self) -> None:
        h = self.config.hc_mult
        self.fn = self.weight("fn", (2 + h) * h, h * self.config.hidden_size)
        self.base = self.weight("base", (2 + h) * h, init=nn.initializers.zeros)
        self.scale = self.weight("scale", 3)

    def enter(
        self, x: Residual, weight: Float[Array, " D"], live: Live
    ) -> tuple[Float[Array, "T H D"], Activation, Float[Array, "T H"], Float[Array, "T H H"]]:
        """The streams with nothing pending, the sub-layer's normed input, its output weights and mixing matrix."""
        c = self.config
        return self.op(
            "hyper_enter",
            live,
            (x.streams, x.pending),
            (self.fn, self.scale, self.base, weight),
            iters=c.hc_sinkhorn_iters,
            eps=c.rms_norm_eps,
            hc_eps=c.hc_eps,
            act=self.numerics.act,
            precision=self.numerics.precision,
        )


class HyperHead(Layer):
    """Collapse of the streams and the final norm."""

    def setup(self) -> None:
        h = self.config.hc_mult
        self.fn = self.weight("fn", h, h * self.config.hidden_size)
        self.base = self.weight("base", h, init=nn.initializers.zeros)
        self.scale = self.weight("scale", 1)

    def __call__(self, streams: Float[Array, "T H D"], weight: Float[Array, " D"], live: Live) -> Activation:
        """`weight` is that of the norm."""
        c = self.config
        return self.op(
            "hyper_leave",
            live,
            (streams,),
            (self.fn, self.scale, self.base, weight),
            eps=c.rms_norm_eps,
            hc_eps=c.hc_eps,
            act=self.numerics.act,
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
        x: Residual,
        tokens: Int[Array, " T"],
        rows: Rows,
        cache: LayerCache,
        table: Table,
        frequencies: Array,
        first: int = 0,
    ) -> tuple[Residual, LayerCache]:
        streams, a, post, mixing = self.hc_attn.enter(x, self.attn_norm, rows.live)
        out, cache = self.attn(a, rows, cache, table, frequencies, first)
        x = Residual(streams, (out, post, mixing))
        streams, a, post, mixing = self.hc_ffn.enter(x, self.ffn_norm, rows.live)
        return Residual(streams, (self.moe(a, tokens, rows.live), post, mixing)), cache

    def finish(self, x: Residual, live: Live) -> Float[Array, "T H D"]:
        """The streams with nothing pending."""
        if x.pending is None:
            return x.streams
        out, post, mixing = x.pending
        return self.op("hyper_post", live, (out, x.streams, post, mixing))

    def append(self, streams: Float[Array, "T H D"], rows: Rows, cache: LayerCache, table: Table) -> LayerCache:
        """Only what later rows need of these: their raw rows."""
        _, a, _, _ = self.hc_attn.enter(Residual(streams), self.attn_norm, rows.live)
        return self.attn.append(a, rows, cache, table)

    def sequence(
        self,
        x: Float[Array, "B S H D"],
        tokens: Int[Array, "B S"],
        table: Table,
        frequencies: Array,
        earlier: Float[Array, "B S d"] | None = None,
    ) -> tuple[Float[Array, "B S H D"], Aux]:
        batch, s = tokens.shape
        live, residual = Live.all(batch * s), Residual(x.reshape(batch * s, *x.shape[2:]))
        streams, a, post, mixing = self.hc_attn.enter(residual, self.attn_norm, live)
        out, keys = self.attn.sequence(a.x.reshape(batch, s, -1), table, frequencies, earlier)
        residual = Residual(streams, (out.reshape(batch * s, -1), post, mixing))
        streams, a, post, mixing = self.hc_ffn.enter(residual, self.ffn_norm, live)
        out, load = self.moe.sequence(a, tokens.reshape(-1))
        return self.finish(Residual(streams, (out, post, mixing)), live).reshape(x.shape), Aux(keys, load)
