"""Inputs of the operations between projections, for comparing kernels with references.

A case is `(operation, settings, function(rng, rows) -> (row arguments, shared arguments))`. Inputs of float dots lie
on a coarse grid on which these are exact in any order, so kernel and reference must agree bit for bit; the cases in
`BOUNDS` draw them freely.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.activation import Activation
from ds4jax.ops.rope import rope_table

f32 = np.float32


def floats(rng, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape).astype(f32))


def spread(rng, rows: int, *shape: int) -> jax.Array:
    """Rows of very different magnitude."""
    scale = 10.0 ** rng.uniform(-3, 3, (rows, *(1,) * len(shape)))
    return jnp.asarray((rng.standard_normal((rows, *shape)) * scale).astype(f32))


def grid(rng, *shape: int, unit: float) -> jax.Array:
    """Small multiples of a power of two."""
    return jnp.asarray((rng.integers(-8, 9, shape) * unit).astype(f32))


def angles(rng, rows: int, rotary: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines at positions up to a million."""
    position = rng.integers(0, 1 << 20, rows).astype(np.int32)
    frequencies = 10000.0 ** (-np.arange(rotary // 2) / (rotary // 2))
    return rope_table(jnp.asarray(position), jnp.asarray(frequencies.astype(f32)))


def norm(width: int):
    return lambda rng, rows: ((spread(rng, rows, width),), (floats(rng, width),))


def heads(count: int, depth: int, rotary: int):
    return lambda rng, rows: ((spread(rng, rows, count, depth), *angles(rng, rows, rotary)), ())


def row(depth: int, rotary: int):
    return lambda rng, rows: ((spread(rng, rows, depth), *angles(rng, rows, rotary)), (floats(rng, depth),))


def mixed(streams: int, depth: int, outputs: int, scales: int, kind: str = "grid"):
    """Streams on the grid, free ones of which each output takes one value, or all drawn freely."""

    def build(rng, rows: int):
        width = streams * depth
        if kind == "grid":
            x, fn = grid(rng, rows, streams, depth, unit=1 / 4), grid(rng, outputs, width, unit=1 / 512)
        elif kind == "one":
            x, fn = floats(rng, rows, streams, depth), jnp.eye(outputs, width)[:, rng.permutation(width)]
        else:
            x, fn = floats(rng, rows, streams, depth) * 3, floats(rng, outputs, width) / np.sqrt(width).astype(f32)
        return (x,), (fn.astype(jnp.float16), floats(rng, scales), floats(rng, outputs))

    return build


def returned(streams: int, depth: int):
    def build(rng, rows: int):
        shapes = (rows, depth), (rows, streams, depth), (rows, streams), (rows, streams, streams)
        return tuple(floats(rng, *shape) for shape in shapes), ()

    return build


def routed(experts: int, depth: int, top_k: int, kind: str = "scores"):
    """Scores with a bias, many equal ones, given ids, or freely drawn ones."""

    def build(rng, rows: int):
        x, gate = grid(rng, rows, depth, unit=1 / 4), grid(rng, experts, depth, unit=1 / 64)
        bias, ids = floats(rng, experts) / 8, None
        if kind == "free":
            x, gate = floats(rng, rows, depth), floats(rng, experts, depth) / np.sqrt(depth).astype(f32)
        elif kind == "ties":
            gate, bias = gate[np.arange(experts) % 3], jnp.asarray((np.arange(experts) % 2).astype(f32))
        elif kind == "given":
            ids = jnp.asarray(np.stack([rng.permutation(experts)[:top_k] for _ in range(rows)]).astype(np.int32))
        return (Activation(x, None), ids), (gate.astype(jnp.float16), None if kind == "given" else bias)

    return build


EPS = {"eps": 1e-6}
HYPER = {"eps": 1e-6, "hc_eps": 1e-6, "precision": "highest"}
ROUTER = {"top_k": 6, "scale": 1.5, "precision": "highest"}

FULL = {
    "norm": ("norm", {**EPS, "act": "q8"}, norm(4096)),
    "norm of the query latent": ("norm", {**EPS, "act": "q8"}, norm(1024)),
    "norm, float activations": ("norm", {**EPS, "act": "f32"}, norm(4096)),
    "q_norm_rope": ("q_norm_rope", EPS, heads(64, 512, 64)),
    "kv_norm_rope": ("kv_norm_rope", {**EPS, "simulate": True}, row(512, 64)),
    "kv_norm_rope, no FP8": ("kv_norm_rope", {**EPS, "simulate": False}, row(512, 64)),
    "unrotate": ("unrotate", {"groups": 8, "act": "q8"}, heads(64, 512, 64)),
    "hyper_pre": ("hyper_pre", {**HYPER, "iters": 20}, mixed(4, 4096, 24, 3)),
    "hyper_pre, sum of squares": ("hyper_pre", {**HYPER, "iters": 20}, mixed(4, 4096, 24, 3, "one")),
    "hyper_pre, free": ("hyper_pre", {**HYPER, "iters": 20}, mixed(4, 4096, 24, 3, "free")),
    "hyper_post": ("hyper_post", {}, returned(4, 4096)),
    "hyper_head": ("hyper_head", HYPER, mixed(4, 4096, 4, 1)),
    "router": ("router", ROUTER, routed(256, 4096, 6)),
    "router, ties": ("router", ROUTER, routed(256, 4096, 6, "ties")),
    "router, given ids": ("router", ROUTER, routed(256, 4096, 6, "given")),
    "router, free": ("router", ROUTER, routed(256, 4096, 6, "free")),
}
"""Shapes of DeepSeek-V4-Flash."""

BOUNDS = {"hyper_pre, free": 2e-5, "router, free": 2e-5}
"""Largest difference of float results, relative to the largest value, where the order of a float dot is open: a few
roundings per level of a sum of up to 16384 products, amplified at most about tenfold by exponentials."""
