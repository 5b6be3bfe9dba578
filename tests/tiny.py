"""A tiny model of random weights with the parts of the real one, for tests of the benchmark."""

import dataclasses

from ds4jax import load_numerics
from ds4jax.bench import synthetic

PERF = load_numerics("perf")
PERF = PERF.replace(xla=())  # options of the GPU compiler only
TINY = dataclasses.replace(
    synthetic.FLASH,
    vocab_size=64,
    hidden_size=256,
    num_hidden_layers=2,
    compress_ratios=(4, 8),
    num_hash_layers=1,
    hc_sinkhorn_iters=2,
    num_attention_heads=2,
    head_dim=128,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=32,
    sliding_window=8,
    index_n_heads=2,
    index_head_dim=64,
    index_topk=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    swiglu_limit=(10.0,) * 3,
    swiglu_limit_shared=(10.0,) * 3,
    max_position_embeddings=256,
)
