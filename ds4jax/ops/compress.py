"""Compressors: blocks of `ratio` tokens pooled into one row (CSA with overlap, HCA without)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ds4jax.config import CSA_RATIO
from ds4jax.ops.norm import rms_norm
from ds4jax.ops.rope import rope_table, rotate, simulate_kv
from ds4jax.ops.simulate import fp4_round_trip, hadamard
from ds4jax.ops.sums import ordered_sum


def pool(values: Float[Array, "T C e"], logits: Float[Array, "T C e"], seen: Array) -> Float[Array, "T e"]:
    """One softmax per feature over the C candidates of a window; `seen` broadcasts against `[T, C, e]`.

    Sums over candidates are `ordered_sum`s.
    """
    logits = jnp.where(seen, logits, -jnp.inf)
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))

    def total(terms: Float[Array, "T C e"]) -> Float[Array, "T e"]:
        return ordered_sum(jnp.swapaxes(terms, 1, 2))

    return total(weights * jnp.where(seen, values, 0.0)) / total(weights)


def finish(
    pooled: Float[Array, "T e"],
    window: Int[Array, " T"],
    norm: Float[Array, " e"],
    frequencies: Float[Array, " r2"],
    *,
    ratio: int,
    eps: float,
    simulate: str,
) -> Float[Array, "T e"]:
    """Norm, rotation at the window's first position, and the simulated format: "kv", "index" or "none"."""
    cos, sin = rope_table(window * ratio, frequencies)
    row = rotate(rms_norm(pooled, norm, eps), cos, sin)
    if simulate == "kv":
        return simulate_kv(row, 2 * frequencies.shape[0])
    return fp4_round_trip(hadamard(row)) if simulate == "index" else row


def compress(
    window: Int[Array, " T"],
    sequence: Int[Array, " T"],
    values: Float[Array, "B cap ve"],
    gates: Float[Array, "B cap ve"],
    ape: Float[Array, "m ve"],
    norm: Float[Array, " e"],
    frequencies: Float[Array, " r2"],
    *,
    ratio: int,
    eps: float,
    simulate: str,
) -> Float[Array, "T e"]:
    """Rows of completed windows, read from the position-indexed rings of per-token projections.

    Window w covers positions `ratio * w ...`. At ratio 4 its candidates are the first half of the features of the
    previous window's tokens and the second half of its own; window 0 has no previous one.
    """
    capacity, width = values.shape[1], norm.shape[0]
    own = window[:, None] * ratio + jnp.arange(ratio, dtype=jnp.int32)

    def gather(ring: Array, position: Array, lo: int) -> Array:
        return ring[sequence[:, None], position % capacity][:, :, lo : lo + width]

    bias = ape.astype(jnp.float32)
    if ratio != CSA_RATIO:
        pooled = pool(gather(values, own, 0), gather(gates, own, 0) + bias, jnp.array(True))
    else:
        before = own - ratio
        v = jnp.concatenate([gather(values, before, 0), gather(values, own, width)], axis=1)
        z = jnp.concatenate(
            [gather(gates, before, 0) + bias[:, :width], gather(gates, own, width) + bias[:, width:]], axis=1
        )
        seen = jnp.concatenate([before, own], axis=1)[:, :, None] >= 0
        pooled = pool(v, z, seen)
    return finish(pooled, window, norm, frequencies, ratio=ratio, eps=eps, simulate=simulate)


def compress_sequence(
    values: Float[Array, "B S ve"],
    gates: Float[Array, "B S ve"],
    ape: Float[Array, "m ve"],
    norm: Float[Array, " e"],
    frequencies: Float[Array, " r2"],
    *,
    ratio: int,
    eps: float,
    simulate: str,
) -> Float[Array, "B n e"]:
    """All `n = S // ratio` rows of whole sequences that start at position 0: the training form of `compress`."""
    batch, width, n = values.shape[0], norm.shape[0], values.shape[1] // ratio
    v = values[:, : n * ratio].reshape(batch, n, ratio, -1)
    z = gates[:, : n * ratio].reshape(batch, n, ratio, -1) + ape.astype(jnp.float32)
    seen = jnp.ones((batch, n, ratio, 1), bool)
    if ratio == CSA_RATIO:

        def shift(a: Array) -> Array:
            return jnp.pad(a[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)])

        v = jnp.concatenate([shift(v[..., :width]), v[..., width:]], axis=2)
        z = jnp.concatenate([shift(z[..., :width]), z[..., width:]], axis=2)
        seen = jnp.concatenate([shift(seen), seen], axis=2)
    window = jnp.tile(jnp.arange(n, dtype=jnp.int32), batch)

    def flat(a: Array) -> Array:
        return a.reshape(batch * n, *a.shape[2:])

    pooled = pool(flat(v), flat(z), flat(seen))
    rows = finish(pooled, window, norm, frequencies, ratio=ratio, eps=eps, simulate=simulate)
    return rows.reshape(batch, n, width)
