"""Routed experts, and the shared expert in launches of its own: gate and up with SwiGLU, then down with the sums.

A routed pair (row, expert) reads its expert's weights by itself; pairs of the same expert meet in the cache. Each dot
is the one of `linear`, whatever the number of rows. The shared expert's launches wait for nobody's choice: they run
beside the router and beside the routed experts, which leave much of the memory's time unused.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.activation import Activation
from ds4jax.pallas.linear import (
    HELD,
    Dots,
    Reader,
    Step,
    activation_planes,
    added,
    load_steps,
    project,
    row_numbers,
    row_planes,
    row_tiles,
    with_sums,
)
from ds4jax.pallas.ptx import Instructions, f32, i32, launch
from ds4jax.pallas.quantise import quantise
from ds4jax.quants import QTensor

Weight = Array | QTensor
SHARED_ROWS = 4  # rows of a program of the shared gate and up: eight need so many registers that fewer programs fit


def _swiglu(gate: Array, up: Array, limit: float) -> Array:
    """`ops.moe.swiglu`."""
    if limit > 0:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate / (1.0 + jnp.exp(-gate)) * up


def _pair(ptx: Instructions, readers: list[Reader], refs: Any, rows: list[tuple[Any, ...]], acts: Any) -> list[Dots]:
    """Some rows of gate and up."""
    return [
        reader.dots(ptx, ref, rows, functools.partial(lambda form, i, m: (acts[form], m), reader.form))
        for reader, ref in zip(readers, refs, strict=True)
    ]


def _gate_up(
    live: Array,
    a: Activation,
    ids: Array,
    weights: Array,
    w1: Weight,
    w3: Weight,
    *,
    limit: float,
    interpret: bool,
) -> Array:
    """`swiglu(x . w1^T, x . w3^T)` of every pair, times its weight, f32 `[T, K, F]`."""
    (rows, top_k), wide = ids.shape, w1.shape[-2]
    readers = [Reader.of(w, a.q8 is not None) for w in (w1, w3)]
    tile = math.gcd(*(reader.tile for reader in readers))

    def kernel(ptx: Instructions, live: Any, ids: Any, weights: Any, acts: Any, refs: Any, out: Any) -> None:
        pair = pl.program_id(0)
        t, k = pair // top_k, pair % top_k
        exists, expert, weight = live[t] != 0, ids[t, k], weights[t, k]  # one wait for all of them
        chosen = [pl.program_id(1) * tile + i for i in range(tile)]

        @pl.when(exists)
        def _() -> None:
            def write(sums: list[list[Array]]) -> None:
                for row, gate, up in zip(chosen, sums[0][:tile], sums[0][tile:], strict=True):
                    out[t, k, row] = _swiglu(gate, up, limit) * weight

            dots = _pair(ptx, readers, refs, [(expert, row) for row in chosen], acts)
            with_sums(ptx, expert >= 0, dots, [t], write)

    return launch(
        kernel,
        jax.ShapeDtypeStruct((rows, top_k, wide), f32),
        (rows * top_k, wide // tile),
        live.astype(i32),
        ids,
        weights,
        activation_planes(live, a, {reader.form for reader in readers}, interpret),
        [reader.arrays for reader in readers],
        name="experts_gate_up",
        warps=1,
        interpret=interpret,
    )


def _down(live: Array, hidden: Array, ids: Array, w2: Weight, shared: Array, *, act: str, interpret: bool) -> Array:
    """`sum_k hidden_k . w2_k^T`, the lanes of all k in one running sum, plus what the shared expert makes, `[T, D]`."""
    (rows, top_k), n = ids.shape, w2.shape[-2]
    reader = Reader.of(w2, act == "q8")
    (acts,) = row_planes(live, [(hidden.reshape(rows * top_k, -1), reader.form)], interpret)

    def kernel(ptx: Instructions, live: Any, ids: Any, acts: Any, w2: Any, shared: Any, out: Any) -> None:
        t = pl.program_id(0)
        exists, experts = live[t] != 0, [ids[t, k] for k in range(top_k)]
        chosen = [pl.program_id(1) * reader.tile + i for i in range(reader.tile)]
        more = [shared[t, row] for row in chosen]

        @pl.when(exists)
        def _() -> None:
            parts = [reader.dots(ptx, w2, [(e, row) for row in chosen], lambda _, m: (acts, m)) for e in experts]
            loads = (load_steps(dots, [t * top_k + k], activations=False) for k, dots in enumerate(parts))

            def finish(steps: Iterable[Step]) -> None:
                (totals,) = added(steps)
                for row, lanes, extra in zip(chosen, totals, more, strict=True):
                    out[t, row] = ptx.tree_sum(lanes) + extra

            if sum(dots.registers(0)[0] for dots in parts) > HELD:
                finish(itertools.chain.from_iterable(loads))
                return
            ready = list(itertools.chain.from_iterable(loads))  # as in `with_sums`, but for the activations
            ptx.fence()
            pl.when(experts[0] >= 0)(functools.partial(finish, ready))

    return launch(
        kernel,
        jax.ShapeDtypeStruct((rows, n), f32),
        (rows, n // reader.tile),
        live.astype(i32),
        ids,
        acts,
        reader.arrays,
        shared,
        name="experts_down",
        warps=1,
        interpret=interpret,
    )


def _shared(
    live: Array, a: Activation, w1: Weight, w3: Weight, w2: Weight, *, limit: float, act: str, interpret: bool
) -> Array:
    """Kernel of `ops.moe.shared_expert`."""
    total, wide = live.shape[0], w1.shape[0]
    readers = [Reader.of(w, a.q8 is not None) for w in (w1, w3)]
    tile = math.gcd(*(reader.tile for reader in readers))

    def kernel(ptx: Instructions, live: Any, acts: Any, refs: Any, out: Any) -> None:
        chosen = [pl.program_id(1) * tile + i for i in range(tile)]
        ms = row_numbers(pl.program_id(0), total, SHARED_ROWS)
        exists = functools.reduce(jnp.maximum, [live[m] for m in ms]) != 0

        def write(sums: list[list[Array]]) -> None:
            for m, values in zip(ms, sums, strict=True):
                for row, gate, up in zip(chosen, values[:tile], values[tile:], strict=True):
                    out[m, row] = _swiglu(gate, up, limit)

        with_sums(ptx, exists, _pair(ptx, readers, refs, [(row,) for row in chosen], acts), ms, write)

    hidden = launch(
        kernel,
        jax.ShapeDtypeStruct((total, wide), f32),
        (row_tiles(total, SHARED_ROWS)[1], wide // tile),
        live.astype(i32),
        activation_planes(live, a, {reader.form for reader in readers}, interpret),
        [reader.arrays for reader in readers],
        name="shared_gate_up",
        warps=1,
        interpret=interpret,
    )
    codes = quantise(live, hidden, act=act, interpret=interpret)
    return project(live, codes, total, (w2,), lambda m, row, n: m, name="shared_down", interpret=interpret)[0]


def experts(
    live: Array,
    a: Activation,
    ids: Array,
    weights: Array,
    w1: Weight,
    w3: Weight,
    w2: Weight,
    shared_w1: Weight,
    shared_w3: Weight,
    shared_w2: Weight,
    *,
    limit: float,
    shared_limit: float,
    act: str,
    interpret: bool,
) -> Array:
    """Kernel of `ops.moe.experts`."""
    shared = _shared(live, a, shared_w1, shared_w3, shared_w2, limit=shared_limit, act=act, interpret=interpret)
    hidden = _gate_up(live, a, ids, weights, w1, w3, limit=limit, interpret=interpret)
    return _down(live, hidden, ids, w2, shared, act=act, interpret=interpret)
