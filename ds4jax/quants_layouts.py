"""Layouts of quantised weights: GGML block bytes [..., blocks, block bytes] to planes, and back on the host.

Packing is written once for NumPy and for traced JAX arrays, so that a device can do it too. Only the formats that
kernels read are rearranged; `quants.QTensor` describes their planes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import quants as ggml

Bytes = np.ndarray | jax.Array
Planes = dict[str, Any]  # NumPy or JAX arrays, as the bytes were


@functools.cache
def ksigns() -> np.ndarray:
    """Sign bytes u8 [128] of GGML's IQ formats: seven stored signs and, in bit 7, their parity."""
    return np.frombuffer(ggml.IQ2_XXS.ksigns, np.uint8)


@functools.cache
def _sign_spread() -> np.ndarray:
    """Two 7-bit sign indices (14 bits) -> u32 with the sign of value j of eight k in bit 4j + k, for k = 0 and 1."""
    bits = (ksigns()[:, None] >> np.arange(8, dtype=np.uint8)) & 1
    spread = (bits.astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    pair = np.arange(1 << 14)
    return spread[pair & 127] | (spread[pair >> 7] << np.uint32(1))


def values_of(data: Bytes, dtype: Any) -> Any:
    """Little-endian values [..., n] in bytes u8 [..., n * itemsize]; a copy on the host, where files are read-only."""
    if isinstance(data, np.ndarray):
        return data.copy(order="C").view(dtype)
    size = np.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(data.reshape(*data.shape[:-1], -1, size) if size > 1 else data, dtype)


def _words(data: Bytes) -> Any:
    """Bytes [..., blocks, n] -> i32 [..., blocks, n / 4]."""
    return values_of(data, np.int32)


def _halves(data: Bytes) -> Any:
    """Bytes [..., blocks, 2] -> f16 [..., blocks]."""
    return values_of(data, np.float16)[..., 0]


def _flat(words: Any) -> Any:
    return words.reshape(*words.shape[:-2], -1)


def _block_bytes(plane: np.ndarray, blocks: int) -> np.ndarray:
    """A plane with file-order words or scales [..., blocks * n] -> bytes [..., blocks, n * itemsize]."""
    return np.ascontiguousarray(plane).view(np.uint8).reshape(*plane.shape[:-1], blocks, -1)


def _pack_q8_0(blocks: Bytes) -> Planes:
    return {"word": _words(blocks[..., 2:]).swapaxes(-2, -1), "d": _halves(blocks[..., :2])}


def _unpack_q8_0(planes: Planes) -> np.ndarray:
    word = np.swapaxes(planes["word"], -2, -1)
    n = word.shape[-2]
    return np.concatenate([_block_bytes(planes["d"], n), np.ascontiguousarray(word).view(np.uint8)], -1)


def _pack_iq2_xxs(blocks: Bytes) -> Planes:
    pairs = _words(blocks[..., 2:])  # [..., B, 16]: grid indices and sign word of each of 8 groups
    word = pairs[..., 1::2].view(np.uint32)
    spread = _sign_spread() if isinstance(blocks, np.ndarray) else jnp.asarray(_sign_spread())
    # Indices are in range; mode="clip" skips NumPy's check, which costs three times the look-up.
    sign = spread.take((word >> np.uint32(14)) & np.uint32(0x3FFF), mode="clip") << np.uint32(2)
    sign |= spread.take(word & np.uint32(0x3FFF), mode="clip")
    nibble = (word >> np.uint32(28)).astype(np.uint8)
    return {
        "idx": _flat(pairs[..., 0::2]),
        "sign": _flat(sign).view(np.int32),
        "scale": _words(nibble[..., 0::2] | (nibble[..., 1::2] << np.uint8(4)))[..., 0],
        "d": _halves(blocks[..., :2]),
    }


def _unpack_iq2_xxs(planes: Planes) -> np.ndarray:
    n = planes["d"].shape[-1]
    word = (planes["scale"].view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) << np.uint32(28)
    sign = planes["sign"].view(np.uint32).reshape(word.shape)
    for k in range(4):
        for j in range(7):  # the eighth sign follows from the parity of these
            word |= ((sign >> np.uint32(4 * j + k)) & np.uint32(1)) << np.uint32(7 * k + j)
    pairs = np.stack([planes["idx"].reshape(word.shape).view(np.uint32), word], -1)
    return np.concatenate([_block_bytes(planes["d"], n), pairs.view(np.uint8).reshape(*word.shape[:-1], 64)], -1)


def _pack_q2_k(blocks: Bytes) -> Planes:
    scales = blocks[..., :16].reshape(*blocks.shape[:-1], 2, 4, 2)  # half, quarter, 16 values
    return {
        "q": _flat(_words(blocks[..., 16:80])),
        "s": _flat(_words(scales.swapaxes(-2, -1).reshape(*blocks.shape[:-1], 16))),
        "d": _halves(blocks[..., 80:82]),
        "dmin": _halves(blocks[..., 82:84]),
    }


def _unpack_q2_k(planes: Planes) -> np.ndarray:
    n = planes["d"].shape[-1]
    q, s, d, dmin = (_block_bytes(planes[name], n) for name in ("q", "s", "d", "dmin"))
    scales = np.swapaxes(s.reshape(*s.shape[:-1], 2, 2, 4), -2, -1).reshape(s.shape)
    return np.concatenate([scales, q, d, dmin], -1)


def _pack_q4_k(blocks: Bytes) -> Planes:
    return {
        "q": _flat(_words(blocks[..., 16:])),
        "s": _flat(_words(blocks[..., 4:16])),
        "d": _halves(blocks[..., :2]),
        "dmin": _halves(blocks[..., 2:4]),
    }


def _unpack_q4_k(planes: Planes) -> np.ndarray:
    n = planes["d"].shape[-1]
    return np.concatenate([_block_bytes(planes[name], n) for name in ("d", "dmin", "s", "q")], -1)


PACK: dict[str, Callable[[Bytes], Planes]] = {
    "Q8_0": _pack_q8_0,
    "IQ2_XXS": _pack_iq2_xxs,
    "Q2_K": _pack_q2_k,
    "Q4_K": _pack_q4_k,
}
UNPACK: dict[str, Callable[[Planes], np.ndarray]] = {
    "Q8_0": _unpack_q8_0,
    "IQ2_XXS": _unpack_iq2_xxs,
    "Q2_K": _unpack_q2_k,
    "Q4_K": _unpack_q4_k,
}
