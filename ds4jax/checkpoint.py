"""Model files: opening, checking, loading in bounded memory, and what `ds4jax info` tells about them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.checkpoint_config import mtp_prefix, read_config
from ds4jax.checkpoint_gguf import GGUF, TensorInfo, open_gguf
from ds4jax.checkpoint_memory import check_device, check_host
from ds4jax.checkpoint_table import ParamPath, Plan, Slot, make_plan
from ds4jax.config import ModelConfig
from ds4jax.errors import CheckpointError
from ds4jax.quants import FORMATS, QTensor, pack, packed_nbytes

__all__ = [
    "GGUF",
    "Census",
    "Description",
    "Fit",
    "TensorInfo",
    "describe",
    "load_params",
    "mtp_prefix",
    "open_gguf",
    "read_config",
]

Progress = Callable[[int, int, str], None]
"""Called with file bytes done, file bytes in all, and the name of the tensor just loaded."""

SLAB_BYTES = 8 << 20
"""Tensors are read and packed in slabs of about this many file bytes."""

WORKERS = 8
"""Slabs that are packed at the same time, each in its own thread; then they are uploaded."""

HOST_BYTES = 8 * WORKERS * SLAB_BYTES
"""Host memory that loading needs besides the page cache: slabs, their planes and temporaries."""

CARDS = (80, 96, 141)
"""Device memories, in GiB, for which `describe` tells what fits."""

CONTEXTS = (4096, 65536)
"""Context lengths for which `describe` tells what fits, besides the model's longest, which ends the list."""

RESERVED_BYTES = 2 << 30
"""Device memory that `describe` sets aside for the runtime, programs and temporaries."""


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
) -> tuple[dict[str, Any], Census]:
    """Parameters of the model on a device, and the census of its files.

    Host memory stays bounded: tensors are mapped, packed and uploaded a slab at a time. `cache_bytes` is what the
    caller will allocate beside the weights. Raises CheckpointError if the files are not this model, and CapacityError,
    before anything is read, if weights and cache do not fit.
    """
    device = device or jax.local_devices()[0]
    plan = make_plan(main, mtp, config)
    census = _census(main, mtp, plan)
    check_device(device, census.device_bytes, cache_bytes)
    if device.platform != "cpu":
        check_host(HOST_BYTES)
    params: dict[str, Any] = {}
    total, done = sum(tensor.nbytes for tensor, _ in plan.assigned), 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for tensor, slot in plan.assigned:
            if slot.kind == "ids":
                _check_ids(tensor, config.n_routed_experts)
            report = functools.partial(_report, progress, tensor.name, done, total)
            for path, leaf in zip(slot.paths, _load(tensor, slot, device, pool, report), strict=True):
                _set(params, path, leaf)
            done += tensor.nbytes
    for path, source in plan.shared.items():
        _set(params, path, _get(params, source))
    return params, census


def _report(progress: Progress | None, name: str, before: int, total: int, size: int) -> None:
    if progress is not None:
        progress(before + size, total, name)


def describe(
    main: GGUF, mtp: GGUF | None = None, cache_nbytes: Callable[[ModelConfig, int], int] | None = None
) -> Description:
    """Sizes, schedule and census of a model, and what fits on which card.

    `cache_nbytes(config, context)` gives the cache of one sequence; without it there are no `fits`. Raises
    CheckpointError if the files are not a model that can be loaded.
    """
    config = read_config(main, mtp)
    census = _census(main, mtp, make_plan(main, mtp, config))
    fits = []
    longest = config.max_position_embeddings
    for context in (*(length for length in CONTEXTS if length < longest), longest) if cache_nbytes is not None else ():
        assert cache_nbytes is not None
        cache = cache_nbytes(config, context)
        left = [(card << 30) - RESERVED_BYTES - census.device_bytes - cache for card in CARDS]
        fits += [Fit(card, context, cache, rest) for card, rest in zip(CARDS, left, strict=True)]
    name = str(main.metadata.get("general.name", main))
    paths = main.paths + (mtp.paths if mtp is not None else ())
    return Description(name, paths, config, census, tuple(fits))


def _census(main: GGUF, mtp: GGUF | None, plan: Plan) -> Census:
    counts: dict[str, tuple[int, int]] = {}
    for tensor, _ in plan.assigned:
        number, size = counts.get(tensor.format, (0, 0))
        counts[tensor.format] = number + 1, size + tensor.nbytes
    by_type = dict(sorted(counts.items(), key=lambda item: -item[1][1]))
    file_bytes = main.nbytes + (mtp.nbytes if mtp is not None else 0)
    return Census(by_type, plan.ignored, file_bytes, sum(_device_nbytes(*pair) for pair in plan.assigned))


def _device_nbytes(tensor: TensorInfo, slot: Slot) -> int:
    if tensor.format in FORMATS:
        return packed_nbytes(tensor.format, tensor.shape)
    return math.prod(tensor.shape) * 4 if slot.kind == "vector" else tensor.nbytes


_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I32": np.int32}


def _load(
    tensor: TensorInfo, slot: Slot, device: jax.Device, pool: ThreadPoolExecutor, report: Callable[[int], None]
) -> list[Any]:
    """Device values of a tensor, one for each path of its slot."""
    rows = tensor.shape[0]
    raw = tensor.data.reshape(*tensor.shape[:-1], -1)
    step = max(1, rows * SLAB_BYTES // tensor.nbytes)
    starts = range(0, rows, step)
    if len(starts) == 1:
        whole = jax.block_until_ready(jax.device_put(_host_planes(tensor, slot, raw), device))
        report(tensor.nbytes)
    else:
        whole = None
        for first in range(0, len(starts), WORKERS):
            group = starts[first : first + WORKERS]
            parts = pool.map(lambda start: _host_planes(tensor, slot, raw[start : start + step]), group)
            for start, part in zip(group, parts, strict=True):
                if whole is None:
                    whole = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype, device=device), part)
                whole = _write(whole, jax.device_put(part, device), jnp.int32(start))
            jax.block_until_ready(whole)  # now the host copies of these slabs may go
            report(min(group[-1] + step, rows) * (tensor.nbytes // rows))
    if tensor.format not in FORMATS:
        return whole
    shape = (*tensor.shape[:-1], tensor.shape[-1] // len(slot.paths))
    return [QTensor(planes, tensor.format, shape) for planes in whole]


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: Any, part: Any, start: jax.Array) -> Any:
    """Overwrites rows of all planes in place."""
    return jax.tree.map(lambda x, rows: jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0), whole, part)


def _host_planes(tensor: TensorInfo, slot: Slot, raw: np.ndarray) -> list[Any]:
    """Planes, or an array, of some rows, u8 [rows, ..., row bytes], for each path of the slot."""
    columns, width = tensor.shape[-1] // len(slot.paths), raw.shape[-1] // len(slot.paths)
    parts = [raw[..., start : start + width] for start in range(0, raw.shape[-1], width)]
    if tensor.format in FORMATS:
        return [pack(tensor.format, part, (*part.shape[:-1], columns)).planes for part in parts]
    values = [part.copy(order="C").view(_DTYPES[tensor.format]) for part in parts]
    return [value.astype(np.float32) for value in values] if slot.kind == "vector" else values


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
