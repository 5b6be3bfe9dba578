"""Rotary embedding: frequencies of the released model, rotation at short and very long range."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.ops import rope as rope_ops
from ds4jax.ops.rope import rope_frequencies

PURE = golden.pure()


@functools.partial(jax.jit, static_argnames="inverse")
def rope(x, position, frequencies, inverse=False):
    """Rotation at given positions."""
    return rope_ops.rotate(x, *rope_ops.rope_table(position, frequencies), inverse)


FLASH = dataclasses.replace(
    golden.load("tiny_a").config,
    head_dim=512,
    qk_rope_head_dim=64,
    index_head_dim=128,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_factor=16.0,
    original_seq_len=65536,
    beta_fast=32.0,
    beta_slow=1.0,
    max_position_embeddings=1048576,
)


def arrays(*names: str) -> list[jax.Array]:
    return [jnp.asarray(PURE[name]) for name in names]


KINDS = pytest.mark.parametrize("kind", ["main", "compress"])


@KINDS
def test_frequencies_are_the_float64_ones_rounded_once(kind):
    frequencies = rope_frequencies(FLASH, compressed=kind == "compress")
    assert frequencies.dtype == np.float32
    np.testing.assert_array_equal(frequencies, PURE[f"freq_{kind}"].astype(np.float32))


@KINDS
def test_frequencies_agree_with_transformers(kind):
    frequencies = rope_frequencies(FLASH, compressed=kind == "compress")
    np.testing.assert_allclose(frequencies, PURE[f"freq_{kind}_hf"], rtol=2e-7, atol=0)


def test_yarn_ramp_of_the_released_model():
    """Pairs 0-15 keep their frequency, 16-24 are blended, 25-31 are divided by the factor."""
    plain = 160000.0 ** (-np.arange(32) / 32)
    ratio = rope_frequencies(FLASH, compressed=True) / plain
    np.testing.assert_allclose(ratio[:16], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[[16, 20, 24]], [0.90625, 0.53125, 0.15625], rtol=1e-6)
    np.testing.assert_allclose(ratio[25:], 1 / 16, rtol=1e-6)


def test_yarn_with_an_empty_ramp():
    """Both corrections fall on pair 0: the ramp becomes a step instead of a division by zero."""
    config = dataclasses.replace(FLASH, original_seq_len=6, beta_fast=32.0, beta_slow=1.0)
    frequencies = rope_frequencies(config, compressed=True)
    plain = 160000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(frequencies, plain * np.where(np.arange(32) < 1, 1, 1 / 16), rtol=1e-6)


@KINDS
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_matches_transformers_at_every_range(kind, inverse):
    """With transformers' own frequencies the angles are the same floats, so even a million positions agree."""
    got = rope(*arrays("rope_in", "rope_pos", f"freq_{kind}_hf"), inverse=inverse)
    want = PURE[f"rope_hf_{kind}" + "_inverse" * inverse]
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=1e-6)


@KINDS
def test_angles_are_float32_products(kind):
    """The angle is float32(position) * float32(frequency), rounded once; the rest is exact to rounding."""
    frequencies = rope_frequencies(FLASH, compressed=kind == "compress")
    got = np.asarray(rope(*arrays("rope_in", "rope_pos"), jnp.asarray(frequencies)))
    angle = (PURE["rope_pos"].astype(np.float32)[:, None] * frequencies).astype(np.float64)
    x = PURE["rope_in"].astype(np.float64)[:, 0]
    pair = (x[:, 64::2] + 1j * x[:, 65::2]) * np.exp(1j * angle)
    np.testing.assert_allclose(got[:, 0, 64::2], pair.real, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got[:, 0, 65::2], pair.imag, rtol=0, atol=1e-6)


@KINDS
@pytest.mark.parametrize("position, tolerance", [(3, 1e-6), (128, 3e-6), (4095, 2e-4), (65536, 2e-3), (10**6, 1.5e-2)])
def test_own_frequencies_against_transformers_and_float64(kind, position, tolerance):
    """A frequency's last bit shifts the angle in proportion to the position: agreement fades at very long range."""
    row = PURE["rope_pos"].tolist().index(position)
    frequencies = rope_frequencies(FLASH, compressed=kind == "compress")
    got = np.asarray(rope(*arrays("rope_in", "rope_pos"), jnp.asarray(frequencies)))[row]
    np.testing.assert_allclose(got, PURE[f"rope_hf_{kind}"][row], rtol=0, atol=tolerance)
    np.testing.assert_allclose(got, PURE[f"rope_out_{kind}"][row], rtol=0, atol=tolerance)


def test_leading_features_are_untouched_and_heads_share_the_angle():
    x = np.random.default_rng(0).standard_normal((5, 3, 24)).astype(np.float32)
    position = jnp.asarray([0, 1, 7, 7, 100], jnp.int32)
    frequencies = (10.0 ** -np.arange(3)).astype(np.float32)
    got = np.asarray(rope(jnp.asarray(x), position, jnp.asarray(frequencies)))
    np.testing.assert_array_equal(got[..., :18], x[..., :18])
    np.testing.assert_array_equal(got[0], x[0])
    pair = (x[..., 18::2] + 1j * x[..., 19::2]) * np.exp(1j * np.outer(np.asarray(position), frequencies))[:, None]
    np.testing.assert_allclose(got[..., 18::2], pair.real, atol=2e-6)
    np.testing.assert_allclose(got[..., 19::2], pair.imag, atol=2e-6)


def test_inverse_undoes_the_rotation():
    x = np.random.default_rng(1).standard_normal((6, 32)).astype(np.float32)
    position = jnp.asarray([0, 3, 128, 4095, 65536, 1_000_000], jnp.int32)
    frequencies = (100.0 ** (-np.arange(8) / 8)).astype(np.float32)
    turned = rope(jnp.asarray(x), position, jnp.asarray(frequencies))
    back = rope(turned, position, jnp.asarray(frequencies), inverse=True)
    np.testing.assert_allclose(np.asarray(back), x, rtol=0, atol=1e-6)
