"""The order in which terms are added wherever a kernel must agree with its reference bit for bit."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

LANES = 128  # running sums; part of the definition of the result
PART = 1024  # terms of a part of `parted_sum`; likewise


def lane_count(terms: int) -> int:
    """Running sums of `ordered_sum`: the next power of two, at most `LANES`."""
    return min(LANES, 1 << max(terms - 1, 0).bit_length())


def ordered_sum(terms: Float[Array, "*rows G"]) -> Float[Array, "*rows"]:
    """Sum over the last axis in a fixed order: running sums in lanes, then a tree of neighbours over the lanes.

    Lane i adds terms i, i + lanes, i + 2 lanes ... in that order; the tree adds lanes 2i and 2i + 1 until one is left.
    """
    return joint_sum(terms[None])


def joint_sum(terms: Float[Array, "K *rows G"]) -> Float[Array, "*rows"]:
    """Sum over the first and the last axis as one `ordered_sum`, in which the lanes run over the K in order."""
    groups = terms.shape[-1]
    lanes = lane_count(groups)
    padded = jnp.pad(terms, [(0, 0)] * (terms.ndim - 1) + [(0, -groups % lanes)])
    steps = [(k, start) for k in range(terms.shape[0]) for start in range(0, padded.shape[-1], lanes)]
    total = functools.reduce(jnp.add, [padded[k, ..., start : start + lanes] for k, start in steps])
    while lanes > 1:
        lanes //= 2
        pairs = total.reshape(*total.shape[:-1], lanes, 2)
        total = pairs[..., 0] + pairs[..., 1]
    return total[..., 0]


def parted_sum(terms: Float[Array, "*rows G"]) -> Float[Array, "*rows"]:
    """Sum over the last axis, long enough for several programs: the `ordered_sum` of those of parts of 1024 terms."""
    count = terms.shape[-1]
    if count > PART:
        padded = jnp.pad(terms, [(0, 0)] * (terms.ndim - 1) + [(0, -count % PART)])
        terms = ordered_sum(padded.reshape(*terms.shape[:-1], -1, PART))
    return ordered_sum(terms)
