"""Filters against NumPy, exact sets, drawn distributions, and independence of a row from its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.decode.sampling import Sampling, filtered_logits, position_noise, sample_rows
from ds4jax.errors import RequestError

filtered = jax.jit(filtered_logits)


def scalars(**settings) -> Sampling:
    """Settings of one sequence as run-time scalars."""
    return jax.tree.map(lambda a: jnp.asarray(a[0]), Sampling(**settings).broadcast(1))


def reference(logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> list[int]:
    """Ids that remain, by the textbook definition in float64, most probable first."""
    scaled = logits.astype(np.float64) / temperature
    order = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))
    if top_k:
        order = order[:top_k]
    mass = np.exp(scaled[order] - scaled[order[0]])
    probabilities = mass / mass.sum()
    if top_p < 1:
        keep = 1
        while probabilities[:keep].sum() < top_p:
            keep += 1
        order = order[:keep]
    return [i for i, p in zip(order, probabilities, strict=False) if p >= min_p * probabilities[0]]


def kept(logits: np.ndarray, **settings) -> set[int]:
    return set(np.flatnonzero(np.asarray(filtered(jnp.asarray(logits), scalars(**settings))) > -np.inf).tolist())


def tied_logits(seed: int, size: int = 60) -> np.ndarray:
    """Logits with many equal values."""
    return (np.random.default_rng(seed).integers(-12, 12, size) / 4).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_top_k_is_exact_with_ties(seed):
    logits = tied_logits(seed)
    for k in (1, 2, 7, 31, 60, 100):
        found = kept(logits, temperature=0.7, top_k=k)
        assert found == set(reference(logits, 0.7, top_k=k))
        assert len(found) == min(k, 60)


@pytest.mark.parametrize("seed", range(4))
def test_top_p_is_the_smallest_prefix(seed):
    logits = tied_logits(seed)
    order = reference(logits, 1.3)
    mass = np.exp(logits[order].astype(np.float64) / 1.3)
    sums = np.concatenate([[0.0], np.cumsum(mass / mass.sum())])
    for n in (1, 2, 3, 10, 59, 60):
        middle = float((sums[n - 1] + sums[n]) / 2)  # above the mass of n - 1 tokens, below that of n
        assert kept(logits, temperature=1.3, top_p=middle) == set(order[:n])


def test_top_p_counts_the_token_that_reaches_p():
    logits = np.log(np.array([0.25, 0.5, 0.125, 0.125], np.float32))
    assert kept(logits, temperature=1.0, top_p=0.5) == {1}
    assert kept(logits, temperature=1.0, top_p=0.5001) == {0, 1}
    assert kept(logits, temperature=1.0, top_p=1.0) == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", range(4))
def test_min_p_is_relative_to_the_best(seed):
    logits = tied_logits(seed)
    for min_p in (0.013, 0.11, 0.4, 0.99):
        assert kept(logits, temperature=0.9, min_p=min_p) == set(reference(logits, 0.9, min_p=min_p))
    assert kept(logits, temperature=0.9, min_p=1.0) == set(np.flatnonzero(logits == logits.max()).tolist())


def test_all_filters_in_order():
    rng = np.random.default_rng(7)
    sizes = set()
    for _ in range(60):
        logits = (3 * rng.standard_normal(50)).astype(np.float32)
        settings = {
            "temperature": float(rng.uniform(0.3, 2.0)),
            "top_k": int(rng.integers(0, 30)),
            "top_p": float(rng.uniform(0.3, 1.0)),
            "min_p": float(rng.uniform(0.0, 0.2)),
        }
        want = reference(logits, **settings)
        assert kept(logits, **settings) == set(want), settings
        sizes.add(len(want))
    assert len(sizes) > 8  # the cases differ


def test_top_p_sees_the_distribution_that_top_k_left():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # Of the two largest alone, 0.4 / 0.7 = 0.57 already reaches 0.55; of all four it would not.
    assert kept(logits, temperature=1.0, top_k=2, top_p=0.55) == {0}
    assert kept(logits, temperature=1.0, top_p=0.55) == {0, 1}


def test_values_are_scaled_logits():
    logits = tied_logits(3)
    out = np.asarray(filtered(jnp.asarray(logits), scalars(temperature=0.5, top_k=9)))
    inside = out > -np.inf
    np.testing.assert_array_equal(out[inside], (logits[inside] - logits.max()) / np.float32(0.5))


def test_zero_temperature_keeps_the_lowest_of_equal_maxima():
    logits = np.array([1.0, 4.0, 4.0, 2.0], np.float32)
    assert kept(logits, temperature=0.0) == {1}
    assert kept(logits, temperature=0.0, top_k=3, min_p=0.1) == {1}


def test_tiny_temperature_does_not_overflow():
    logits = np.array([30.0, -20.0, 30.0, 29.0], np.float32)
    out = np.asarray(filtered(jnp.asarray(logits), scalars(temperature=2e-38, top_p=0.9)))
    assert not np.isnan(out).any()
    assert set(np.flatnonzero(out > -np.inf).tolist()) == {0, 2}


def test_filters_do_not_recompile():
    logits = jnp.zeros(32, jnp.float32)
    before = filtered._cache_size()
    for settings in ({"temperature": 0.5}, {"temperature": 2.0, "top_k": 5}, {"temperature": 0.0, "top_p": 0.3}):
        filtered(logits, scalars(**settings))
    assert filtered._cache_size() == before + 1


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"temperature": [0.1, 0.2, 0.3]},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(RequestError, match=next(iter(settings))):
        Sampling(**settings).broadcast(2)


sample = jax.jit(sample_rows, static_argnames="together")


def draw(logits, settings, seeds, positions, live=None, together=False):
    batch, rows = positions.shape
    keys = jax.vmap(lambda s: jax.random.key(s, impl="threefry2x32"))(jnp.asarray(seeds))
    live = jnp.ones((batch, rows), bool) if live is None else jnp.asarray(live)
    out = sample(jnp.asarray(logits), settings.broadcast(batch), keys, jnp.asarray(positions), live, together=together)
    return tuple(np.asarray(o) for o in out)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 6},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 9, "top_p": 0.95, "min_p": 0.1},
    ],
)
def test_distribution(settings):
    draws, size = 8192, 12
    logits = (2 * np.random.default_rng(1).standard_normal(size)).astype(np.float32)
    rows = np.broadcast_to(logits, (1, draws, size))
    tokens, _ = draw(rows, Sampling(**settings), [11], np.arange(draws, dtype=np.int32)[None])
    ids = reference(logits, **settings)
    weights = np.exp(logits[ids].astype(np.float64) / settings["temperature"])
    expected = draws * weights / weights.sum()
    counts = np.bincount(tokens[0], minlength=size)
    assert set(np.flatnonzero(counts)) <= set(ids)
    statistic = float((((counts[ids] - expected) ** 2) / expected).sum())
    freedom = len(ids) - 1
    # 99.9 % quantile of chi-square by the Wilson-Hilferty approximation.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_logprob_is_the_unfiltered_one():
    logits = (2 * np.random.default_rng(2).standard_normal((1, 3, 20))).astype(np.float32)
    tokens, logprobs = draw(logits, Sampling(temperature=1.0, top_k=2), [0], np.arange(3, dtype=np.int32)[None])
    wide = logits[0].astype(np.float64)
    want = wide[np.arange(3), tokens[0]] - np.log(np.exp(wide).sum(-1))
    np.testing.assert_allclose(logprobs[0], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("filters", [{}, {"top_k": np.array([0, 40, 0]), "top_p": np.array([1.0, 0.9, 0.7])}])
def test_a_row_does_not_depend_on_its_neighbours(filters):
    rng = np.random.default_rng(3)
    batch, rows, size = 3, 4, 501
    logits = (3 * rng.standard_normal((batch, rows, size))).astype(np.float32)
    settings = Sampling(temperature=np.array([0.0, 0.8, 1.2]), **filters)
    seeds = [5, 6, 7]
    start = np.array([9, 100, 2**20], np.int32)
    positions = start[:, None] + np.arange(rows, dtype=np.int32)
    live = np.arange(rows) < np.array([4, 1, 3])[:, None]
    tokens, logprobs = draw(logits, settings, seeds, positions, live)
    assert len(set(tokens[live].tolist())) > 4
    joint = draw(logits, settings, seeds, positions, live, together=True)
    assert joint[0].tobytes() == tokens.tobytes() and joint[1].tobytes() == logprobs.tobytes()
    for b in range(batch):
        for r in range(rows):
            if not live[b, r]:
                assert tokens[b, r] == 0 and logprobs[b, r] == 0
                continue
            one = jax.tree.map(lambda a, b=b: a[b : b + 1], settings.broadcast(batch))
            alone = draw(logits[b : b + 1, r : r + 1], one, [seeds[b]], positions[b : b + 1, r : r + 1])
            assert alone[0][0, 0] == tokens[b, r]
            assert alone[1].tobytes() == logprobs[b : b + 1, r : r + 1].tobytes()


def test_noise_belongs_to_seed_and_position():
    key, other = jax.random.key(1), jax.random.key(2)
    noise = np.asarray(position_noise(key, jnp.int32(7), 64))
    np.testing.assert_array_equal(noise, np.asarray(position_noise(key, jnp.int32(7), 64)))
    assert not np.array_equal(noise, np.asarray(position_noise(key, jnp.int32(8), 64)))
    assert not np.array_equal(noise, np.asarray(position_noise(other, jnp.int32(7), 64)))
