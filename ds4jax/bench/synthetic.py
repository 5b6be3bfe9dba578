"""A model of random weights, made on the device from a seed in the shapes and types of the real file."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ds4jax.bench.case import floats, quantised, random_words
from ds4jax.checkpoint_table import Slot, mtp_slots, trunk_slots
from ds4jax.config import ModelConfig, Numerics
from ds4jax.errors import ConfigError
from ds4jax.model.cache import Cache, commit, init_cache

LAYERS = 43

FLASH = ModelConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=LAYERS,
    compress_ratios=(0, 0, *(4, 128) * 20, 4),
    num_hash_layers=3,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    sliding_window=128,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    n_routed_experts=256,
    num_experts_per_tok=6,
    moe_intermediate_size=2048,
    routed_scaling_factor=1.5,
    swiglu_limit=(10.0,) * (LAYERS + 1),
    swiglu_limit_shared=(10.0,) * (LAYERS + 1),
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_factor=16.0,
    original_seq_len=65536,
    beta_fast=32.0,
    beta_slow=1.0,
    max_position_embeddings=1 << 20,
)
"""DeepSeek-V4-Flash (its `config.json`), without the MTP block; `has_mtp` adds it."""

FORMATS = {
    "output.weight": "Q8_0",
    "attn_q_a.weight": "Q8_0",
    "attn_q_b.weight": "Q8_0",
    "attn_kv.weight": "Q8_0",
    "attn_output_a.weight": "Q8_0",
    "attn_output_b.weight": "Q8_0",
    "ffn_gate_exps.weight": "IQ2_XXS",
    "ffn_up_exps.weight": "IQ2_XXS",
    "ffn_down_exps.weight": "Q2_K",
    "ffn_gate_shexp.weight": "Q8_0",
    "ffn_up_shexp.weight": "Q8_0",
    "ffn_down_shexp.weight": "Q8_0",
}
"""Types of the quantised tensors of the 81 GiB file (IQ2_XXS experts); its other matrices are F16."""

MTP_FORMATS = FORMATS | {
    "e_proj.weight": "Q8_0",
    "h_proj.weight": "Q8_0",
    "ffn_gate_exps.weight": "Q4_K",
    "ffn_up_exps.weight": "Q4_K",
    "ffn_down_exps.weight": "Q4_K",
}
"""Types of the quantised tensors of the MTP file; its other matrices are F32."""


def flash(layers: int = LAYERS) -> ModelConfig:
    """The first `layers` layers of Flash; the first four have every kind of attention and of routing.

    Raises ConfigError for fewer than four layers or more than there are.
    """
    if not 4 <= layers <= LAYERS:
        raise ConfigError(f"flash:{layers}: expected 4 to {LAYERS} layers; 4 have one layer of each kind")
    clamp = FLASH.swiglu_limit[: layers + 1]
    return dataclasses.replace(
        FLASH,
        num_hidden_layers=layers,
        compress_ratios=FLASH.compress_ratios[:layers],
        swiglu_limit=clamp,
        swiglu_limit_shared=clamp,
    )


def parse(text: str) -> ModelConfig:
    """The model that `flash` or `flash:LAYERS` names; ConfigError for anything else."""
    name, _, layers = text.partition(":")
    if name != "flash" or (layers and not layers.isdecimal()):
        raise ConfigError(f"synthetic model {text!r}: expected flash or flash:LAYERS, for instance flash:4")
    return flash(int(layers)) if layers else FLASH


def make_params(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Parameters, as loading the files would give them; the same for the same seed.

    Products of weights and rows of unit variance have about unit variance. Experts of different tokens differ: token
    tables are random, router scores random and their bias small.
    """
    params: dict[str, Any] = {}
    root = jax.random.key(seed)
    for slot in (*trunk_slots(config), *(mtp_slots(config) if config.has_mtp else ())):
        (path,) = slot.paths
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        number = zlib.crc32(slot.name.encode())
        if slot.kind == "vector":  # small and many: drawn on the host, they need no compiling
            node[path[-1]] = jax.device_put(_vector(slot, np.random.default_rng((seed, number))))
        elif slot.kind == "ids":
            node[path[-1]] = _table(jax.random.fold_in(root, number), slot.shape, config.n_routed_experts)
        else:
            node[path[-1]] = _matrix(jax.random.fold_in(root, number), format_of(slot), slot.shape)
    return params


