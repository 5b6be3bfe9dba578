"""Projections: float dots against float64, quantised activations bit for bit against NumPy float32."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants as gguf_quants
from quantised_numpy import (
    act_q8_numpy,
    act_q8k_numpy,
    f32,
    ordered_sum_numpy,
    packed,
    quantised_dot_numpy,
    random_blocks,
)

from ds4jax.activation import Q8, Q8K
from ds4jax.ops import linear as ops
from ds4jax.ops import quantise, sums

QUANTS = golden.read("golden/quants.npz")

ordered_sum, embed = jax.jit(sums.ordered_sum), jax.jit(ops.embed)


@functools.partial(jax.jit, static_argnames=("act", "precision"))
def linear(x, w, act, precision):
    return ops.linear(quantise.quantise(x, act=act), (), w, precision=precision)[0]


@functools.partial(jax.jit, static_argnames=("act", "precision"))
def grouped_linear(x, w, act, precision):
    return ops.grouped_linear(quantise.quantise(x, act=act), w, precision=precision)


def act_q8(x):
    """int8 codes [T, K] and scales."""
    q = jax.jit(quantise.act_q8)(x)
    assert isinstance(q, Q8)
    codes = np.asarray(q.word)[..., None].view(np.int8)  # [T, 8, G, 4]
    return codes.swapaxes(1, 2).reshape(x.shape), q.scale


def act_q8k(x):
    """int8 codes [T, K], scales, and sums in the order of the values."""
    q = jax.jit(quantise.act_q8k)(x)
    assert isinstance(q, Q8K)
    rows = len(x)
    codes = np.asarray(q.word)[..., None].view(np.int8).reshape(rows, 4, -1, 2, 8, 4)  # quarter, block, half
    sums = np.asarray(q.sums).reshape(rows, -1, 2, 2, 4)  # block, half, sixteen, quarter
    return codes.transpose(0, 2, 3, 1, 4, 5).reshape(x.shape), q.scale, sums.swapaxes(-2, -1).reshape(rows, -1)


def activations(rows: int, width: int, seed: int = 1) -> np.ndarray:
    """Rows of very different magnitude, one of them zero, one with a negative peak, one with a zero block."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, width)) * 10.0 ** rng.uniform(-3, 3, (rows, 1))).astype(f32)
    x[0] = 0
    x[1, 3] = -np.abs(x[1]).max() * 2
    x[2, :32] = 0
    return x


# ------------------------------------------------------------------------------------------ activation formats


def test_act_q8_matches_golden():
    codes, scale = act_q8(jnp.asarray(QUANTS["act_in"]))
    np.testing.assert_array_equal(np.asarray(codes), QUANTS["act_q8_qs"])
    np.testing.assert_array_equal(np.asarray(scale), QUANTS["act_q8_d"])


def test_act_q8_matches_numpy():
    x = activations(400, 128)
    codes, scale = act_q8(jnp.asarray(x))
    want, want_scale = act_q8_numpy(x)
    np.testing.assert_array_equal(np.asarray(codes), want.reshape(x.shape))
    np.testing.assert_array_equal(np.asarray(scale), want_scale)


def test_act_q8k_matches_golden():
    codes, scale, sums = act_q8k(jnp.asarray(QUANTS["act_in"]))
    raw = QUANTS["q8_k_raw"]
    np.testing.assert_array_equal(np.asarray(codes), raw[:, 4:260].view(np.int8))
    np.testing.assert_array_equal(np.asarray(scale), raw[:, :4].copy().view("<f4"))
    np.testing.assert_array_equal(np.asarray(sums), raw[:, 260:].copy().view("<i2"))


def test_act_q8k_matches_numpy():
    x = activations(200, 512)
    codes, scale, sums = act_q8k(jnp.asarray(x))
    want, want_scale = act_q8k_numpy(x)
    np.testing.assert_array_equal(np.asarray(codes), want.reshape(x.shape))
    np.testing.assert_array_equal(np.asarray(scale), want_scale)
    np.testing.assert_array_equal(np.asarray(sums), want.reshape(200, -1, 16).sum(-1))


def test_act_q8k_takes_the_first_of_two_equal_peaks():
    """+2 before -2: the scale is negative, so that the first peak is exactly -127."""
    x = np.zeros((2, 256), f32)
    x[0, [5, 9]] = [2, -2]
    x[1, [5, 9]] = [-2, 2]
    codes, scale, _ = act_q8k(jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(codes)[:, [5, 9]], [[-127, 127], [-127, 127]])
    np.testing.assert_array_equal(np.sign(np.asarray(scale)[:, 0]), [-1, 1])


# ------------------------------------------------------------------------------------------------- ordered sum


