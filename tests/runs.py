"""Runs a model over one sequence in pieces, the way every caller does: step, commit, step."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.config import ModelConfig, Numerics
from ds4jax.model.cache import Cache, commit, init_cache
from ds4jax.model.transformer import DeepSeekV4


@dataclasses.dataclass(frozen=True)
class Run:
    """Logits [T, V], streams [T, H, D] and the committed cache of one sequence.

    `seen[path]` holds what the method at a module path returned, of the last piece only: `layers_3/moe/route`.
    """

    logits: np.ndarray
    streams: np.ndarray
    cache: Cache
    seen: dict[str, Any]


def chunks(total: int, sizes: tuple[int, ...]) -> list[int]:
    """Cuts `total` rows into pieces of the given sizes, repeated; the last piece is what is left."""
    pieces: list[int] = []
    while sum(pieces) < total:
        pieces.append(min(sizes[len(pieces) % len(sizes)], total - sum(pieces)))
    return pieces


def empty_cache(config: ModelConfig, numerics: Numerics, context: int, rows: int) -> Cache:
    """A cache bound to the device, as what a step returns is: otherwise the second step would compile once more."""
    return jax.device_put(init_cache(config, numerics, 1, context, rows), jax.local_devices()[0])


def _observed(module: Any, method: str) -> bool:
    return method in ("__call__", "enter", "route")


@functools.cache
def _step(config: ModelConfig, numerics: Numerics, observe: bool) -> Any:
    model = DeepSeekV4(config, numerics)
    extra = {"capture_intermediates": _observed, "mutable": ["intermediates"]} if observe else {}

    def step(params: Any, tokens: jax.Array, cache: Cache, count: jax.Array) -> Any:
        start = cache.length
        result = model.apply({"params": params}, tokens, cache, start, count, **extra)
        (streams, cache), seen = result if observe else (result, {})
        live = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] < count[:, None]
        logits = model.apply({"params": params}, streams, live, method="logits")
        return logits, streams, commit(cache, start + count), seen

    return jax.jit(step, compiler_options=numerics.compiler_options)


def run(
    config: ModelConfig,
    numerics: Numerics,
    params: Any,
    ids: np.ndarray,
    pieces: list[int],
    *,
    rows: int | None = None,
    context: int | None = None,
    observe: bool = False,
) -> Run:
    """Feeds `ids` in pieces, every call `rows` wide (by default the longest piece)."""
    rows = rows or max(pieces)
    cache = empty_cache(config, numerics, context or len(ids), rows)
    step, logits, streams, done, seen = _step(config, numerics, observe), [], [], 0, {}
    for piece in pieces:
        tokens = np.full((1, rows), -1, np.int32) % config.vocab_size
        tokens[0, :piece] = ids[done : done + piece]
        out, hidden, cache, seen = step(params, jnp.asarray(tokens), cache, jnp.asarray([piece], jnp.int32))
        logits.append(np.asarray(out)[0, :piece])
        streams.append(np.asarray(hidden)[0, :piece])
        done += piece
    return Run(np.concatenate(logits), np.concatenate(streams), cache, _paths(seen.get("intermediates", {})))


def _paths(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens captured results: every method of a module is called once per step."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _paths(value, f"{prefix}{name}/")
        else:
            assert len(value) == 1, f"{prefix}{name} was called {len(value)} times"
            flat[f"{prefix}{name}"] = value[0]
    return flat
