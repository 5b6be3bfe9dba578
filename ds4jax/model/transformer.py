"""The DeepSeek-V4 model: one forward pass for prefill, decoding and verification, and its training form."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ds4jax.config import CSA_RATIO
from ds4jax.model.base import Layer, Table
from ds4jax.model.cache import Cache, Rows
from ds4jax.model.layers import Aux, DecoderLayer, HyperHead, Residual
from ds4jax.ops.rope import rope_frequencies
from ds4jax.ops.rows import Live


class MTPBlock(Layer):
    """The multi-token-prediction block: one window-only layer over pairs of a stream tensor and the next token.

    The row of the token at position p pairs it with the streams of position p - 1 and predicts position p + 1
    (DeepSeek-V3, arXiv 2412.19437, section 2.2). Its own output streams may stand in for the trunk's to draft on.
    """

    def setup(self) -> None:
        c, num = self.config, self.numerics
        d = c.hidden_size
        self.e_proj, self.h_proj = self.weight("e_proj", d, d), self.weight("h_proj", d, d)
        self.enorm, self.hnorm = self.weight("enorm", d), self.weight("hnorm", d)
        self.norm_weight = self.weight("norm", d)
        self.hc_head = HyperHead(c, num)
        self.layer = DecoderLayer(c, num, c.num_hidden_layers, 0)

    def inputs(
        self, embedded: Float[Array, "T D"], streams: Float[Array, "T H D"], live: Live
    ) -> Float[Array, "T H D"]:
        """Input streams: the projected token, the same for all streams, plus every projected stream."""
        e = self.linear(self.normed(embedded, self.enorm, live), self.e_proj, live)
        t, h, d = streams.shape
        every = Live.of(jnp.repeat(live.mask, h))
        flat = self.normed(streams.reshape(t * h, d), self.hnorm, every)
        return e[:, None] + self.linear(flat, self.h_proj, every).reshape(t, h, d)

    def logits(self, streams: Float[Array, "T H D"], head: Any, live: Live) -> Float[Array, "T V"]:
        """Logits of the token after each row, by the model's head `[V, D]`.

        If the parameters give the block a `head` of its own, it ranks some tokens only, those with a `place` among its
        rows. All others get -inf: they are never drafted, and everything else about a draft stays as it is.
        """
        hidden = self.hc_head(streams, self.norm_weight, live)
        if not self.has_variable("params", "head"):
            return self.linear(hidden, head, live)
        ranked = self.linear(hidden, self.get_variable("params", "head"), live)
        return jnp.take(ranked, self.get_variable("params", "place"), axis=1, mode="fill", fill_value=-jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequence:
    """Result of the training form over `[B, S]` tokens.

    streams: `[B, S, H, D]`, input of `logits` and of the next draft depth.
    index_loss: loss of the indexers, their mean.
    load: share of the rows that each expert got, `[layers, E]`.
    keys: raw rows `[B, S, d]` of the last layer run.
    """

    streams: Float[Array, "B S H D"]
    index_loss: Float[Array, ""]
    load: Float[Array, "layers E"]
    keys: Float[Array, "B S d"]


class DeepSeekV4(Layer):
    """DeepSeek-V4 over rows of B sequences.

    Use: `DeepSeekV4(config, numerics).apply({"params": params}, tokens, cache, start, count)`; other methods through
    `method="logits"` and so on. Row `(b, r)` has position `start[b] + r` and sees what a lone token there would see,
    the earlier rows of its own call included.
    """

    def setup(self) -> None:
        c, num = self.config, self.numerics
        self.embed = self.weight("embed", c.vocab_size, c.hidden_size, init=nn.initializers.normal(1.0))
        self.layers = [
            DecoderLayer(c, num, index, ratio, name=f"layers_{index}") for index, ratio in enumerate(c.compress_ratios)
        ]
        self.hc_head = HyperHead(c, num)
        self.norm_weight = self.weight("norm", c.hidden_size)
        self.head = self.weight("head", c.vocab_size, c.hidden_size)
        if c.has_mtp:
            self.mtp = MTPBlock(c, num)

    def _tables(self, position: Int[Array, " T"], live: Live) -> dict[bool, tuple[Table, Float[Array, " r2"]]]:
        """Rotation tables and frequencies, for window-only (False) and compressed (True) layers."""
        kinds = sorted({ratio > 0 for ratio in self.config.compress_ratios} | {False})
        frequencies = {kind: jnp.asarray(rope_frequencies(self.config, kind)) for kind in kinds}
        return {kind: (self.op("rope_table", live, (position,), (f,)), f) for kind, f in frequencies.items()}

    def _embedded(self, tokens: Int[Array, " T"], live: Live) -> Float[Array, "T D"]:
        return self.op("embed", live, (tokens,), (self.embed,))

    def _streams(self, tokens: Int[Array, " T"], live: Live) -> Float[Array, "T H D"]:
        embedded = self._embedded(tokens, live)
        return jnp.broadcast_to(embedded[:, None], (embedded.shape[0], self.config.hc_mult, embedded.shape[1]))

    def __call__(
        self, tokens: Int[Array, "B R"], cache: Cache, start: Int[Array, " B"], count: Int[Array, " B"]
    ) -> tuple[Float[Array, "B R H D"], Cache]:
        """Runs the trunk.

        Args:
            tokens: ids; those at or beyond `count[b]` are absent: they cost nothing and are not stored.
            cache: holds positions below `start`.
            start: first position of each sequence.
            count: rows that exist, 0 to R.

        Returns:
            Streams after the last layer `[B, R, H, D]` (unspecified for absent rows), and the cache with the rows
            stored; its committed length is unchanged.
        """
        batch, r = tokens.shape
        rows = Rows.of(start, count, r)
        flat = tokens.reshape(-1)
        tables = self._tables(rows.position, rows.live)
        x, layers = Residual(self._streams(flat, rows.live)), []
        for layer, state in zip(self.layers, cache.layers, strict=True):
            x, state = layer(x, flat, rows, state, *tables[layer.ratio > 0])
            layers.append(state)
        streams = self.layers[-1].finish(x, rows.live)
        return streams.reshape(batch, r, *streams.shape[1:]), dataclasses.replace(cache, layers=tuple(layers))

    def logits(self, streams: Float[Array, "B R H D"], live: Bool[Array, "B R"]) -> Float[Array, "B R V"]:
        """Logits of the next token from the trunk's streams."""
        batch, r, h, d = streams.shape
        flat, alive = streams.reshape(batch * r, h, d), Live.of(live.reshape(-1))
        hidden = self.hc_head(flat, self.norm_weight, alive)
        return self.linear(hidden, self.head, alive).reshape(batch, r, -1)

    def draft(
        self,
        tokens: Int[Array, "B R"],
        streams: Float[Array, "B R H D"],
        cache: Cache,
        start: Int[Array, " B"],
        count: Int[Array, " B"],
    ) -> tuple[Float[Array, "B R V"], Float[Array, "B R H D"], Cache]:
        """Runs the MTP block: logits of the token after each row, the block's streams, and the cache.

        Row `(b, r)` is the token at position `start[b] + r`, paired with `streams[b, r]`, those of the position before
        it (the trunk's, or this block's own when drafting on).
        """
        batch, r = tokens.shape
        pairs, rows, flat = self._pairs(tokens, streams, start, count)
        table, frequencies = self._tables(rows.position, rows.live)[False]
        assert cache.mtp is not None, "the cache was made for a model without an MTP block"
        x, state = self.mtp.layer(Residual(pairs), flat, rows, cache.mtp, table, frequencies, first=1)
        own = self.mtp.layer.finish(x, rows.live)
        logits = self.mtp.logits(own, self.head, rows.live)
        return logits.reshape(batch, r, -1), own.reshape(streams.shape), dataclasses.replace(cache, mtp=state)

    def draft_prefill(
        self,
        tokens: Int[Array, "B R"],
        streams: Float[Array, "B R H D"],
        cache: Cache,
        start: Int[Array, " B"],
        count: Int[Array, " B"],
    ) -> Cache:
        """Stores the MTP rows of known tokens without running the block: a row depends on its own pair alone."""
        x, rows, _ = self._pairs(tokens, streams, start, count)
        table, _ = self._tables(rows.position, rows.live)[False]
        assert cache.mtp is not None, "the cache was made for a model without an MTP block"
        return dataclasses.replace(cache, mtp=self.mtp.layer.append(x, rows, cache.mtp, table))

    def _pairs(
        self, tokens: Int[Array, "B R"], streams: Float[Array, "B R H D"], start: Array, count: Array
    ) -> tuple[Float[Array, "T H D"], Rows, Int[Array, " T"]]:
        rows, flat = Rows.of(start, count, tokens.shape[1]), tokens.reshape(-1)
        pairs = streams.reshape(flat.shape[0], *streams.shape[2:])
        return self.mtp.inputs(self._embedded(flat, rows.live), pairs, rows.live), rows, flat

    def sequence(self, tokens: Int[Array, "B S"]) -> Sequence:
        """Training form of the trunk: whole sequences from position 0, differentiable."""
        (batch, s), live = tokens.shape, Live.all(tokens.size)
        tables = self._tables(jnp.tile(jnp.arange(s, dtype=jnp.int32), batch), live)
        x = self._streams(tokens.reshape(-1), live).reshape(batch, s, self.config.hc_mult, -1)
        seen: list[Aux] = []
        for layer in self.layers:
            x, aux = layer.sequence(x, tokens, *tables[layer.ratio > 0])
            seen.append(aux)
        losses = [aux.keys.index_loss for layer, aux in zip(self.layers, seen, strict=True) if layer.ratio == CSA_RATIO]
        loss = sum(losses, jnp.zeros(())) / max(len(losses), 1)
        return Sequence(x, loss, jnp.stack([aux.load for aux in seen]), seen[-1].keys.kv)

    def draft_sequence(
        self,
        tokens: Int[Array, "B S"],
        streams: Float[Array, "B S H D"],
        start: int,
        earlier: Float[Array, "B S d"] | None = None,
    ) -> Sequence:
        """Training form of the MTP block: row s pairs `tokens[:, s]` at position `start + s` with the streams of the
        position before it, `streams[:, s]`.

        `earlier` are the raw rows of earlier positions when the streams are the block's own (a deeper draft).
        """
        (batch, s), live = tokens.shape, Live.all(tokens.size)
        position = jnp.tile(jnp.arange(start, start + s, dtype=jnp.int32), batch)
        table, frequencies = self._tables(position, live)[False]
        flat = streams.reshape(batch * s, *streams.shape[2:])
        x = self.mtp.inputs(self._embedded(tokens.reshape(-1), live), flat, live).reshape(streams.shape)
        x, aux = self.mtp.layer.sequence(x, tokens, table, frequencies, earlier)
        return Sequence(x, jnp.zeros(()), aux.load[None], aux.keys.kv)

    def draft_logits(self, streams: Float[Array, "B S H D"]) -> Float[Array, "B S V"]:
        """Logits from the MTP block's streams, for training."""
        batch, s, h, d = streams.shape
        live = Live.all(batch * s)
        return self.mtp.logits(streams.reshape(batch * s, h, d), self.head, live).reshape(batch, s, -1)

    def initialise(self, tokens: Int[Array, "B S"]) -> None:
        """Touches every parameter; for `DeepSeekV4.init(key, tokens, method="initialise")`."""
        run = self.sequence(tokens)
        self.logits(run.streams, jnp.ones(tokens.shape, bool))
        if self.config.has_mtp:
            self.draft_logits(self.draft_sequence(tokens, run.streams, 1).streams)
