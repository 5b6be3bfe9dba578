"""No kernel reads or writes beyond an array, whatever absent rows hold: the interpreter clamps, a GPU does not."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent import spoiled

from ds4jax.bench import cases_glue
from ds4jax.bench.case import activation, choices, quantised
from ds4jax.pallas import KERNELS, ptx

KERNEL_FILES = Path(ptx.__file__).parent


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def same(count, value):
    return jnp.full(count, value, jnp.int32)


def keys(count, ids=None, visible=None):
    """Attention of sequence 1 of 2: over a window, and listed compressed rows or all that there is room for."""
    compressed = None if ids is None and visible is None else normal(2, visible or 64, 32, dtype=jnp.float16)
    if ids is not None:
        ids = jnp.broadcast_to(jnp.arange(ids, dtype=jnp.int32), (count, ids))
    if visible is not None:
        visible = same(count, visible)
    table = normal(count, 2), normal(count, 2)
    row_args = normal(count, 3, 32), *table, same(count, 255), same(count, 1), ids, visible
    settings = {"window": 70, "first": 1, "groups": 3, "act": "q8"}
    return row_args, (normal(2, 77, 32, dtype=jnp.float16), compressed, normal(3)), settings


def pooled(count, ratio, width, simulate):
    wide = width * (2 if ratio == 4 else 1)
    ring = normal(2, 2 * ratio + 1, wide)
    shared = (ring, ring, normal(ratio, wide), normal(width), normal(4), normal(2, 3, width))
    return (same(count, 0), same(count, 1)), shared, {"ratio": ratio, "eps": 1e-6, "simulate": simulate}


def glue(case):
    def make(count):
        return case.rows(jax.random.key(0), count), case.shared(jax.random.key(1)), case.settings

    return case.op, make


def projected(width, format):
    key = jax.random.key(0)
    return "linear", lambda t: ((activation(key, t, width), ()), (quantised(key, format, 3, width),), {})


def projected_and_stored(count):
    key = jax.random.key(0)
    row_args = activation(key, count, 32), same(count, 1), jnp.arange(count)
    returned, stored, rings = (quantised(key, "Q8_0", 3, 32),), (normal(5, 32),), (normal(2, count, 5),)
    return row_args, (returned, stored, rings), {}


def experts(count):
    key, settings = jax.random.key(0), {"limit": 10.0, "shared_limit": 10.0, "act": "q8"}
    row_args = activation(key, count, 32), choices(key, count, 3, 2), normal(count, 2)
    weights = tuple(quantised(key, "Q8_0", *lead, wide, 32) for lead in ((3,), ()) for wide in (32, 32, 1))
    return row_args, weights, settings


def indexer(count):
    row_args = normal(count, 3, 32), normal(count, 4), normal(count, 4), normal(count, 3), same(count, 1)
    settings = {"top_k": 21, "simulate": True}
    return (*row_args, same(count, 192)), (normal(2, 192, 32, dtype=jnp.float16),), settings


CASES = {
    "q_norm_rope": glue(cases_glue.q_norm_rope(1, 192, 64)),
    "kv_store": glue(cases_glue.kv_store(40, 16, simulate=False)),
    "hyper_enter": glue(cases_glue.hyper_enter(3, 24, iters=1)),
    "router": glue(cases_glue.router(12, 1100, 2)),
    "router, given ids": glue(cases_glue.router(12, 64, 2, "given")),
    "embed": ("embed", lambda t: ((same(t, 4),), (normal(5, 24),), {})),
    "attention, window": ("attention", keys),
    "attention, ids": ("attention", lambda t: keys(t, ids=40)),
    "attention, visible": ("attention", lambda t: keys(t, visible=192)),
    "compress_store, CSA": ("compress_store", lambda t: pooled(t, 4, 72, "kv")),
    "compress_store, HCA": ("compress_store", lambda t: pooled(t, 6, 20, "none")),
    "indexer": ("indexer", indexer),
    "Q4_K": projected(5 * 256, "Q4_K"),
    "linear_store": ("linear_store", projected_and_stored),
    "experts": ("experts", experts),
}


@pytest.fixture
def beyond(monkeypatch):
    """Lines of kernels that used an index beyond an array, collected while they run."""
    lines, ran = [], []

    def watched(function):
        def call(ref, *args, mask=None, **options):
            frame = sys._getframe(1)
            while Path(frame.f_code.co_filename).parent != KERNEL_FILES or frame.f_code.co_filename == ptx.__file__:
                frame = frame.f_back
            inside = jnp.asarray(True)
            for index, size in zip(ref.transforms[-1].indices, ref.transforms[-1].shape, strict=True):
                first, last = (index.start, index.start + index.size - 1) if hasattr(index, "start") else (index, index)
                good = (jnp.asarray(first) >= 0) & (jnp.asarray(last) < size)
                inside &= jnp.all(good if mask is None else good | ~mask)
            where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            jax.debug.callback(lambda inside: (ran.append(where), None if inside else lines.append(where)), inside)
            return function(ref, *args, mask=mask, **options)

        return call

    monkeypatch.setattr(ptx.plt, "load", watched(ptx.plt.load))
    monkeypatch.setattr(ptx.plt, "store", watched(ptx.plt.store))
    yield lines
    assert ran


@pytest.mark.parametrize("name", CASES)
def test_indices_stay_inside(name, beyond):
    """Every second row is absent."""
    op, make = CASES[name]
    row_args, shared, settings = make(3)
    live = jnp.array([True, False, True])
    settings = {key: value for key, value in settings.items() if key != "precision"}
    jax.block_until_ready(KERNELS[op](live, *spoiled(row_args, live), *shared, interpret=True, **settings))
    jax.effects_barrier()
    assert sorted(set(beyond)) == []
