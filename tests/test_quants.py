"""Every GGML type decodes bit for bit, packing loses nothing, and indexing commutes with decoding."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4jax.quants import FORMATS, QTensor, block_size, codes_k, codes_q8, dequantize, pack, unpack

QUANTS = dict(np.load(DATA / "golden" / "quants.npz"))
decode = jax.jit(dequantize)


def equal_bits(got: jax.Array, want: np.ndarray) -> bool:
    """Same bits, except that any NaN equals any other."""
    found = np.asarray(got)
    assert found.dtype == want.dtype == np.float32 and found.shape == want.shape
    return bool(np.all((found.view(np.uint32) == want.view(np.uint32)) | (np.isnan(found) & np.isnan(want))))


def random_weight(format: str, shape: tuple[int, ...], seed: int = 0) -> tuple[QTensor, np.ndarray]:
    """Arbitrary bytes (scales include NaN, infinities and subnormals) as a QTensor and as the file's rows."""
    values, size = block_size(format)
    raw = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] // values * size), np.uint8)
    return pack(format, raw, shape), raw


def ggml_values(format: str, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[format])


@pytest.mark.parametrize("format", FORMATS)
def test_decodes_golden_bits(format):
    raw, want = QUANTS[f"raw_{format}"], QUANTS[f"val_{format}"]
    q = pack(format, raw, want.shape)
    assert equal_bits(decode(q), want)
    two_blocks = pack(format, raw.reshape(len(raw) // 2, -1), (len(raw) // 2, 2 * want.shape[1]))
    assert equal_bits(decode(two_blocks), want.reshape(two_blocks.shape))


@pytest.mark.parametrize("format", FORMATS)
def test_decodes_any_bits_as_ggml_does(format):
    q, raw = random_weight(format, (3, 20, 512))
    assert equal_bits(decode(q), ggml_values(format, raw))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FORMATS), st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_pack_is_invertible(format, seed, rows, blocks, experts):
    shape = ((2,) if experts else ()) + (rows, blocks * block_size(format)[0])
    values, size = block_size(format)
    raw = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], blocks * size), np.uint8)
    if format == "IQ2_XXS":  # the scale nibbles of a super-block share a word: all eight extremes must survive
        raw[..., 9::8] |= 0xF0
    q = pack(format, raw, shape)
    assert q.shape == shape
    np.testing.assert_array_equal(unpack(q), raw)
    np.testing.assert_array_equal(unpack(jax.device_put(q)), raw)


@pytest.mark.parametrize("format", ["Q8_0", "IQ2_XXS", "Q2_K", "Q4_K", "Q6_K"])
def test_a_device_packs_as_the_host_does(format):
    host, raw = random_weight(format, (3, 5, 512))
    device = jax.jit(lambda raw: pack(format, raw, host.shape))(raw)
    assert (device.format, device.shape) == (host.format, host.shape)
    for name, plane in host.planes.items():
        found = np.asarray(device.planes[name])
        assert (found.dtype, found.shape, found.tobytes()) == (plane.dtype, plane.shape, plane.tobytes()), name


@pytest.mark.parametrize("format", FORMATS)
def test_device_bytes(format):
    q, raw = random_weight(format, (4, 1024))
    assert q.nbytes == (raw.nbytes * 70 // 66 if format == "IQ2_XXS" else raw.nbytes)


@pytest.mark.parametrize("format", FORMATS)
def test_indexing_picks_the_rows_of_the_file(format):
    q, raw = random_weight(format, (5, 4, 256))
    ids = jnp.array([[4, 0], [2, 9]], jnp.int32)  # 9 is clipped to 4

    @jax.jit
    def pick(q: QTensor, i: jax.Array, ids: jax.Array) -> tuple[QTensor, ...]:
        return q[i], q[-1], q[1:3], q.take(ids), q[0].take(ids)

    for got, want in zip(pick(q, jnp.int32(2), ids), (raw[2], raw[-1], raw[1:3], raw[[[4, 0], [2, 4]]]), strict=False):
        assert got.shape == (*want.shape[:-1], 256)
        np.testing.assert_array_equal(unpack(got), want)
    rows = pick(q, jnp.int32(2), ids)[-1]
    np.testing.assert_array_equal(unpack(rows), raw[0][[[3, 0], [2, 3]]])


def test_static_facts_survive_jit():
    q, _ = random_weight("Q4_K", (2, 3, 512))
    traced = []

    @jax.jit
    def identity(q: QTensor) -> QTensor:
        traced.append((q.format, q.shape))
        return q

    out = identity(q)
    identity(out)
    assert traced == [("Q4_K", (2, 3, 512))]
    assert (out.format, out.shape, out.nbytes) == (q.format, q.shape, q.nbytes)


@pytest.mark.parametrize("format", ["Q8_0", "IQ2_XXS"])
def test_codes_per_32(format):
    q, raw = random_weight(format, (2, 3, 512))
    codes, scale = jax.jit(codes_q8)(q)
    assert codes.dtype == jnp.int8 and codes.shape == (2, 3, 16, 32)
    if format == "IQ2_XXS":
        assert set(np.unique(np.abs(np.asarray(codes)))) == {8, 25, 43}
    with np.errstate(all="ignore"):
        values = np.asarray(scale)[..., None] * np.asarray(codes).astype(np.float32)
    assert equal_bits(jnp.asarray(values.reshape(q.shape)), ggml_values(format, raw))


@pytest.mark.parametrize(("format", "parts", "largest", "sub"), [("Q2_K", 16, 3, 15), ("Q4_K", 8, 15, 63)])
def test_codes_per_256(format, parts, largest, sub):
    q, raw = random_weight(format, (2, 3, 512))
    codes, sc, m, d, dmin = (np.asarray(part) for part in jax.jit(codes_k)(q))
    assert codes.dtype == np.int8 and codes.shape == (2, 3, 2, parts, 256 // parts)
    assert (codes.min(), codes.max(), sc.max(), m.max()) == (0, largest, sub, sub)
    with np.errstate(all="ignore"):
        scale, minimum = d[..., None] * sc.astype(np.float32), dmin[..., None] * m.astype(np.float32)
        values = scale[..., None] * codes.astype(np.float32) - minimum[..., None]
    assert equal_bits(jnp.asarray(values.reshape(q.shape)), ggml_values(format, raw))


def test_word_planes_are_what_kernels_expect():
    """Layout facts that no decoding test pins: word order of Q8_0 and bit order of IQ2_XXS signs."""
    raw = np.zeros((1, 68), np.uint8)
    raw[0, 2:34] = np.arange(32)
    raw[0, 36:68] = np.arange(100, 132)
    word = pack("Q8_0", raw, (1, 64)).planes["word"]
    assert word.shape == (1, 8, 2)
    assert word[0, 3, 0] == int.from_bytes(bytes([12, 13, 14, 15]), "little")
    assert word[0, 0, 1] == int.from_bytes(bytes([100, 101, 102, 103]), "little")
    raw = np.zeros((1, 66), np.uint8)
    raw[0, 2:6] = [10, 20, 30, 40]
    raw[0, 6:10] = np.frombuffer(np.uint32((9 << 28) | (1 << 14)).tobytes(), np.uint8)  # eight 2: value 0, parity
    planes = pack("IQ2_XXS", raw, (1, 256)).planes
    assert planes["idx"][0, 0] == int.from_bytes(bytes([10, 20, 30, 40]), "little")
    assert planes["sign"].view(np.uint32)[0, 0] == (1 << 2) | (1 << 30)
    assert planes["scale"].view(np.uint32)[0, 0] == 9
