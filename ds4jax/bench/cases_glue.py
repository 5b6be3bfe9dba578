"""Operations between the projections: norms, rotations, raw rows, hyper-connections, router.

Inputs of float dots lie on a coarse grid on which these are exact in any order, so kernel and reference must agree bit
for bit; the cases in `BOUNDS` draw them freely.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ds4jax.activation import Activation
from ds4jax.bench.case import Case, choices, positions, sequences
from ds4jax.ops import rope

EPS = 1e-6
RING = 135  # places of a ring of raw rows
FLOATS = {"eps": EPS, "hc_eps": EPS, "precision": "highest"}

normal, split = jax.random.normal, jax.random.split


def spread(key: Array, rows: int, *shape: int) -> Array:
    """Rows of very different magnitude."""
    k1, k2 = split(key)
    scale = 10.0 ** jax.random.uniform(k1, (rows, *(1,) * len(shape)), minval=-3, maxval=3)
    return normal(k2, (rows, *shape)) * scale


def grid(key: Array, *shape: int, unit: float) -> Array:
    """Small multiples of a power of two."""
    return jax.random.randint(key, shape, -8, 9).astype(jnp.float32) * unit


def angles(key: Array, rows: int, rotary: int) -> tuple[Array, Array]:
    """Cosines and sines at positions up to a million."""
    half = jnp.arange(rotary // 2, dtype=jnp.float32) / (rotary // 2)
    return rope.rope_table(jax.random.randint(key, (rows,), 0, 1 << 20), 10000.0**-half)


def norm(width: int, act: str = "q8") -> Case:
    """Weighted RMS norm of rows of `width` values."""
    settings = {"eps": EPS, "act": act}
    return Case("norm", settings, lambda key, t: (spread(key, t, width),), lambda key: (normal(key, (width,)),))


def _rotated(key: Array, rows: int, rotary: int, *shape: int) -> tuple[Array, ...]:
    k1, k2 = split(key)
    return (spread(k1, rows, *shape), *angles(k2, rows, rotary))


def q_norm_rope(heads: int, depth: int, rotary: int) -> Case:
    """Query heads `[T, heads, depth]`."""
    return Case("q_norm_rope", {"eps": EPS}, lambda key, t: _rotated(key, t, rotary, heads, depth), lambda key: ())


def kv_store(depth: int, rotary: int, simulate: bool = True) -> Case:
    """Key-value rows `[T, depth]` into a ring; `simulate` rounds to the FP8 grid."""

    def rows(key: Array, t: int) -> tuple[Any, ...]:
        return *_rotated(key, t, rotary, depth), sequences(t), positions(t, 1000) % RING

    def shared(key: Array) -> tuple[Any, ...]:
        k1, k2 = split(key)
        return normal(k1, (depth,)), normal(k2, (1, RING, depth)).astype(jnp.float16)

    return Case("kv_store", {"eps": EPS, "simulate": simulate}, rows, shared, lambda t: depth * 4)


def _streams(key: Array, rows: int, streams: int, depth: int, kind: str) -> Array:
    if kind == "grid":
        return grid(key, rows, streams, depth, unit=1 / 4)
    return normal(key, (rows, streams, depth)) * (3 if kind == "free" else 1)


def _returning(key: Array, rows: int, streams: int, depth: int, kind: str) -> tuple[Array, Array, Array]:
    """Output of a sub-layer, its weights and the mixing."""
    shapes = (rows, depth), (rows, streams), (rows, streams, streams)
    keys = split(key, 3)
    if kind == "grid":
        out, post, mixing = (grid(k, *shape, unit=1 / 4) for k, shape in zip(keys, shapes, strict=True))
    else:
        out, post, mixing = (normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    return out, post, mixing


def _mix(key: Array, width: int, depth: int, outputs: int, scales: int, kind: str) -> tuple[Array, ...]:
    """Weights of a mix and of the norm. kind: "grid"; "one": each output is one free value; "free"."""
    k1, k2, k3, k4 = split(key, 4)
    if kind == "grid":
        fn = grid(k1, outputs, width, unit=1 / 512)
    elif kind == "one":
        place = jax.random.permutation(k1, width)[:outputs]
        fn = (jnp.arange(width) == place[:, None]).astype(jnp.float32)
    else:
        fn = normal(k1, (outputs, width)) * width**-0.5
    return fn.astype(jnp.float16), normal(k2, (scales,)), normal(k3, (outputs,)), normal(k4, (depth,))


def hyper_enter(
    streams: int, depth: int, iters: int = 20, kind: str = "grid", pending: bool = True, act: str = "q8"
) -> Case:
    """From sub-layer to sub-layer over `[T, streams, depth]`, `pending` or at the start; see `_mix` for `kind`."""

    def rows(key: Array, t: int) -> tuple[Any, ...]:
        k1, k2 = split(key)
        x = _streams(k1, t, streams, depth, kind)
        return x, _returning(k2, t, streams, depth, kind) if pending else None

    def shared(key: Array) -> tuple[Any, ...]:
        return _mix(key, streams * depth, depth, (2 + streams) * streams, 3, kind)

    return Case("hyper_enter", {**FLOATS, "iters": iters, "act": act}, rows, shared)


def hyper_leave(streams: int, depth: int) -> Case:
    """From the streams to the vocabulary head."""

    def rows(key: Array, t: int) -> tuple[Any, ...]:
        return (_streams(key, t, streams, depth, "grid"),)

    def shared(key: Array) -> tuple[Any, ...]:
        return _mix(key, streams * depth, depth, streams, 1, "grid")

    return Case("hyper_leave", {**FLOATS, "act": "q8"}, rows, shared)


def hyper_post(streams: int, depth: int) -> Case:
    """Streams after a sub-layer."""

    def rows(key: Array, t: int) -> tuple[Any, ...]:
        k1, k2 = split(key)
        out, post, mixing = _returning(k1, t, streams, depth, "one")
        return out, _streams(k2, t, streams, depth, "one"), post, mixing

    return Case("hyper_post", {}, rows, lambda key: ())


def router(experts: int, depth: int, top_k: int, kind: str = "scores") -> Case:
    """kind: "scores" with a bias; "ties", many equal ones; "given" ids; "free"."""

    def rows(key: Array, t: int) -> tuple[Any, ...]:
        k1, k2 = split(key)
        x = normal(k1, (t, depth)) if kind == "free" else grid(k1, t, depth, unit=1 / 4)
        return Activation(x, None), choices(k2, t, experts, top_k) if kind == "given" else None

    def shared(key: Array) -> tuple[Any, ...]:
        k1, k2 = split(key)
        gate = grid(k1, experts, depth, unit=1 / 64)
        bias: Array | None = normal(k2, (experts,)) / 8
        if kind == "free":
            gate = normal(k1, (experts, depth)) * depth**-0.5
        elif kind == "ties":
            number = jnp.arange(experts)
            gate, bias = gate[number % 3], (number % 2).astype(jnp.float32)
        elif kind == "given":
            bias = None
        return gate.astype(jnp.float16), bias

    return Case("router", {"top_k": top_k, "scale": 1.5, "precision": "highest"}, rows, shared)


def embed(vocabulary: int, width: int) -> Case:
    """Rows of a float16 table."""

    def rows(key: Array, t: int) -> tuple[Any, ...]:
        return (jax.random.randint(key, (t,), 0, vocabulary),)

    def shared(key: Array) -> tuple[Any, ...]:
        return (normal(key, (vocabulary, width)).astype(jnp.float16),)

    return Case("embed", {}, rows, shared, lambda t: t * width * 2)


def rope_table(rotary: int) -> Case:
    """Angles at positions up to a million."""

    def rows(key: Array, t: int) -> tuple[Any, ...]:
        return (jax.random.randint(key, (t,), 0, 1 << 20),)

    return Case("rope_table", {}, rows, lambda key: (jnp.geomspace(1, 1e-5, rotary // 2, dtype=jnp.float32),))


GLUE: dict[str, Case] = {
    "embed": embed(129280, 4096),
    "rope_table": rope_table(64),
    "norm": norm(4096),
    "norm of the query latent": norm(1024),
    "norm, float activations": norm(4096, "f32"),
    "q_norm_rope": q_norm_rope(64, 512, 64),
    "kv_store": kv_store(512, 64),
    "kv_store, no FP8": kv_store(512, 64, simulate=False),
    "hyper_enter": hyper_enter(4, 4096),
    "hyper_enter, every order of sums": hyper_enter(4, 4096, kind="one"),
    "hyper_enter, nothing pending": hyper_enter(4, 4096, kind="one", pending=False),
    "hyper_enter, free": hyper_enter(4, 4096, kind="free", act="f32"),
    "hyper_post": hyper_post(4, 4096),
    "hyper_leave": hyper_leave(4, 4096),
    "router": router(256, 4096, 6),
    "router, ties": router(256, 4096, 6, "ties"),
    "router, given ids": router(256, 4096, 6, "given"),
    "router, free": router(256, 4096, 6, "free"),
}

BOUNDS = {"hyper_enter, free": 2e-5, "router, free": 2e-5}
"""Largest difference of float results, relative to the largest value, where the order of a float dot is open: a few
roundings per level of a sum of up to 16384 products, amplified at most about tenfold by exponentials."""
