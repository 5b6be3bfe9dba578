"""Quantised weights: a pytree of planes with a static format, packed at loading and decoded where they are used.

A `QTensor` keeps a weight in the bits of its GGUF file. Formats that kernels read are rearranged into planes of 32-bit
words and scales; the others stay rows of GGML blocks. Every decoded value is bit-equal to `gguf.quants.dequantize`:
all products of a scale, a sub-scale and a code fit in 24 bits, so neither fused multiply-add nor the order of factors
can change them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from gguf import quants as ggml
from jax import Array
from jaxtyping import Float, Float32, Int, Int8, Int32, UInt8

from ds4jax.quants_layouts import PACK, UNPACK, ksigns, values_of

FORMATS = (
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ1_S",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ3_XXS",
    "MXFP4",
)
"""GGML types that a QTensor can hold."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["planes"], meta_fields=["format", "shape"])
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantised weight of logical `shape`; rows run along the last axis.

    planes, with `...` for `shape[:-1]`, B = K/256 and G = K/32 for rows of K values:
        Q8_0: `word` i32 [..., 8, G] (word j of group g holds codes 4j..4j+3, lowest byte first), `d` f16 [..., G]
        IQ2_XXS: `idx` i32 [..., G] (four grid indices), `sign` i32 [..., G] (bit 4j+k = sign of value j of eight k),
            `scale` i32 [..., B] (nibble g = scale of group g), `d` f16 [..., B]
        Q2_K: `q` i32 [..., 16 B] in file order, `s` i32 [..., 4 B] (word 2h + k of a super-block holds the scale bytes
            of the quarters j = 0..3 of its half h, for the k-th 16 values), `d` and `dmin` f16 [..., B]
        Q4_K: `q` i32 [..., 32 B], `s` i32 [..., 3 B], `d` and `dmin` f16 [..., B]; words in file order
        others: `raw` u8 [..., blocks, block bytes]
    format: GGML name of the type.
    """

    planes: dict[str, Any]
    format: str
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> QTensor:
        """Indexes the leading axis (an expert or a row) by a slice, or by an integer or array, which may be traced."""
        return self._map(lambda plane: plane[index])

    def take(self, ids: Int[Array, "*ids"]) -> QTensor:
        """Gathers entries of the leading axis; ids outside it are clipped. Shape: `ids.shape + shape[1:]`."""
        return self._map(lambda plane: jnp.take(plane, ids, axis=0, mode="clip"))

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(math.prod(plane.shape) * plane.dtype.itemsize for plane in self.planes.values())

    def _map(self, function: Callable[[Any], Any]) -> QTensor:
        planes = {name: function(plane) for name, plane in self.planes.items()}
        name, plane = next(iter(planes.items()))
        row_axes = self.planes[name].ndim - len(self.shape) + 1
        return QTensor(planes, self.format, (*plane.shape[: plane.ndim - row_axes], self.shape[-1]))


def block_size(format: str) -> tuple[int, int]:
    """Values and bytes of one block of a GGML type."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]]
    return values, size


def packed_nbytes(format: str, shape: tuple[int, ...]) -> int:
    """Bytes of the planes of a QTensor."""
    values, size = block_size(format)
    return math.prod(shape) // values * pack(format, np.zeros(size, np.uint8), (values,)).nbytes


