"""Attention, indexer and compressors over rings and rows, each against a plain float64 version."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.ops import attention as ops
from ds4jax.ops import compress as compress_ops
from ds4jax.ops import simulate

PURE = golden.pure()
attention = jax.jit(ops.attend, static_argnames=("window", "first", "precision"))
indexer = jax.jit(ops.indexer, static_argnames=("top_k", "simulate", "precision"))
compress = jax.jit(compress_ops.compress, static_argnames=("ratio", "eps", "simulate"))
on_fp8_grid = jax.jit(simulate.fp8_round_trip)
on_fp4_grid = jax.jit(lambda x: simulate.fp4_round_trip(simulate.hadamard(x)))
WINDOW, HEADS, WIDTH = 6, 3, 16


def f32(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(np.asarray(a, np.float32)) for a in arrays]


def i32(*arrays: np.ndarray | list[int]) -> list[jax.Array]:
    return [jnp.asarray(np.asarray(a, np.int32)) for a in arrays]


# --------------------------------------------------------------------------------------------------- attention


class Keys:
    """Keys of two sequences: raw rows by position (stored in a ring) and compressed rows."""

    def __init__(self, seed: int, rows: int) -> None:
        rng = np.random.default_rng(seed)
        self.position, self.sequence = np.array([0, 3, 17, 30, 2, 25]), np.array([0, 0, 0, 0, 1, 1])
        self.q = rng.standard_normal((6, HEADS, WIDTH)) * 2
        self.raw = rng.standard_normal((2, 31, WIDTH))
        self.rows = rng.standard_normal((2, rows, WIDTH))
        self.sink = rng.standard_normal(HEADS)
        self.rng = rng

    def ring(self, capacity: int) -> np.ndarray:
        """Every row's own window is in place; the rest is poison."""
        ring = np.full((2, capacity, WIDTH), 1e3)
        for t, b in zip(self.position, self.sequence, strict=True):
            for p in range(max(0, t - WINDOW + 1), t + 1):
                ring[b, p % capacity] = self.raw[b, p]
        return ring

    def expected(self, row: int, chosen: np.ndarray, first: int = 0) -> np.ndarray:
        t, b = self.position[row], self.sequence[row]
        keys = np.concatenate([self.raw[b, max(first, t - WINDOW + 1) : t + 1], self.rows[b, chosen]])
        scores = self.q[row] @ keys.T / np.sqrt(WIDTH)
        weights = np.exp(scores)
        return weights / (weights.sum(-1, keepdims=True) + np.exp(self.sink)[:, None]) @ keys


@pytest.mark.parametrize("first", [0, 1])
def test_window_only(first):
    """Positions before the window, before `first` and after the row itself do not count. The ring holds all of them."""
    keys = Keys(0, 0)
    ring = keys.raw.copy()
    position, sequence = i32(keys.position[1:], keys.sequence[1:])
    q, raw, sink = f32(keys.q[1:], ring, keys.sink)
    got = attention(q, position, sequence, None, None, raw, None, sink, window=WINDOW, first=first, precision="highest")
    want = [keys.expected(row, np.zeros(0, int), first) for row in range(1, 6)]
    np.testing.assert_allclose(np.asarray(got), np.stack(want), rtol=0, atol=2e-6)


@pytest.mark.parametrize("row, capacity", [(2, WINDOW), (3, WINDOW), (2, WINDOW + 5)])
def test_ring_wraps_around(row, capacity):
    keys = Keys(1, 0)
    keys.position, keys.sequence, keys.q = keys.position[[row]], keys.sequence[[row]], keys.q[[row]]
    position, sequence = i32(keys.position, keys.sequence)
    q, raw, sink = f32(keys.q, keys.ring(capacity), keys.sink)
    got = attention(q, position, sequence, None, None, raw, None, sink, window=WINDOW, first=0, precision="highest")
    np.testing.assert_allclose(np.asarray(got)[0], keys.expected(0, np.zeros(0, int)), rtol=0, atol=2e-6)