@pytest.mark.parametrize("terms", [1, 2, 3, 5, 8, 31, 32, 100, 127, 128, 129, 200, 256, 300])
def test_ordered_sum_bit_for_bit(terms):
    x = (np.random.default_rng(terms).standard_normal((17, terms)) * 10.0 ** np.arange(-8, 9)[:, None]).astype(f32)
    got = np.asarray(ordered_sum(jnp.asarray(x)))
    np.testing.assert_array_equal(got, ordered_sum_numpy(x))


# --------------------------------------------------------------------------------------------------- matmuls


@pytest.mark.parametrize("blocks", [1, 5, 17])
@pytest.mark.parametrize("name", ["Q8_0", "IQ2_XXS", "Q2_K", "Q4_K"])
def test_quantised_activations_bit_for_bit(name, blocks):
    """Block counts on both sides of every power of two, and more groups than lanes (17 * 8 > 128)."""
    raw = random_blocks(name, 11, blocks * 8 if name == "Q8_0" else blocks)
    width = 256 * blocks
    weight, x = packed(name, raw, (11, width)), activations(5, width)
    got = np.asarray(linear(jnp.asarray(x), weight, act="q8", precision="highest"))
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, quantised_dot_numpy(name, x, raw))


@pytest.mark.parametrize("name", ["Q8_0", "IQ2_XXS", "Q2_K", "Q4_K"])
def test_quantised_activations_approximate_float_ones(name):
    raw = random_blocks(name, 32, 16 if name == "Q8_0" else 2, seed=3)
    weight = packed(name, raw, (32, 512))
    x = np.random.default_rng(4).standard_normal((9, 512)).astype(f32)
    exact = np.asarray(linear(jnp.asarray(x), weight, act="f32", precision="highest"))
    rough = np.asarray(linear(jnp.asarray(x), weight, act="q8", precision="highest"))
    assert 0 < np.abs(rough - exact).std() < 0.02 * exact.std()


@pytest.mark.parametrize("name", ["Q8_0", "IQ2_XXS", "Q2_K", "Q4_K"])
def test_float_activations_use_dequantised_weights(name):
    raw = random_blocks(name, 8, 16 if name == "Q8_0" else 2, seed=5)
    matrix = gguf_quants.dequantize(raw, getattr(gguf_quants.GGMLQuantizationType, name)).astype(np.float64)
    x = np.random.default_rng(6).standard_normal((7, 512)).astype(f32)
    got = np.asarray(linear(jnp.asarray(x), packed(name, raw, (8, 512)), act="f32", precision="highest"))
    want = x.astype(np.float64) @ matrix.T
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("act", ["q8", "f32"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float_weights_keep_float_activations(dtype, act):
    """Unquantised weights are widened, never the activations narrowed."""
    rng = np.random.default_rng(7)
    weight = jnp.asarray(rng.standard_normal((12, 40)).astype(f32)).astype(dtype)
    x = rng.standard_normal((6, 40)).astype(f32)
    want = x.astype(np.float64) @ np.asarray(weight.astype(jnp.float32), np.float64).T
    got = np.asarray(linear(jnp.asarray(x), weight, act=act, precision="highest"))
    assert got.dtype == f32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_grouped_linear_float():
    """Row block g of the weight meets group g only."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((5, 3, 20)).astype(f32)
    weight = rng.standard_normal((3 * 4, 20)).astype(f32)
    want = np.concatenate([x[:, g].astype(np.float64) @ weight[4 * g : 4 * g + 4].T for g in range(3)], axis=1)
    got = np.asarray(grouped_linear(jnp.asarray(x), jnp.asarray(weight), act="f32", precision="highest"))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_grouped_linear_quantised_bit_for_bit():
    raw = random_blocks("Q8_0", 2 * 6, 8, seed=9)
    x = activations(5, 512, seed=10).reshape(5, 2, 256)
    want = [quantised_dot_numpy("Q8_0", x[:, g], raw[6 * g : 6 * g + 6]) for g in range(2)]
    got = grouped_linear(jnp.asarray(x), packed("Q8_0", raw, (12, 256)), act="q8", precision="highest")
    np.testing.assert_array_equal(np.asarray(got), np.concatenate(want, axis=1))


def test_embed_reads_rows_of_any_format():
    rng = np.random.default_rng(11)
    tokens = jnp.asarray([3, 0, 6, 3], jnp.int32)
    table = rng.standard_normal((7, 64)).astype(np.float16)
    np.testing.assert_array_equal(np.asarray(embed(tokens, jnp.asarray(table))), table.astype(f32)[[3, 0, 6, 3]])
    raw = random_blocks("Q8_0", 7, 2, seed=12)
    want = gguf_quants.dequantize(raw, gguf_quants.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(np.asarray(embed(tokens, packed("Q8_0", raw, (7, 64)))), want[[3, 0, 6, 3]])