def pack(
    format: str,
    raw: UInt8[np.ndarray, "*rows bytes"] | UInt8[Array, "*rows bytes"],
    shape: tuple[int, ...],
) -> QTensor:
    """Rearranges rows of GGML blocks, u8 [..., row bytes], into a QTensor.

    NumPy planes own their memory; under `jax.jit` the device does the same with JAX arrays.
    """
    values, size = block_size(format)
    assert shape[-1] % values == 0, f"{format} row of {shape[-1]} values is not a multiple of {values}"
    expected = (*shape[:-1], shape[-1] // values * size)
    assert raw.shape == expected, f"{format} {shape}: raw bytes have shape {raw.shape}, expected {expected}"
    blocks = raw.reshape(*shape[:-1], shape[-1] // values, size)
    packer = PACK.get(format)
    planes = packer(blocks) if packer else {"raw": values_of(blocks, np.uint8)}
    if isinstance(raw, np.ndarray):
        planes = {name: np.ascontiguousarray(plane) for name, plane in planes.items()}
    return QTensor(planes, format, tuple(shape))


def unpack(q: QTensor) -> UInt8[np.ndarray, "*rows bytes"]:
    """Exact inverse of `pack`: the file's bytes, u8 [..., row bytes]."""
    planes = {name: np.asarray(plane) for name, plane in q.planes.items()}
    unpacker = UNPACK.get(q.format)
    blocks = unpacker(planes) if unpacker else planes["raw"]
    return blocks.reshape(*q.shape[:-1], -1)


def dequantize(q: QTensor) -> Float32[Array, "*shape"]:
    """Values of a QTensor, f32 of its logical shape, bit-equal to `gguf.quants.dequantize`."""
    if q.format in ("Q8_0", "IQ2_XXS"):
        codes, scale = codes_q8(q)
        values = scale[..., None] * codes.astype(jnp.float32)
    elif q.format in ("Q2_K", "Q4_K"):
        k_codes, sc, m, d, dmin = codes_k(q)
        values = _affine(k_codes, sc, m, d, dmin)
    else:
        values = _DECODE[q.format](jnp.asarray(q.planes["raw"]))
    return values.reshape(q.shape)


def codes_q8(q: QTensor) -> tuple[Int8[Array, "*rows G 32"], Float32[Array, "*rows G"]]:
    """Q8_0 or IQ2_XXS as signed bytes per group of 32 and one scale per group: value = scale * code."""
    planes = jax.tree.map(jnp.asarray, q.planes)
    if q.format == "Q8_0":
        codes = jnp.swapaxes(_bytes(planes["word"], jnp.int8), -3, -2)  # [..., 8, G, 4] -> [..., G, 8, 4]
        return codes.reshape(*codes.shape[:-2], 32), planes["d"].astype(jnp.float32)
    assert q.format == "IQ2_XXS", q.format
    level = jnp.asarray(iq2_xxs_levels())[_bytes(planes["idx"], jnp.uint8).astype(jnp.int32)]  # [..., G, 4]
    level = (level[..., None] >> jnp.arange(0, 16, 2, dtype=jnp.int32)) & 3
    magnitude = 8 + 17 * level + (level >> 1)  # 8, 25, 43
    shift = 4 * jnp.arange(8, dtype=jnp.int32)[None, :] + jnp.arange(4, dtype=jnp.int32)[:, None]
    negative = (planes["sign"][..., None, None] >> shift) & 1
    codes = jnp.where(negative == 1, -magnitude, magnitude).astype(jnp.int8)
    nibble = (planes["scale"][..., None] >> jnp.arange(0, 32, 4, dtype=jnp.int32)) & 15
    scale = (planes["d"].astype(jnp.float32)[..., None] * (0.5 + nibble.astype(jnp.float32))) * 0.25
    return codes.reshape(*codes.shape[:-2], 32), scale.reshape(*scale.shape[:-2], -1)


def codes_k(
    q: QTensor,
) -> tuple[
    Int8[Array, "*rows B S n"],
    Int32[Array, "*rows B S"],
    Int32[Array, "*rows B S"],
    Float32[Array, "*rows B"],
    Float32[Array, "*rows B"],
]:
    """Q2_K (S = 16) or Q4_K (S = 8) as codes, sub-scales, sub-minima, d and dmin.

    Per super-block of 256 values in S parts: value = (d * sub-scale) * code - dmin * sub-minimum.
    """
    planes = jax.tree.map(jnp.asarray, q.planes)
    d, dmin = planes["d"].astype(jnp.float32), planes["dmin"].astype(jnp.float32)
    rows = d.shape
    quants = _bytes(planes["q"], jnp.uint8)
    if q.format == "Q2_K":
        s = _bytes(planes["s"], jnp.uint8).reshape(*rows, 2, 2, 4).astype(jnp.int32)
        s = jnp.swapaxes(s, -2, -1).reshape(*rows, 16)
        codes = _bit_fields(quants.reshape(*rows, 2, 32), 2, 4)
        return codes.reshape(*rows, 16, 16).astype(jnp.int8), s & 15, s >> 4, d, dmin
    assert q.format == "Q4_K", q.format
    sc, m = _six_bit_scales(_bytes(planes["s"], jnp.uint8).reshape(*rows, 12))
    codes = _bit_fields(quants.reshape(*rows, 4, 32), 4, 2)
    return codes.reshape(*rows, 8, 32).astype(jnp.int8), sc, m, d, dmin


def k_scales(
    q: QTensor,
) -> tuple[
    Int32[Array, "*rows L"],
    Int32[Array, "P *rows L"],
    Int32[Array, "M *rows L"],
    Float32[Array, "*rows B"],
    Float32[Array, "*rows B"],
]:
    """Q2_K or Q4_K by words of codes: the words, the sub-scale of each of their P parts, sub-minima, d and dmin.

    Part j of a word are the fields `(word >> (bits * j)) & mask` of its bytes, P = 4 for Q2_K and 2 for Q4_K. There is
    one sub-minimum per part for Q4_K (M = 2); for Q2_K one per word, word 4k + j of a half holding that of quarter j.
    """
    planes = jax.tree.map(jnp.asarray, q.planes)
    d, dmin = planes["d"].astype(jnp.float32), planes["dmin"].astype(jnp.float32)
    if q.format == "Q2_K":
        s = jnp.repeat(planes["s"], 4, axis=-1)
        sc = jnp.stack([(s >> (8 * j)) & 15 for j in range(4)])
        m = (s >> (8 * (jnp.arange(s.shape[-1], dtype=jnp.int32) % 4) + 4)) & 15
        return planes["q"], sc, m[None], d, dmin
    assert q.format == "Q4_K", q.format

    def per_word(values: Array) -> Array:
        pairs = jnp.moveaxis(values.reshape(*values.shape[:-1], 4, 2), -1, 0)
        return jnp.repeat(pairs.reshape(2, *d.shape[:-1], -1), 8, axis=-1)

    sc, m = _six_bit_scales(_bytes(planes["s"], jnp.uint8).reshape(*d.shape, 12))
    return planes["q"], per_word(sc), per_word(m), d, dmin


# Codebooks, taken from gguf.quants.


@functools.cache
def _grid(format: str) -> Float32[np.ndarray, "n width"]:
    kind: Any = getattr(ggml, format)
    kind.init_grid()
    return np.asarray(kind.grid, np.float32).reshape(kind.grid_shape)


@functools.cache
def iq2_xxs_levels() -> np.ndarray:
    """The IQ2_XXS grid, i32 [256], as eight 2-bit levels per entry: one gathered word per eight values."""
    level = np.searchsorted([8.0, 25.0, 43.0], _grid("IQ2_XXS"))
    return (level << np.arange(0, 16, 2)).sum(-1).astype(np.int32)


# Device side: block bytes u8 [..., blocks, block bytes] to values f32 [..., blocks, values], GGML block layouts.


def _bytes(words: Int32[Array, "*n"], dtype: Any) -> Array:
    """i32 [...] -> bytes [..., 4], lowest first; the caller's reshape merges the last axis."""
    return jax.lax.bitcast_convert_type(words, dtype)


def _half(raw: UInt8[Array, "*n 2"]) -> Float32[Array, "*n"]:
    return jax.lax.bitcast_convert_type(raw, jnp.float16).astype(jnp.float32)


def _bit_fields(x: UInt8[Array, "*n w"], bits: int, count: int) -> UInt8[Array, "*n c w"]:
    """The `count` lowest fields of `bits` bits of every byte: [..., w] -> [..., count, w]."""
    shift = jnp.arange(0, bits * count, bits, dtype=jnp.uint8)[:, None]
    return (x[..., None, :] >> shift) & jnp.uint8((1 << bits) - 1)


def _affine(codes: Array, sc: Array, m: Array, d: Array, dmin: Array) -> Float32[Array, "*shape"]:
    scale = d[..., None] * sc.astype(jnp.float32)
    minimum = dmin[..., None] * m.astype(jnp.float32)
    return scale[..., None] * codes.astype(jnp.float32) - minimum[..., None]


def _six_bit_scales(s: UInt8[Array, "*n 12"]) -> tuple[Int32[Array, "*n 8"], Int32[Array, "*n 8"]]:
    """Scales and minima of Q4_K and Q5_K."""
    low, high, rest = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    sc = jnp.concatenate([low & 63, (rest & 15) | ((low >> 2) & 48)], -1)
    m = jnp.concatenate([high & 63, (rest >> 4) | ((high >> 2) & 48)], -1)
    return sc.astype(jnp.int32), m.astype(jnp.int32)


def _q3_k(raw: Array) -> Array:
    n = raw.shape[:-1]
    high_mask, q, s, d = raw[..., :32], raw[..., 32:96], raw[..., 96:108], _half(raw[..., 108:])
    low = _bit_fields(s[..., :8], 4, 2).reshape(*n, 16)
    high = _bit_fields(s[..., 8:], 2, 4).reshape(*n, 16)
    scale = (low | (high << 4)).astype(jnp.int8) - jnp.int8(32)
    lo = _bit_fields(q.reshape(*n, 2, 32), 2, 4).reshape(*n, 16, 16)
    hi = _bit_fields(high_mask, 1, 8).reshape(*n, 16, 16)
    codes = lo.astype(jnp.int8) - jnp.int8(4) * (jnp.int8(1) - hi.astype(jnp.int8))
    return (d[..., None] * scale.astype(jnp.float32))[..., None] * codes.astype(jnp.float32)


def _q5_k(raw: Array) -> Array:
    n = raw.shape[:-1]
    sc, m = _six_bit_scales(raw[..., 4:16])
    lo = _bit_fields(raw[..., 48:].reshape(*n, 4, 32), 4, 2).reshape(*n, 8, 32)
    codes = lo | (_bit_fields(raw[..., 16:48], 1, 8) << 4)
    return _affine(codes, sc, m, _half(raw[..., 0:2]), _half(raw[..., 2:4]))


def _q6_k(raw: Array) -> Array:
    n = raw.shape[:-1]
    lo = _bit_fields(raw[..., :128].reshape(*n, 2, 64), 4, 2).reshape(*n, 16, 16)
    hi = _bit_fields(raw[..., 128:192].reshape(*n, 2, 32), 2, 4).reshape(*n, 16, 16)
    codes = (lo | (hi << 4)).astype(jnp.int8) - jnp.int8(32)
    scale = jax.lax.bitcast_convert_type(raw[..., 192:208], jnp.int8).astype(jnp.float32)
    return (_half(raw[..., 208:])[..., None] * scale)[..., None] * codes.astype(jnp.float32)


def _signed(values: Float[Array, "*n eights 8"], index: Int32[Array, "*n eights"]) -> Float[Array, "*n eights 8"]:
    """Applies the signs of a 7-bit sign index to each eight values."""
    signs = _bit_fields(jnp.asarray(ksigns())[index][..., None], 1, 8)[..., 0]
    return jnp.where(signs == 1, -values, values)


def _sevens(word: Int32[Array, "*n"]) -> Int32[Array, "*n 4"]:
    return (word[..., None] >> jnp.arange(0, 28, 7, dtype=jnp.int32)) & 127


def _iq2_xs(raw: Array) -> Array:
    n = raw.shape[:-1]
    q = jax.lax.bitcast_convert_type(raw[..., 2:66].reshape(*n, 32, 2), jnp.uint16).astype(jnp.int32)
    nibble = jnp.swapaxes(_bit_fields(raw[..., 66:], 4, 2), -2, -1).reshape(*n, 16)
    scale = _half(raw[..., :2])[..., None] * (0.5 + nibble.astype(jnp.float32)) * 0.25
    values = _signed(jnp.asarray(_grid("IQ2_XS"))[q & 511], q >> 9)
    return scale[..., None] * values.reshape(*n, 16, 16)


def _iq3_xxs(raw: Array) -> Array:
    n = raw.shape[:-1]
    word = jax.lax.bitcast_convert_type(raw[..., 66:].reshape(*n, 8, 4), jnp.int32)
    nibble = jax.lax.shift_right_logical(word, jnp.int32(28))
    scale = _half(raw[..., :2])[..., None] * (0.5 + nibble.astype(jnp.float32)) * 0.5
    grid = jnp.asarray(_grid("IQ3_XXS"))[raw[..., 2:66].astype(jnp.int32)]
    values = _signed(grid.reshape(*n, 32, 8), _sevens(word).reshape(*n, 32))
    return scale[..., None] * values.reshape(*n, 8, 32)


def _iq1_s(raw: Array) -> Array:
    n = raw.shape[:-1]
    h = jax.lax.bitcast_convert_type(raw[..., 34:].reshape(*n, 8, 2), jnp.uint16).astype(jnp.int32)
    scale = _half(raw[..., :2])[..., None] * (2 * ((h >> 12) & 7) + 1).astype(jnp.float32)
    delta = jnp.where(h & 0x8000, -ggml.IQ1_S.delta, ggml.IQ1_S.delta)
    high = (h[..., None] >> jnp.arange(0, 12, 3, dtype=jnp.int32)) & 7
    index = raw[..., 2:34].reshape(*n, 8, 4).astype(jnp.int32) | (high << 8)
    values = jnp.asarray(_grid("IQ1_S"))[index].reshape(*n, 8, 32)
    return scale[..., None] * (values + delta[..., None])


def _mxfp4(raw: Array) -> Array:
    # XLA:CPU flushes subnormal operands and results to zero, so the product with 2^(e - 128) is formed on the bits.
    codes = _bit_fields(raw[..., 1:], 4, 2).reshape(*raw.shape[:-1], 32).astype(jnp.int32)
    table = np.asarray(ggml.MXFP4.kvalues, np.float32).view(np.int32)
    value = jnp.asarray(table)[codes]
    magnitude, sign = value & 0x7FFFFFFF, value & jnp.int32(-0x80000000)
    exponent = (magnitude >> 23) + raw[..., :1].astype(jnp.int32) - 128
    mantissa = magnitude & 0x7FFFFF
    subnormal = (mantissa | 0x800000) >> jnp.clip(1 - exponent, 0, 24)
    bits = jnp.where(exponent > 0, (exponent << 23) | mantissa, subnormal)
    bits = jnp.where(exponent > 254, jnp.int32(0x7F800000), bits)
    return jax.lax.bitcast_convert_type(jnp.where(magnitude == 0, 0, bits | sign), jnp.float32)


_DECODE: dict[str, Callable[[Array], Array]] = {
    "Q3_K": _q3_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ1_S": _iq1_s,
    "IQ2_XS": _iq2_xs,
    "IQ3_XXS": _iq3_xxs,
    "MXFP4": _mxfp4,
}