def test_first_visible_rows():
    """More rows than one block, a different number for every query, none for one of them."""
    keys = Keys(2, 3 * ops.BLOCK)
    visible = np.array([0, 1, 64, 130, 5, 65])
    position, sequence, seen = i32(keys.position, keys.sequence, visible)
    q, raw, rows, sink = f32(keys.q, keys.raw, keys.rows, keys.sink)
    got = attention(q, position, sequence, None, seen, raw, rows, sink, window=WINDOW, first=0, precision="highest")
    want = [keys.expected(row, np.arange(visible[row])) for row in range(6)]
    np.testing.assert_allclose(np.asarray(got), np.stack(want), rtol=0, atol=2e-6)


def test_selected_rows():
    """Lists of different lengths; places that hold the row count are empty."""
    n, places = 3 * ops.BLOCK, 70
    keys = Keys(3, n)
    lengths = [0, 1, 70, 64, 65, 3]
    ids = np.full((6, places), n)
    for row, length in enumerate(lengths):
        ids[row, :length] = np.sort(keys.rng.permutation(n)[:length])
    position, sequence, chosen = i32(keys.position, keys.sequence, ids)
    q, raw, rows, sink = f32(keys.q, keys.raw, keys.rows, keys.sink)
    got = attention(q, position, sequence, chosen, None, raw, rows, sink, window=WINDOW, first=0, precision="highest")
    want = [keys.expected(row, ids[row, : lengths[row]]) for row in range(6)]
    np.testing.assert_allclose(np.asarray(got), np.stack(want), rtol=0, atol=2e-6)


def test_sink_above_every_score_does_not_overflow():
    keys = Keys(4, 0)
    keys.sink = np.array([200.0, -200.0, 0.0])
    position, sequence = i32(keys.position, keys.sequence)
    q, raw, sink = f32(keys.q, keys.raw, keys.sink)
    got = np.asarray(
        attention(q, position, sequence, None, None, raw, None, sink, window=WINDOW, first=0, precision="highest")
    )
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[:, 0], 0, atol=1e-30)
    np.testing.assert_allclose(got[0, 1], keys.raw[0, 0], rtol=1e-6)


# ----------------------------------------------------------------------------------------------------- indexer


def index(q, weights, rows, visible, *, top_k: int, angle=None, simulated: bool = False) -> np.ndarray:
    """Sorted ids; without an angle nothing is rotated."""
    total = len(q)
    angle = np.zeros((total, 2)) if angle is None else angle
    arrays = f32(q, np.cos(angle), np.sin(angle), weights, rows)
    sequence, seen = i32(np.zeros(total), visible)
    got = indexer(*arrays[:4], sequence, seen, arrays[4][None], top_k=top_k, simulate=simulated, precision="highest")
    return np.asarray(got)


def test_equal_scores_take_the_lower_row():
    """One head whose dot product with row k is exactly the recorded score."""
    scores, want = PURE["topk_tie_scores"], PURE["topk_tie_ids"]
    rows = np.zeros((ops.BLOCK, 16))
    rows[:40] = scores.T
    got = index(np.eye(16)[:, None] * 4, np.ones((16, 1)), rows, np.full(16, 40), top_k=8)
    np.testing.assert_array_equal(got, np.sort(want, axis=1))


def test_all_scores_zero_take_the_first_rows():
    got = index(np.ones((1, 2, 8)), np.ones((1, 2)), np.zeros((ops.BLOCK, 8)), [50], top_k=4)
    np.testing.assert_array_equal(got, [[0, 1, 2, 3]])


def test_only_visible_rows_are_chosen():
    """Invisible rows would score best; unused places hold the number of rows. Where all are chosen, no query is asked
    for."""
    n = 2 * ops.BLOCK
    rows = np.arange(n)[:, None] * np.ones(8)
    q = np.array([np.nan, np.nan, -np.inf, 1])[:, None, None] * np.ones(8)
    got = index(q, np.ones((4, 1)), rows, [0, 2, 5, 70], top_k=5)
    want = [[n] * 5, [0, 1, n, n, n], [0, 1, 2, 3, 4], [65, 66, 67, 68, 69]]
    np.testing.assert_array_equal(got, want)


def test_a_row_beyond_the_cache_does_not_disturb_its_neighbour():
    n = ops.BLOCK
    rows = np.arange(n)[:, None] * np.ones(8)
    got = index(np.ones((2, 1, 8)), np.ones((2, 1)), rows, [50, n + 17], top_k=3)
    np.testing.assert_array_equal(got[0], [47, 48, 49])