def _vector(slot: Slot, rng: np.random.Generator) -> np.ndarray:
    """Factors near one, anything else near zero."""
    around = 1.0 if "norm" in slot.name or "scale" in slot.name else 0.0
    return (around + rng.uniform(-0.1, 0.1, slot.shape)).astype(np.float32)


def format_of(slot: Slot) -> str:
    """Type of a matrix in the real file."""
    head, _, rest = slot.name.partition(".")
    inner = rest.partition(".")[2]
    return MTP_FORMATS.get(inner, "F32") if head == "mtp" else FORMATS.get(inner if head == "blk" else slot.name, "F16")


@functools.partial(jax.jit, static_argnums=(1, 2))
def _matrix(key: Array, format: str, shape: tuple[int, ...]) -> Any:
    """Compiled once per type and shape."""
    if format in ("F16", "F32"):
        return floats(key, *shape).astype({"F16": jnp.float16, "F32": jnp.float32}[format])
    return quantised(key, format, *shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _table(key: Array, shape: tuple[int, int], experts: int) -> Array:
    """Distinct experts for every token: a random start and a random odd stride, which is coprime to powers of two."""
    drawn = random_words(key, (shape[0], 2)) & 0x7FFFFFFF
    start, stride = drawn[:, :1] % experts, (drawn[:, 1:] % (experts // 2)) * 2 + 1
    return (start + jnp.arange(shape[1], dtype=jnp.int32) * stride) % experts


def params_nbytes(config: ModelConfig) -> int:
    """Bytes of `make_params`, without making them."""
    return nbytes(jax.eval_shape(lambda: make_params(config, 0)))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def make_cache(config: ModelConfig, numerics: Numerics, capacity: int, rows: int) -> Cache:
    """The cache of one sequence with random values in every place, none of them committed yet."""
    shapes = jax.eval_shape(lambda: init_cache(config, numerics, 1, capacity, rows))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(capacity), len(leaves))
    filled = [_fill(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return commit(jax.tree.unflatten(tree, filled), at_length(0))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fill(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Uniform values with a standard deviation of one."""
    return (random_words(key, shape).astype(jnp.float32) * 2.0**-31 * 3**0.5).astype(dtype)


def at_length(length: int) -> Array:
    """The committed lengths of a batch of one."""
    return jnp.full((1,), length, jnp.int32)


def weight_bytes(params: dict[str, Any], config: ModelConfig, rows: int, drafts: int = 0) -> int:
    """Bytes of the weights that a step of `rows` rows reads, drafts included, if no two rows share an expert.

    A draft reads the MTP block and the head, the block's own if it has one; a step with drafts also stores the block's
    rows of its tokens.
    """
    total = _bytes_read({name: tree for name, tree in params.items() if name != "mtp"}, config, rows)
    if drafts:
        block = params["mtp"]
        names = ("embed", "mtp") if "head" in block else ("embed", "head", "mtp")
        total += drafts * _bytes_read({name: params[name] for name in names}, config, 1)
        stored = {name: block[name] for name in ("e_proj", "h_proj", "enorm", "hnorm")}
        layer = {name: block["layer"][name] for name in ("hc_attn", "attn_norm")}
        attention = {name: block["layer"]["attn"][name] for name in ("wkv", "kv_norm")}
        total += _bytes_read({"embed": params["embed"], "mtp": [stored, layer, attention]}, config, rows)
    return round(total)


def _bytes_read(params: Any, config: ModelConfig, rows: int) -> float:
    """Bytes that a call of `rows` rows reads: of tables by token the rows of its tokens, of experts those chosen."""
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        size = leaf.size * leaf.dtype.itemsize
        if names[0] == "embed" or "tid2eid" in names:
            size *= rows / config.vocab_size
        elif "moe" in names and names[names.index("moe") + 1] in ("w1", "w2", "w3"):
            size *= min(1.0, rows * config.num_experts_per_tok / config.n_routed_experts)
        total += size
    return total
