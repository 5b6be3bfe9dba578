"""What kernels with a program per row, or per part of a row, share.

Such a program lives for a few waits on memory: it loads all it needs before it adds anything up, and stores last,
because the compiler cannot know that a store leaves later loads alone. Nor does it keep loads together: it spreads them
over the arithmetic to save registers. Hence, where it matters, the loads, `ptx.fence()`, and the arithmetic in a branch
behind it, on a value that was loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ds4jax.pallas.ptx import i32

LOWEST = -(2**31)  # below the key (`ordered`) of every number
LANES = 128  # running sums of `ops.sums.ordered_sum`
ROWS = 8  # rows of a step: `when_live` runs so few whether they exist or not, a branch on memory costs more


def when_live(live: Any, row: Any) -> Callable[[Callable[[], None]], None]:
    """Decorator of what a program does for a row if the row exists."""
    if live.shape[0] <= ROWS:
        return lambda body: body()
    return pl.when(live[row] != 0)


def ring_place(where: tuple[Any, Any, Any], row: Any) -> tuple[Any, tuple[Any, Any]]:
    """Whether a row of a call exists, and its sequence and place in a ring, from arrays of the three.

    Call it before anything is stored.
    """
    live, sequence, place = where
    return live[row] != 0, (sequence[row], place[row])


def segments(program: Any, parts: Sequence[tuple[int, Callable[[Any], None]]]) -> None:
    """Divides programs among several bodies: (number of programs, body of the number of its first program)."""
    begin = 0
    for count, body in parts:
        if len(parts) == 1:
            body(begin)
        else:
            here = (program >= begin) & (program < begin + count)
            pl.when(here)(functools.partial(body, begin))
        begin += count


def part_size(width: int, most: int) -> int:
    """Largest power of two up to `most` that divides a row into equal parts."""
    return min(width & -width, most)


def pick(x: Array, place: Any) -> Array:
    """One element of a tile `[n]` as a scalar: its bits, since a warp adds integers in one instruction."""
    bits = lax.bitcast_convert_type(x, i32)
    return lax.bitcast_convert_type(jnp.sum(jnp.where(jnp.arange(x.shape[0], dtype=i32) == place, bits, 0)), x.dtype)


def ordered(x: Array) -> Array:
    """Keys in the order of the values, i32; zeros of either sign are equal. A warp finds the highest in one step."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), i32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def add_in_tree(parts: list[Array]) -> Array:
    """Sum of a list, neighbours first, as in `ops.sums.ordered_sum`."""
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]