@pytest.mark.parametrize("simulated", [False, True])
def test_selection_matches_float64(simulated):
    """Head weights of both signs, negative dots cut off, queries rotated."""
    rng = np.random.default_rng(5)
    q, weights, rows = (
        rng.standard_normal((9, 6, 32)),
        rng.standard_normal((9, 6)),
        rng.standard_normal((2 * ops.BLOCK, 32)),
    )
    angle, visible = rng.uniform(0, 6, (9, 4)), np.arange(9) * 15 + 3
    pair = (q[..., 24::2] + 1j * q[..., 25::2]) * np.exp(1j * angle)[:, None]
    turned = q.copy()
    turned[..., 24::2], turned[..., 25::2] = pair.real, pair.imag
    if simulated:
        turned = np.asarray(on_fp4_grid(f32(turned)[0]))
    scores = np.einsum("tn,tnk->tk", weights, np.maximum(np.einsum("tnd,kd->tnk", turned, rows), 0))
    got = index(q, weights, rows, visible, top_k=7, angle=angle, simulated=simulated)
    for row, seen in enumerate(visible):
        best = np.sort(np.argsort(-scores[row, :seen], kind="stable")[:7])
        np.testing.assert_array_equal(got[row, : len(best)], best)


# --------------------------------------------------------------------------------------------------- compressor


def rows_numpy(values, gates, ape, norm, frequencies, ratio: int, eps: float, windows: list[int]) -> np.ndarray:
    """Pooled, normed and rotated rows of one sequence, straight from the definition."""
    width, rows = len(norm), []
    for w in windows:
        own = list(range(w * ratio, (w + 1) * ratio))
        if ratio == 4:
            before = [p for p in range((w - 1) * ratio, w * ratio) if p >= 0]
            value = np.concatenate([values[before, :width], values[own, width:]])
            logit = np.concatenate([(gates + ape)[before, :width], (gates + ape)[own, width:]])
        else:
            value, logit = values[own], (gates + ape)[own]
        weight = np.exp(logit - logit.max(0))
        pooled = (weight / weight.sum(0) * value).sum(0)
        row = pooled / np.sqrt((pooled**2).mean() + eps) * norm
        pair = (row[-4::2] + 1j * row[-3::2]) * np.exp(1j * (w * ratio) * frequencies)
        row[-4::2], row[-3::2] = pair.real, pair.imag
        rows.append(row)
    return np.stack(rows)


@pytest.mark.parametrize(
    "ratio, windows, simulated",
    [
        (4, [0, 1], "none"),
        (4, [5, 6], "none"),
        (6, [0], "none"),
        (6, [3, 4], "none"),
        (1, [2, 3], "none"),
        (4, [0, 1], "kv"),
        (6, [3, 4], "kv"),
        (4, [5, 6], "index"),
    ],
)
def test_compressed_rows_match_float64(ratio, windows, simulated):
    """Windows of two sequences read from rings just large enough, beginning and wrapped."""
    rng, width = np.random.default_rng(ratio), 32 if simulated == "index" else 68
    wide = width * (2 if ratio == 4 else 1)
    total = (windows[-1] + 1) * ratio
    values, gates = rng.standard_normal((2, total, wide)), rng.standard_normal((2, total, wide)) * 2
    ape, norm = rng.standard_normal((ratio, wide)), rng.standard_normal(width)
    frequencies, capacity = np.array([0.7, 0.05]), (2 if ratio == 4 else 1) * ratio + ratio * (len(windows) - 1)
    rings = np.full((2, 2, capacity, wide), 1e3)
    for p in range(max(0, total - capacity), total):
        rings[0][:, p % capacity], rings[1][:, p % capacity] = values[:, p], gates[:, p]
    tiled = np.tile(ape, (total // ratio, 1))
    want = [rows_numpy(values[b], gates[b], tiled, norm, frequencies, ratio, 1e-3, windows) for b in (1, 0)]
    want = np.concatenate(want)
    if simulated == "kv":
        want[:, :-4] = on_fp8_grid(f32(want[:, :-4])[0])
    elif simulated == "index":
        want = np.asarray(on_fp4_grid(f32(want)[0]))
    window, sequence = i32(windows * 2, [1] * len(windows) + [0] * len(windows))
    arrays = f32(rings[0], rings[1], ape, norm, frequencies)
    got = compress(window, sequence, *arrays, ratio=ratio, eps=1e-3, simulate=simulated)
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=5e-6)
