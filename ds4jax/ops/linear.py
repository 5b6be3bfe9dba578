"""Matrix-vector products with stored weights: float, or int8 activations against quantised blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ds4jax.quants import QTensor, codes_k, codes_q8, dequantize

Weight = Array | QTensor
LANES = 128  # partial sums of a row of blocks; part of the definition of the result


def act_q8(x: Float[Array, "*rows K"]) -> tuple[Int[Array, "*rows K"], Float[Array, "*rows G"]]:
    """int8 codes and a float32 scale per 32 values: `scale = max|x| / 127`, `code = rint(x / scale)` (ggml Q8_0)."""
    v = x.reshape(*x.shape[:-1], -1, 32)
    amax = jnp.max(jnp.abs(v), axis=-1)
    # XLA turns a division by a constant or a broadcast scalar into a product with its reciprocal, which rounds twice.
    scale = amax / lax.optimization_barrier(jnp.full(amax.shape, 127.0, jnp.float32))
    inverse = jnp.where(scale > 0, 1.0 / jnp.where(scale > 0, scale, 1.0), 0.0)
    codes = jnp.clip(jnp.rint(v * inverse[..., None]), -128, 127).astype(jnp.int8)
    return codes.reshape(x.shape), scale


def act_q8k(
    x: Float[Array, "*rows K"],
) -> tuple[Int[Array, "*rows K"], Float[Array, "*rows B"], Int[Array, "*rows S"]]:
    """int8 codes, a float32 scale per 256 values, and sums of 16 codes (ggml Q8_K).

    The value of largest magnitude, the first one on a tie, maps to -127.
    """
    v = x.reshape(*x.shape[:-1], -1, 256)
    first = jnp.argmax(jnp.abs(v), axis=-1, keepdims=True)
    peak = jnp.take_along_axis(v, first, axis=-1)
    nonzero = peak != 0
    inverse = jnp.where(nonzero, -127.0 / jnp.where(nonzero, peak, 1.0), 0.0)
    codes = jnp.clip(jnp.rint(inverse * v), -128, 127).astype(jnp.int8)
    scale = jnp.where(nonzero, 1.0 / jnp.where(nonzero, inverse, 1.0), 0.0)[..., 0]
    sums = jnp.sum(codes.reshape(*v.shape[:-1], 16, 16).astype(jnp.int32), axis=-1)
    return codes.reshape(x.shape), scale, sums.reshape(*x.shape[:-1], -1)


def ordered_sum(terms: Float[Array, "*rows G"]) -> Float[Array, "*rows"]:
    """Sum over the last axis in a fixed order: `lanes` running sums, then a halving tree over the lanes.

    lanes = min(128, next power of two >= G). Lane i adds terms i, i + lanes, i + 2 lanes ... in that order; the tree
    adds lane i + n/2 to lane i for n = lanes, lanes/2 ... 2.
    """
    groups = terms.shape[-1]
    lanes = min(LANES, 1 << max(groups - 1, 0).bit_length())
    padded = jnp.pad(terms, [(0, 0)] * (terms.ndim - 1) + [(0, -groups % lanes)])
    total = padded[..., :lanes]
    for start in range(lanes, padded.shape[-1], lanes):
        total = total + padded[..., start : start + lanes]
    while lanes > 1:
        lanes //= 2
        total = total[..., :lanes] + total[..., lanes:]
    return total[..., 0]


def dense(w: Weight) -> Float[Array, "*lead N K"]:
    """The values of a stored matrix in float32."""
    return dequantize(w) if isinstance(w, QTensor) else w.astype(jnp.float32)


def float_dot(x: Float[Array, "T *lead K"], w: Weight, precision: str) -> Float[Array, "T *lead N"]:
    """`x . w^T` in float32 with float activations; `w` is `[*lead, N, K]`, dequantised if needed."""
    matrix = dense(w)
    if matrix.ndim == 2:
        return lax.dot_general(x, matrix, (((1,), (1,)), ((), ())), precision=precision)
    product = lax.dot_general(x, matrix, (((2,), (2,)), ((1,), (0,))), precision=precision)
    return jnp.moveaxis(product, 0, 1)


def _dot_q8(x: Float[Array, "T *lead K"], w: QTensor) -> Float[Array, "T *lead N"]:
    """Int8 activations per 32 values against Q8_0 or IQ2_XXS: integer sums per block, then `ordered_sum`."""
    codes, scale = codes_q8(w)
    q, xscale = act_q8(x)
    q = q.reshape(*x.shape[:-1], 1, -1, 32)
    isum = jnp.sum(codes.astype(jnp.int32) * q.astype(jnp.int32), axis=-1)
    return ordered_sum(isum.astype(jnp.float32) * (scale * xscale[..., None, :]))


def _dot_q8k(x: Float[Array, "T *lead K"], w: QTensor) -> Float[Array, "T *lead N"]:
    """Int8 activations per 256 values against Q2_K or Q4_K: integer sums per super-block, then `ordered_sum`."""
    codes, sc, m, d, dmin = codes_k(w)
    q, xscale, bsum = act_q8k(x)
    blocks, sub, width = codes.shape[-3:]
    q = q.reshape(*x.shape[:-1], 1, blocks, sub, width)
    bsum = jnp.sum(bsum.reshape(*x.shape[:-1], 1, blocks, sub, width // 16), axis=-1)
    isum = jnp.sum(codes.astype(jnp.int32) * q.astype(jnp.int32), axis=-1)
    values = jnp.sum(isum * sc, axis=-1).astype(jnp.float32)
    minima = jnp.sum(bsum * m, axis=-1).astype(jnp.float32)
    xs = xscale[..., None, :]
    return ordered_sum((d * xs) * values - (dmin * xs) * minima)


def matvec(x: Float[Array, "T *lead K"], w: Weight, *, act: str, precision: str) -> Float[Array, "T *lead N"]:
    """`x . w^T` for `w [*lead, N, K]`, with quantised activations where `act` is "q8" and the format has them."""
    if act == "q8" and isinstance(w, QTensor):
        if w.format in ("Q8_0", "IQ2_XXS"):
            return _dot_q8(x, w)
        if w.format in ("Q2_K", "Q4_K"):
            return _dot_q8k(x, w)
    return float_dot(x, w, precision)


def linear(x: Float[Array, "T K"], w: Weight, *, act: str, precision: str) -> Float[Array, "T N"]:
    """One projection, `w [N, K]`."""
    return matvec(x, w, act=act, precision=precision)


def grouped_linear(x: Float[Array, "T G I"], w: Weight, *, act: str, precision: str) -> Float[Array, "T GR"]:
    """Row block g of `w [G R, I]` applied to group g only: the low-rank output projection of the attention."""
    groups = x.shape[1]
    split = jax.tree.map(lambda plane: plane.reshape(groups, -1, *plane.shape[1:]), w)
    if isinstance(split, QTensor):
        split = QTensor(split.planes, split.format, (groups, split.shape[0] // groups, split.shape[1]))
    return matvec(x, split, act=act, precision=precision).reshape(x.shape[0], -1)


def embed(tokens: Int[Array, " T"], table: Weight) -> Float[Array, "T D"]:
    """Rows of the embedding table as float32."""
    if isinstance(table, QTensor):
        return dequantize(table.take(tokens))
    return jnp.take(table, tokens, axis=0).astype(jnp.float32)
