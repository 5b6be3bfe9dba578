"""The switchboard: every operation of the model by name, carried out by the implementation that `Numerics` demands.

An operation has two: the reference in plain XLA, defined in the modules of this package, and the kernel of the same
name in `ds4jax.pallas`, which may also be interpreted. Where the order of all sums is defined (`ops.sums`) they agree
bit for bit. Operations take arrays over T rows and `live`, which of them exist; results of absent rows are unspecified.
Those that write a cache do so in place where it is donated. Each is traced once per shape, whatever the number of
layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from ds4jax import pallas
from ds4jax.config import Numerics
from ds4jax.ops import attention as _attention
from ds4jax.ops import hyper as _hyper
from ds4jax.ops import linear as _linear
from ds4jax.ops import moe as _moe
from ds4jax.ops import norm as _norm
from ds4jax.ops import quantise as _quantise
from ds4jax.ops import rope as _rope
from ds4jax.ops import store as _store
from ds4jax.ops.rows import Live, map_rows

_REFERENCE: dict[str, Callable[..., Any]] = {
    "embed": _linear.embed,
    "norm": _norm.norm,
    "quantise": _quantise.quantise,
    "linear": _linear.linear,
    "grouped_linear": _linear.grouped_linear,
    "rope_table": _rope.rope_table,
    "q_norm_rope": _rope.q_norm_rope,
    "hyper_enter": _hyper.hyper_enter,
    "hyper_post": _hyper.hyper_post,
    "hyper_leave": _hyper.hyper_leave,
    "router": _moe.route,
    "experts": _moe.experts,
    "indexer": _attention.indexer,
    "attention": _attention.attention,
}

WRITERS: dict[str, Callable[..., Any]] = {
    "linear_store": _store.linear_store,
    "kv_store": _store.kv_store,
    "compress_store": _store.compress_store,
}
"""References of those that write rows into a cache: into their last shared argument, which their result ends with."""


def _reference(name: str, num: Numerics, live: Live, rows: Any, shared: Any, settings: dict[str, Any]) -> Any:
    def each(function: Callable[..., Any], *rows: Any) -> Any:
        return map_rows(function, live, *rows) if num.rows == "loop" else function(*rows)

    if name in WRITERS:
        return WRITERS[name](live, each, *rows, *shared, **settings)
    return each(lambda *rows: _REFERENCE[name](*rows, *shared, **settings), *rows)


def implementation(num: Numerics, name: str) -> str:
    """What carries out an operation here: "xla", "pallas" or "interpret"."""
    chosen = num.implementation(name)
    if chosen == "auto":
        return "pallas" if jax.default_backend() == "gpu" else "xla"
    return chosen


def _choose(num: Numerics, name: str, shared: tuple[Any, ...]) -> str:
    """`implementation`, but "auto" leaves weights in formats that no kernel reads to the reference."""
    readable = num.implementation(name) != "auto" or pallas.reads(shared)
    return implementation(num, name) if readable else "xla"


def absent_rows_are_free(num: Numerics) -> bool:
    """Whether projections cost only the rows that exist: where they are taken one by one.

    A kernel computes those that share a program with one that exists.
    """
    return num.rows == "loop" and implementation(num, "linear") == "xla"


@functools.partial(jax.jit, static_argnames=("name", "num", "settings"))
def _run(name: str, num: Numerics, settings: tuple[tuple[str, Any], ...], live: Live, rows: Any, shared: Any) -> Any:
    chosen = _choose(num, name, shared)
    if chosen == "xla":
        return _reference(name, num, live, rows, shared, dict(settings))
    # Kernels have one precision for float products: float32.
    wanted = {key: value for key, value in settings if key != "precision"}
    return pallas.KERNELS[name](live.mask, *rows, *shared, interpret=chosen == "interpret", **wanted)


def call(name: str, num: Numerics, live: Live, rows: tuple[Any, ...], shared: tuple[Any, ...], **settings: Any) -> Any:
    """Carries out operation `name`.

    Args:
        rows: arguments of the reference function with a leading row axis, in its order.
        shared: its remaining positional arguments: weights and caches.
        settings: its keyword arguments, static.

    Raises:
        ConfigError: a kernel is demanded that does not read the format of its weights.
    """
    return _run(name, num, tuple(sorted(settings.items())), live, rows, shared)
