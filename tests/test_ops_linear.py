"""Projections: float dots against float64, quantised activations bit for bit against NumPy float32."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants as gguf_quants

from ds4jax.ops import linear as ops
from ds4jax.quants import QTensor, pack

QUANTS = golden.read("golden/quants.npz")
f32, i32 = np.float32, np.int32

act_q8, act_q8k, ordered_sum, embed = (jax.jit(f) for f in (ops.act_q8, ops.act_q8k, ops.ordered_sum, ops.embed))
linear, grouped_linear = (jax.jit(f, static_argnames=("act", "precision")) for f in (ops.linear, ops.grouped_linear))


# ------------------------------------------------------------------------------- NumPy float32, block by block


def random_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random valid bytes [rows, blocks * block bytes] with finite scales of both signs, one of them zero."""
    rng = np.random.default_rng(seed)
    size, offsets = {"Q8_0": (34, [0]), "IQ2_XXS": (66, [0]), "Q2_K": (84, [80, 82]), "Q4_K": (144, [0, 2])}[name]
    raw = rng.integers(0, 256, (rows, blocks, size), np.uint8)
    for offset in offsets:
        scale = (rng.standard_normal((rows, blocks)) * 0.02).astype(np.float16)
        scale[0, 0] = 0
        raw[:, :, offset : offset + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def half(raw: np.ndarray, offset: int) -> np.ndarray:
    return raw[..., offset : offset + 2].copy().view("<f2")[..., 0].astype(f32)


def groups_numpy(name: str, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q8_0, IQ2_XXS: codes [N, G, 32] and float32 scales [N, G]."""
    if name == "Q8_0":
        raw = raw.reshape(len(raw), -1, 34)
        return raw[..., 2:].view(np.int8).astype(i32), half(raw, 0)
    raw = raw.reshape(len(raw), -1, 66)
    gguf_quants.IQ2_XXS.init_grid()
    grid = np.asarray(gguf_quants.IQ2_XXS.grid).reshape(256, 8).astype(i32)
    group = raw[..., 2:].reshape(len(raw), -1, 8)
    word = group[..., 4:].copy().view("<u4")[..., 0]
    codes = np.empty((*word.shape, 4, 8), i32)
    for k in range(4):
        low = ((word >> np.uint32(7 * k)) & np.uint32(127)).astype(i32)
        parity = np.bitwise_count(low).astype(i32) & 1
        signs = low | parity << 7
        negative = (signs[..., None] >> np.arange(8)) & 1
        codes[..., k, :] = np.where(negative == 1, -1, 1) * grid[group[..., k]]
    d = np.repeat(half(raw, 0), 8, axis=-1)
    scale = (d * (f32(0.5) + (word >> np.uint32(28)).astype(f32))) * f32(0.25)
    return codes.reshape(*word.shape, 32), scale


def superblocks_numpy(name: str, raw: np.ndarray) -> tuple[np.ndarray, ...]:
    """Q2_K, Q4_K: codes [N, B, S, 256/S], scales and minima [N, B, S], d and dmin [N, B]."""
    if name == "Q2_K":
        raw = raw.reshape(len(raw), -1, 84)
        scales, packed = raw[..., :16].astype(i32), raw[..., 16:80].astype(i32).reshape(*raw.shape[:2], 2, 1, 32)
        codes = (packed >> (2 * np.arange(4))[:, None]) & 3
        return codes.reshape(*raw.shape[:2], 16, 16), scales & 15, scales >> 4, half(raw, 80), half(raw, 82)
    raw = raw.reshape(len(raw), -1, 144)
    s, packed = raw[..., 4:16].astype(i32), raw[..., 16:].astype(i32).reshape(*raw.shape[:2], 4, 1, 32)
    codes = (packed >> (4 * np.arange(2))[:, None]) & 15
    low, middle, high = s[..., :4], s[..., 4:8], s[..., 8:]
    sc = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], -1)
    m = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], -1)
    return codes.reshape(*raw.shape[:2], 8, 32), sc, m, half(raw, 0), half(raw, 2)


def act_q8_numpy(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    v = x.reshape(len(x), -1, 32)
    scale = np.abs(v).max(-1) / f32(127)
    inverse = np.divide(f32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    return np.clip(np.rint(v * inverse[..., None]), -128, 127).astype(i32), scale


def act_q8k_numpy(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    v = x.reshape(len(x), -1, 256)
    codes, scale = np.zeros(v.shape, i32), np.zeros(v.shape[:2], f32)
    for index in np.ndindex(*v.shape[:2]):
        peak = v[index][np.abs(v[index]).argmax()]
        if peak != 0:
            inverse = f32(-127) / peak
            codes[index] = np.clip(np.rint(inverse * v[index]), -128, 127)
            scale[index] = f32(1) / inverse
    return codes, scale


def ordered_sum_numpy(terms: np.ndarray) -> np.ndarray:
    lanes = 1
    while lanes < terms.shape[-1] and lanes < 128:
        lanes *= 2
    total = np.zeros((*terms.shape[:-1], lanes), f32)
    for index in range(terms.shape[-1]):
        lane = index % lanes
        total[..., lane] = terms[..., index] if index < lanes else total[..., lane] + terms[..., index]
    while lanes > 1:
        lanes //= 2
        total = total[..., :lanes] + total[..., lanes : 2 * lanes]
    return total[..., 0]


def quantised_dot_numpy(name: str, x: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """`x [T, K] . w^T` with int8 activations; every product and sum is one float32 operation."""
    if name in ("Q8_0", "IQ2_XXS"):
        codes, scale = groups_numpy(name, raw)
        q, xscale = act_q8_numpy(x)
        isum = (q[:, None] * codes[None]).sum(-1)
        return ordered_sum_numpy(isum.astype(f32) * (scale[None] * xscale[:, None]))
    codes, sc, m, d, dmin = superblocks_numpy(name, raw)
    q, xscale = act_q8k_numpy(x)
    q = q.reshape(len(x), 1, *codes.shape[1:])
    values = (sc * (q * codes).sum(-1)).sum(-1).astype(f32)
    minima = (m * q.sum(-1)).sum(-1).astype(f32)
    xs = xscale[:, None]
    return ordered_sum_numpy((d * xs) * values - (dmin * xs) * minima)


def packed(name: str, raw: np.ndarray, shape: tuple[int, ...]) -> QTensor:
    return jax.tree.map(jnp.asarray, pack(name, raw, shape))


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
    assert codes.dtype == jnp.int8
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
    assert codes.dtype == jnp.int8
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
