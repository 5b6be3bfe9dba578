"""What a named case is, and random arrays for its arguments, made on the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ds4jax import ops
from ds4jax.activation import Activation
from ds4jax.config import Numerics
from ds4jax.ops.quantise import quantise
from ds4jax.ops.rows import Live
from ds4jax.quants import QTensor


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One operation at one shape.

    op: name in the switchboard. settings: its static keyword arguments.
    rows, shared: functions of a key (and the number of rows) that make the arguments of `ops.call`; `shared` are the
        weights and caches that a timing rotates, so that they come from memory and not from the L2.
    active: bytes of `shared` that one call reads, for T rows; None: all of them.
    """

    op: str
    settings: dict[str, Any]
    rows: Callable[[Array, int], tuple[Any, ...]]
    shared: Callable[[Array], tuple[Any, ...]]
    active: Callable[[int], int] | None = None

    def parted(self, shared: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What the operation reads only, and what it writes."""
        read = len(shared) - (self.op in ops.WRITERS)
        return shared[:read], shared[read:]

    def call(
        self, num: Numerics, live: Live, rows: Any, weights: tuple[Any, ...], caches: tuple[Any, ...]
    ) -> tuple[Any, tuple[Any, ...]]:
        """Results of one call, and the caches that it has written.

        Without caches the results are as the operation returns them; otherwise they are a list of the other arrays.
        """
        results = ops.call(self.op, num, live, rows, (*weights, *caches), **self.settings)
        if not caches:
            return results, ()
        leaves, (before, structure) = jax.tree.leaves(results), jax.tree.flatten(caches)
        count = len(leaves) - len(before)
        return leaves[:count], jax.tree.unflatten(structure, leaves[count:])


def random_words(key: Array, shape: tuple[int, ...]) -> Array:
    """Random words, by a counter hash: fast for gigabytes, and without `jax.random`'s temporaries."""
    seed = jax.random.bits(key, (), jnp.uint32)
    x = jnp.arange(math.prod(shape), dtype=jnp.uint32) * jnp.uint32(0x9E3779B9) + seed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return jax.lax.bitcast_convert_type(x ^ (x >> 16), jnp.int32).reshape(shape)


def _scale(key: Array, shape: tuple[int, ...], size: float) -> Array:
    """Scales of both signs, f16, of magnitude size/2 .. size."""
    bits = random_words(key, shape)
    value = (0.5 + (bits & 0xFFFF).astype(jnp.float32) / 131072.0) * size
    return jnp.where(bits < 0, -value, value).astype(jnp.float16)


def quantised(key: Array, format: str, *shape: int) -> QTensor:
    """A QTensor of random valid blocks whose values have a standard deviation of about 1 / sqrt(K)."""
    *lead, width = shape
    groups, blocks, size = width // 32, width // 256, width**-0.5
    layouts: dict[str, dict[str, tuple[int, ...]]] = {
        "Q8_0": {"word": (8, groups), "d": (groups,)},
        "IQ2_XXS": {"idx": (groups,), "sign": (groups,), "scale": (blocks,), "d": (blocks,)},
        "Q2_K": {"q": (16 * blocks,), "s": (4 * blocks,), "d": (blocks,), "dmin": (blocks,)},
        "Q4_K": {"q": (32 * blocks,), "s": (3 * blocks,), "d": (blocks,), "dmin": (blocks,)},
    }
    planes = layouts[format]
    unit = {"Q8_0": 1 / 74, "IQ2_XXS": 1 / 55, "Q2_K": 1 / 11, "Q4_K": 1 / 250}[format]
    keys = jax.random.split(key, len(planes))
    made = {
        name: _scale(k, (*lead, *tail), size * unit) if name in ("d", "dmin") else random_words(k, (*lead, *tail))
        for k, (name, tail) in zip(keys, planes.items(), strict=True)
    }
    return QTensor(made, format, shape)


def floats(key: Array, *shape: int) -> Array:
    """f16 weights with a standard deviation of about 1 / sqrt(K)."""
    return _scale(key, shape, 1.3 * shape[-1] ** -0.5)


def activation(key: Array, *shape: int) -> Activation:
    """Normal rows with their codes, by the reference."""
    return quantise(jax.random.normal(key, shape), act="q8")


def choices(key: Array, rows: int, total: int, count: int) -> Array:
    """`count` different numbers below `total` for every row, i32 `[rows, count]`."""
    keys = jax.random.split(key, rows)
    return jax.vmap(lambda key: jax.random.permutation(key, total)[:count])(keys).astype(jnp.int32)


def positions(rows: int, context: int) -> Array:
    """The last rows of a context, in order."""
    return jnp.arange(context - rows, context, dtype=jnp.int32)


def sequences(rows: int) -> Array:
    """All rows belong to the first sequence."""
    return jnp.zeros(rows, jnp.int32)
