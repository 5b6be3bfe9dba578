"""Weight encoders for GGUF files: float32 arrays to IQ2_XXS, Q2_K, Q4_K and Q8_0 blocks (NumPy)."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from tools.demo_model import blockfit

CHUNK = 256  # super-blocks per task: the dot products with the codebook stay in cache


def encode(type_name: str, x: np.ndarray) -> np.ndarray:
    """Encodes x f32 [..., K] into uint8 [..., row_bytes] of a GGML type.

    Raises ValueError for a type without an encoder or rows that are no multiple of the block.
    """
    if type_name == "Q8_0":
        return quants.quantize(np.ascontiguousarray(x, np.float32), GGMLQuantizationType.Q8_0)
    if type_name not in _ENCODERS:
        raise ValueError(f"no encoder for {type_name}, expected Q8_0, {', '.join(_ENCODERS)}")
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    if x.shape[-1] % values:
        raise ValueError(f"rows of {x.shape[-1]} values, {type_name} needs multiples of {values}")
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, values)
    chunks = [blocks[i : i + CHUNK] for i in range(0, len(blocks), CHUNK)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        encoded = np.concatenate(list(pool.map(_ENCODERS[type_name], chunks)))
    return encoded.reshape(*x.shape[:-1], x.shape[-1] // values * size)


def decode(type_name: str, raw: np.ndarray) -> np.ndarray:
    """The float32 values of encoded rows, by the decoder of the gguf package."""
    if type_name == "IQ2_XXS":
        quants.IQ2_XXS.init_grid()
    return quants.dequantize(raw, GGMLQuantizationType[type_name])


def _f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def _f16_bytes(x: np.ndarray) -> np.ndarray:
    return x.astype("<f2").view(np.uint8).reshape(-1, 2)


def _encode_iq2_xxs(x: np.ndarray) -> np.ndarray:
    fit = blockfit.fit_iq2_xxs(x, np, _f16)
    index = blockfit.iq2_xxs_codebook().file_index[fit.entry]  # u8 [B, 8, 4]
    seven = (fit.negative[..., :7] * (1 << np.arange(7))).sum(-1).astype(np.uint32)  # the eighth sign is the parity
    word = (seven << np.array([0, 7, 14, 21], np.uint32)).sum(-1, dtype=np.uint32) | (
        fit.scale.astype(np.uint32) << np.uint32(28)
    )
    groups = np.concatenate([index, word.astype("<u4")[..., None].view(np.uint8)], -1)  # [B, 8, 8]
    return np.concatenate([_f16_bytes(fit.d), groups.reshape(-1, 64)], -1)


def _encode_q2_k(x: np.ndarray) -> np.ndarray:
    fit = blockfit.fit_affine(x, blockfit.Q2_K, np, _f16)
    scales = fit.scale.astype(np.uint8) | (fit.low.astype(np.uint8) << 4)
    code = fit.code.astype(np.uint8).reshape(-1, 2, 4, 32)
    packed = (code << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(2, dtype=np.uint8).reshape(-1, 64)
    return np.concatenate([scales, packed, _f16_bytes(fit.d), _f16_bytes(fit.dmin)], -1)


def _encode_q4_k(x: np.ndarray) -> np.ndarray:
    fit = blockfit.fit_affine(x, blockfit.Q4_K, np, _f16)
    scale, low = fit.scale.astype(np.uint8), fit.low.astype(np.uint8)
    first = scale[:, :4] | ((scale[:, 4:] >> 4) << 6)
    second = low[:, :4] | ((low[:, 4:] >> 4) << 6)
    third = (scale[:, 4:] & 15) | ((low[:, 4:] & 15) << 4)
    code = fit.code.astype(np.uint8).reshape(-1, 4, 2, 32)
    packed = (code[:, :, 0] | (code[:, :, 1] << 4)).reshape(-1, 128)
    return np.concatenate([_f16_bytes(fit.d), _f16_bytes(fit.dmin), first, second, third, packed], -1)


_ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "IQ2_XXS": _encode_iq2_xxs,
    "Q2_K": _encode_q2_k,
    "Q4_K": _encode_q4_k,
}
