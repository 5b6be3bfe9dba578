"""Kernels between the projections, interpreted, against their references: equal bit for bit, row by row."""

import functools

import cases_glue as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import ops
from ds4jax.ops.norm import rms_norm
from ds4jax.ops.rope import rotate
from ds4jax.pallas import KERNELS

ROUTER = {"top_k": 4, "scale": 1.5, "precision": "highest"}
EPS = cases.EPS

SMALL = {
    "norm": ("norm", {**EPS, "act": "q8"}, cases.norm(384)),
    "norm of an odd width": ("norm", {**EPS, "act": "q8"}, cases.norm(40)),
    "q_norm_rope": ("q_norm_rope", EPS, cases.heads(2, 192, 64)),
    "kv_norm_rope": ("kv_norm_rope", {**EPS, "simulate": True}, cases.row(192, 64)),
    "kv_norm_rope, no FP8": ("kv_norm_rope", {**EPS, "simulate": False}, cases.row(40, 16)),
    "unrotate": ("unrotate", {"groups": 2, "act": "q8"}, cases.heads(4, 192, 64)),
    "unrotate, heads within a block": ("unrotate", {"groups": 2, "act": "q8"}, cases.heads(8, 24, 8)),
    "hyper_pre": ("hyper_pre", {**cases.HYPER, "iters": 20}, cases.mixed(4, 384, 24, 3)),
    "hyper_pre, odd": ("hyper_pre", {**cases.HYPER, "iters": 3}, cases.mixed(3, 24, 15, 3)),
    "hyper_pre, sum of squares": ("hyper_pre", {**cases.HYPER, "iters": 2}, cases.mixed(2, 1024, 8, 3, "one")),
    "hyper_post": ("hyper_post", {}, cases.returned(4, 256)),
    "hyper_head": ("hyper_head", cases.HYPER, cases.mixed(4, 512, 4, 1)),
    "router": ("router", ROUTER, cases.routed(12, 1100, 4)),
    "router, ties": ("router", ROUTER, cases.routed(16, 64, 4, "ties")),
    "router, given ids": ("router", ROUTER, cases.routed(8, 64, 4, "given")),
}


@functools.partial(jax.jit, static_argnames=("op", "settings"))
def kernel(live, rows, shared, *, op, settings):
    wanted = {name: value for name, value in settings if name != "precision"}
    return KERNELS[op](live, *rows, *shared, interpret=True, **wanted)


@functools.partial(jax.jit, static_argnames=("op", "settings"))
def reference(rows, shared, *, op, settings):
    return ops._REFERENCE[op](*rows, *shared, **dict(settings))


def take(tree, index):
    return jax.tree.map(lambda a: np.asarray(a)[index], tree)


def assert_equal(got, want):
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize("name", SMALL)
def test_kernel_equals_reference(name):
    op, settings, build = SMALL[name]
    how = {"op": op, "settings": tuple(settings.items())}
    for seed in range(4):  # a sum in another order may round alike
        rows, shared = build(np.random.default_rng(seed), 2)
        assert_equal(kernel(jnp.ones(2, bool), rows, shared, **how), reference(rows, shared, **how))


@pytest.mark.parametrize("name", ["norm", "unrotate", "hyper_pre", "router"])
def test_rows_do_not_depend_on_their_number(name):
    """More rows than run unasked: every second one is absent, and its content does not matter."""
    op, settings, build = SMALL[name]
    how = {"op": op, "settings": tuple(settings.items())}
    rows, shared = build(np.random.default_rng(1), 2)
    padded = jax.tree.map(lambda a: jnp.full((10, *a.shape[1:]), jnp.nan, a.dtype).at[jnp.array([3, 9])].set(a), rows)
    live = jnp.zeros(10, bool).at[jnp.array([3, 9])].set(True)
    got = kernel(live, padded, shared, **how)
    assert_equal(take(got, [3, 9]), kernel(jnp.ones(2, bool), rows, shared, **how))


def test_free_floats_stay_within_rounding():
    """The mix projection and the router add float products in an order of their own."""
    for op, settings, build in (
        ("hyper_pre", {**cases.HYPER, "iters": 20}, cases.mixed(4, 384, 24, 3, "free")),
        ("router", ROUTER, cases.routed(12, 1100, 4, "free")),
    ):
        how = {"op": op, "settings": tuple(settings.items())}
        rows, shared = build(np.random.default_rng(2), 2)
        got, want = kernel(jnp.ones(2, bool), rows, shared, **how), reference(rows, shared, **how)
        for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            scale = np.abs(np.asarray(right)).max()
            np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=0, atol=2e-5 * scale)


def test_fused_rotation_equals_norm_to_memory_and_then_rotation():
    """And the comparison is sharp: with one rounding less (a contracted multiply-add) it would fail."""
    op, settings, build = SMALL["q_norm_rope"]
    rows, shared = build(np.random.default_rng(3), 2)
    fused = np.asarray(kernel(jnp.ones(2, bool), rows, shared, op=op, settings=tuple(settings.items())))
    q, cos, sin = rows
    normed = jax.block_until_ready(jax.jit(rms_norm, static_argnums=(1, 2))(q, None, settings["eps"]))
    np.testing.assert_array_equal(fused, np.asarray(jax.jit(rotate)(normed, cos, sin)))
    tail = np.asarray(normed)[..., -64:]
    a, b = tail[..., ::2], tail[..., 1::2]
    c, s = (np.asarray(table)[:, None] for table in (cos, sin))
    contracted = ((a * c).astype(np.float64) - b.astype(np.float64) * s).astype(np.float32)
    assert (contracted != fused[..., -64::2]).sum() > 10
