"""Tensors of mapped files, on a device: threads read and upload slabs, and the device itself rearranges them.

So the host moves nothing but the file's bytes, and the device needs little more than the parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.checkpoint_gguf import TensorInfo
from ds4jax.checkpoint_table import ParamPath, Slot
from ds4jax.quants import FORMATS, QTensor, block_size, pack
from ds4jax.quants_layouts import values_of

Progress = Callable[[int, int, str], None]
"""Called with file bytes done, file bytes in all, and the name of the tensor that they belong to."""

SLAB_BYTES = 16 << 20
"""Larger tensors are read, uploaded and rearranged in slabs of about this many file bytes."""

WORKERS = 8
"""Threads that read and upload."""

_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I32": np.int32}

Item = TypeVar("Item")
Result = TypeVar("Result")


def slab_bytes() -> int:
    """Memory of slabs at the same time, on the host and on the device: under way, waiting, and being rearranged."""
    return (2 * WORKERS + 2) * SLAB_BYTES


@dataclasses.dataclass(frozen=True)
class Slab:
    """Some rows of a tensor from `start`.

    raw: their bytes, u8 [rows, ..., row bytes]; of a vector u8 [bytes]. done: bytes of the tensor up to their end.
    """

    tensor: TensorInfo
    slot: Slot
    start: int
    raw: np.ndarray
    done: int

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows."""
        return self.raw.size == self.tensor.nbytes


def slabs_of(tensor: TensorInfo, slot: Slot) -> Iterator[Slab]:
    """The slabs of a tensor, all of one size: the last overlaps the one before, which saves a program of its own."""
    raw = tensor.data.reshape(*tensor.shape[:-1], -1)
    rows = len(raw)
    size = min(rows, max(1, rows * SLAB_BYTES // tensor.nbytes))
    for first in range(0, rows, size):
        start = min(first, rows - size)
        yield Slab(tensor, slot, start, raw[start : start + size], tensor.nbytes // rows * (start + size))


def jobs_of(assigned: Iterable[tuple[TensorInfo, Slot]]) -> Iterator[list[Slab]]:
    """All slabs in file order, those of small tensors together: about SLAB_BYTES at a time."""
    job: list[Slab] = []
    size = 0
    for slab in (slab for tensor, slot in assigned for slab in slabs_of(tensor, slot)):
        if job and size + slab.raw.size > SLAB_BYTES:
            yield job
            job, size = [], 0
        job.append(slab)
        size += slab.raw.size
    yield job


def upload(
    assigned: Sequence[tuple[TensorInfo, Slot]], device: jax.Device, progress: Progress | None = None
) -> Iterator[tuple[ParamPath, Any]]:
    """Parameters on a device, in file order, with their paths."""
    before, total = 0, sum(tensor.nbytes for tensor, _ in assigned)
    whole: Any = None
    with ThreadPoolExecutor(WORKERS) as pool:
        for slab, part in in_order(pool, lambda job: zip(job, fetch(job, device), strict=True), jobs_of(assigned)):
            if not slab.is_whole:
                whole = empty(slab, device) if slab.start == 0 else whole
                # Waiting lets the slab's bytes go before more are uploaded; the other threads do not wait.
                part = whole = jax.block_until_ready(place(whole, part, slab))
            if progress is not None:
                progress(before + slab.done, total, slab.tensor.name)
            if slab.done == slab.tensor.nbytes:
                before += slab.done
                yield from zip(slab.slot.paths, _leaves(part, slab.tensor, slab.slot), strict=True)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Iterable[Result]], items: Iterable[Item]
) -> Iterator[Result]:
    """The results for all items, in order; twice as many items as there are threads are under way or wait."""
    waiting: deque[Future[Iterable[Result]]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == 2 * WORKERS:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def fetch(job: Sequence[Slab], device: jax.Device) -> list[Any]:
    """On a device, of every slab: its bytes, or of a small tensor the values, which takes no program of its own."""
    for slab in job:
        read(slab)
    return jax.block_until_ready(jax.device_put([_values(s.raw, s) if s.is_whole else s.raw for s in job], device))


def read(slab: Slab) -> None:
    """Brings the bytes of a slab into memory and maps them, by touching every page."""
    slab.raw.reshape(-1)[:: mmap.PAGESIZE].max()


def empty(slab: Slab, device: jax.Device) -> Any:
    """Room for all rows of the slab's tensor, in the form of `place`."""
    shape = (slab.tensor.shape[0], *slab.raw.shape[1:])
    values = jax.eval_shape(lambda raw: _values(raw, slab), jax.ShapeDtypeStruct(shape, np.uint8))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=device), values)


def place(whole: Any, raw: jax.Array, slab: Slab) -> Any:
    """Rearranges a slab's bytes on their device and writes them into the whole tensor, in place."""
    slot = slab.slot
    return _place(whole, raw, np.int32(slab.start), slab.tensor.format, slot.kind == "vector", len(slot.paths))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _place(whole: Any, raw: jax.Array, start: Any, format: str, to_f32: bool, parts: int) -> Any:
    values = _rearranged(raw, format, to_f32, parts)
    return jax.tree.map(lambda x, rows: jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0), whole, values)


def _values(raw: Any, slab: Slab) -> list[Any]:
    return _rearranged(raw, slab.tensor.format, slab.slot.kind == "vector", len(slab.slot.paths))


def _rearranged(raw: Any, format: str, to_f32: bool, parts: int) -> list[Any]:
    """Planes, or an array, for each part of the columns of some rows, u8 [rows, ..., row bytes]."""
    width = raw.shape[-1] // parts
    pieces = [raw[..., start : start + width] for start in range(0, raw.shape[-1], width)]
    if format in FORMATS:
        values, size = block_size(format)
        return [pack(format, piece, (*piece.shape[:-1], width // size * values)).planes for piece in pieces]
    arrays = [values_of(piece, _DTYPES[format]) for piece in pieces]
    return [array.astype(np.float32) for array in arrays] if to_f32 else arrays


def _leaves(values: list[Any], tensor: TensorInfo, slot: Slot) -> list[Any]:
    if tensor.format not in FORMATS:
        return values
    shape = (*tensor.shape[:-1], tensor.shape[-1] // len(slot.paths))
    return [QTensor(planes, tensor.format, shape) for planes in values]
