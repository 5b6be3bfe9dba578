"""Model files: opening, checking, loading in bounded memory, and what `ds4jax info` tells about them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from ds4jax.checkpoint_config import mtp_prefix, read_config
from ds4jax.checkpoint_drafts import draft_head_nbytes, read_draft_tokens, with_draft_head
from ds4jax.checkpoint_gguf import GGUF, TensorInfo, open_gguf
from ds4jax.checkpoint_memory import OUTSIDE_BYTES, WORKSPACE_BYTES, check_device, check_host
from ds4jax.checkpoint_table import ParamPath, Plan, Slot, make_plan
from ds4jax.checkpoint_upload import Progress, slab_bytes, upload
from ds4jax.config import ModelConfig
from ds4jax.errors import CheckpointError
from ds4jax.quants import FORMATS, packed_nbytes

__all__ = [
    "GGUF",
    "Census",
    "Description",
    "Fit",
    "Progress",
    "TensorInfo",
    "describe",
    "load_params",
    "mtp_prefix",
    "open_gguf",
    "read_config",
    "read_draft_tokens",
]

CARDS = (80, 96, 141)
"""Device memories, in GiB, for which `describe` tells what fits."""

CONTEXTS = (4096, 65536)
"""Context lengths for which `describe` tells what fits, besides the model's longest, which ends the list."""


@dataclasses.dataclass(frozen=True)
class Census:
    """What the files hold.

    by_type: GGML type -> (tensors, file bytes), largest first, of the tensors that are used. ignored: `file: tensor` ->
    why it is not needed. file_bytes: of all tensors. device_bytes: of the parameters.
    """

    by_type: dict[str, tuple[int, int]]
    ignored: dict[str, str]
    file_bytes: int
    device_bytes: int


@dataclasses.dataclass(frozen=True)
class Fit:
    """Memory left (negative: missing) on a card of `card` GiB with the cache of one sequence of `context` tokens."""

    card: int
    context: int
    cache_bytes: int
    left_bytes: int


@dataclasses.dataclass(frozen=True)
class Description:
    """Everything `ds4jax info` shows about a model."""

    name: str
    paths: tuple[Path, ...]
    config: ModelConfig
    census: Census
    fits: tuple[Fit, ...]


def load_params(
    main: GGUF,
    mtp: GGUF | None,
    config: ModelConfig,
    *,
    progress: Progress | None = None,
    device: jax.Device | None = None,
    cache_bytes: int = 0,
    draft_tokens: Int[np.ndarray, " n"] | None = None,
) -> tuple[dict[str, Any], Census]:
    """Parameters of the model on a device, and the census of its files.

    Memory stays bounded: tensors are mapped, uploaded and rearranged a slab at a time. `cache_bytes` is what the caller
    will allocate beside the weights. With `draft_tokens` the MTP block, which there must be, gets a head of its own
    (`with_draft_head`). Raises CheckpointError if the files are not this model, and CapacityError, before anything is
    read, if weights and cache do not fit.
    """
    device = device or jax.local_devices()[0]
    plan = make_plan(main, mtp, config)
    census = _census(main, mtp, plan, draft_tokens)
    slabs = min(slab_bytes(), census.file_bytes)
    check_device(device, census.device_bytes, max(cache_bytes, slabs))
    if device.platform != "cpu":
        check_host(3 * slabs)  # small tensors with their temporaries, and copies that CUDA transfers from
    for tensor, slot in plan.assigned:
        if slot.kind == "ids":
            _check_ids(tensor, config.n_routed_experts)
    params: dict[str, Any] = {}
    for path, leaf in upload(plan.assigned, device, progress):
        _set(params, path, leaf)
    for path, source in plan.shared.items():
        _set(params, path, _get(params, source))
    return params if draft_tokens is None else with_draft_head(params, draft_tokens), census


def describe(
    main: GGUF,
    mtp: GGUF | None = None,
    cache_nbytes: Callable[[ModelConfig, int], int] | None = None,
    draft_tokens: Int[np.ndarray, " n"] | None = None,
) -> Description:
    """Sizes, schedule and census of a model, and what fits on which card.

    `cache_nbytes(config, context)` gives the cache of one sequence; without it there are no `fits`. `draft_tokens` are
    as for `load_params`. Raises CheckpointError if the files are not a model that can be loaded.
    """
    config = read_config(main, mtp)
    census = _census(main, mtp, make_plan(main, mtp, config), draft_tokens)
    fits = []
    longest = config.max_position_embeddings
    for context in (*(length for length in CONTEXTS if length < longest), longest) if cache_nbytes is not None else ():
        assert cache_nbytes is not None
        cache = cache_nbytes(config, context)
        left = [(card << 30) - WORKSPACE_BYTES - OUTSIDE_BYTES - census.device_bytes - cache for card in CARDS]
        fits += [Fit(card, context, cache, rest) for card, rest in zip(CARDS, left, strict=True)]
    name = str(main.metadata.get("general.name", main))
    paths = main.paths + (mtp.paths if mtp is not None else ())
    return Description(name, paths, config, census, tuple(fits))


def _census(main: GGUF, mtp: GGUF | None, plan: Plan, draft_tokens: Int[np.ndarray, " n"] | None) -> Census:
    counts: dict[str, tuple[int, int]] = {}
    for tensor, _ in plan.assigned:
        number, size = counts.get(tensor.format, (0, 0))
        counts[tensor.format] = number + 1, size + tensor.nbytes
    by_type = dict(sorted(counts.items(), key=lambda item: -item[1][1]))
    file_bytes = main.nbytes + (mtp.nbytes if mtp is not None else 0)
    device_bytes = sum(_device_nbytes(*pair) for pair in plan.assigned)
    if draft_tokens is not None:
        (head,) = (pair for pair in plan.assigned if pair[1].paths == (("head",),))
        device_bytes += draft_head_nbytes(_device_nbytes(*head), head[0].shape[0], len(draft_tokens))
    return Census(by_type, plan.ignored, file_bytes, device_bytes)


def _device_nbytes(tensor: TensorInfo, slot: Slot) -> int:
    if tensor.format in FORMATS:
        return packed_nbytes(tensor.format, tensor.shape)
    return math.prod(tensor.shape) * 4 if slot.kind == "vector" else tensor.nbytes


def _check_ids(tensor: TensorInfo, experts: int) -> None:
    ids = tensor.data.view(np.int32)
    if ids.min() < 0 or ids.max() >= experts:
        raise CheckpointError(
            f"{tensor.path.name}: {tensor.name}: expected expert ids from 0 to {experts - 1}, "
            f"file has {ids.min()} to {ids.max()}; the file is damaged: download or convert it again"
        )


def _set(params: dict[str, Any], path: ParamPath, leaf: Any) -> None:
    for name in path[:-1]:
        params = params.setdefault(name, {})
    params[path[-1]] = leaf


def _get(params: dict[str, Any], path: ParamPath) -> Any:
    return functools.reduce(lambda node, name: node[name], path, params)
