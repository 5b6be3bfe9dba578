"""Small published models with known answers: golden vectors and their weights under the package's parameter names.

`data/golden/README.md` says where every number comes from and how close an implementation has to be.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.checkpoint import load_params, open_gguf, read_config
from ds4jax.config import OPS, ModelConfig, Numerics

DATA = Path(__file__).parent / "data"

EXACT = Numerics(
    rows="loop",
    act="f32",
    sim_kv=False,
    sim_index=False,
    cache="f32",
    precision="highest",
    accept="coupled",
    draft_cost=0.2,
    draft_cost_kernels=0.2,
    impl=tuple((op, "xla") for op in OPS),
    xla=(("xla_allow_excess_precision", False),),
)
"""Float32 throughout, nothing simulated: the setting in which other implementations can be compared."""

QUICK = EXACT.replace(xla=(*EXACT.xla, ("xla_backend_optimization_level", 0)))
"""The same arithmetic, compiled in two thirds of the time: for the variants of a comparison."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """A tiny model: sizes, parameters as the package names them, and every recorded array."""

    config: ModelConfig
    params: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def ids(self) -> np.ndarray:
        """Token ids of the recorded run [T]."""
        return self.arrays["input_ids"]


def read(path: str) -> dict[str, np.ndarray]:
    """All arrays of a file under `data`."""
    with np.load(DATA / path) as file:
        return dict(file)


def pure() -> dict[str, np.ndarray]:
    """Inputs and outputs of single operations."""
    return read("golden/pure.npz")


@functools.cache
def load(name: str, *, mtp: bool = False, dtype: str = "float32") -> Golden:
    """`tiny_a`, `tiny_b` or `tiny_c`; `mtp` adds the block of `mtp_a`. Matrices get `dtype`, float16 being exact."""
    arrays = read(f"golden/{name}.npz")
    spec = json.loads((DATA / "golden" / f"{name}.json").read_text())["spec"]
    weights = {key[2:]: arrays.pop(key) for key in list(arrays) if key.startswith("w/")}
    params = _trunk(weights, spec["L"], dtype)
    if mtp:
        block = read("golden/mtp_a.npz")
        weights = {key[2:]: block.pop(key) for key in list(block) if key.startswith("w/")}
        params["mtp"] = _mtp(weights, dtype)
        arrays |= {f"mtp/{key}": value for key, value in block.items()}
    return Golden(_config(spec, mtp), params, arrays)


def _config(spec: dict[str, Any], mtp: bool) -> ModelConfig:
    factor, original, fast, slow = spec["yarn"]
    limits = (float(spec["limit"]),) * (spec["L"] + 1)
    return ModelConfig(
        vocab_size=spec["V"],
        hidden_size=spec["D"],
        num_hidden_layers=spec["L"],
        compress_ratios=tuple(spec["ratios"]),
        num_hash_layers=spec["L_h"],
        hc_mult=spec["H"],
        hc_sinkhorn_iters=spec["n_sk"],
        hc_eps=spec["hc_eps"],
        rms_norm_eps=spec["eps"],
        num_attention_heads=spec["N"],
        head_dim=spec["d"],
        qk_rope_head_dim=spec["r"],
        q_lora_rank=spec["R_q"],
        o_groups=spec["G"],
        o_lora_rank=spec["R_o"],
        sliding_window=spec["W"],
        index_n_heads=spec["N_I"],
        index_head_dim=spec["d_I"],
        index_topk=spec["K_I"],
        n_routed_experts=spec["E"],
        num_experts_per_tok=spec["K"],
        moe_intermediate_size=spec["F"],
        routed_scaling_factor=spec["lam"],
        swiglu_limit=limits,
        swiglu_limit_shared=limits,
        rope_theta=spec["theta_main"],
        compress_rope_theta=spec["theta_cmp"],
        rope_factor=factor,
        original_seq_len=original,
        beta_fast=fast,
        beta_slow=slow,
        max_position_embeddings=256,
        has_mtp=mtp,
    )


def _leaf(value: np.ndarray, dtype: str) -> jax.Array:
    if value.dtype == np.int32:
        return jnp.asarray(value)
    return jnp.asarray(value.astype("float32" if value.ndim == 1 else dtype))


def _trunk(weights: dict[str, np.ndarray], layers: int, dtype: str) -> dict[str, Any]:
    def get(name: str) -> jax.Array:
        return _leaf(weights[name], dtype)

    params: dict[str, Any] = {
        "embed": get("model.embed_tokens.weight"),
        "head": get("lm_head.weight"),
        "norm": get("model.norm.weight"),
        "hc_head": {part: get(f"model.hc_head.hc_{part}") for part in ("fn", "base", "scale")},
    }
    for layer in range(layers):
        params[f"layers_{layer}"] = _layer(weights, f"model.layers.{layer}.", dtype)
    return params


def _mtp(weights: dict[str, np.ndarray], dtype: str) -> dict[str, Any]:
    def get(name: str) -> jax.Array:
        return _leaf(weights[f"mtp.0.{name}"], dtype)

    return {
        **{name: get(f"{name}.weight") for name in ("e_proj", "h_proj", "enorm", "hnorm", "norm")},
        "hc_head": {part: get(f"hc_head_{part}") for part in ("fn", "base", "scale")},
        "layer": _layer(weights, "mtp.0.", dtype),
    }


def _layer(weights: dict[str, np.ndarray], prefix: str, dtype: str) -> dict[str, Any]:
    def has(name: str) -> bool:
        return prefix + name in weights

    def get(name: str) -> jax.Array:
        return _leaf(weights[prefix + name], dtype)

    def compressor(name: str) -> dict[str, jax.Array]:
        return {
            "wkv": get(f"{name}kv_proj.weight"),
            "wgate": get(f"{name}gate_proj.weight"),
            "ape": get(f"{name}position_bias"),
            "norm": get(f"{name}kv_norm.weight"),
        }

    attn: dict[str, Any] = {
        "wq_a": get("self_attn.q_a_proj.weight"),
        "q_norm": get("self_attn.q_a_norm.weight"),
        "wq_b": get("self_attn.q_b_proj.weight"),
        "wkv": get("self_attn.kv_proj.weight"),
        "kv_norm": get("self_attn.kv_norm.weight"),
        "sink": get("self_attn.sinks"),
        "wo_a": get("self_attn.o_a_proj.weight"),
        "wo_b": get("self_attn.o_b_proj.weight"),
    }
    if has("self_attn.compressor.kv_proj.weight"):
        attn["compressor"] = compressor("self_attn.compressor.")
    if has("self_attn.compressor.indexer.q_b_proj.weight"):
        indexer = "self_attn.compressor.indexer."
        attn["indexer"] = {
            "wq_b": get(f"{indexer}q_b_proj.weight"),
            "w": get(f"{indexer}scorer.weights_proj.weight"),
            "compressor": compressor(indexer),
        }
    gate, up = np.split(weights[prefix + "mlp.experts.gate_up_proj"], 2, axis=1)  # rows [gate; up]
    moe: dict[str, Any] = {
        "gate": get("mlp.gate.weight"),
        "w1": _leaf(gate, dtype),
        "w3": _leaf(up, dtype),
        "w2": get("mlp.experts.down_proj"),
        "shared": {
            "w1": get("mlp.shared_experts.gate_proj.weight"),
            "w3": get("mlp.shared_experts.up_proj.weight"),
            "w2": get("mlp.shared_experts.down_proj.weight"),
        },
    }
    if has("mlp.gate.tid2eid"):
        moe["tid2eid"] = get("mlp.gate.tid2eid")
    else:
        moe["bias"] = get("mlp.gate.e_score_correction_bias")
    return {
        "hc_attn": {part: get(f"attn_hc.{part}") for part in ("fn", "base", "scale")},
        "hc_ffn": {part: get(f"ffn_hc.{part}") for part in ("fn", "base", "scale")},
        "attn_norm": get("input_layernorm.weight"),
        "ffn_norm": get("post_attention_layernorm.weight"),
        "attn": attn,
        "moe": moe,
    }


@functools.cache
def oracle(main: str, mtp: str | None = None) -> tuple[ModelConfig, dict[str, Any]]:
    """Sizes and parameters of a GGUF file of `data/oracle`, and of an MTP file beside it."""
    files = [open_gguf(DATA / "oracle" / f"{name}.gguf") if name else None for name in (main, mtp)]
    config = read_config(*files)
    params, _ = load_params(*files, config)
    return config, params
