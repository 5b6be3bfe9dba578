"""Small GGUF files: the oracle's, and variants of them that other converters might write."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from golden import DATA

from ds4jax.checkpoint import GGUF, load_params, open_gguf, read_config
from ds4jax.config import ModelConfig
from ds4jax.quants import QTensor, unpack

ORACLE = DATA / "oracle"
F32, Q, F32_MTP, DS4_MTP, Q_MTP = (
    ORACLE / name
    for name in ("tiny-f32.gguf", "tiny-q.gguf", "tiny-f32-mtp.gguf", "tiny-f32-mtp-ds4.gguf", "tiny-q-mtp-ds4.gguf")
)

TINY = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    num_hidden_layers=7,
    compress_ratios=(0, 0, 4, 128, 4, 128, 4),
    num_hash_layers=3,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=float(np.float32(3e-3)),
    rms_norm_eps=float(np.float32(1e-3)),
    num_attention_heads=4,
    head_dim=96,
    qk_rope_head_dim=32,
    q_lora_rank=48,
    o_groups=2,
    o_lora_rank=24,
    sliding_window=32,
    index_n_heads=16,
    index_head_dim=64,
    index_topk=8,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=48,
    routed_scaling_factor=1.5,
    swiglu_limit=(2.5,) * 8,
    swiglu_limit_shared=(2.5,) * 8,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_factor=4.0,
    original_seq_len=256,
    beta_fast=32.0,
    beta_slow=1.0,
    max_position_embeddings=1024,
)
TINY_MTP = dataclasses.replace(TINY, has_mtp=True)


Tensors = dict[str, tuple[str, np.ndarray]]  # name -> GGML type, array (bytes [..., row bytes] if quantised)


def tensors_of(path: Path) -> Tensors:
    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in gguf.GGUFReader(path).tensors}


def metadata_of(path: Path) -> dict[str, Any]:
    return dict(open_gguf(path).metadata)


def value_type(value: Any) -> GGUFValueType:
    if isinstance(value, np.generic):
        names = {"i4": "INT32", "u8": "UINT64", "f8": "FLOAT64", "u4": "UINT32"}
        return GGUFValueType[names[value.dtype.str[1:]]]
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    return GGUFValueType[kinds[type(value)]]


def write(path: Path, metadata: dict[str, Any], tensors: Tensors) -> Path:
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "deepseek4"))
    for key, value in metadata.items():
        if key != "general.architecture":
            sub_type = value_type(value[0]) if isinstance(value, list) else None
            kind = value_type(value)
            plain = value.item() if isinstance(value, np.generic) else value
            writer.add_key_value(key, plain, kind, sub_type)
    for name, (kind, data) in tensors.items():
        raw_type = None if data.dtype in (np.float32, np.float16, np.int32) else GGMLQuantizationType[kind]
        writer.add_tensor(name, data, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_metadata(path: Path, *drop: str, **changes: Any) -> GGUF:
    """An opened file with hyperparameters dropped, or changed under names whose `__` stand for dots."""
    file = open_gguf(path)
    new = {f"deepseek4.{key.replace('__', '.')}": value for key, value in changes.items()}
    kept = {key: value for key, value in file.metadata.items() if key.removeprefix("deepseek4.") not in drop}
    return dataclasses.replace(file, metadata=kept | new)


def without_tensors(path: Path, pattern: str) -> GGUF:
    file = open_gguf(path)
    kept = {name: tensor for name, tensor in file.tensors.items() if not re.search(pattern, name)}
    return dataclasses.replace(file, tensors=kept)


def combined(path: Path, main: Path, mtp: Tensors, **metadata: Any) -> Path:
    """A main file that contains an MTP block, as `blk.7`, in the way of llama.cpp's converter."""
    tensors = tensors_of(main) | mtp
    return write(path, metadata_of(main) | {"deepseek4.block_count": 8, **metadata}, tensors)


def nextn(tensors: Tensors) -> Tensors:
    """Tensors of a ds4 MTP file under llama.cpp's names; e_proj and h_proj merged along the input axis."""
    out: Tensors = {}
    for name, (kind, data) in tensors.items():
        leaf = name.removeprefix("mtp.0.")
        if leaf == "e_proj.weight":
            merged = np.concatenate([data, tensors["mtp.0.h_proj.weight"][1]], -1)
            out["blk.7.nextn.eh_proj.weight"] = kind, merged
        elif leaf == "norm.weight":
            out["blk.7.nextn.shared_head_norm.weight"] = kind, data
        elif leaf.startswith(("enorm", "hnorm", "hc_head")):
            out[f"blk.7.nextn.{leaf}"] = kind, data
        elif leaf != "h_proj.weight":
            out[f"blk.7.{leaf}"] = kind, data
    return out


def load(main: GGUF | Path, mtp: GGUF | Path | None = None, **options: Any) -> dict[str, Any]:
    files = [open_gguf(file) if isinstance(file, Path) else file for file in (main, mtp)]
    return load_params(files[0], files[1], read_config(files[0], files[1]), **options)[0]


def leaf_bytes(leaf: Any) -> bytes:
    return unpack(leaf).tobytes() if isinstance(leaf, QTensor) else np.asarray(leaf).tobytes()


def is_qtensor(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def same_params(left: Any, right: Any) -> bool:
    left_leaves, left_tree = jax.tree.flatten(left)
    right_leaves, right_tree = jax.tree.flatten(right)
    return left_tree == right_tree and all(
        a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b), equal_nan=a.dtype.kind == "f")
        for a, b in zip(left_leaves, right_leaves, strict=True)
    )
