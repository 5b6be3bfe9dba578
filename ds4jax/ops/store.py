"""Writing rows into a cache."""

from __future__ import annotations

from jax import lax
from jaxtyping import Array, Float, Int

from ds4jax.ops.rows import Live


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
