"""Compressors: pooling of completed windows, then norm, rotation and simulated format, written to the cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.config import CSA_RATIO
from ds4jax.pallas.fp4 import fp4_round_trip, hadamard
from ds4jax.pallas.norm import inverse_rms
from ds4jax.pallas.ptx import Instructions, f32, i32, launch, load, next_power, store
from ds4jax.pallas.rope import partner_of, signed, turn
from ds4jax.pallas.simulate import FP8_BLOCK, fp8_round_trip

TILE = 2048  # candidates, at most 128, times features of a program that pools


def _pool(
    ptx: Instructions,
    live: Any,
    window: Any,
    sequence: Any,
    values: Any,
    gates: Any,
    ape: Any,
    out: Any,
    *,
    ratio: int,
    candidates: int,
    features: int,
) -> None:
    """Softmax over the candidates of one window for a tile of features."""
    row, part = pl.program_id(0), pl.program_id(1)
    capacity, width = values.shape[1], out.shape[1]
    overlap = ratio == CSA_RATIO
    feature = (part * features + jnp.arange(features, dtype=i32))[:, None]
    candidate = jnp.arange(next_power(candidates), dtype=i32)[None]
    exists, index, b = live[row], window[row], sequence[row]

    @pl.when(exists != 0)
    def _() -> None:
        position = (index - (1 if overlap else 0)) * ratio + candidate
        inside = feature < width
        seen = (candidate < candidates) & (position >= 0) & inside
        place = jnp.where(position >= 0, position, 0) % capacity
        # The previous window gives the first half of its features, the own one the second.
        column = feature + jnp.where(overlap & (candidate >= ratio), width, 0)
        logit = load(gates, b, place, column, mask=seen)
        logit = logit + load(ape, candidate % ratio, column, mask=seen).astype(f32)
        value = load(values, b, place, column, mask=seen)
        logit = jnp.where(seen, logit, jnp.where(inside, -jnp.inf, 0.0))  # a feature without candidates is no NaN
        weight = jnp.exp(logit - jnp.max(logit, axis=1)[:, None])
        pooled = ptx.divide(ptx.tree_sum(weight * value), ptx.tree_sum(weight))
        store(out, pooled, row, feature[:, 0], mask=inside[:, 0])


def _finish(
    ptx: Instructions,
    rows: Any,
    live: Any,
    window: Any,
    sequence: Any,
    pooled: Any,
    norm: Any,
    frequencies: Any,
    out: Any,
    *,
    size: int,
    ratio: int,
    eps: float,
    simulate: str,
) -> None:
    """`size` features of a row; every program adds up the squares of the whole row."""
    row, part = pl.program_id(0), pl.program_id(1)
    width, tail = pooled.shape[1], pooled.shape[1] - 2 * frequencies.shape[0]
    exists, index, b = live[row], window[row], sequence[row]

    @pl.when(exists != 0)
    def _() -> None:
        scale = inverse_rms(ptx, pooled, row, eps)

        def normed(place: Array, mask: Array | None) -> Array:
            return load(pooled, row, place, mask=mask) * scale * load(norm, place, mask=mask)

        place = part * size + jnp.arange(size, dtype=i32)
        inside, offset = place < width, place - tail
        rotated = offset >= 0
        angle = (index * ratio).astype(f32) * load(frequencies, offset >> 1, mask=inside & rotated)
        y = normed(place, None if width % size == 0 else inside)
        partner = normed(partner_of(place, offset), inside & rotated)
        turned = turn(y, partner, jnp.cos(angle), signed(jnp.sin(angle), offset))
        if simulate == "kv":
            y = fp8_round_trip(ptx, y)
        y = jnp.where(rotated, turned, y)
        if simulate == "index":
            y = fp4_round_trip(ptx, hadamard(y))
        store(out, y.astype(out.dtype), b, index, place, mask=inside)


def compress_store(
    live: Array,
    window: Array,
    sequence: Array,
    values: Array,
    gates: Array,
    ape: Array,
    norm: Array,
    frequencies: Array,
    rows: Array,
    *,
    ratio: int,
    eps: float,
    simulate: str,
    interpret: bool,
) -> Array:
    """Kernel of `ops.store.compress_store`."""
    total, width = window.shape[0], norm.shape[0]
    mask = live.astype(i32)

    candidates = 2 * ratio if ratio == CSA_RATIO else ratio
    features = min(64, TILE // next_power(candidates))

    def pool(ptx: Instructions, *refs: Any) -> None:
        _pool(ptx, *refs, ratio=ratio, candidates=candidates, features=features)

    pooled = launch(
        pool,
        jax.ShapeDtypeStruct((total, width), f32),
        (total, -(-width // features)),
        mask,
        window,
        sequence,
        values,
        gates,
        ape,
        name="compress_pool",
        warps=4,
        interpret=interpret,
    )
    size = next_power(width) if simulate == "index" else FP8_BLOCK

    def finish(ptx: Instructions, *refs: Any) -> None:
        _finish(ptx, *refs, size=size, ratio=ratio, eps=eps, simulate=simulate)

    return launch(
        finish,
        jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        (total, -(-width // size)),
        rows,
        mask,
        window,
        sequence,
        pooled,
        norm,
        frequencies,
        name="compress_store",
        warps=1,
        interpret=interpret,
        aliases={0: 0},
    )
