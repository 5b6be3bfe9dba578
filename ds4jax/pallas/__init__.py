"""Triton kernels under the names and signatures of the operations in `ds4jax.ops`.

Each takes which rows exist (bool `[T]`), the row arguments, the shared ones, and `interpret`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ds4jax.pallas import attention as _attention
from ds4jax.pallas import compress as _compress
from ds4jax.pallas import embed as _embed
from ds4jax.pallas import experts as _experts
from ds4jax.pallas import hyper as _hyper
from ds4jax.pallas import indexer as _indexer
from ds4jax.pallas import linear as _linear
from ds4jax.pallas import norm as _norm
from ds4jax.pallas import quantise as _quantise
from ds4jax.pallas import rope as _rope
from ds4jax.pallas import router as _router
from ds4jax.pallas import streams as _streams
from ds4jax.pallas.formats import FORMATS
from ds4jax.quants import QTensor


def reads(weights: tuple[Any, ...]) -> bool:
    """Whether the kernels read the formats of all quantised weights among some arguments."""
    leaves = jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, QTensor))
    return all(w.format in FORMATS for w in leaves if isinstance(w, QTensor))


KERNELS: dict[str, Callable[..., Any]] = {
    "embed": _embed.embed,
    "rope_table": _embed.rope_table,
    "norm": _norm.norm,
    "quantise": _quantise.quantise,
    "linear": _linear.linear,
    "linear_store": _linear.linear_store,
    "grouped_linear": _linear.grouped_linear,
    "experts": _experts.experts,
    "q_norm_rope": _rope.q_norm_rope,
    "kv_store": _rope.kv_store,
    "hyper_enter": _hyper.hyper_enter,
    "hyper_post": _streams.hyper_post,
    "hyper_leave": _hyper.hyper_leave,
    "router": _router.route,
    "compress_store": _compress.compress_store,
    "indexer": _indexer.indexer,
    "attention": _attention.attention,
}
