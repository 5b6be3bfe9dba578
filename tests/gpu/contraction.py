"""What the comparison of fused and two-step rotation is for: a contracted multiply-add would show in it."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.bench.cases_glue import GLUE
from ds4jax.ops.norm import rms_norm
from ds4jax.ops.rope import rotate
from ds4jax.pallas import rope
from ds4jax.pallas.ptx import asm


def contracted_turn(x, partner, cos, sin):
    """`rope.turn` with one rounding less."""
    return asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", (partner, sin, x * cos), jnp.float32)


def differences(rows: int = 3) -> tuple[int, int]:
    """Elements in which the fused kernel, and its contracted variant, differ from norm to memory and then rotation."""
    case = GLUE["q_norm_rope"]
    q, cos, sin = case.rows(jax.random.key(0), rows)
    live = jnp.ones(rows, bool)

    def fused(q, cos, sin):
        return rope.q_norm_rope(live, q, cos, sin, interpret=False, **case.settings)

    def contracted(q, cos, sin):
        with mock.patch.object(rope, "turn", contracted_turn):
            return fused(q, cos, sin)

    normed = jax.block_until_ready(jax.jit(rms_norm, static_argnums=(1, 2))(q, None, case.settings["eps"]))
    two_steps = np.asarray(jax.jit(rotate)(normed, cos, sin))
    return tuple(int((np.asarray(jax.jit(f)(q, cos, sin)) != two_steps).sum()) for f in (fused, contracted))
