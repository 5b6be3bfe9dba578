"""Sizes of the demonstration model: every mechanism of the real one, with window and top-k far below the context."""

from ds4jax.config import ModelConfig

_LAYERS = 8

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=_LAYERS,
    compress_ratios=(0, 0, 4, 32, 4, 32, 4, 32),
    num_hash_layers=3,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    num_attention_heads=8,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=64,
    sliding_window=32,
    index_n_heads=8,
    index_head_dim=64,
    index_topk=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    routed_scaling_factor=1.5,
    swiglu_limit=(10.0,) * (_LAYERS + 1),
    swiglu_limit_shared=(10.0,) * (_LAYERS + 1),
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_factor=16.0,
    original_seq_len=65536,
    beta_fast=32.0,
    beta_slow=1.0,
    max_position_embeddings=2048,
    has_mtp=True,
)
