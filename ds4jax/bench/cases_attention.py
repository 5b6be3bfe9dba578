"""Operations on the cache: attention, compressors, indexer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ds4jax.bench.case import Case, positions, sequences
from ds4jax.bench.cases_glue import RING, angles

WINDOW, HEADS, WIDTH, ROTARY, GROUPS = 128, 64, 512, 64, 8
TOP_K, INDEX_HEADS, INDEX_WIDTH = 512, 64, 128
BLOCK = 64  # capacities are multiples of so many compressed rows

normal, split = jax.random.normal, jax.random.split


def fp4(key: Array, *shape: int, spread: int = 3) -> Array:
    """Values on the FP4 grid, a power of two per 32 of them."""
    k1, k2, k3 = split(key, 3)
    magnitude = jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[jax.random.randint(k1, shape, 0, 8)]
    values = jnp.where(jax.random.bernoulli(k2, shape=shape), magnitude, -magnitude)
    scale = jnp.exp2(jax.random.randint(k3, (*shape[:-1], shape[-1] // 32), -spread, 1).astype(jnp.float32))
    return (values.reshape(*scale.shape, 32) * scale[..., None]).reshape(shape)


def chosen(key: Array, seen: Array, places: int, empty: int) -> Array:
    """`places` different rows of those that each query has seen, ascending; `empty` where it has seen fewer."""
    slot, count = jnp.arange(places, dtype=jnp.int32), jnp.minimum(seen, places)[:, None]
    # One row from each of `count` equal parts of what has been seen.
    low, high = (edge * seen[:, None] // jnp.maximum(count, 1) for edge in (slot, slot + 1))
    inside = jax.random.randint(key, low.shape, 0, 1 << 30) % jnp.maximum(high - low, 1)
    return jnp.where(slot < count, low + inside, empty)


def attention(context: int, ratio: int, first: int = 0) -> Case:
    """Queries of unit variance per feature, as after their norm, over the window and compressed rows."""
    n = -(-context // (BLOCK * ratio)) * BLOCK if ratio else 0

    def rows(key: Array, t: int) -> tuple[Any, ...]:
        k1, k2, k3 = split(key, 3)
        q, position = normal(k1, (t, HEADS, WIDTH)), positions(t, context)
        seen = (position + 1) // max(ratio, 1)
        ids = chosen(k2, seen, min(TOP_K, n), n) if ratio == 4 else None
        table = angles(k3, t, ROTARY)
        return q, *table, position, sequences(t), ids, seen if ratio and ids is None else None

    def shared(key: Array) -> tuple[Any, ...]:
        k1, k2, k3 = split(key, 3)
        compressed = normal(k2, (1, n, WIDTH)).astype(jnp.float16) if ratio else None
        return normal(k1, (1, RING, WIDTH)).astype(jnp.float16), compressed, normal(k3, (HEADS,))

    def active(t: int) -> int:
        seen = context // ratio if ratio else 0
        return (min(context, WINDOW) + (t * min(TOP_K, seen) if ratio == 4 else seen)) * WIDTH * 2

    settings = {"window": WINDOW, "first": first, "groups": GROUPS, "act": "q8", "precision": "highest"}
    return Case("attention", settings, rows, shared, active)


def compress_store(ratio: int, width: int, first: int, simulate: str) -> Case:
    """Windows from number `first` on, each of `ratio` tokens, or twice as many where they overlap."""
    halves = 2 if ratio == 4 else 1
    both = width * halves

    def rows(key: Array, t: int) -> tuple[Any, ...]:
        return first + jnp.arange(t, dtype=jnp.int32), sequences(t)

    def shared(key: Array) -> tuple[Any, ...]:
        k1, k2, k3, k4, k5 = split(key, 5)
        ring = (1, (halves + 7) * ratio, both)
        frequencies = jnp.geomspace(1, 1e-5, ROTARY // 2, dtype=jnp.float32)
        ape, norm = normal(k3, (ratio, both)), 1 + 0.1 * normal(k4, (width,))
        stored = normal(k5, (1, first + BLOCK, width)).astype(jnp.float16)
        return normal(k1, ring), normal(k2, ring) * 2, ape, norm, frequencies, stored

    def active(t: int) -> int:
        return ((t + halves - 1) * 2 * ratio * both + ratio * both) * 4

    return Case("compress_store", {"ratio": ratio, "eps": 1e-6, "simulate": simulate}, rows, shared, active)


def indexer(context: int, ties: bool = False) -> Case:
    """`ties`: a few distinct rows only, so that nearly every choice is made by index."""
    n = -(-context // (4 * BLOCK)) * BLOCK

    def rows(key: Array, t: int) -> tuple[Any, ...]:
        k1, k2, k3 = split(key, 3)
        angle = jax.random.uniform(k1, (t, ROTARY // 2), maxval=6)
        q, weights = normal(k2, (t, INDEX_HEADS, INDEX_WIDTH)), normal(k3, (t, INDEX_HEADS))
        return q, jnp.cos(angle), jnp.sin(angle), weights, sequences(t), (positions(t, context) + 1) // 4

    def shared(key: Array) -> tuple[Any, ...]:
        k1, k2 = split(key)
        keys = fp4(k1, 1, 8 if ties else n, INDEX_WIDTH)
        if ties:
            keys = keys[:, jax.random.randint(k2, (n,), 0, 8)]
        return (keys.astype(jnp.float16),)

    return Case("indexer", {"top_k": TOP_K, "simulate": True, "precision": "highest"}, rows, shared)


ATTENTION: dict[str, Case] = {
    "attention window": attention(5000, 0),
    "attention window begun": attention(20, 0, first=1),
    "attention CSA 500": attention(500, 4),
    "attention CSA 64k": attention(65_536, 4),
    "attention HCA 4k": attention(4096, 128),
    "attention HCA 1M": attention(1_048_576, 128),
    "compress CSA first": compress_store(4, 512, 0, "kv"),
    "compress CSA": compress_store(4, 512, 200_000, "kv"),
    "compress index": compress_store(4, 128, 5000, "index"),
    "compress HCA": compress_store(128, 512, 8000, "kv"),
    "indexer 500": indexer(500),
    "indexer 16k": indexer(16_384),
    "indexer 64k ties": indexer(65_536, ties=True),
    "indexer 1M": indexer(1_048_576),
}
