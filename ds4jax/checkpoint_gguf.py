"""GGUF files: header, metadata and memory-mapped tensors, with the parts of a split file joined.

`gguf.GGUFReader` keeps a NumPy view per string, which takes seconds for a vocabulary of 129k tokens; this reader takes
tenths of a second and says what is wrong with a damaged file. Format: GGUF versions 2 and 3, little endian.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ds4jax.errors import CheckpointError

_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")
_DOWNLOAD = "the download is incomplete or damaged; fetch the file again"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One stored tensor.

    format: GGML type name. shape: row-major, the reverse of the order in the file. data: its bytes, memory-mapped.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    data: np.ndarray
    path: Path

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.size

    def __str__(self) -> str:
        return f"{self.format} {list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class GGUF:
    """An opened GGUF file, or all parts of a split one: metadata of the first part, tensors of all."""

    paths: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """`general.architecture`, empty if absent."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __str__(self) -> str:
        return self.paths[0].name


def open_gguf(path: str | Path) -> GGUF:
    """Opens a GGUF file; of a split file (`-00001-of-0000N.gguf`) any part may be given.

    Raises CheckpointError if the file, or a part of it, is missing, damaged or not a GGUF.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return GGUF((path,), metadata, tensors)
    paths = _split_paths(path, count)
    joined: dict[str, TensorInfo] = {}
    first: dict[str, Any] = {}
    for number, part in enumerate(paths):
        metadata, tensors = _read(part)
        if (found := metadata.get("split.no")) != number or metadata.get("split.count") != count:
            raise CheckpointError(
                f"{part.name}: expected part {number + 1} of {count}, its metadata says "
                f"split.no = {found}, split.count = {metadata.get('split.count')}; {_DOWNLOAD}"
            )
        first = first or metadata
        if doubled := sorted(joined.keys() & tensors.keys()):
            raise CheckpointError(f"{part.name}: {doubled[0]} is in an earlier part too; {_DOWNLOAD}")
        joined |= tensors
    expected = first.get("split.tensors.count", len(joined))
    if expected != len(joined):
        raise CheckpointError(
            f"{paths[0].name}: expected {expected} tensors in {count} parts, found {len(joined)}; {_DOWNLOAD}"
        )
    return GGUF(tuple(paths), first, joined)


def listed(names: list[str], limit: int = 3) -> str:
    """The first few names of a list, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _split_paths(path: Path, count: int) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if not match or int(match["count"]) != count:
        raise CheckpointError(
            f"{path.name}: is one of {count} parts, but its name does not end in "
            f"-00001-of-{count:05d}.gguf, so the others cannot be found; restore the original names"
        )
    paths = [path.with_name(f"{match['stem']}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise CheckpointError(
            f"{path.name}: {len(missing)} of {count} parts missing beside it ({listed(missing)}); download them too"
        )
    return paths


def _read(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a GGUF file, found a directory; name a file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check its name and folder")
    if path.stat().st_size < 4:
        raise CheckpointError(f"{path.name}: expected a GGUF file, found {path.stat().st_size} bytes; {_DOWNLOAD}")
    try:
        cursor = _Cursor(path, np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
    magic = bytes(cursor.data[:4])
    if magic != b"GGUF":
        found, remedy = f"a file starting with {magic!r}", "name a model in GGUF format, or convert this one"
        if magic == b"vers":
            found, remedy = "a Git LFS pointer", "use `git lfs pull`"
        raise CheckpointError(f"{path.name}: expected a GGUF file, found {found}; {remedy}")
    cursor.offset = 4
    version = cursor.scalar("<I")
    if version not in (2, 3):
        kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise CheckpointError(
            f"{path.name}: expected little-endian GGUF version 2 or 3, found {kind}; convert it again"
        )
    tensor_count, key_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    headers = [cursor.tensor_header() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(
            f"{path.name}: general.alignment = {alignment!r}, expected a positive number; {_DOWNLOAD}"
        )
    start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, type_id, offset in headers:
        if name in tensors:
            raise CheckpointError(f"{path.name}: tensor {name} appears twice; {_DOWNLOAD}")
        tensors[name] = _tensor(cursor, name, shape, type_id, start + offset)
    return metadata, tensors


def _tensor(cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: int, start: int) -> TensorInfo:
    try:
        ggml_type = gguf.GGMLQuantizationType(type_id)
    except ValueError:
        raise CheckpointError(
            f"{cursor.path.name}: {name} has GGML type {type_id}, which is not known; "
            "get another quantisation, or the file again if it may be damaged"
        ) from None
    values, size = gguf.GGML_QUANT_SIZES[ggml_type]
    row = shape[-1] if shape else 1
    if row % values:
        raise CheckpointError(
            f"{cursor.path.name}: {name}: {ggml_type.name} rows need a multiple of {values} values, "
            f"file has {list(shape)}; {_DOWNLOAD}"
        )
    end = start + math.prod(shape) // values * size
    if end > cursor.data.size:
        raise CheckpointError(
            f"{cursor.path.name}: truncated: {name} ends at byte {end:,}, "
            f"the file has {cursor.data.size:,}; {_DOWNLOAD}"
        )
    return TensorInfo(name, ggml_type.name, shape, cursor.data[start:end], cursor.path)


class _Cursor:
    """Reads consecutive little-endian fields and refuses to run past the end of the file."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path = path
        self.data = data
        self.view = data.data
        self.offset = 0

    def take(self, size: int) -> int:
        """Start of the next `size` bytes, which are consumed."""
        start, self.offset = self.offset, self.offset + size
        if self.offset > self.data.size:
            raise CheckpointError(
                f"{self.path.name}: truncated: the header needs byte {self.offset:,}, "
                f"the file has {self.data.size:,}; {_DOWNLOAD}"
            )
        return start

    def scalar(self, code: str) -> Any:
        return struct.unpack_from(code, self.view, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        size = self.scalar("<Q")
        start = self.take(size)
        return str(self.view[start : start + size], "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == gguf.GGUFValueType.STRING:
            return self.string()
        if kind == gguf.GGUFValueType.ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
            if code := _SCALARS.get(item):
                start = self.take(count * struct.calcsize(code))
                return np.frombuffer(self.view, np.dtype(code), count, start).tolist()
            if item == gguf.GGUFValueType.STRING:
                return [self.string() for _ in range(count)]
            raise CheckpointError(f"{self.path.name}: unsupported metadata array of type {item}; {_DOWNLOAD}")
        if code := _SCALARS.get(kind):
            return self.scalar(code)
        raise CheckpointError(f"{self.path.name}: unknown metadata type {kind} at byte {self.offset:,}; {_DOWNLOAD}")

    def tensor_header(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, row-major shape, type id and offset in the data section."""
        name = self.string()
        axes = self.scalar("<I")
        shape = tuple(self.scalar("<Q") for _ in range(axes))
        return name, shape[::-1], self.scalar("<I"), self.scalar("<Q")


_SCALARS: dict[int, str] = {
    gguf.GGUFValueType.UINT8: "<B",
    gguf.GGUFValueType.INT8: "<b",
    gguf.GGUFValueType.UINT16: "<H",
    gguf.GGUFValueType.INT16: "<h",
    gguf.GGUFValueType.UINT32: "<I",
    gguf.GGUFValueType.INT32: "<i",
    gguf.GGUFValueType.FLOAT32: "<f",
    gguf.GGUFValueType.BOOL: "<?",
    gguf.GGUFValueType.UINT64: "<Q",
    gguf.GGUFValueType.INT64: "<q",
    gguf.GGUFValueType.FLOAT64: "<d",
}
