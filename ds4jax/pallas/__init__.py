"""Triton kernels under the names and signatures of the operations in `ds4jax.ops`.

Each takes which rows exist (bool `[T]`), the row arguments, the shared ones, and `interpret`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds4jax.pallas import attention as _attention
from ds4jax.pallas import compress as _compress
from ds4jax.pallas import indexer as _indexer
from ds4jax.pallas import linear as _linear
from ds4jax.pallas import quantise as _quantise
from ds4jax.pallas import store as _store

KERNELS: dict[str, Callable[..., Any]] = {
    "quantise": _quantise.quantise,
    "linear": _linear.linear,
    "grouped_linear": _linear.grouped_linear,
    "store": _store.store_rows,
    "compress": _compress.compress,
    "indexer": _indexer.indexer,
    "attention": _attention.attention,
}
