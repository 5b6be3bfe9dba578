"""Time of loading a model from a file, and of the parts of it by themselves."""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
import math
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from ds4jax import checkpoint_upload
from ds4jax.bench.synthetic import FLASH, LAYERS, flash, format_of
from ds4jax.checkpoint import load_params, open_gguf, read_config
from ds4jax.checkpoint_table import Slot, make_plan, trunk_slots
from ds4jax.checkpoint_upload import Slab, empty, fetch, in_order, jobs_of, place, read
from ds4jax.checkpoint_write import add_metadata, metadata_of
from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError
from ds4jax.quants import QTensor, block_size, pack, unpack

POOL_BYTES = 16 << 20  # random bytes of a type, which its tensors repeat
REPEATS = 8
FULL_BYTES = 81 << 30
"""The full model's file."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of loading.

    stage: by themselves "read" (touching every page), "upload" (bytes to the device) and "repack" (bytes that are there
        to planes, an estimate from one slab of each kind); overlapped "load, compiling" and, once more, "load".
    nbytes: of the file. resident: share of the file that was in memory before.
    """

    stage: str
    nbytes: int
    seconds: float
    resident: float

    @property
    def gbps(self) -> float:
        """File bytes per nanosecond."""
        return self.nbytes / self.seconds / 1e9


def sized(gib: float) -> ModelConfig:
    """Flash with so many layers, and in the smallest case so many experts, that its file has at most `gib` GiB.

    Raises:
        ConfigError: not even four layers with eight experts do.
    """

    def with_experts(count: int) -> ModelConfig:
        return dataclasses.replace(flash(4), n_routed_experts=count)

    def largest(counts: range, make: Callable[[int], ModelConfig]) -> ModelConfig | None:
        fitting = bisect.bisect_right(counts, gib * 2**30, key=lambda count: file_nbytes(make(count)))
        return make(counts[fitting - 1]) if fitting else None

    config = largest(range(4, LAYERS + 1), flash) or largest(range(8, FLASH.n_routed_experts, 8), with_experts)
    if config is None:
        raise ConfigError(f"--gib {gib:g}: expected at least {math.ceil(file_nbytes(with_experts(8)) / 2**30)}")
    return config


def file_nbytes(config: ModelConfig) -> int:
    """Bytes of all tensors of `write_model`'s file."""
    return sum(math.prod(_bytes_shape(slot)) for slot in trunk_slots(config))


