"""Kernels between the projections, interpreted, against their references: equal bit for bit, row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import ops
from ds4jax.bench import cases_glue as cases
from ds4jax.ops.norm import rms_norm
from ds4jax.ops.rope import rotate
from ds4jax.pallas import KERNELS

SMALL = {
    "norm": cases.norm(384),
    "norm of an odd width": cases.norm(40),
    "q_norm_rope": cases.q_norm_rope(2, 192, 64),
    "hyper_enter": cases.hyper_enter(2, 256, iters=2),
    "hyper_enter, odd": cases.hyper_enter(3, 24, iters=3),
    "hyper_enter, parts of a stream": cases.hyper_enter(2, 2048, iters=2, kind="one"),
    "hyper_enter, streams in a part": cases.hyper_enter(2, 640, iters=2, kind="one"),
    "hyper_enter, nothing pending": cases.hyper_enter(2, 1024, iters=2, kind="one", pending=False),
    "hyper_post": cases.hyper_post(4, 256),
    "hyper_leave": cases.hyper_leave(4, 512),
    "router": cases.router(12, 1100, 4),
    "router, ties": cases.router(16, 64, 4, "ties"),
    "router, given ids": cases.router(8, 64, 4, "given"),
    "embed": cases.embed(50, 24),
    "rope_table": cases.rope_table(24),
}


@functools.cache
def maker(case):
    return jax.jit(lambda key, other: (case.rows(key, 2), case.shared(other)))


def made(case, seed):
    """Arguments, drawn anew for every seed; and what the two functions below take besides."""
    rows, shared = maker(case)(*jax.random.split(jax.random.key(seed)))
    return rows, shared, {"op": case.op, "settings": tuple(case.settings.items())}


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
    for seed in range(4):  # a sum in another order may round alike
        rows, shared, how = made(SMALL[name], seed)
        assert_equal(kernel(jnp.ones(2, bool), rows, shared, **how), reference(rows, shared, **how))


@pytest.mark.parametrize("name", ["norm", "hyper_enter, streams in a part", "router"])
def test_rows_do_not_depend_on_their_number(name):
    """More rows than run unasked: every second one is absent, and its content does not matter."""
    rows, shared, how = made(SMALL[name], 1)
    padded = jax.tree.map(lambda a: jnp.full((10, *a.shape[1:]), jnp.nan, a.dtype).at[jnp.array([3, 9])].set(a), rows)
    live = jnp.zeros(10, bool).at[jnp.array([3, 9])].set(True)
    got = kernel(live, padded, shared, **how)
    assert_equal(take(got, [3, 9]), kernel(jnp.ones(2, bool), rows, shared, **how))


def test_free_floats_stay_within_rounding():
    """The mix projection and the router add float products in an order of their own."""
    for case in (cases.hyper_enter(2, 256, iters=2, kind="free", act="f32"), cases.router(12, 1100, 4, "free")):
        rows, shared, how = made(case, 2)
        got, want = kernel(jnp.ones(2, bool), rows, shared, **how), reference(rows, shared, **how)
        for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            scale = np.abs(np.asarray(right)).max()
            np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=0, atol=2e-5 * scale)


def test_fused_rotation_equals_norm_to_memory_and_then_rotation():
    """And the comparison is sharp: with one rounding less (a contracted multiply-add) it would fail."""
    rows, shared, how = made(SMALL["q_norm_rope"], 3)
    fused = np.asarray(kernel(jnp.ones(2, bool), rows, shared, **how))
    q, cos, sin = rows
    normed = jax.block_until_ready(jax.jit(rms_norm, static_argnums=(1, 2))(q, None, cases.EPS))
    np.testing.assert_array_equal(fused, np.asarray(jax.jit(rotate)(normed, cos, sin)))
    tail = np.asarray(normed)[..., -64:]
    a, b = tail[..., ::2], tail[..., 1::2]
    c, s = (np.asarray(table)[:, None] for table in (cos, sin))
    contracted = ((a * c).astype(np.float64) - b.astype(np.float64) * s).astype(np.float32)
    assert (contracted != fused[..., -64::2]).sum() > 10
