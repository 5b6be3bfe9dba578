"""Every operation by named cases at the shapes of DeepSeek-V4-Flash; here the projections and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ds4jax.activation import Activation
from ds4jax.bench.case import Case, activation, choices, floats, positions, quantised, sequences
from ds4jax.bench.cases_attention import ATTENTION
from ds4jax.bench.cases_glue import GLUE

D, F, E, K, VOCAB = 4096, 2048, 256, 6, 129280


def _experts(key: Array, rows: int) -> tuple[Activation, Array, Array]:
    """Rows with K distinct experts each."""
    k1, k2, k3 = jax.random.split(key, 3)
    return activation(k1, rows, D), choices(k2, rows, E, K), jax.random.uniform(k3, (rows, K))


def _weights(key: Array, *weights: tuple[str, int, int]) -> tuple[Any, ...]:
    keys = jax.random.split(key, len(weights))
    return tuple(
        floats(k, n, width) if format == "F16" else quantised(k, format, n, width)
        for k, (format, n, width) in zip(keys, weights, strict=True)
    )


def _projection(*weights: tuple[str, int, int], wanted: Callable[[int], Array] | None = None) -> Case:
    """`wanted`: of so many rows, those for which the product with the first weight is wanted."""

    def rows(key: Array, t: int) -> tuple[Any, ...]:
        return activation(key, t, weights[0][2]), () if wanted is None else (wanted(t),)

    return Case("linear", {"precision": "highest"}, rows, lambda key: _weights(key, *weights))


def _compressor(ratio: int, width: int, heads: int = 0) -> Case:
    """A compressor's projections into its rings, and the weights of an indexer's heads."""
    outputs = width * (2 if ratio == 4 else 1)
    capacity = ratio * (2 if ratio == 4 else 1) + 7
    others = (("F16", heads, D),) if heads else ()

    def rows(key: Array, t: int) -> tuple[Any, ...]:
        return activation(key, t, D), sequences(t), positions(t, 1000) % capacity

    def shared(key: Array) -> tuple[Any, ...]:
        k1, k2, k3 = jax.random.split(key, 3)
        rings = tuple(jax.random.normal(k, (1, capacity, outputs)) for k in jax.random.split(k3))
        return _weights(k1, *others), _weights(k2, *[("F16", outputs, D)] * 2), rings

    return Case("linear_store", {"precision": "highest"}, rows, shared, lambda t: 2 * D * (2 * outputs + heads))


def _moe(*formats: str) -> Case:
    """Gate, up and down of the routed experts in these formats, the shared expert in Q8_0."""

    def shared(key: Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 6)
        shapes = ((E, F, D), (E, F, D), (E, D, F), (F, D), (F, D), (D, F))
        kinds = (*formats, "Q8_0", "Q8_0", "Q8_0")
        return tuple(quantised(k, f, *shape) for k, f, shape in zip(keys, kinds, shapes, strict=True))

    def active(rows: int) -> int:
        size = {"IQ2_XXS": 70, "Q2_K": 84, "Q4_K": 144}
        return F * D // 256 * (rows * K * sum(size[f] for f in formats) + 3 * 272)

    settings = {"limit": 10.0, "shared_limit": 10.0, "act": "q8", "precision": "highest"}
    return Case("experts", settings, _experts, shared, active)


PROJECTIONS: dict[str, Case] = {
    "wq_a+wkv": _projection(("Q8_0", 1024, D), ("Q8_0", 512, D)),
    "wq_b": _projection(("Q8_0", 32768, 1024)),
    "wq_b+index": _projection(("Q8_0", 8192, 1024), ("Q8_0", 32768, 1024), wanted=lambda t: jnp.ones(t, bool)),
    "wo_a": Case(
        "grouped_linear",
        {"precision": "highest"},
        lambda key, t: (activation(key, t, 8, D),),
        lambda key: (quantised(key, "Q8_0", 8192, D),),
    ),
    "wo_b": _projection(("Q8_0", D, 8192)),
    "head": _projection(("Q8_0", VOCAB, D)),
    "compressor CSA": _compressor(4, 512),
    "compressor HCA": _compressor(128, 512),
    "compressor index": _compressor(4, 128, heads=64),
    "quantise": Case("quantise", {"act": "q8"}, lambda key, t: (jax.random.normal(key, (t, 8192)),), lambda key: ()),
    "experts": _moe("IQ2_XXS", "IQ2_XXS", "Q2_K"),
    "experts Q4_K": _moe("Q4_K", "Q4_K", "Q4_K"),
}

CASES: dict[str, Case] = {**PROJECTIONS, **GLUE, **ATTENTION}
"""All cases."""
