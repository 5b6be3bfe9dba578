"""Writes parameters as one GGUF file with the tensor names, types and metadata of the real DeepSeek-V4-Flash files.

The MTP block is stored in the file as block `L`, under the `nextn` names of other converters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from ds4jax.checkpoint_write import add_metadata, metadata_of
from ds4jax.config import ModelConfig
from tools.demo_model.encoders import encode
from tools.demo_model.fakequant import FAKE

HYPER = {"fn": "F16", "base": "F32", "scale": "F32"}
COMPRESSOR = {"wkv": ("kv", "F16"), "wgate": ("gate", "F16"), "ape": ("ape", "F16"), "norm": ("norm", "F32")}

TOP = {
    "embed": ("token_embd.weight", "F16"),
    "head": ("output.weight", "Q8_0"),
    "norm": ("output_norm.weight", "F32"),
    **{f"hc_head/{leaf}": (f"output_hc_{leaf}.weight", kind) for leaf, kind in HYPER.items()},
}
"""Parameter to tensor name and type, outside the layers."""

LAYER = {
    **{f"hc_attn/{leaf}": (f"hc_attn_{leaf}.weight", kind) for leaf, kind in HYPER.items()},
    **{f"hc_ffn/{leaf}": (f"hc_ffn_{leaf}.weight", kind) for leaf, kind in HYPER.items()},
    "attn_norm": ("attn_norm.weight", "F32"),
    "ffn_norm": ("ffn_norm.weight", "F32"),
    "attn/wq_a": ("attn_q_a.weight", "Q8_0"),
    "attn/q_norm": ("attn_q_a_norm.weight", "F32"),
    "attn/wq_b": ("attn_q_b.weight", "Q8_0"),
    "attn/wkv": ("attn_kv.weight", "Q8_0"),
    "attn/kv_norm": ("attn_kv_a_norm.weight", "F32"),
    "attn/sink": ("attn_sinks.weight", "F32"),
    "attn/wo_a": ("attn_output_a.weight", "Q8_0"),
    "attn/wo_b": ("attn_output_b.weight", "Q8_0"),
    **{
        f"attn/compressor/{leaf}": (f"attn_compressor_{name}.weight", kind) for leaf, (name, kind) in COMPRESSOR.items()
    },
    "attn/indexer/wq_b": ("indexer.attn_q_b.weight", "F16"),
    "attn/indexer/w": ("indexer.proj.weight", "F16"),
    **{
        f"attn/indexer/compressor/{leaf}": (f"indexer_compressor_{name}.weight", kind)
        for leaf, (name, kind) in COMPRESSOR.items()
    },
    "moe/gate": ("ffn_gate_inp.weight", "F16"),
    "moe/bias": ("exp_probs_b.bias", "F32"),
    "moe/tid2eid": ("ffn_gate_tid2eid.weight", "I32"),
    "moe/w1": ("ffn_gate_exps.weight", "IQ2_XXS"),
    "moe/w3": ("ffn_up_exps.weight", "IQ2_XXS"),
    "moe/w2": ("ffn_down_exps.weight", "Q2_K"),
    "moe/shared/w1": ("ffn_gate_shexp.weight", "Q8_0"),
    "moe/shared/w3": ("ffn_up_shexp.weight", "Q8_0"),
    "moe/shared/w2": ("ffn_down_shexp.weight", "Q8_0"),
}
"""Parameter of a decoder layer to tensor name below `blk.N.` and type."""

MTP_TYPES = {"F16": "F32", "IQ2_XXS": "Q4_K", "Q2_K": "Q4_K"}
"""Types that the MTP block holds with more bits than the trunk."""

MTP = {
    "e_proj": ("nextn.e_proj.weight", "Q8_0"),
    "h_proj": ("nextn.h_proj.weight", "Q8_0"),
    "enorm": ("nextn.enorm.weight", "F32"),
    "hnorm": ("nextn.hnorm.weight", "F32"),
    "norm": ("nextn.shared_head_norm.weight", "F32"),
    **{f"hc_head/{leaf}": (f"nextn.hc_head_{leaf}.weight", "F32") for leaf in HYPER},
    **{f"layer/{leaf}": (name, MTP_TYPES.get(kind, kind)) for leaf, (name, kind) in LAYER.items()},
}
"""Parameter of the MTP block to tensor name below `blk.N.` and type."""

_ARRAY_TYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32}


def stored_as(name: str, layers: int) -> tuple[str, str]:
    """GGUF tensor name and type of a parameter path such as `layers_3/attn/wq_a`; KeyError for an unknown one."""
    if name in TOP:
        return TOP[name]
    if found := re.fullmatch(r"layers_(\d+)/(.+)", name):
        block, (leaf, kind) = int(found[1]), LAYER[found[2]]
    else:
        block, (leaf, kind) = layers, MTP[name.removeprefix("mtp/")]
    return f"blk.{block}.{leaf}", kind


def quantised_types(names: Iterable[str]) -> dict[str, str]:
    """GGML type of every parameter path that is stored in blocks."""
    types = {name: stored_as(name, 0)[1] for name in names}
    return {name: kind for name, kind in types.items() if kind in FAKE}


def export(path: Path, params: Mapping[str, Any], config: ModelConfig, tokenizer: Mapping[str, Any]) -> None:
    """Writes nested float32 parameters, the sizes and the tokenizer metadata as a GGUF file."""
    writer = GGUFWriter(path, "deepseek4")
    about = {"general.name": "ds4jax demonstration model: children's stories", "general.quantization_version": 2}
    add_metadata(writer, about | metadata_of(config) | dict(tokenizer))
    for name, value in flax.traverse_util.flatten_dict(dict(params), sep="/").items():
        tensor, kind = stored_as(name, config.num_hidden_layers)
        if kind in FAKE:
            writer.add_tensor(tensor, encode(kind, np.asarray(value)), raw_dtype=GGMLQuantizationType[kind])
        else:
            writer.add_tensor(tensor, np.ascontiguousarray(value, _ARRAY_TYPES[kind]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
