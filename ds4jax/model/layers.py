"""Layers of DeepSeek-V4 over T rows: hyper-connections, attention with its compressors and indexer, experts.

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

from ds4jax import ops
from ds4jax.config import ModelConfig, Numerics
from ds4jax.model.cache import CompressorCache, LayerCache, Rows, write
from ds4jax.ops.attention import attention_sequence, index_query, index_scores
from ds4jax.ops.compress import CSA_RATIO, compress_sequence
from ds4jax.ops.linear import dense
from ds4jax.ops.moe import swiglu
from ds4jax.ops.rows import Live

Table = tuple[Float[Array, "T r2"], Float[Array, "T r2"]]


class Layer(nn.Module):
    """What all layers share: sizes, numerics, and parameters that may be arrays or QTensors."""

    config: ModelConfig
    numerics: Numerics

    def weight(self, name: str, *shape: int, init: Any = None) -> Any:
        """A parameter as stored; float32, drawn by `init`, where the module is initialised instead of loaded."""
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        if init is None:
            init = (
                nn.initializers.ones
                if len(shape) == 1
                else nn.initializers.variance_scaling(1.0, "fan_in", "normal", -1, -2)
            )
        return self.param(name, init, shape, jnp.float32)

    def op(self, name: str, live: Live, rows: tuple[Any, ...], shared: tuple[Any, ...] = (), **settings: Any) -> Any:
        """`ops.call` with this module's numerics."""
        return ops.call(name, self.numerics, live, rows, shared, **settings)

    def linear(self, x: Float[Array, "T K"], w: Any, live: Live) -> Float[Array, "T N"]:
        """One projection."""
        return self.op("linear", live, (x,), (w,), act=self.numerics.act, precision=self.numerics.precision)

    def normed(self, x: Float[Array, "T D"], weight: Float[Array, " D"], live: Live) -> Float[Array, "T D"]:
        """Weighted RMS norm."""
        return self.op("rms_norm", live, (x,), (weight,), eps=self.config.rms_norm_eps)


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
        self, x: Float[Array, "T D"], rows: Rows, cache: CompressorCache, frequencies: Array
    ) -> CompressorCache:
        """Stores the projections of every row and the compressed rows that these complete."""
        place = rows.position % cache.values.shape[1]
        values = write(cache.values, rows.sequence, place, rows.live, self.linear(x, self.wkv, rows.live))
        gates = write(cache.gates, rows.sequence, place, rows.live, self.linear(x, self.wgate, rows.live))
        emitted = self._windows(rows, cache.rows.shape[0])
        fresh = self.op(
            "compress",
            emitted.live,
            (emitted.position, emitted.sequence),
            (values, gates, self.ape, self.norm_weight, frequencies),
            ratio=self.ratio,
            eps=self.config.rms_norm_eps,
            simulate=self.simulate,
        )
        stored = write(cache.rows, emitted.sequence, emitted.position, emitted.live, fresh)
        return CompressorCache(values, gates, stored)

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
        flat = x.reshape(-1, x.shape[-1])
        shape = (*x.shape[:2], -1)
        return compress_sequence(
            self.linear(flat, self.wkv, live).reshape(shape),
            self.linear(flat, self.wgate, live).reshape(shape),
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

    def __call__(
        self, x: Array, latent: Array, rows: Rows, cache: CompressorCache, table: Table, frequencies: Array
    ) -> tuple[Int[Array, "T k"], CompressorCache]:
        c = self.config
        cache = self.compressor(x, rows, cache, frequencies)
        q = self.linear(latent, self.wq_b, rows.live).reshape(-1, c.index_n_heads, c.index_head_dim)
        weights = self.linear(x, self.w, rows.live)
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
        q = self.linear(latent.reshape(batch * s, -1), self.wq_b, live)
        q = q.reshape(batch * s, c.index_n_heads, c.index_head_dim)
        q = index_query(q, *table, simulate=self.numerics.sim_index)
        weights = self.linear(x.reshape(batch * s, -1), self.w, live)

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

    def queries(self, x: Array, live: Live, table: Table) -> tuple[Float[Array, "T R"], Float[Array, "T N d"]]:
        """The normed query latent, which the indexer shares, and the finished queries."""
        c = self.config
        latent = self.normed(self.linear(x, self.wq_a, live), self.q_norm, live)
        q = self.linear(latent, self.wq_b, live).reshape(-1, c.num_attention_heads, c.head_dim)
        return latent, self.op("q_norm_rope", live, (q, *table), eps=c.rms_norm_eps)

    def keys(self, x: Array, live: Live, table: Table) -> Float[Array, "T d"]:
        """Finished raw rows, before storage."""
        return self.op(
            "kv_norm_rope",
            live,
            (self.linear(x, self.wkv, live), *table),
            (self.kv_norm,),
            eps=self.config.rms_norm_eps,
            simulate=self.numerics.sim_kv,
        )

    def output(self, o: Float[Array, "T N d"], live: Live, table: Table) -> Float[Array, "T D"]:
        """Takes the rotation of the values back and projects."""
        o = self.op("rope", live, (o, *table), inverse=True)
        grouped = o.reshape(o.shape[0], self.config.o_groups, -1)
        low = self.op(
            "grouped_linear",
            live,
            (grouped,),
            (self.wo_a,),
            act=self.numerics.act,
            precision=self.numerics.precision,
        )
        return self.linear(low, self.wo_b, live)

    def append(self, x: Array, rows: Rows, cache: LayerCache, table: Table) -> LayerCache:
        """Stores the raw rows."""
        kv = self.keys(x, rows.live, table)
        place = rows.position % cache.raw.shape[1]
        return dataclasses.replace(cache, raw=write(cache.raw, rows.sequence, place, rows.live, kv))

    def __call__(
        self, x: Float[Array, "T D"], rows: Rows, cache: LayerCache, table: Table, frequencies: Array, first: int = 0
    ) -> tuple[Float[Array, "T D"], LayerCache]:
        """`first` is the lowest position that holds a raw row: 1 for the MTP block, whose rows need a predecessor."""
        c = self.config
        latent, q = self.queries(x, rows.live, table)
        cache = self.append(x, rows, cache, table)
        ids, visible, compressed = None, None, None
        if self.ratio:
            assert cache.compressor is not None, "a compressed layer needs a compressor cache"
            state = self.compressor(x, rows, cache.compressor, frequencies)
            cache, compressed = dataclasses.replace(cache, compressor=state), state.rows
            visible = rows.visible(self.ratio)
        if self.ratio == CSA_RATIO:
            assert cache.indexer is not None, "a CSA layer needs an indexer cache"
            ids, index = self.indexer(x, latent, rows, cache.indexer, table, frequencies)
            cache, visible = dataclasses.replace(cache, indexer=index), None
        o = self.op(
            "attention",
            rows.live,
            (q, rows.position, rows.sequence, ids, visible),
            (cache.raw, compressed, self.sink),
            window=c.sliding_window,
            first=first,
            precision=self.numerics.precision,
        )
        return self.output(o, rows.live, table), cache

    def sequence(
        self, x: Float[Array, "B S D"], table: Table, frequencies: Array, earlier: Float[Array, "B S d"] | None = None
    ) -> tuple[Float[Array, "B S D"], Keys]:
        """Whole sequences; `earlier` replaces the raw rows of earlier positions (chained drafts)."""
        c, (batch, s, _) = self.config, x.shape
        live = Live.all(batch * s)
        flat = x.reshape(batch * s, -1)
        latent, q = self.queries(flat, live, table)
        kv = self.keys(flat, live, table).reshape(batch, s, -1)
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
                inputs = jax.lax.stop_gradient((x, latent.reshape(batch, s, -1)))
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
        out = self.output(o.reshape(batch * s, c.num_attention_heads, -1), live, table).reshape(batch, s, -1)
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


class SharedExpert(Layer):
    """The expert that every token passes through."""

    limit: float

    def setup(self) -> None:
        c = self.config
        self.w1 = self.weight("w1", c.moe_intermediate_size, c.hidden_size)
        self.w3 = self.weight("w3", c.moe_intermediate_size, c.hidden_size)
        self.w2 = self.weight("w2", c.hidden_size, c.moe_intermediate_size)

    def __call__(self, x: Float[Array, "T D"], live: Live) -> Float[Array, "T D"]:
        return self.op(
            "shared_expert",
            live,
            (x,),
            (self.w1, self.w3, self.w2),
            limit=self.limit,
            act=self.numerics.act,
            precision=self.numerics.precision,
        )


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
        self.shared = SharedExpert(c, self.numerics, c.swiglu_limit_shared[self.layer])

    def route(self, x: Array, tokens: Array, live: Live) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
        """Expert ids and weights of every row."""
        c = self.config
        ids = jnp.take(self.tid2eid, tokens, axis=0) if self.hashed else None
        return self.op(
            "router",
            live,
            (x, ids),
            (self.gate, None if self.hashed else self.bias),
            top_k=c.num_experts_per_tok,
            scale=c.routed_scaling_factor,
            precision=self.numerics.precision,
        )

    def __call__(self, x: Float[Array, "T D"], tokens: Int[Array, " T"], live: Live) -> Array:
        ids, weights = self.route(x, tokens, live)
        routed = self.op(
            "routed_experts",
            live,
            (x, ids, weights),
            (self.w1, self.w3, self.w2),
            limit=self.config.swiglu_limit[self.layer],
            act=self.numerics.act,
            precision=self.numerics.precision,
        )
        return routed + self.shared(x, live)

    def sequence(self, x: Float[Array, "T D"], tokens: Int[Array, " T"]) -> tuple[Array, Float[Array, " E"]]:
        """All experts for every row, weighted by zero where not chosen; also the share of rows each expert got."""
        live = Live.all(x.shape[0])
        ids, weights = self.route(x, tokens, live)
        chosen = jax.nn.one_hot(ids, self.config.n_routed_experts)
        share = jnp.einsum("tk,tke->te", weights, chosen)
        w1, w3, w2 = dense(self.w1), dense(self.w3), dense(self.w2)
        precision = self.numerics.precision
        gate = jnp.einsum("td,efd->tef", x, w1, precision=precision)
        up = jnp.einsum("td,efd->tef", x, w3, precision=precision)
        hidden = swiglu(gate, up, self.config.swiglu_limit[self.layer]) * share[..., None]
        routed = jnp.einsum("tef,edf->td", hidden, w2, precision=precision)
        return routed + self.shared(x, live), jnp.mean(chosen, axis=(0, 1))


def _even_table(shape: tuple[int, int], experts: int) -> Int[Array, "V K"]:
    """A token table that spreads tokens evenly; trained models bring their own."""
    token, k = jnp.arange(shape[0], dtype=jnp.int32)[:, None], jnp.arange(shape[1], dtype=jnp.int32)
    return (token + k) % experts


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
        y = self.normed(y, self.attn_norm, live).reshape(batch, s, -1)
        out, keys = self.attn.sequence(y, table, frequencies, earlier)
        x = self.hc_attn.post(out.reshape(batch * s, -1), x, post, mixing, live)
        y, post, mixing = self.hc_ffn.pre(x, live)
        out, load = self.moe.sequence(self.normed(y, self.ffn_norm, live), tokens.reshape(-1))
        x = self.hc_ffn.post(out, x, post, mixing, live)
        return x.reshape(batch, s, *x.shape[1:]), Aux(keys, load)
