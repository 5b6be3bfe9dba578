"""Metadata of GGUF files that are written here: the inverse of `checkpoint_config.read_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter

from ds4jax.checkpoint_config import ARCHITECTURE
from ds4jax.config import ModelConfig


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    """Sizes and schedule as the real files of DeepSeek-V4-Flash name them."""
    c, extra = config, int(config.has_mtp)
    sizes = {
        "block_count": c.num_hidden_layers + extra,
        "nextn_predict_layers": extra,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.output_lora_rank": c.o_lora_rank,
        "attention.output_group_count": c.o_groups,
        "attention.sliding_window": c.sliding_window,
        "attention.compress_ratios": [*c.compress_ratios, *[0] * extra],
        "attention.compress_rope_freq_base": c.compress_rope_theta,
        "attention.indexer.head_count": c.index_n_heads,
        "attention.indexer.key_length": c.index_head_dim,
        "attention.indexer.top_k": c.index_topk,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.dimension_count": c.qk_rope_head_dim,
        "rope.freq_base": c.rope_theta,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": c.rope_factor,
        "rope.scaling.original_context_length": c.original_seq_len,
        "rope.scaling.yarn_beta_fast": c.beta_fast,
        "rope.scaling.yarn_beta_slow": c.beta_slow,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": 1,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_gating_func": 4,  # sqrt(softplus)
        "expert_weights_scale": c.routed_scaling_factor,
        "expert_weights_norm": True,
        "swiglu_clamp_exp": list(c.swiglu_limit[: c.num_hidden_layers + extra]),
        "swiglu_clamp_shexp": list(c.swiglu_limit_shared[: c.num_hidden_layers + extra]),
        "hash_layer_count": c.num_hash_layers,
        "hyper_connection.count": c.hc_mult,
        "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters,
        "hyper_connection.epsilon": c.hc_eps,
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in sizes.items()}


def add_metadata(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Adds values as the types that the real files have: whole numbers of 32 bits, floats of 32 bits."""
    add: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        add[type(value)](key, value)
