"""Weight encoders of the demonstration model: what the gguf package decodes from them, and their twins inside jit."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tools.demo_model import blockfit, fakequant
from tools.demo_model.encoders import decode, encode
from tools.demo_model.fakequant import FAKE, fake_all

# Relative RMS error on Gaussian weights. A 2-bit Lloyd-Max quantiser of unlimited scale precision has 0.343.
LIMITS = {"IQ2_XXS": 0.33, "Q2_K": 0.265, "Q4_K": 0.071, "Q8_0": 0.0056}


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(np.float32)


def relative(error: np.ndarray, of: np.ndarray) -> float:
    return float(np.sqrt((error**2).sum() / (of**2).sum()))


@pytest.mark.parametrize("kind", LIMITS)
def test_error_on_gaussian_weights(kind: str) -> None:
    x = gaussian(2, 64, 1024)
    raw = encode(kind, x)
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert raw.dtype == np.uint8
    assert raw.shape == (2, 64, 1024 // values * size)
    error = relative(decode(kind, raw) - x, x)
    assert 0.9 * LIMITS[kind] < error < LIMITS[kind]


@pytest.mark.parametrize("kind", LIMITS)
def test_error_is_the_same_at_every_size_of_weights(kind: str) -> None:
    x = gaussian(16, 1024, seed=1)
    small, large = (relative(decode(kind, encode(kind, s * x)) - s * x, s * x) for s in (0.25, 1024.0))
    assert small == pytest.approx(large, rel=0.01)


@pytest.mark.parametrize(("kind", "loss"), [("IQ2_XXS", 1e-6), ("Q2_K", 2e-3), ("Q4_K", 4e-3), ("Q8_0", 1e-6)])
def test_stored_values_are_found_again(kind: str, loss: float) -> None:
    stored = decode(kind, encode(kind, gaussian(64, 1024, seed=2)))
    assert relative(decode(kind, encode(kind, stored)) - stored, stored) < loss


def test_random_iq2_xxs_blocks_are_found_again() -> None:
    rng = np.random.default_rng(3)
    raw = rng.integers(0, 256, (4, 66 * 16), np.uint8).reshape(-1, 66)
    raw[:, :2] = rng.uniform(1e-3, 1e-2, (64, 1)).astype("<f2").view(np.uint8)
    stored = decode("IQ2_XXS", raw)
    assert relative(decode("IQ2_XXS", encode("IQ2_XXS", stored)) - stored, stored) < 0.01


def test_iq2_xxs_is_the_best_choice_at_its_scales() -> None:
    """No other codebook entry, sign pattern of even parity or group scale comes closer to a sub-block."""
    x = gaussian(4, 256, seed=4)
    fit = blockfit.fit_iq2_xxs(x, np, lambda v: v.astype(np.float16).astype(np.float32))
    error = (blockfit.iq2_xxs_values(fit, np) - x).reshape(4, 8, 4, 8)
    grid = blockfit.iq2_xxs_codebook().entries
    even = [[1 - 2 * (p >> j & 1) for j in range(8)] for p in range(256) if p.bit_count() % 2 == 0]
    patterns = np.array(even, np.float32)
    step = fit.d[:, None] * (2 * fit.scale + 1) / 8
    v = x.reshape(4, 8, 4, 8)
    for b, g, k in np.ndindex(4, 8, 4):
        cost = ((patterns[:, None] * grid * step[b, g] - v[b, g, k]) ** 2).sum(-1)
        # The smallest value takes the flip of an odd pattern; another flip can win by a hair only.
        assert (error[b, g, k] ** 2).sum() <= cost.min() * 1.05 + 1e-9


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("row", [np.zeros(256), np.full(256, 0.03), -np.full(256, 0.03), np.eye(1, 256, 7)[0]])
def test_degenerate_rows(kind: str, row: np.ndarray) -> None:
    x = row.astype(np.float32)[None]
    values = decode(kind, encode(kind, x))
    assert np.isfinite(values).all()
    # IQ2_XXS has no zero and no entry with a single large value.
    limit = 0.55 if kind == "IQ2_XXS" and np.count_nonzero(row) == 1 else 0.001
    assert ((values - x) ** 2).sum() <= limit * (x**2).sum()


@pytest.mark.parametrize("kind", LIMITS)
def test_values_inside_jit_are_those_of_the_encoder(kind: str) -> None:
    x = gaussian(3, 16, 1024, seed=5)
    fake = np.asarray(jax.jit(FAKE[kind])(x))
    stored = decode(kind, encode(kind, x))
    assert relative(fake - x, x) == pytest.approx(relative(stored - x, x), rel=1e-3)
    assert relative(fake - stored, stored) < 0.01  # near ties fall either way
    again = decode(kind, encode(kind, fake))
    assert relative(again - fake, fake) < 0.05 * relative(fake - x, x)


def test_chunks_do_not_change_values(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(7, 512, seed=6)
    whole = np.asarray(jax.jit(fakequant.fake_q2_k)(x))
    monkeypatch.setattr(fakequant, "CHUNK", 4)
    parts = np.asarray(jax.jit(lambda w: fakequant.fake_q2_k(w))(x))
    assert relative(parts - whole, whole) < 1e-3


def test_many_weights_at_once_are_each_alone() -> None:
    weights = {"a": gaussian(2, 256), "b": gaussian(3, 512, seed=7), "c": gaussian(4, 64, seed=8), "free": gaussian(3)}
    types = {"a": "Q2_K", "b": "Q2_K", "c": "Q8_0"}
    values = jax.jit(lambda w: fake_all(w, types))(weights)
    assert set(values) == set(types)
    for name, kind in types.items():
        stored = decode(kind, encode(kind, weights[name]))
        assert values[name].shape == weights[name].shape
        assert relative(np.asarray(values[name]) - stored, stored) < 0.01


def test_unknown_type_and_ragged_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no encoder for Q3_K"):
        encode("Q3_K", gaussian(1, 256))
    with pytest.raises(ValueError, match="rows of 128 values"):
        encode("Q2_K", gaussian(1, 128))
