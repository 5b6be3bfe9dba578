"""Triton kernels under the names and signatures of the operations in `ds4jax.ops`.

Each takes which rows exist (bool `[T]`), the row arguments, the shared ones, and `interpret`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds4jax.pallas import experts as _experts
from ds4jax.pallas import linear as _linear
from ds4jax.pallas import quantise as _quantise

KERNELS: dict[str, Callable[..., Any]] = {
    "quantise": _quantise.quantise,
    "linear": _linear.linear,
    "grouped_linear": _linear.grouped_linear,
    "routed_experts": _experts.routed_experts,
    "shared_expert": _experts.shared_expert,
}
