"""The cache: position-indexed rings and append-only compressed rows, one committed length per sequence.

Position p of a ring lives in place p mod capacity, and what a row sees is decided by positions alone, so rolling back
is setting the length: rows beyond it are masked until they are overwritten.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ds4jax.config import CSA_RATIO, ModelConfig, Numerics
from ds4jax.ops.attention import BLOCK
from ds4jax.ops.rows import Live


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressorCache:
    """State of one compressor.

    values, gates: rings `[B, cap, v e]` float32 of the per-token projections.
    rows: finished rows `[B, n, e]`; row w is valid once position `ratio * (w + 1) - 1` is committed.
    """

    values: Float[Array, "B cap ve"]
    gates: Float[Array, "B cap ve"]
    rows: Float[Array, "B n e"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """State of one layer: the ring of raw key-value rows `[B, cap, d]` and its compressors, if it has any."""

    raw: Float[Array, "B cap d"]
    compressor: CompressorCache | None
    indexer: CompressorCache | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """State of B sequences. `mtp` is the ring of the MTP block, row p belonging to the token at position p."""

    length: Int[Array, " B"]
    layers: tuple[LayerCache, ...]
    mtp: LayerCache | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Which sequence and position each of the T rows of a call belongs to, and whether it exists."""

    sequence: Int[Array, " T"]
    position: Int[Array, " T"]
    live: Live

    @staticmethod
    def of(start: Int[Array, " B"], count: Int[Array, " B"], rows: int) -> Rows:
        """Rows of a call over `[B, R]` tokens, flattened sequence by sequence."""
        batch = start.shape[0]
        offset = jnp.arange(rows, dtype=jnp.int32)[None]
        position = jnp.broadcast_to(start[:, None] + offset, (batch, rows))
        live = jnp.broadcast_to(offset < count[:, None], (batch, rows))
        sequence = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), rows)
        return Rows(sequence, position.reshape(-1), Live.of(live.reshape(-1)))

    def visible(self, ratio: int) -> Int[Array, " T"]:
        """Compressed rows that each row sees, its own window included; none for absent rows, whose positions may lie
        beyond the cache."""
        return jnp.where(self.live.mask, (self.position + 1) // ratio, 0)


def init_cache(config: ModelConfig, numerics: Numerics, batch: int, context: int, rows: int) -> Cache:
    """An empty cache.

    Args:
        context: positions a sequence may reach.
        rows: most rows a call may have; rings keep `rows - 1` places more than an operation sees, so that a call may
            write all its rows before it reads.
    """
    stored = jnp.float16 if numerics.cache == "f16" else jnp.float32
    slack = rows - 1

    def compressor(ratio: int, width: int) -> CompressorCache:
        halves = 2 if ratio == CSA_RATIO else 1
        ring = (batch, halves * ratio + slack, halves * width)
        n = -(-context // (ratio * BLOCK)) * BLOCK
        return CompressorCache(jnp.zeros(ring), jnp.zeros(ring), jnp.zeros((batch, n, width), stored))

    def layer(ratio: int) -> LayerCache:
        raw = jnp.zeros((batch, config.sliding_window + slack, config.head_dim), stored)
        return LayerCache(
            raw,
            compressor(ratio, config.head_dim) if ratio else None,
            compressor(ratio, config.index_head_dim) if ratio == CSA_RATIO else None,
        )

    layers = tuple(layer(ratio) for ratio in config.compress_ratios)
    return Cache(jnp.zeros((batch,), jnp.int32), layers, layer(0) if config.has_mtp else None)


def cache_nbytes(config: ModelConfig, numerics: Numerics, batch: int, context: int, rows: int) -> int:
    """Bytes of `init_cache` with the same arguments, without allocating it."""
    shapes = jax.eval_shape(lambda: init_cache(config, numerics, batch, context, rows))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def commit(cache: Cache, length: Int[Array, " B"]) -> Cache:
    """The cache at another committed length: forward after a call, or back to take rows away."""
    return dataclasses.replace(cache, length=length)
