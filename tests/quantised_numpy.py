"""Matrix products of quantised weights and int8 activations in NumPy float32, one operation at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from gguf import quants as gguf_quants

from ds4jax.quants import QTensor, pack

f32, i32 = np.float32, np.int32


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
    return joint_sum_numpy([terms])


def joint_sum_numpy(parts: list[np.ndarray]) -> np.ndarray:
    """Sum over the last axis and the list, in lanes that go through all parts."""
    lanes = 1
    while lanes < parts[0].shape[-1] and lanes < 128:
        lanes *= 2
    total = np.zeros((*parts[0].shape[:-1], lanes), f32)
    begun = False
    for terms in parts:
        for start in range(0, terms.shape[-1], lanes):
            step = np.zeros_like(total)
            step[..., : terms[..., start : start + lanes].shape[-1]] = terms[..., start : start + lanes]
            total = total + step if begun else step
            begun = True
    while lanes > 1:
        lanes //= 2
        total = total[..., 0::2] + total[..., 1::2]
    return total[..., 0]


def quantised_terms_numpy(name: str, x: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """What the lanes of `x [T, K] . w^T` add, [T, N, lanes]: every product and difference is one float32 operation."""
    if name in ("Q8_0", "IQ2_XXS"):
        codes, scale = groups_numpy(name, raw)
        q, xscale = act_q8_numpy(x)
        isum = (q[:, None] * codes[None]).sum(-1)
        return isum.astype(f32) * (scale[None] * xscale[:, None])
    codes, sc, m, d, dmin = superblocks_numpy(name, raw)
    q, xscale = act_q8k_numpy(x)
    codes = codes.reshape(*codes.shape[:2], 256)
    q = q.reshape(len(x), 1, *codes.shape[1:])
    words, parts, wide = (16, 4, 32) if name == "Q2_K" else (32, 2, 32)
    size = 256 // sc.shape[-1]
    values, minima = np.zeros((2, len(x), *codes.shape[:2], words), i32)
    for word in range(words):
        chunk, byte = divmod(word, 8)
        for part in range(parts):
            first = chunk * wide * parts + part * wide + 4 * byte
            four, sub = slice(first, first + 4), first // size
            values[..., word] += sc[..., sub] * (q[..., four] * codes[..., four]).sum(-1)
            if name == "Q4_K":
                minima[..., word] += m[..., sub] * q[..., four].sum(-1)
        if name == "Q2_K":  # word 4k + j of a half: sub-block k of its quarter j
            sub = chunk * 8 + 2 * (byte % 4) + byte // 4
            minima[..., word] = m[..., sub] * q[..., sub * size : (sub + 1) * size].sum(-1)
    xs = xscale[:, None]
    terms = (d * xs)[..., None] * values.astype(f32) - (dmin * xs)[..., None] * minima.astype(f32)
    return terms.reshape(*terms.shape[:2], -1)


def quantised_dot_numpy(name: str, x: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """`x [T, K] . w^T` with int8 activations."""
    return ordered_sum_numpy(quantised_terms_numpy(name, x, raw))


def packed(name: str, raw: np.ndarray, shape: tuple[int, ...]) -> QTensor:
    return jax.tree.map(jnp.asarray, pack(name, raw, shape))
