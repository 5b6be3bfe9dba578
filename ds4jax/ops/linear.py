"""Matrix-vector products with stored weights: float, or int8 activations against quantised blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ds4jax.activation import Q8, Q8K, Activation
from ds4jax.ops.quantise import act_q8k, word_codes
from ds4jax.ops.sums import ordered_sum
from ds4jax.quants import QTensor, codes_q8, dequantize, k_scales

Weight = Array | QTensor


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


def _dot4(a: Int[Array, ...], b: Int[Array, ...]) -> Int[Array, ...]:
    """Sum of the products of the four signed bytes of two words."""
    return jnp.sum(word_codes(a).astype(jnp.int32) * word_codes(b).astype(jnp.int32), axis=-1)


def _total(parts: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, parts)


def _terms_q8(a: Q8, w: QTensor) -> Float[Array, "T *lead N G"]:
    """One term per group of 32 values of Q8_0 or IQ2_XXS: `isum * (d * scale)`."""
    codes, scale = codes_q8(w)
    q = jnp.swapaxes(word_codes(a.word), -3, -2)  # [..., G, 8, 4]
    q = q.reshape(*q.shape[:-3], 1, q.shape[-3], 32)
    isum = jnp.sum(codes.astype(jnp.int32) * q.astype(jnp.int32), axis=-1)
    return isum.astype(jnp.float32) * (scale * a.scale[..., None, :])


def _terms_k(a: Q8K, w: QTensor) -> Float[Array, "T *lead N L"]:
    """One term per word of codes of Q2_K or Q4_K: `(d * scale) * isum - (dmin * scale) * minimum`.

    isum weighs the codes of a word's parts with their sub-scales. A word of Q2_K (16 values in four quarters) carries
    the minimum of one of the four sub-blocks that it shares with its neighbours; a word of Q4_K (8 values in two
    halves) those of its own values.
    """
    word, sc, m, d, dmin = k_scales(w)
    parts = sc.shape[0]
    per = word.shape[-1] // d.shape[-1]
    each = jnp.moveaxis(a.word, -2, 0)[..., None, :]  # [4, T, *lead, 1, 16 B], the quarter first
    if w.format == "Q4_K":  # chunk c of 64 values is half c // 2, quarters 2 (c % 2) and 2 (c % 2) + 1
        each = each.reshape(2, 2, *each.shape[1:-1], -1, 2, 8)
        each = jnp.moveaxis(each, 0, -2)
        each = each.reshape(*each.shape[:-4], -1)
    mask, bits = (0x03030303, 2) if w.format == "Q2_K" else (0x0F0F0F0F, 4)
    isum = _total(sc[j] * _dot4((word >> (bits * j)) & mask, each[j]) for j in range(parts))
    if w.format == "Q2_K":
        minimum = m[0] * a.sums[..., None, :]
    else:
        minimum = _total(m[j] * jnp.sum(word_codes(each[j]).astype(jnp.int32), axis=-1) for j in range(parts))

    def spread(block: Array) -> Array:
        return jnp.repeat(block, per, axis=-1)

    xs = a.scale[..., None, :]
    return spread(d * xs) * isum.astype(jnp.float32) - spread(dmin * xs) * minimum.astype(jnp.float32)


def terms(a: Activation, w: QTensor) -> Float[Array, "T *lead N L"] | None:
    """What int8 activations contribute to each output, one float32 term per lane; None where `w` takes floats."""
    if a.q8 is None:
        return None
    if w.format in ("Q8_0", "IQ2_XXS"):
        return _terms_q8(a.q8, w)
    if w.format in ("Q2_K", "Q4_K"):
        return _terms_k(act_q8k(a.x), w)
    return None


def matvec(a: Activation, w: Weight, *, precision: str) -> Float[Array, "T *lead N"]:
    """`x . w^T` for `w [*lead, N, K]`, with int8 activations where both have them."""
    parts = terms(a, w) if isinstance(w, QTensor) else None
    return float_dot(a.x, w, precision) if parts is None else ordered_sum(parts)


def linear(
    a: Activation, wanted: tuple[Bool[Array, " T"], ...], *ws: Weight, precision: str
) -> tuple[Float[Array, "T N"], ...]:
    """Projections of the same rows, each `w [N, K]`.

    `wanted` holds, for the first weights, the rows for which their products are wanted. The others are unspecified;
    here they are NaN, so that whoever uses one notices.
    """
    products = [matvec(a, w, precision=precision) for w in ws]
    asked = [jnp.where(rows[:, None], y, jnp.nan) for rows, y in zip(wanted, products, strict=False)]
    return (*asked, *products[len(wanted) :])


def grouped_linear(a: Activation, w: Weight, *, precision: str) -> Float[Array, "T GR"]:
    """Row block g of `w [G R, I]` applied to group g of `[T, G, I]`: the low-rank output projection of attention."""
    rows, groups = a.x.shape[:2]
    split = jax.tree.map(lambda plane: plane.reshape(groups, -1, *plane.shape[1:]), w)
    if isinstance(split, QTensor):
        split = QTensor(split.planes, split.format, (groups, split.shape[0] // groups, split.shape[1]))
    return matvec(a, split, precision=precision).reshape(rows, -1)


def embed(tokens: Int[Array, " T"], table: Weight) -> Float[Array, "T D"]:
    """Rows of the embedding table as float32."""
    if isinstance(table, QTensor):
        return dequantize(table.take(tokens))
    return jnp.take(table, tokens, axis=0).astype(jnp.float32)
