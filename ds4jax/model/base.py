"""What all layers of the model share."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ds4jax import ops
from ds4jax.activation import Activation
from ds4jax.config import ModelConfig, Numerics
from ds4jax.ops.rows import Live

Table = tuple[Float[Array, "T r2"], Float[Array, "T r2"]]
"""Cosines and sines of the rotary angles of every row."""


class Layer(nn.Module):
    """What all layers share: sizes, numerics, and parameters that may be arrays or QTensors."""

    config: ModelConfig
    numerics: Numerics

    def weight(self, name: str, *shape: int, init: Any = None) -> Any:
        """A parameter as stored; float32, drawn by `init`, where the module is initialised instead of loaded."""
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        if init is None:
            init = (
                nn.initializers.ones
                if len(shape) == 1
                else nn.initializers.variance_scaling(1.0, "fan_in", "normal", -1, -2)
            )
        return self.param(name, init, shape, jnp.float32)

    def op(self, name: str, live: Live, rows: tuple[Any, ...], shared: tuple[Any, ...] = (), **settings: Any) -> Any:
        """`ops.call` with this module's numerics."""
        return ops.call(name, self.numerics, live, rows, shared, **settings)

    def quantised(self, x: Float[Array, "T *lead K"], live: Live) -> Activation:
        """Rows with their int8 codes where activations are quantised."""
        return self.op("quantise", live, (x,), act=self.numerics.act)

    def linear(self, a: Activation, w: Any, live: Live) -> Float[Array, "T N"]:
        """One projection."""
        return self.linears(a, (w,), live)[0]

    def linears(
        self, a: Activation, ws: tuple[Any, ...], live: Live, wanted: tuple[Bool[Array, " T"], ...] = ()
    ) -> tuple[Float[Array, "T N"], ...]:
        """Projections of the same rows; `wanted` as in `ops.linear.linear`."""
        return self.op("linear", live, (a, wanted), ws, precision=self.numerics.precision)

    def normed(self, x: Float[Array, "T D"], weight: Float[Array, " D"], live: Live) -> Activation:
        """Weighted RMS norm, ready for projections."""
        return self.op("norm", live, (x,), (weight,), eps=self.config.rms_norm_eps, act=self.numerics.act)
