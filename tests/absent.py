"""What absent rows may hold."""

import jax
import jax.numpy as jnp


def spoiled(row_args, live):
    """Row arguments whose absent rows are full of what no index may be made of."""

    def spoil(leaf):
        bad = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 1 << 20
        return jnp.where(live.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.asarray(bad, leaf.dtype))

    return jax.tree.map(spoil, row_args)
