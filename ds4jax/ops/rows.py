"""One row at a time: how the XLA path makes a row's result independent of the rows beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Live:
    """Which of T rows exist: a mask, and the same as a list: the first `count` entries of `order`."""

    mask: Bool[Array, " T"]
    order: Int[Array, " T"]
    count: Int[Array, ""]

    @staticmethod
    def of(mask: Bool[Array, " T"]) -> Live:
        """The rows where `mask` is true."""
        order = jnp.nonzero(mask, size=mask.shape[0], fill_value=0)[0].astype(jnp.int32)
        return Live(mask, order, jnp.sum(mask, dtype=jnp.int32))

    @staticmethod
    def all(rows: int) -> Live:
        """Every row exists."""
        return Live(jnp.ones(rows, bool), jnp.arange(rows, dtype=jnp.int32), jnp.int32(rows))


def map_rows(function: Callable[..., Any], live: Live, *rows: Any) -> Any:
    """Applies `function` to each live row alone and stacks the results; absent rows cost nothing and give zeros.

    Args:
        function: takes one array (or pytree) of leading size 1 per element of `rows`, returns the same.
        live: which rows exist. Its count must be a run-time value.
        rows: pytrees of arrays with leading size T.

    The trip count is a run-time value: XLA unrolls a loop of known length one, and the unrolled body may be fused
    with its surroundings and round differently.
    """
    total = live.mask.shape[0]

    def pick(index: Array) -> Any:
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, index, 1), rows)

    jitted = jax.jit(function)
    result = jax.eval_shape(lambda: jitted(*pick(jnp.int32(0))))
    buffers = jax.tree.map(lambda s: jnp.zeros((total, *s.shape[1:]), s.dtype), result)

    def body(step: Array, out: Any) -> Any:
        index = live.order[step]
        values = jitted(*pick(index))
        return jax.tree.map(lambda o, v: lax.dynamic_update_slice_in_dim(o, v, index, 0), out, values)

    return lax.fori_loop(0, live.count, body, buffers)