def write_model(path: Path, config: ModelConfig) -> None:
    """A file with the tensors and types of the real one: random blocks with finite scales, which repeat."""
    writer = GGUFWriter(path, "deepseek4")
    add_metadata(writer, {"general.name": "random weights"} | metadata_of(config))
    slots = list(trunk_slots(config))
    for slot in slots:
        shape, kind = _bytes_shape(slot), GGMLQuantizationType[_type(slot)]
        writer.add_tensor_info(slot.name, shape, np.dtype(np.uint8), math.prod(shape), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    pools = {kind: _pool(kind, rng, config.n_routed_experts) for kind in {_type(slot) for slot in slots}}
    for slot in slots:
        writer.write_tensor_data(np.resize(pools[_type(slot)], math.prod(_bytes_shape(slot))))
    writer.close()


def measure(path: Path, device: jax.Device, cold: bool) -> Iterator[Stage]:
    """Stages of loading a file; `cold` has the kernel forget it before each that reads it, else all of it is read."""
    file = open_gguf(path)
    config, nbytes = read_config(file), file.nbytes
    del file  # a mapped file cannot be forgotten

    def jobs() -> Iterator[list[Slab]]:
        return jobs_of(make_plan(open_gguf(path), None, config).assigned)

    def timed(stage: str, run: Callable[[], Any], cold: bool = cold) -> Stage:
        (forget if cold else warm)(path)
        share = resident(path)
        began = time.perf_counter()
        run()
        return Stage(stage, nbytes, time.perf_counter() - began, share)

    def in_threads(function: Callable[[list[Slab]], Any]) -> None:
        with ThreadPoolExecutor(checkpoint_upload.WORKERS) as pool:
            for _ in in_order(pool, lambda job: [function(job)], jobs()):
                pass

    def touch(job: list[Slab]) -> None:
        for slab in job:
            read(slab)

    def put(job: list[Slab]) -> None:
        jax.block_until_ready(jax.device_put([slab.raw for slab in job], device))

    def load() -> None:
        jax.block_until_ready(load_params(open_gguf(path), None, config, device=device)[0])

    yield timed("read", lambda: in_threads(touch))
    if device.platform != "cpu":  # whose memory is the host's
        yield timed("upload", lambda: in_threads(put), cold=False)
    yield from _repack(jobs(), device)
    yield timed("load, compiling", load)
    yield timed("load", load)


def _repack(jobs: Iterable[list[Slab]], device: jax.Device) -> Iterator[Stage]:
    """The device's part, measured on one slab of each kind; nothing if there are none."""
    slabs = [slab for job in jobs for slab in job if not slab.is_whole]
    counts = Counter((slab.tensor.format, slab.tensor.shape) for slab in slabs)
    seconds, nbytes = 0.0, 0
    for kind, slab in {(slab.tensor.format, slab.tensor.shape): slab for slab in slabs}.items():
        (raw,) = fetch([slab], device)
        whole = jax.block_until_ready(place(empty(slab, device), raw, slab))  # compiles
        began = time.perf_counter()
        for _ in range(REPEATS):
            whole = jax.block_until_ready(place(whole, raw, slab))
        seconds += (time.perf_counter() - began) / REPEATS * counts[kind]
        nbytes += slab.raw.size * counts[kind]
    if slabs:
        yield Stage("repack", nbytes, seconds, 1.0)


def resident(path: Path) -> float:
    """Share of a file's pages that are in memory, as `mincore` tells."""
    data = np.memmap(path, np.uint8, "r")
    pages = np.zeros(-(-data.size // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    where, found = ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(pages.ctypes.data)
    if libc.mincore(where, ctypes.c_size_t(data.size), found):
        raise OSError(ctypes.get_errno(), "mincore")
    return float((pages & 1).mean())


def forget(path: Path) -> None:
    """Asks the kernel to drop a file from memory; a file in /dev/shm has no other place."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: Path) -> None:
    """Reads a file, so that it is in memory if there is room."""
    np.memmap(path, np.uint8, "r")[:: mmap.PAGESIZE].max()


def _type(slot: Slot) -> str:
    """Type of a tensor in the real file."""
    return {"vector": "F32", "ids": "I32"}.get(slot.kind) or format_of(slot)


def _bytes_shape(slot: Slot) -> tuple[int, ...]:
    """Shape with the last axis in bytes."""
    values, size = block_size(_type(slot))
    return (*slot.shape[:-1], slot.shape[-1] // values * size)


def _pool(kind: str, rng: np.random.Generator, experts: int) -> np.ndarray:
    """Bytes of random values of a type: norms and scales near one, matrices and the scales of blocks small."""
    values, size = block_size(kind)
    count = POOL_BYTES // size
    if kind == "F32":
        return rng.uniform(0.9, 1.1, count).astype(np.float32).view(np.uint8)
    if kind == "F16":
        return (0.02 * rng.standard_normal(count)).astype(np.float16).view(np.uint8)
    if kind == "I32":
        return rng.integers(0, experts, count, np.int32).view(np.uint8)
    blocks = pack(kind, rng.integers(0, 256, (1, count * size), np.uint8), (1, count * values))
    scales = {name: blocks.planes[name] for name in ("d", "dmin") if name in blocks.planes}
    small = {name: rng.uniform(0.001, 0.01, plane.shape).astype(np.float16) for name, plane in scales.items()}
    return unpack(QTensor(blocks.planes | small, kind, blocks.shape))[0]
