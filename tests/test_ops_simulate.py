"""Simulated quantisation: FP8 and FP4 round trips, the Hadamard transform, power-of-two scales."""

import golden
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ds4jax.ops import simulate

PURE = golden.pure()
pow2_scale, fp8_round_trip, fp4_round_trip, hadamard = (
    jax.jit(f) for f in (simulate.pow2_scale, simulate.fp8_round_trip, simulate.fp4_round_trip, simulate.hadamard)
)
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)


def scale_numpy(ratio: np.ndarray) -> np.ndarray:
    """2**ceil(log2(ratio)), exactly, through the mantissa."""
    mantissa, exponent = np.frexp(ratio.astype(np.float64))
    return np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))


def test_pow2_scale_exact_at_and_around_powers_of_two():
    powers = np.ldexp(np.float32(1), np.arange(-120, 120)).astype(np.float32)
    x = np.concatenate([powers, np.nextafter(powers, np.float32(np.inf)), np.nextafter(powers, np.float32(0))])
    np.testing.assert_array_equal(np.asarray(pow2_scale(jnp.asarray(x))), scale_numpy(x).astype(np.float32))


def test_pow2_scale_exact_on_random_values():
    x = np.exp(np.random.default_rng(0).uniform(-60, 60, 20_000)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(pow2_scale(jnp.asarray(x))), scale_numpy(x).astype(np.float32))


def test_fp8_matches_golden_bit_for_bit():
    np.testing.assert_array_equal(np.asarray(fp8_round_trip(jnp.asarray(PURE["fp8_in"]))), PURE["fp8_out"])


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 300.0, 1e6])
def test_fp8_matches_numpy_bit_for_bit(magnitude):
    x = (np.random.default_rng(1).standard_normal((50, 3, 128)) * magnitude).astype(np.float32)
    blocks = x.reshape(50, 3, 2, 64)
    largest = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(1e-4))
    scale = scale_numpy(largest * np.float32(1 / 448)).astype(np.float32)
    codes = np.clip(blocks / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(
        np.asarray(fp8_round_trip(jnp.asarray(x))), (codes.astype(np.float32) * scale).reshape(x.shape)
    )


def test_fp8_is_idempotent():
    once = fp8_round_trip(jnp.asarray(PURE["fp8_in"]))
    np.testing.assert_array_equal(np.asarray(fp8_round_trip(once)), np.asarray(once))


def test_hadamard_matches_golden():
    x = PURE["had_in"]
    error = np.abs(np.asarray(hadamard(jnp.asarray(x))) - PURE["had_out"]).max(1)
    assert (error <= 4e-7 * np.linalg.norm(x, axis=1)).all(), error


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64, 128])
def test_hadamard_matches_sylvester_matrix(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x = np.random.default_rng(2).standard_normal((7, size)).astype(np.float32)
    want = x.astype(np.float64) @ matrix / np.sqrt(size)
    np.testing.assert_allclose(np.asarray(hadamard(jnp.asarray(x))), want, rtol=0, atol=2e-6)


def test_fp4_matches_golden_bit_for_bit():
    np.testing.assert_array_equal(np.asarray(fp4_round_trip(jnp.asarray(PURE["had_out"]))), PURE["fp4_out"])
    np.testing.assert_array_equal(np.asarray(fp4_round_trip(jnp.asarray(PURE["fp4_ties_in"]))), PURE["fp4_ties_out"])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e5])
def test_fp4_matches_numpy_bit_for_bit(magnitude):
    x = (np.random.default_rng(3).standard_normal((40, 64)) * magnitude).astype(np.float32)
    blocks = x.reshape(40, 2, 32)
    largest = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(6 * 2.0**-126))
    scale = scale_numpy(largest * np.float32(1 / 6))
    distance = np.abs(np.abs(blocks / scale)[..., None] - E2M1)
    nearest = distance.argmin(-1)
    tie = (
        np.take_along_axis(distance, nearest[..., None], -1)[..., 0]
        == np.take_along_axis(distance, np.minimum(nearest + 1, 7)[..., None], -1)[..., 0]
    )
    code = np.where(tie & (nearest % 2 == 1), np.minimum(nearest + 1, 7), nearest)
    want = np.copysign(E2M1[code] * scale, blocks).astype(np.float32).reshape(x.shape)
    np.testing.assert_array_equal(np.asarray(fp4_round_trip(jnp.asarray(x))), want)


def test_fp4_of_zeros_is_zero():
    np.testing.assert_array_equal(np.asarray(fp4_round_trip(jnp.zeros((2, 64)))), np.zeros((2, 64)))
