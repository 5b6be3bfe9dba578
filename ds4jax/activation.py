"""Rows as projections take them: floats, and the int8 codes that weights of quantised formats are multiplied with.

Codes are packed four to a 32-bit word, the lowest byte first, in the order in which the kernels read them.
"""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q8:
    """int8 codes with one scale per 32 values (ggml Q8_0): value = scale * code.

    word: `[..., 8, G]`, word j of group g holds codes 4j .. 4j+3. scale: `[..., G]`.
    """

    word: Int[Array, "*rows 8 G"]
    scale: Float[Array, "*rows G"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q8K:
    """int8 codes with one scale per super-block of 256 values (ggml Q8_K): value = scale * code.

    The 64 words of a super-block are numbered `32 h + 8 j + i` for half h, quarter j and i < 8.

    word: `[..., 4, 16 B]`; `[j, 16 b + 8 h + i]` is that word of super-block b.
    scale: `[..., B]`.
    sums: `[..., 16 B]`; entry `16 b + 8 h + 4 k + j` is the sum of the 16 codes of words `4 k ..` of that quarter.
    """

    word: Int[Array, "*rows 4 W"]
    scale: Float[Array, "*rows B"]
    sums: Int[Array, "*rows W"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activation:
    """Rows `x [..., K]`, and their codes where activations are quantised and K is a multiple of 32."""

    x: Float[Array, "*rows K"]
    q8: Q8 | None
