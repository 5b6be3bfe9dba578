"""Writing rows into a cache, and the operations that end with it.

These take, before their rows, which of them exist and `each`, which calls a function of rows with them, all at once or
one by one. What they write, their last argument, they return anew; rows that do not exist leave it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax
from jaxtyping import Array, Float, Int

from ds4jax.activation import Activation
from ds4jax.ops.compress import compress
from ds4jax.ops.linear import Weight, linear
from ds4jax.ops.rope import kv_norm_rope
from ds4jax.ops.rows import Live

Each = Callable[..., Any]
"""`each(function, *rows)`: the results of a function of rows."""


def store(
    live: Live,
    rows: Float[Array, "T e"],
    sequence: Int[Array, " T"],
    place: Int[Array, " T"],
    target: Float[Array, "B cap e"],
) -> Float[Array, "B cap e"]:
    """The target with the live rows at `[sequence, place]`, in its own format."""
    # Without the barrier XLA:GPU may skip the narrowing for a reader that it fuses with the write.
    stored = lax.optimization_barrier(rows.astype(target.dtype))

    # A loop, because XLA:CPU turns a scatter of one row into an update that it repeats, with a copy, in every reader.
    def body(step: Array, target: Array) -> Array:
        row = live.order[step]
        return lax.dynamic_update_slice(target, stored[row][None, None], (sequence[row], place[row], 0))

    return lax.fori_loop(0, live.count, body, target)


def linear_store(
    live: Live,
    each: Each,
    a: Activation,
    sequence: Int[Array, " T"],
    place: Int[Array, " T"],
    returned: tuple[Weight, ...],
    stored: tuple[Weight, ...],
    rings: tuple[Float[Array, "B cap _"], ...],
    *,
    precision: str,
) -> tuple[tuple[Float[Array, "T _"], ...], tuple[Float[Array, "B cap _"], ...]]:
    """`linear` of the same rows with all weights: the results of those `returned`, and for each one `stored` its ring,
    which holds the results at `[sequence, place]`."""

    def project(a: Activation) -> tuple[Array, ...]:
        return linear(a, (), *returned, *stored, precision=precision)

    results = each(project, a)
    fresh = zip(results[len(returned) :], rings, strict=True)
    return results[: len(returned)], tuple(store(live, rows, sequence, place, ring) for rows, ring in fresh)


def kv_store(
    live: Live,
    each: Each,
    kv: Float[Array, "T d"],
    cos: Float[Array, "T r2"],
    sin: Float[Array, "T r2"],
    sequence: Int[Array, " T"],
    place: Int[Array, " T"],
    weight: Float[Array, " d"],
    ring: Float[Array, "B cap d"],
    *,
    eps: float,
    simulate: bool,
) -> Float[Array, "B cap d"]:
    """The ring with finished key-value rows (`kv_norm_rope`) at `[sequence, place]`."""

    def finish(kv: Array, cos: Array, sin: Array) -> Array:
        return kv_norm_rope(kv, cos, sin, weight, eps=eps, simulate=simulate)

    return store(live, each(finish, kv, cos, sin), sequence, place, ring)


def compress_store(
    live: Live,
    each: Each,
    window: Int[Array, " T"],
    sequence: Int[Array, " T"],
    values: Float[Array, "B cap ve"],
    gates: Float[Array, "B cap ve"],
    ape: Float[Array, "m ve"],
    norm: Float[Array, " e"],
    frequencies: Float[Array, " r2"],
    rows: Float[Array, "B n e"],
    *,
    ratio: int,
    eps: float,
    simulate: str,
) -> Float[Array, "B n e"]:
    """The compressed rows with those of completed windows (`compress`) at `[sequence, window]`."""

    def finish(window: Array, sequence: Array) -> Array:
        return compress(
            window, sequence, values, gates, ape, norm, frequencies, ratio=ratio, eps=eps, simulate=simulate
        )

    return store(live, each(finish, window, sequence), sequence, window, rows)
