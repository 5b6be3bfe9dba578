"""Kernels that read and write the cache, interpreted, against the operations that they replace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import pallas
from ds4jax.ops import WRITERS
from ds4jax.ops import attention as ops
from ds4jax.ops import simulate as simulate_ops
from ds4jax.ops.quantise import act_q8
from ds4jax.ops.rows import Live
from ds4jax.pallas import attention as attention_kernels
from ds4jax.pallas import indexer as indexer_kernels

HEADS, WIDTH, WINDOW = 6, 32, 70
SEQUENCE = jnp.array([0, 1, 0, 1], jnp.int32)
LIVE = jnp.array([True, True, False, True])


def draw(rng: np.random.Generator, *shape: int, dtype: type = np.float32) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape).astype(dtype))


def kernel(name: str, **settings):
    return jax.jit(functools.partial(pallas.KERNELS[name], interpret=True, **settings))


def writer(name: str, **settings):
    """The reference of an operation that writes a cache, for all rows at once."""

    def run(live, *args):
        return WRITERS[name](Live.of(live), lambda function, *rows: function(*rows), *args, **settings)

    return jax.jit(run)


# ---------------------------------------------------------------------------------------------------- raw rows


@pytest.mark.parametrize("dtype, width, rotary, simulate", [(np.float16, 192, 64, True), (np.float32, 40, 16, False)])
def test_raw_rows(dtype, width, rotary, simulate):
    """The bits of the reference in the first and the last place of rings; the absent row has a place, and leaves it."""
    angle, place = jnp.linspace(-3, 3, 2 * rotary).reshape(4, -1), jnp.array([4, 0, 2, 4], jnp.int32)
    settings = {"eps": 1e-6, "simulate": simulate}
    run, reference = kernel("kv_store", **settings), writer("kv_store", **settings)
    for seed in range(4):  # a sum in another order may round alike
        rng = np.random.default_rng(seed)
        kv = draw(rng, 4, width) * jnp.array([[1e-3], [1.0], [jnp.nan], [1e3]])
        rows, shared = (kv, jnp.cos(angle), jnp.sin(angle)), (draw(rng, width), draw(rng, 2, 5, width, dtype=dtype))
        got = np.asarray(run(LIVE, *rows, SEQUENCE, place, *shared))
        np.testing.assert_array_equal(got, np.asarray(reference(LIVE, *rows, SEQUENCE, place, *shared)))
        changed = (got != np.asarray(shared[1])).any(axis=2)
        assert sorted(zip(*np.nonzero(changed), strict=True)) == [(0, 4), (1, 0), (1, 4)]
    one = jax.tree.map(lambda a: a[3:], (LIVE, *rows, SEQUENCE, place))
    np.testing.assert_array_equal(np.asarray(run(*one, *shared))[1, 4], got[1, 4])


# --------------------------------------------------------------------------------------------------- attention


ANGLE = np.linspace(-3, 3, 16).reshape(4, -1)
TABLE = jnp.cos(ANGLE).astype(jnp.float32), jnp.sin(ANGLE).astype(jnp.float32)


@functools.cache
def attention_pair(first: int, groups: int = 2):
    settings = {"window": WINDOW, "first": first, "groups": groups, "act": "q8"}
    reference = jax.jit(functools.partial(ops.attention, precision="highest", **settings))
    return kernel("attention", **settings), reference


def take(rows, which):
    return jax.tree.map(lambda a: np.asarray(a)[which], rows)


def assert_same(got, want) -> None:
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(left, right)


def same_attention(q, position, ids, visible, raw, rows, sink, first: int = 0, groups: int = 2) -> None:
    """Near the reference, with the codes of the floats that they are; a row alone has the bits of the row among
    others."""
    run, reference = attention_pair(first, groups)
    got = run(LIVE, q, *TABLE, position, SEQUENCE, ids, visible, raw, rows, sink)
    want = reference(q, *TABLE, position, SEQUENCE, ids, visible, raw, rows, sink)
    np.testing.assert_allclose(take(got.x, LIVE), take(want.x, LIVE), rtol=1e-6, atol=3e-6)
    assert_same(take(got.q8, LIVE), take(jax.jit(act_q8)(got.x), LIVE))
    one = jax.tree.map(lambda a: a[3:], (LIVE, q, *TABLE, position, SEQUENCE, ids, visible))
    assert_same(take(run(*one, raw, rows, sink), 0), take(got, 3))


POSITION = jnp.array([3, 40, 10**6, 200], jnp.int32)


@pytest.mark.parametrize(
    "dtype, first, width, groups", [(np.float16, 0, WIDTH, 2), (np.float16, 1, WIDTH, 2), (np.float32, 0, 16, 3)]
)
def test_window(dtype, first, width, groups):
    """A ring that wraps around, a window that has just begun, places of one part only; codes of two heads."""
    rng = np.random.default_rng(1)
    raw, q = draw(rng, 2, WINDOW + 3, width, dtype=dtype), draw(rng, 4, HEADS, width) * 3
    same_attention(q, POSITION, None, None, raw, None, draw(rng, HEADS), first, groups)


def test_selected_rows():
    """Lists of several lengths, none at all among them; the rows behind them are poison."""
    rng = np.random.default_rng(2)
    n, places = 192, 70
    rows = np.full((2, n, WIDTH), np.nan, np.float16)
    ids = np.full((4, places), n, np.int32)
    for row, length in enumerate([0, 70, 70, 65]):
        ids[row, :length] = np.sort(rng.permutation(n)[:length])
        rows[SEQUENCE[row], ids[row, :length]] = rng.standard_normal((length, WIDTH))
    raw, sink = draw(rng, 2, WINDOW + 3, WIDTH, dtype=np.float16), draw(rng, HEADS)
    same_attention(draw(rng, 4, HEADS, WIDTH), POSITION, jnp.asarray(ids), None, raw, jnp.asarray(rows), sink)


def test_visible_rows():
    """More parts than one step of the combination takes, a part not full, none; the capacity changes nothing."""
    rng = np.random.default_rng(3)
    n, visible = 2112, jnp.array([2100, 0, 9999999, 129], jnp.int32)
    rows = draw(rng, 2, n, WIDTH, dtype=np.float16)
    q, raw, sink = draw(rng, 4, HEADS, WIDTH), draw(rng, 2, WINDOW + 3, WIDTH, dtype=np.float16), draw(rng, HEADS)
    same_attention(q, POSITION, None, visible, raw, rows, sink)
    run, few = attention_pair(0)[0], jnp.minimum(visible, 129)
    full, short = (run(LIVE, q, *TABLE, POSITION, SEQUENCE, None, few, raw, r, sink) for r in (rows, rows[:, :192]))
    assert_same(take(full, LIVE), take(short, LIVE))


def test_rows_take_turns(monkeypatch):
    """Where the partial results of all rows would take too much memory; the last turn repeats a row. Nine rows at a
    time are so many that absent ones are left out."""
    rng = np.random.default_rng(7)
    args = (draw(rng, 4, HEADS, WIDTH), *TABLE, POSITION, SEQUENCE, None, None)
    shared = (draw(rng, 2, WINDOW + 3, WIDTH, dtype=np.float16), None, draw(rng, HEADS))
    at_once = attention_pair(0)[0](LIVE, *args, *shared)
    partial = -(-WINDOW // attention_kernels.PART) * HEADS * WIDTH * 4
    monkeypatch.setattr(attention_kernels, "WORKSPACE", 9 * partial)
    which = jnp.arange(17) % 4
    live, *args = jax.tree.map(lambda a: a[which], (LIVE, *args))
    got = kernel("attention", window=WINDOW, first=0, groups=2, act="q8")(live, *args, *shared)
    assert_same(take(got, live), take(at_once, which[live]))


def test_extreme_sinks_and_scores():
    rng = np.random.default_rng(4)
    raw = draw(rng, 2, WINDOW + 3, WIDTH, dtype=np.float16) * np.float16(30)
    sink = jnp.array([500.0, -500.0, 0.0] * 2)
    same_attention(draw(rng, 4, HEADS, WIDTH) * 0.02, POSITION, None, None, raw, None, sink)
    q = draw(rng, 4, HEADS, WIDTH) * 1000
    got = attention_pair(0)[0](LIVE, q, *TABLE, POSITION, SEQUENCE, None, None, raw, None, sink)
    assert np.isfinite(take(got.x, LIVE)).all()


# ---------------------------------------------------------------------------------------------------- compress


@pytest.mark.parametrize(
    "ratio, width, simulate, dtype",
    [(4, 68, "kv", np.float32), (4, 32, "index", np.float16), (6, 68, "kv", np.float32), (128, 20, "none", np.float32)],
)
def test_compressed_rows(ratio, width, simulate, dtype):
    """The bits of the reference, but for one; the first window of a sequence, rings that wrap around. The absent row
    has a place, and leaves it."""
    rng = np.random.default_rng(5)
    wide = width * (2 if ratio == 4 else 1)
    capacity = 2 * ratio + 1
    values, gates = draw(rng, 2, capacity, wide), draw(rng, 2, capacity, wide) * 3
    cache = draw(rng, 2, 1001, width, dtype=dtype)
    shared = (values, gates, draw(rng, ratio, wide), draw(rng, width), jnp.array([0.7, 0.05]), cache)
    window = jnp.array([0, 5, 700, 1000], jnp.int32)
    settings = {"ratio": ratio, "eps": 1e-6, "simulate": simulate}
    run = kernel("compress_store", **settings)
    got = np.asarray(run(LIVE, window, SEQUENCE, *shared))
    want = np.asarray(writer("compress_store", **settings)(LIVE, window, SEQUENCE, *shared))
    # In a long loop the exponential of XLA:CPU depends on what it is fused with.
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-7 if ratio == 128 else 0)
    changed = (got != np.asarray(cache)).any(axis=2)
    assert sorted(zip(*np.nonzero(changed), strict=True)) == [(0, 0), (1, 5), (1, 1000)]
    alone = np.asarray(run(LIVE[3:], window[3:], SEQUENCE[3:], *shared))
    np.testing.assert_array_equal(alone[1, 1000], got[1, 1000])


# ----------------------------------------------------------------------------------------------------- indexer


@pytest.mark.parametrize("simulate, dtype", [(True, np.float16), (False, np.float16), (False, np.float32)])
def test_selection(simulate, dtype):
    """Fewer rows than wanted, none, one more, many more; every score twice, so that the lower row has to win. Where all
    are chosen, no query is asked for."""
    rng = np.random.default_rng(6)
    heads, width, n = 6, 32, 192
    grid = jax.jit(lambda x: simulate_ops.fp4_round_trip(x))
    rows = np.array(grid(draw(rng, 2, n, width)))
    rows[:, 1::2] = rows[:, ::2]
    q, weights, angle = draw(rng, 4, heads, width).at[0].set(jnp.nan), draw(rng, 4, heads), draw(rng, 4, 4) * 3
    visible = jnp.array([5, 150, 10**7, 22], jnp.int32)
    args = (q, jnp.cos(angle), jnp.sin(angle), weights, SEQUENCE)
    stored = jnp.asarray(rows.astype(dtype))
    run = kernel("indexer", top_k=21, simulate=simulate)
    reference = jax.jit(functools.partial(ops.indexer, top_k=21, simulate=simulate, precision="highest"))
    got = np.asarray(run(LIVE, *args, visible, stored))
    want = np.asarray(reference(*args, jnp.where(LIVE, visible, 0), stored))
    np.testing.assert_array_equal(got[LIVE], want[LIVE])
    if simulate:
        none = np.asarray(run(LIVE, *args, jnp.zeros(4, jnp.int32), stored))
        np.testing.assert_array_equal(none[LIVE], n)


@pytest.mark.parametrize("distinct, top_k, wide", [(1, 20, False), (40, 20, True), (10**6, 20, False), (40, 60, True)])
def test_tournament_of_scores(distinct, top_k, wide, monkeypatch):
    """Several levels; few distinct scores, of both signs and zeros of both, against a stable sort; lists that fill a
    chunk; scores many powers of two apart, in one row with fewer positive ones than wanted."""
    monkeypatch.setattr(indexer_kernels, "CHUNK", 64)
    rng = np.random.default_rng(distinct)
    n, visible = 1000, np.array([1000, 20, 4, 777])
    scores = (rng.integers(0, distinct, (4, n)) - distinct // 2).astype(np.float32) * np.float32(1e-3)
    scores = np.where(rng.random((4, n)) < 0.5, -scores, scores)
    if wide:
        scores *= np.float32(2) ** rng.integers(-90, 90, (4, n))
        scores[3] = np.where(rng.random(n) < 0.5, np.nextafter(np.float32(-4), 0), -4 - np.abs(scores[3]))
        scores[3, 760:769] = np.linspace(0, 1, 9)  # the key of 1 is 2^31 above that of the number after -4
    run = jax.jit(functools.partial(indexer_kernels.select, top_k=top_k, interpret=True))
    got = np.asarray(run(LIVE.astype(jnp.int32), jnp.asarray(visible, jnp.int32), jnp.asarray(scores)))
    for row in (0, 1, 3):
        best = np.sort(np.argsort(-scores[row, : visible[row]], kind="stable")[:top_k])
        np.testing.assert_array_equal(got[row], np.pad(best, (0, top_k - len(best)), constant_values=n))
