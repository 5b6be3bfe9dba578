"""One row at a time: how the XLA path makes a row's result independent of the rows beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool


def map_rows(function: Callable[..., Any], live: Bool[Array, " T"], *rows: Any) -> Any:
    """Applies `function` to each live row alone and stacks the results; absent rows cost nothing and give zeros.

    Args:
        function: takes one array (or pytree) of leading size 1 per element of `rows`, returns the same.
        live: which rows exist.
        rows: pytrees of arrays with leading size T.

    The trip count is a run-time value: XLA unrolls a loop of known length one, and the unrolled body may be fused
    with its surroundings and round differently.
    """
    total = live.shape[0]
    order = jnp.nonzero(live, size=total, fill_value=0)[0].astype(jnp.int32)

    def pick(index: Array) -> Any:
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, index, 1), rows)

    jitted = jax.jit(function)
    result = jax.eval_shape(lambda: jitted(*pick(jnp.int32(0))))
    buffers = jax.tree.map(lambda s: jnp.zeros((total, *s.shape[1:]), s.dtype), result)

    def body(step: Array, out: Any) -> Any:
        index = order[step]
        values = jitted(*pick(index))
        return jax.tree.map(lambda o, v: lax.dynamic_update_slice_in_dim(o, v, index, 0), out, values)

    return lax.fori_loop(0, jnp.sum(live, dtype=jnp.int32), body, buffers)
