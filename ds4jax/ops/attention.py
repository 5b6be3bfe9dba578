"""Sparse attention over a raw window and compressed rows, with a learned sink; the indexer that selects rows."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ds4jax.activation import Activation
from ds4jax.ops.rope import rotate, unrotate
from ds4jax.ops.simulate import fp4_round_trip, hadamard
from ds4jax.ops.sums import ordered_sum

BLOCK = 64  # compressed rows read per step; part of the definition of the result


def index_query(
    q: Float[Array, "T N d"], cos: Float[Array, "T r2"], sin: Float[Array, "T r2"], *, simulate: bool
) -> Float[Array, "T N d"]:
    """Indexer queries: rotation, then Hadamard transform and FP4 grid where simulated."""
    q = rotate(q, cos, sin)
    return fp4_round_trip(hadamard(q)) if simulate else q


def index_scores(
    q: Float[Array, "T N d"], weights: Float[Array, "T N"], rows: Float[Array, "T n d"], precision: str
) -> Float[Array, "T n"]:
    """`sum_h weight_h * relu(q_h . row) / sqrt(d * N)` (Lightning indexer, DeepSeek-V3.2), an `ordered_sum`."""
    dots = jnp.maximum(jnp.einsum("tnd,tkd->tkn", q, rows, precision=precision), 0.0)
    scale = jnp.float32(1 / math.sqrt(q.shape[1] * q.shape[2]))
    return ordered_sum((weights * scale)[:, None] * dots)


def indexer(
    q: Float[Array, "T N d"],
    cos: Float[Array, "T r2"],
    sin: Float[Array, "T r2"],
    weights: Float[Array, "T N"],
    sequence: Int[Array, " T"],
    visible: Int[Array, " T"],
    rows: Float[Array, "B n d"],
    *,
    top_k: int,
    simulate: bool,
    precision: str,
) -> Int[Array, "T k"]:
    """The `k = min(top_k, n)` best of the first `visible` compressed rows, in ascending order.

    Equal scores: the lower index wins. Unused places hold `n`. Where no more than `top_k` are visible, all are chosen,
    whatever the queries hold. Scores are computed in blocks up to the last visible row, so the cost follows the length
    and not the capacity n, a multiple of `BLOCK`.
    """
    total, n = q.shape[0], rows.shape[1]
    q = index_query(q, cos, sin, simulate=simulate)
    # Never past the capacity: a slice that does not fit moves back over its neighbours.
    blocks = jnp.minimum(jnp.max(visible) + BLOCK - 1, n) // BLOCK

    def score(block: Array, scores: Array) -> Array:
        keys = lax.dynamic_slice_in_dim(rows, block * BLOCK, BLOCK, 1)[sequence].astype(jnp.float32)
        index = block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        fresh = index_scores(q, weights, keys, precision)
        # Zeros of either sign are equal.
        fresh = jnp.where((fresh == 0) | (visible <= top_k)[:, None], 0.0, fresh)
        fresh = jnp.where(index < visible[:, None], fresh, -jnp.inf)
        return lax.dynamic_update_slice_in_dim(scores, fresh, block * BLOCK, 1)

    scores = lax.fori_loop(0, blocks, score, jnp.full((total, n), -jnp.inf, jnp.float32))
    best, ids = lax.top_k(scores, min(top_k, n))
    return jnp.sort(jnp.where(best > -jnp.inf, ids, n), axis=-1)


def attention(
    q: Float[Array, "T N d"],
    cos: Float[Array, "T r2"],
    sin: Float[Array, "T r2"],
    position: Int[Array, " T"],
    sequence: Int[Array, " T"],
    ids: Int[Array, "T k"] | None,
    visible: Int[Array, " T"] | None,
    raw: Float[Array, "B cap d"],
    rows: Float[Array, "B n d"] | None,
    sink: Float[Array, " N"],
    *,
    window: int,
    first: int,
    groups: int,
    act: str,
    precision: str,
) -> Activation:
    """`attend`, then `unrotate`: input of the grouped output projection, `[T, G, N d / G]`."""
    o = attend(q, position, sequence, ids, visible, raw, rows, sink, window=window, first=first, precision=precision)
    return unrotate(o, cos, sin, groups=groups, act=act)


def attend(
    q: Float[Array, "T N d"],
    position: Int[Array, " T"],
    sequence: Int[Array, " T"],
    ids: Int[Array, "T k"] | None,
    visible: Int[Array, " T"] | None,
    raw: Float[Array, "B cap d"],
    rows: Float[Array, "B n d"] | None,
    sink: Float[Array, " N"],
    *,
    window: int,
    first: int,
    precision: str,
) -> Float[Array, "T N d"]:
    """Softmax attention of every row over its raw window and its compressed rows; keys are also the values.

    The raw window holds positions `max(first, position - window + 1) .. position`, read from the ring `raw` at
    position mod cap. Compressed rows are those listed in `ids` (places holding n or more are empty), or the first
    `visible` ones, or none. The sink is a logit without a value. Keys are taken in a fixed order, the window from its
    oldest place, then compressed rows in blocks of `BLOCK`, with a running maximum and sum, so the result depends
    neither on capacities nor on other rows.
    """
    total, heads, d = q.shape
    scale = jnp.float32(1 / math.sqrt(d))

    def add(carry: tuple[Array, Array, Array], keys: Array, seen: Bool[Array, "T k"]) -> tuple[Array, Array, Array]:
        maximum, denominator, acc = carry
        keys = jnp.where(seen[:, :, None], keys.astype(jnp.float32), 0.0)
        s = jnp.einsum("tnd,tkd->tnk", q, keys, precision=precision) * scale
        s = jnp.where(seen[:, None], s, -jnp.inf)
        highest = jnp.maximum(maximum, jnp.max(s, axis=-1))
        p, old = jnp.exp(s - highest[..., None]), jnp.exp(maximum - highest)
        fresh = jnp.einsum("tnk,tkd->tnd", p, keys, precision=precision)
        return highest, denominator * old + jnp.sum(p, axis=-1), acc * old[..., None] + fresh

    carry = (
        jnp.broadcast_to(sink, (total, heads)),
        jnp.ones((total, heads), jnp.float32),
        jnp.zeros((total, heads, d), jnp.float32),
    )
    place = position[:, None] - window + 1 + jnp.arange(window, dtype=jnp.int32)
    carry = add(carry, raw[sequence[:, None], place % raw.shape[1]], place >= first)
    if rows is None:
        return carry[2] / carry[1][..., None]

    n = rows.shape[1]
    if ids is not None:
        chosen = jnp.pad(ids, [(0, 0), (0, -ids.shape[1] % BLOCK)], constant_values=n)
        count = jnp.sum(chosen < n, axis=-1, dtype=jnp.int32)
    else:
        assert visible is not None, "attention over compressed rows needs ids or visible"
        count = visible

    def step(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        if ids is not None:
            index = lax.dynamic_slice_in_dim(chosen, block * BLOCK, BLOCK, 1)
            keys = rows[sequence[:, None], jnp.minimum(index, n - 1)]
            return add(carry, keys, index < n)
        index = block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        keys = lax.dynamic_slice_in_dim(rows, block * BLOCK, BLOCK, 1)[sequence]
        return add(carry, keys, index < count[:, None])

    carry = lax.fori_loop(0, (jnp.max(count) + BLOCK - 1) // BLOCK, step, carry)
    return carry[2] / carry[1][..., None]


def attention_sequence(
    q: Float[Array, "B S N d"],
    kv: Float[Array, "B S d"],
    own: Float[Array, "B S d"],
    rows: Float[Array, "B n d"],
    selected: Bool[Array, "B S n"],
    sink: Float[Array, " N"],
    *,
    window: int,
    precision: str,
) -> tuple[Float[Array, "B S N d"], Float[Array, "B S N n"]]:
    """Attention of whole sequences from position 0: the training form of `attend`.

    `kv` are the keys of earlier positions, `own` the key of a position for itself (the same array for the trunk,
    another one for a chained draft). Returns the output and the scaled scores of all compressed rows, from which the
    indexer learns.
    """
    batch, s, heads, d = q.shape
    scale = jnp.float32(1 / math.sqrt(d))
    pad = -s % window
    blocks = (s + pad) // window

    def split(a: Array) -> Array:
        return jnp.pad(a, [(0, 0), (0, pad), *[(0, 0)] * (a.ndim - 2)]).reshape(batch, blocks, window, *a.shape[2:])

    keys = split(kv)
    keys = jnp.concatenate([jnp.pad(keys[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)]), keys], axis=2)
    raw = jnp.einsum("bcqnd,bckd->bcnqk", split(q), keys, precision=precision) * scale
    query, key = jnp.arange(window)[:, None], jnp.arange(2 * window)[None] - window
    near = (key < query) & (key > query - window)
    exists = (jnp.arange(blocks)[:, None, None] > 0) | (key >= 0)
    raw = jnp.where((near & exists)[None, :, None], raw, -jnp.inf)
    raw_scores = jnp.moveaxis(raw, 2, 3).reshape(batch, s + pad, heads, -1)[:, :s]
    self_scores = jnp.einsum("bsnd,bsd->bsn", q, own, precision=precision)[..., None] * scale
    row_scores = jnp.einsum("bsnd,bkd->bsnk", q, rows, precision=precision) * scale
    masked = jnp.where(selected[:, :, None], row_scores, -jnp.inf)
    scores = jnp.concatenate(
        [jnp.broadcast_to(sink[:, None], (batch, s, heads, 1)), raw_scores, self_scores, masked], axis=-1
    )
    p = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    p = p / jnp.sum(p, axis=-1, keepdims=True)
    p_raw, p_self, p_rows = p[..., 1 : 1 + 2 * window], p[..., 1 + 2 * window, None], p[..., 2 + 2 * window :]
    out_raw = jnp.einsum("bcqnk,bckd->bcqnd", split(p_raw), keys, precision=precision)
    out = out_raw.reshape(batch, s + pad, heads, d)[:, :s] + p_self * own[:, :, None]
    return out + jnp.einsum("bsnk,bkd->bsnd", p_rows, rows, precision=precision), row_scores
