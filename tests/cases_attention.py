"""Calls of cache kernels at the sizes of the full model: `{name: (operation, settings, build)}`.

`build(rng, T)` returns the row arguments and the shared ones of `ops.call`; kernels take no `precision`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Args = tuple[tuple[Any, ...], tuple[Any, ...]]

WINDOW, RING, HEADS, WIDTH, ROTARY = 128, 135, 64, 512, 64
TOP_K, INDEX_HEADS, INDEX_WIDTH = 512, 64, 128


def normal(rng: np.random.Generator, *shape: int, dtype: type = np.float32) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32).astype(dtype))


def sequences(rows: int) -> jax.Array:
    return jnp.zeros(rows, jnp.int32)


def positions(rows: int, context: int) -> np.ndarray:
    """The last rows of a context, in order."""
    return np.arange(context - rows, context).astype(np.int32)


def fp4(rng: np.random.Generator, *shape: int, spread: int = 3) -> np.ndarray:
    """Values on the FP4 grid, a power of two per 32 of them."""
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    codes = rng.integers(0, 16, shape, np.int8)
    values = grid[codes & 7] * np.where(codes & 8, -1, 1).astype(np.float32)
    scale = np.exp2(rng.integers(-spread, 1, (*shape[:-1], shape[-1] // 32))).astype(np.float32)
    return (values.reshape(*scale.shape, 32) * scale[..., None]).reshape(shape)


def store(rng: np.random.Generator, rows: int, width: int, dtype: type, capacity: int) -> Args:
    target = normal(rng, 1, capacity, width, dtype=dtype)
    place = jnp.asarray(positions(rows, 1000) % capacity)
    return (normal(rng, rows, width), sequences(rows), place), (target,)


def attention(rng: np.random.Generator, rows: int, context: int, ratio: int) -> Args:
    """Queries of unit variance per feature, as after their norm."""
    position = positions(rows, context)
    raw, sink = normal(rng, 1, RING, WIDTH, dtype=np.float16), normal(rng, HEADS)
    q, seen = normal(rng, rows, HEADS, WIDTH), (position + 1) // max(ratio, 1)
    ids, visible, compressed = None, None, None
    if ratio:
        n = -(-context // (64 * ratio)) * 64
        compressed = normal(rng, 1, n, WIDTH, dtype=np.float16)
        visible = jnp.asarray(seen)
    if ratio == 4:
        chosen = np.full((rows, min(TOP_K, n)), n, np.int32)
        for row, count in enumerate(np.minimum(seen, TOP_K)):
            chosen[row, :count] = np.sort(rng.choice(seen[row], count, replace=False))
        ids, visible = jnp.asarray(chosen), None
    return (q, jnp.asarray(position), sequences(rows), ids, visible), (raw, compressed, sink)


def compress(rng: np.random.Generator, rows: int, ratio: int, width: int, first: int) -> Args:
    both = width * (2 if ratio == 4 else 1)
    ring = (1, (2 if ratio == 4 else 1) * ratio + ratio * (rows - 1), both)
    window = jnp.asarray(first + np.arange(rows, dtype=np.int32))
    ape, norm = normal(rng, ratio, both), 1 + 0.1 * normal(rng, width)
    frequencies = jnp.asarray(np.geomspace(1, 1e-5, ROTARY // 2).astype(np.float32))
    return (window, sequences(rows)), (normal(rng, *ring), normal(rng, *ring) * 2, ape, norm, frequencies)


def indexer(rng: np.random.Generator, rows: int, context: int, ties: bool = False) -> Args:
    """`ties`: a few distinct rows only, so that nearly every choice is made by index."""
    visible, n = (positions(rows, context) + 1) // 4, -(-context // 256) * 64
    keys = fp4(rng, 1, 8 if ties else n, INDEX_WIDTH)
    if ties:
        keys = keys[:, rng.integers(0, 8, n)]
    angle = rng.uniform(0, 6, (rows, ROTARY // 2)).astype(np.float32)
    q, weights = normal(rng, rows, INDEX_HEADS, INDEX_WIDTH), normal(rng, rows, INDEX_HEADS)
    table = (jnp.cos(jnp.asarray(angle)), jnp.sin(jnp.asarray(angle)))
    return (q, *table, weights, sequences(rows), jnp.asarray(visible)), (jnp.asarray(keys.astype(np.float16)),)


ATTEND = {"window": WINDOW, "first": 0, "precision": "highest"}
INDEX = {"top_k": TOP_K, "simulate": True, "precision": "highest"}
HALVES = {"ratio": 4, "eps": 1e-6}

CASES: dict[str, tuple[str, dict[str, Any], Callable[[np.random.Generator, int], Args]]] = {
    "store ring": ("store", {}, functools.partial(store, width=512, dtype=np.float16, capacity=RING)),
    "store rows of 1M": ("store", {}, functools.partial(store, width=512, dtype=np.float16, capacity=262_144)),
    "store gates": ("store", {}, functools.partial(store, width=1024, dtype=np.float32, capacity=15)),
    "attention window": ("attention", ATTEND, functools.partial(attention, context=5000, ratio=0)),
    "attention window begun": ("attention", {**ATTEND, "first": 1}, functools.partial(attention, context=20, ratio=0)),
    "attention CSA 500": ("attention", ATTEND, functools.partial(attention, context=500, ratio=4)),
    "attention CSA 64k": ("attention", ATTEND, functools.partial(attention, context=65_536, ratio=4)),
    "attention HCA 4k": ("attention", ATTEND, functools.partial(attention, context=4096, ratio=128)),
    "attention HCA 1M": ("attention", ATTEND, functools.partial(attention, context=1_048_576, ratio=128)),
    "compress CSA first": (
        "compress",
        {**HALVES, "simulate": "kv"},
        functools.partial(compress, ratio=4, width=512, first=0),
    ),
    "compress CSA": (
        "compress",
        {**HALVES, "simulate": "kv"},
        functools.partial(compress, ratio=4, width=512, first=200_000),
    ),
    "compress index": (
        "compress",
        {**HALVES, "simulate": "index"},
        functools.partial(compress, ratio=4, width=128, first=5000),
    ),
    "compress HCA": (
        "compress",
        {"ratio": 128, "eps": 1e-6, "simulate": "kv"},
        functools.partial(compress, ratio=128, width=512, first=8000),
    ),
    "indexer 500": ("indexer", INDEX, functools.partial(indexer, context=500)),
    "indexer 16k": ("indexer", INDEX, functools.partial(indexer, context=16_384)),
    "indexer 64k ties": ("indexer", INDEX, functools.partial(indexer, context=65_536, ties=True)),
    "indexer 1M": ("indexer", INDEX, functools.partial(indexer, context=1_048_576)),
}
