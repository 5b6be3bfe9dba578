"""Attention with its compressors and indexer.

Every layer has two forms. `__call__` is inference: rows of any sequences against the cache. `sequence` is training:
whole sequences from position 0, no cache, differentiable, the same weights and operations.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ds4jax.activation import Activation
from ds4jax.config import CSA_RATIO
from ds4jax.model.base import Layer, Table
from ds4jax.model.cache import CompressorCache, LayerCache, Rows
from ds4jax.ops.attention import attention_sequence, index_query, index_scores
from ds4jax.ops.compress import compress_sequence
from ds4jax.ops.rope import kv_norm_rope, unrotate
from ds4jax.ops.rows import Live


class Compressor(Layer):
    """Pools `ratio` tokens into a row of `width` features."""

    ratio: int
    width: int
    simulate: str

    def setup(self) -> None:
        both = self.width * (2 if self.ratio == CSA_RATIO else 1)
        self.wkv = self.weight("wkv", both, self.config.hidden_size)
        self.wgate = self.weight("wgate", both, self.config.hidden_size)
        self.ape = self.weight("ape", self.ratio, both, init=nn.initializers.zeros)
        self.norm_weight = self.weight("norm", self.width)

    def __call__(
        self, a: Activation, rows: Rows, cache: CompressorCache, frequencies: Array, *others: Any
    ) -> tuple[tuple[Float[Array, "T _"], ...], CompressorCache]:
        """Stores the projections of every row and the compressed rows that these complete.

        `others` are weights that read the same input; their products are returned.
        """
        results, (values, gates) = self.op(
            "linear_store",
            rows.live,
            (a, rows.sequence, rows.position % cache.values.shape[1]),
            (others, (self.wkv, self.wgate), (cache.values, cache.gates)),
            precision=self.numerics.precision,
        )
        emitted = self._windows(rows, cache.rows.shape[0])
        stored = self.op(
            "compress_store",
            emitted.live,
            (emitted.position, emitted.sequence),
            (values, gates, self.ape, self.norm_weight, frequencies, cache.rows),
            ratio=self.ratio,
            eps=self.config.rms_norm_eps,
            simulate=self.simulate,
        )
        return results, CompressorCache(values, gates, stored)

    def _windows(self, rows: Rows, batch: int) -> Rows:
        """Windows that the rows of a call complete; `position` holds the window index."""
        per_call = rows.position.shape[0] // batch
        start = rows.position.reshape(batch, per_call)[:, 0]
        end = start + jnp.sum(rows.live.mask.reshape(batch, per_call), axis=1, dtype=jnp.int32)
        most = -(-per_call // self.ratio)
        return Rows.of(start // self.ratio, end // self.ratio - start // self.ratio, most)

    def sequence(self, x: Float[Array, "B S D"], frequencies: Array) -> Float[Array, "B n e"]:
        """All rows of whole sequences."""
        live = Live.all(x.shape[0] * x.shape[1])
        flat = self.quantised(x.reshape(-1, x.shape[-1]), live)
        value, gate = self.linears(flat, (self.wkv, self.wgate), live)
        return compress_sequence(
            value.reshape(*x.shape[:2], -1),
            gate.reshape(*x.shape[:2], -1),
            self.ape,
            self.norm_weight,
            frequencies,
            ratio=self.ratio,
            eps=self.config.rms_norm_eps,
            simulate=self.simulate,
        )


class Indexer(Layer):
    """Chooses which compressed rows a CSA layer attends to."""

    def setup(self) -> None:
        c = self.config
        self.wq_b = self.weight("wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        self.w = self.weight("w", c.index_n_heads, c.hidden_size)
        simulate = "index" if self.numerics.sim_index else "none"
        self.compressor = Compressor(c, self.numerics, CSA_RATIO, c.index_head_dim, simulate)

    def asked(self, rows: Rows) -> Bool[Array, " T"]:
        """Rows that see more compressed rows than are chosen: only their queries matter."""
        return rows.visible(CSA_RATIO) > self.config.index_topk

    def __call__(
        self,
        a: Activation,
        q: Float[Array, "T Nd"],
        rows: Rows,
        cache: CompressorCache,
        table: Table,
        frequencies: Array,
    ) -> tuple[Int[Array, "T k"], CompressorCache]:
        """`q` are products of `wq_b`, for the rows that are `asked` for them."""
        c = self.config
        (weights,), cache = self.compressor(a, rows, cache, frequencies, self.w)
        q = q.reshape(-1, c.index_n_heads, c.index_head_dim)
        ids = self.op(
            "indexer",
            rows.live,
            (q, *table, weights, rows.sequence, rows.visible(CSA_RATIO)),
            (cache.rows,),
            top_k=c.index_topk,
            simulate=self.numerics.sim_index,
            precision=self.numerics.precision,
        )
        return ids, cache

    def sequence(
        self, x: Float[Array, "B S D"], latent: Float[Array, "B S R"], table: Table, frequencies: Array
    ) -> Float[Array, "B S n"]:
        """Scores of every compressed row for every position, not masked."""
        c, (batch, s, _) = self.config, x.shape
        keys = self.compressor.sequence(x, frequencies)
        live = Live.all(batch * s)
        q = self.linear(self.quantised(latent.reshape(batch * s, -1), live), self.wq_b, live)
        q = q.reshape(batch * s, c.index_n_heads, c.index_head_dim)
        q = index_query(q, *table, simulate=self.numerics.sim_index)
        weights = self.linear(self.quantised(x.reshape(batch * s, -1), live), self.w, live)

        def score(q: Array, weights: Array, keys: Array) -> Array:
            return index_scores(q, weights, jnp.broadcast_to(keys, (s, *keys.shape)), self.numerics.precision)

        split = (batch, s, c.index_n_heads)
        return jax.vmap(score)(q.reshape(*split, -1), weights.reshape(split), keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
    """What the training form of an attention layer hands on.

    kv: raw rows `[B, S, d]`. index_loss: KL divergence of the indexer from the attention it should predict, mean
    over positions that see a row; zero without an indexer.
    """

    kv: Float[Array, "B S d"]
    index_loss: Float[Array, ""]


class Attention(Layer):
    """Multi-query attention with a low-rank query, one shared key-value row, and a grouped low-rank output."""

    ratio: int

    def setup(self) -> None:
        c = self.config
        wide = c.num_attention_heads * c.head_dim
        self.wq_a = self.weight("wq_a", c.q_lora_rank, c.hidden_size)
        self.q_norm = self.weight("q_norm", c.q_lora_rank)
        self.wq_b = self.weight("wq_b", wide, c.q_lora_rank)
        self.wkv = self.weight("wkv", c.head_dim, c.hidden_size)
        self.kv_norm = self.weight("kv_norm", c.head_dim)
        self.sink = self.weight("sink", c.num_attention_heads, init=nn.initializers.zeros)
        self.wo_a = self.weight("wo_a", c.o_groups * c.o_lora_rank, wide // c.o_groups)
        self.wo_b = self.weight("wo_b", c.hidden_size, c.o_groups * c.o_lora_rank)
        if self.ratio:
            simulate = "kv" if self.numerics.sim_kv else "none"
            self.compressor = Compressor(c, self.numerics, self.ratio, c.head_dim, simulate)
        if self.ratio == CSA_RATIO:
            self.indexer = Indexer(c, self.numerics)

    def project(
        self, a: Activation, live: Live, table: Table, others: tuple[Any, ...] = (), wanted: tuple[Array, ...] = ()
    ) -> tuple[Activation, Float[Array, "T N d"], Float[Array, "T d"], list[Float[Array, "T _"]]]:
        """The normed query latent, the finished queries, the raw rows to finish, and products of the latent.

        `others` are weights that read the latent too, `wanted` their masks of rows (`ops.linear.linear`). They share
        the queries' launch, and come first, because more waits for them. Compressors have launches of their own: on a
        GPU they run beside this, which is longer.
        """
        c = self.config
        low, kv = self.linears(a, (self.wq_a, self.wkv), live)
        latent = self.normed(low, self.q_norm, live)
        *products, q = self.linears(latent, (*others, self.wq_b), live, wanted)
        q = q.reshape(-1, c.num_attention_heads, c.head_dim)
        return latent, self.op("q_norm_rope", live, (q, *table), eps=c.rms_norm_eps), kv, products

    def keys(self, kv: Float[Array, "T d"], rows: Rows, cache: LayerCache, table: Table) -> LayerCache:
        """Finishes projected raw rows and stores them."""
        raw = self.op(
            "kv_store",
            rows.live,
            (kv, *table, rows.sequence, rows.position % cache.raw.shape[1]),
            (self.kv_norm, cache.raw),
            eps=self.config.rms_norm_eps,
            simulate=self.numerics.sim_kv,
        )
        return dataclasses.replace(cache, raw=raw)

    def output(self, a: Activation, live: Live) -> Float[Array, "T D"]:
        """Projects heads in groups `[T, G, N d / G]`, whose rotation has been taken back."""
        low = self.op("grouped_linear", live, (a,), (self.wo_a,), precision=self.numerics.precision)
        return self.linear(self.quantised(low, live), self.wo_b, live)

    def append(self, a: Activation, rows: Rows, cache: LayerCache, table: Table) -> LayerCache:
        """Stores the raw rows alone."""
        return self.keys(self.linear(a, self.wkv, rows.live), rows, cache, table)

    def __call__(
        self, a: Activation, rows: Rows, cache: LayerCache, table: Table, frequencies: Array, first: int = 0
    ) -> tuple[Float[Array, "T D"], LayerCache]:
        """`first` is the lowest position that holds a raw row: 1 for the MTP block, whose rows need a predecessor."""
        c = self.config
        csa = self.ratio == CSA_RATIO
        index = ((self.indexer.wq_b,), (self.indexer.asked(rows),)) if csa else ()
        _, q, kv, products = self.project(a, rows.live, table, *index)
        cache = self.keys(kv, rows, cache, table)
        ids, visible, compressed = None, None, None
        if self.ratio:
            assert cache.compressor is not None, "a compressed layer needs a compressor cache"
            _, state = self.compressor(a, rows, cache.compressor, frequencies)
            cache, compressed = dataclasses.replace(cache, compressor=state), state.rows
            visible = rows.visible(self.ratio)
        if csa:
            assert cache.indexer is not None, "a CSA layer needs an indexer cache"
            ids, state = self.indexer(a, products[0], rows, cache.indexer, table, frequencies)
            cache, visible = dataclasses.replace(cache, indexer=state), None
        heads = self.op(
            "attention",
            rows.live,
            (q, *table, rows.position, rows.sequence, ids, visible),
            (cache.raw, compressed, self.sink),
            window=c.sliding_window,
            first=first,
            groups=c.o_groups,
            act=self.numerics.act,
            precision=self.numerics.precision,
        )
        return self.output(heads, rows.live), cache

    def sequence(
        self, x: Float[Array, "B S D"], table: Table, frequencies: Array, earlier: Float[Array, "B S d"] | None = None
    ) -> tuple[Float[Array, "B S D"], Keys]:
        """Whole sequences; `earlier` replaces the raw rows of earlier positions (chained drafts)."""
        c, (batch, s, _) = self.config, x.shape
        live = Live.all(batch * s)
        latent, q, kv, _ = self.project(self.quantised(x.reshape(batch * s, -1), live), live, table)
        kv = kv_norm_rope(kv, *table, self.kv_norm, eps=c.rms_norm_eps, simulate=self.numerics.sim_kv)
        kv = kv.reshape(batch, s, -1)
        compressed, selected = jnp.zeros((batch, 0, c.head_dim)), jnp.zeros((batch, s, 0), bool)
        scores = None
        if self.ratio:
            compressed = self.compressor.sequence(x, frequencies)
            window = jnp.arange(compressed.shape[1])
            visible = jnp.broadcast_to(
                window < ((jnp.arange(s) + 1) // self.ratio)[:, None], (batch, s, window.shape[0])
            )
            selected = visible
            if self.ratio == CSA_RATIO:
                # The indexer learns from its own loss only, and the trunk not from it.
                inputs = jax.lax.stop_gradient((x, latent.x.reshape(batch, s, -1)))
                scores = self.indexer.sequence(*inputs, table, frequencies)
                selected = select(scores, visible, c.index_topk)
        o, row_scores = attention_sequence(
            q.reshape(batch, s, c.num_attention_heads, -1),
            kv if earlier is None else earlier,
            kv,
            compressed,
            selected,
            self.sink,
            window=c.sliding_window,
            precision=self.numerics.precision,
        )
        o = o.reshape(batch * s, c.num_attention_heads, -1)
        a = unrotate(o, *table, groups=c.o_groups, act=self.numerics.act)
        out = self.output(a, live).reshape(batch, s, -1)
        loss = jnp.zeros(()) if scores is None else index_loss(scores, row_scores, visible)
        return out, Keys(kv, loss)


def select(scores: Float[Array, "B S n"], visible: Bool[Array, "B S n"], top_k: int) -> Bool[Array, "B S n"]:
    """The `top_k` best visible rows of each position, the lower index first on a tie."""
    masked = jnp.where(visible, scores, -jnp.inf)
    ids = jax.lax.top_k(masked, min(top_k, scores.shape[-1]))[1]
    picked = jnp.zeros(scores.shape, bool)
    picked = jnp.put_along_axis(picked, ids, True, axis=-1, inplace=False)
    return picked & visible


def index_loss(
    scores: Float[Array, "B S n"], row_scores: Float[Array, "B S N n"], visible: Bool[Array, "B S n"]
) -> Float[Array, ""]:
    """KL divergence from the head-averaged attention over visible rows to the indexer's softmax (DeepSeek-V3.2)."""
    attention = jax.nn.softmax(jnp.where(visible[:, :, None], row_scores, -1e30), axis=-1)
    target = jax.lax.stop_gradient(jnp.mean(attention, axis=2))
    log_p = jax.nn.log_softmax(jnp.where(visible, scores, -1e30), axis=-1)
    divergence = jnp.sum(jnp.where(visible, target * (jnp.log(target + 1e-20) - log_p), 0.0), axis=-1)
    sees = jnp.any(visible, axis=-1)
    return jnp.sum(jnp.where(sees, divergence, 0.0)) / jnp.maximum(jnp.sum(sees, dtype=jnp.float32), 1.0)
