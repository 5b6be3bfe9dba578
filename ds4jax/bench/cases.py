"""Named inputs for every operation at the shapes of DeepSeek-V4-Flash, made on the device from a seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ds4jax.activation import Activation
from ds4jax.quants import QTensor

D, F, E, K, VOCAB = 4096, 2048, 256, 6, 129280


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape.

    op: name in the switchboard. settings: its static keyword arguments.
    rows, shared: functions of a key (and the number of rows) that make its arguments; `shared` are the weights and
        caches that a timing rotates, so that they come from memory and not from the L2.
    active: bytes of `shared` that one call reads, for T rows; None: all of them.
    """

    op: str
    settings: dict[str, Any]
    rows: Callable[[Array, int], tuple[Any, ...]]
    shared: Callable[[Array], tuple[Any, ...]]
    active: Callable[[int], int] | None = None


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
    from ds4jax.ops.quantise import quantise

    return quantise(jax.random.normal(key, shape), act="q8")


def _experts(key: Array, rows: int) -> tuple[Activation, Array, Array]:
    """Rows with K distinct experts each."""
    k1, k2, k3 = jax.random.split(key, 3)
    ids = jax.vmap(lambda k: jax.random.permutation(k, E)[:K])(jax.random.split(k2, rows)).astype(jnp.int32)
    return activation(k1, rows, D), ids, jax.random.uniform(k3, (rows, K))


def _projection(*weights: tuple[str, int, int]) -> Case:
    def shared(key: Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, len(weights))
        return tuple(
            floats(k, n, width) if format == "F16" else quantised(k, format, n, width)
            for k, (format, n, width) in zip(keys, weights, strict=True)
        )

    return Case("linear", {"precision": "highest"}, lambda key, t: (activation(key, t, weights[0][2]),), shared)


def _routed(formats: tuple[str, str, str]) -> Case:
    def shared(key: Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 3)
        shapes = ((E, F, D), (E, F, D), (E, D, F))
        return tuple(quantised(k, f, *shape) for k, f, shape in zip(keys, formats, shapes, strict=True))

    def active(rows: int) -> int:
        size = {"IQ2_XXS": 70, "Q2_K": 84, "Q4_K": 144}
        return rows * K * F * D // 256 * sum(size[f] for f in formats)

    settings = {"limit": 10.0, "act": "q8", "precision": "highest"}
    return Case("routed_experts", settings, _experts, shared, active)


def _shared_expert() -> Case:
    def shared(key: Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 3)
        shapes = ((F, D), (F, D), (D, F))
        return tuple(quantised(k, "Q8_0", *shape) for k, shape in zip(keys, shapes, strict=True))

    settings = {"limit": 10.0, "act": "q8", "precision": "highest"}
    return Case("shared_expert", settings, lambda key, t: (activation(key, t, D),), shared)


CASES: dict[str, Case] = {
    "wq_a+wkv": _projection(("Q8_0", 1024, D), ("Q8_0", 512, D)),
    "wq_b": _projection(("Q8_0", 32768, 1024)),
    "wo_a": Case(
        "grouped_linear",
        {"precision": "highest"},
        lambda key, t: (activation(key, t, 8, D),),
        lambda key: (quantised(key, "Q8_0", 8192, D),),
    ),
    "wo_b": _projection(("Q8_0", D, 8192)),
    "head": _projection(("Q8_0", VOCAB, D)),
    "compressor": _projection(("F16", 1024, D), ("F16", 1024, D)),
    "quantise": Case("quantise", {"act": "q8"}, lambda key, t: (jax.random.normal(key, (t, 8192)),), lambda key: ()),
    "experts": _routed(("IQ2_XXS", "IQ2_XXS", "Q2_K")),
    "experts Q4_K": _routed(("Q4_K", "Q4_K", "Q4_K")),
    "shared expert": _shared_expert(),
}
