"""Reading GGUF files: the same content as gguf-py finds, split files joined, damage named."""

import re

import gguf
import numpy as np
import pytest
from gguf_variants import (
    DS4_MTP,
    F32,
    F32_MTP,
    Q_MTP,
    TINY,
    Q,
    load,
    metadata_of,
    same_params,
    tensors_of,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4jax.checkpoint import open_gguf, read_config
from ds4jax.errors import CheckpointError


@pytest.mark.parametrize("path", [F32, Q, F32_MTP, DS4_MTP, Q_MTP], ids=lambda path: path.stem)
def test_reader_agrees_with_gguf_py(path):
    file, reader = open_gguf(path), gguf.GGUFReader(path)
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        found = file.tensors[tensor.name]
        assert (found.format, found.shape) == (tensor.tensor_type.name, tuple(tensor.shape[::-1].tolist()))
        np.testing.assert_array_equal(found.data, tensor.data.reshape(-1).view(np.uint8))
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == fields
    assert file.nbytes == sum(tensor.n_bytes for tensor in reader.tensors)


def test_split_files_join_from_any_part(tmp_path):
    metadata, tensors = metadata_of(F32), list(tensors_of(F32).items())
    chunks = [tensors[:2], tensors[2:99], tensors[99:]]
    paths = []
    for part, chunk in enumerate(chunks):
        split = {"split.no": part, "split.count": 3, "split.tensors.count": len(tensors)}
        own = metadata | split if part == 0 else {"general.architecture": "deepseek4"} | split
        paths.append(write(tmp_path / f"tiny-{part + 1:05d}-of-00003.gguf", own, dict(chunk)))
    whole = load(F32)
    for path in paths:
        file = open_gguf(path)
        assert file.paths == tuple(paths)
        assert read_config(file) == TINY
    assert same_params(load(paths[2]), whole)
    paths[1].rename(tmp_path / "aside.gguf")
    with pytest.raises(CheckpointError, match=r"1 of 3 parts missing .*tiny-00002-of-00003\.gguf"):
        open_gguf(paths[0])
    with pytest.raises(CheckpointError, match=r"aside\.gguf: is one of 3 parts"):
        open_gguf(tmp_path / "aside.gguf")
    (tmp_path / "aside.gguf").rename(paths[2])
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(CheckpointError, match=r"expected part 2 of 3, its metadata says split\.no = 0"):
        open_gguf(paths[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<!doctype html>", "found a file starting with b'<!do'; name a model in GGUF format"),
        (b"GGUF\x01\0\0\0" + b"\0" * 8, "found version 1"),
        (b"GGUF\0\0\0\x03" + b"\0" * 16, "found big-endian"),
        (b"GGUF\x03\0\0\0", "the header needs byte 16, the file has 8"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "truncated"),
    ],
)
def test_what_is_not_a_gguf(tmp_path, content, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_gguf(path)


def test_no_such_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such file; check its name and folder"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match="expected a GGUF file, found a directory"):
        open_gguf(tmp_path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> bytes:
    tensors = {f"t{i}": ("F32", np.full((2, 3 + i), i, np.float32)) for i in range(3)}
    metadata = {"general.architecture": "deepseek4", "a": 1, "b": [1.5, 2.5], "c": ["x", "yz"], "d": True, "e": "text"}
    return write(tmp_path_factory.mktemp("small") / "small.gguf", metadata, tensors).read_bytes()


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damage_is_reported_or_harmless(small_file, tmp_path_factory, data):
    """A file cut anywhere is refused; a file with any byte changed opens or is refused, and nothing else happens."""
    path = tmp_path_factory.mktemp("damage") / "file.gguf"
    path.write_bytes(small_file[: data.draw(st.integers(0, len(small_file) - 33), label="cut")])
    with pytest.raises(CheckpointError):
        open_gguf(path)
    changed = bytearray(small_file)
    changed[data.draw(st.integers(0, len(small_file) - 1), label="at")] = data.draw(st.integers(0, 255), label="byte")
    path.write_bytes(changed)
    try:
        open_gguf(path)
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_truncated_file_names_the_tensor(tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(F32.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError, match=r"cut\.gguf: truncated: \S+ ends at byte [\d,]+, the file has [\d,]+; .*fetch"
    ):
        open_gguf(path)


def test_rows_that_blocks_do_not_divide(tmp_path):
    path = write(
        tmp_path / "odd.gguf", {"general.architecture": "deepseek4"}, {"odd": ("F32", np.zeros((2, 33), np.float32))}
    )
    data = path.read_bytes()
    at = data.index(b"odd", data.index(b"general.architecture") + 40) + 3 + 4 + 16
    path.write_bytes(data[:at] + np.uint32(8).tobytes() + data[at + 4 :])
    with pytest.raises(
        CheckpointError, match=r"odd\.gguf: odd: Q8_0 rows need a multiple of 32 values, file has \[2, 33\]"
    ):
        open_gguf(path)
    path.write_bytes(data[:at] + np.uint32(99).tobytes() + data[at + 4 :])
    with pytest.raises(CheckpointError, match=r"odd\.gguf: odd has GGML type 99, which is not known; get another"):
        open_gguf(path)
