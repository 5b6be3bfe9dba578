"""ModelConfig from the metadata of a GGUF file; sizes that a converter left out are read off the tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ds4jax.checkpoint_gguf import GGUF
from ds4jax.config import ModelConfig
from ds4jax.errors import CheckpointError, ConfigError

ARCHITECTURE = "deepseek4"

_NEXTN = re.compile(r"blk\.(\d+)\.nextn\.(?:eh_proj|e_proj)\.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.")


def read_config(main: GGUF, mtp: GGUF | None = None) -> ModelConfig:
    """Sizes and schedule of the model in `main`, with the MTP block of `mtp` or, without it, of `main` itself.

    Tensors, not the key `nextn_predict_layers`, decide whether there is an MTP block. Raises CheckpointError if `main`
    is not a DeepSeek-V4 trunk, `mtp` holds no MTP block, a key is missing, of the wrong type or unsupported, or keys
    contradict each other.
    """
    try:
        return _config(main, mtp)
    except ConfigError as error:
        raise CheckpointError(f"{main}: {error}; the metadata contradict each other: convert it again") from error


def _config(main: GGUF, mtp: GGUF | None) -> ModelConfig:
    _require_trunk(main)
    keys = _Keys(main)
    _require_supported(keys)
    layers = _layer_count(keys)
    block = _mtp_block(main, mtp, layers)
    ratios = _ratios(keys, layers, has_mtp=block is not None)
    heads = keys.integer("attention.head_count", _axis("blk.0.attn_sinks.weight", 0))
    head_dim = keys.integer("attention.key_length", _axis("blk.0.attn_kv.weight", 0))
    groups = keys.integer("attention.output_group_count", _output_groups(heads * head_dim))
    if groups < 1:
        raise CheckpointError(f"{keys.name('attention.output_group_count')}: expected at least 1; convert it again")
    clamp = keys.per_layer("swiglu_clamp_exp", layers, mtp)
    yarn = _yarn_factor(keys)
    theta = keys.real("rope.freq_base", 10000.0)
    context = keys.integer("context_length")
    index_n_heads, index_head_dim, index_topk = _indexer(keys, ratios)
    return ModelConfig(
        vocab_size=keys.integer("vocab_size", _axis("token_embd.weight", 0)),
        hidden_size=keys.integer("embedding_length", _axis("token_embd.weight", 1)),
        num_hidden_layers=layers,
        compress_ratios=ratios,
        num_hash_layers=keys.integer("hash_layer_count", _hash_layers),
        hc_mult=keys.integer("hyper_connection.count", _axis("output_hc_base.weight", 0)),
        hc_sinkhorn_iters=keys.integer("hyper_connection.sinkhorn_iterations"),
        hc_eps=keys.real("hyper_connection.epsilon"),
        rms_norm_eps=keys.real("attention.layer_norm_rms_epsilon"),
        num_attention_heads=heads,
        head_dim=head_dim,
        qk_rope_head_dim=keys.integer("rope.dimension_count"),
        q_lora_rank=keys.integer("attention.q_lora_rank", _axis("blk.0.attn_q_a.weight", 0)),
        o_groups=groups,
        o_lora_rank=keys.integer("attention.output_lora_rank", _axis("blk.0.attn_output_a.weight", 0, groups)),
        sliding_window=keys.integer("attention.sliding_window"),
        index_n_heads=index_n_heads,
        index_head_dim=index_head_dim,
        index_topk=index_topk,
        n_routed_experts=keys.integer("expert_count", _axis("blk.0.ffn_gate_exps.weight", 0)),
        num_experts_per_tok=keys.integer("expert_used_count", _axis("blk.0.ffn_gate_tid2eid.weight", 1)),
        moe_intermediate_size=keys.integer("expert_feed_forward_length", _axis("blk.0.ffn_gate_exps.weight", 1)),
        routed_scaling_factor=keys.real("expert_weights_scale"),
        swiglu_limit=clamp,
        swiglu_limit_shared=keys.per_layer("swiglu_clamp_shexp", layers, mtp, clamp),
        rope_theta=theta,
        compress_rope_theta=keys.real("attention.compress_rope_freq_base", None if any(ratios) else theta),
        rope_factor=yarn,
        original_seq_len=keys.integer("rope.scaling.original_context_length") if yarn != 1 else context,
        beta_fast=keys.real("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.real("rope.scaling.yarn_beta_slow", 1.0),
        max_position_embeddings=context,
        has_mtp=block is not None,
    )


def mtp_prefix(file: GGUF) -> str | None:
    """Prefix of the MTP block's layer tensors, `mtp.0` or `blk.L` (llama.cpp's `nextn`), None if there is no block.

    Raises CheckpointError for a DSpark drafter, whose tensors are named alike, and for more than one block.
    """
    if file.architecture in ("deepseek4-dspark", "dflash") or "mtp.0.main_proj.weight" in file.tensors:
        raise CheckpointError(
            f"{file}: expected an MTP block, found a DSpark drafter, which is another kind of draft model; "
            "leave it out, or use the MTP file of the checkpoint"
        )
    if "mtp.0.e_proj.weight" in file.tensors:
        return "mtp.0"
    blocks = _nextn_blocks(file)
    if len(blocks) > 1:
        raise CheckpointError(f"{file}: expected one MTP block, found {len(blocks)}; only one is supported")
    return f"blk.{blocks.pop()}" if blocks else None


def _require_trunk(main: GGUF) -> None:
    if main.architecture == ARCHITECTURE and any(name.startswith("blk.0.") for name in main.tensors):
        return
    if main.architecture in (ARCHITECTURE, "deepseek4_mtp_support") and mtp_prefix(main):
        raise CheckpointError(
            f"{main}: expected a main model, found an MTP block alone; give it as the MTP file instead"
        )
    raise CheckpointError(
        f"{main}: expected architecture {ARCHITECTURE} with layers blk.0 ..., found {main.architecture!r}; "
        "only DeepSeek-V4 GGUF files can be loaded"
    )


def _require_supported(keys: _Keys) -> None:
    """Variants of the architecture that the model does not implement."""
    supported = {
        "attention.head_count_kv": (1,),
        "attention.value_length": (keys.integer("attention.key_length", _axis("blk.0.attn_kv.weight", 0)),),
        "expert_shared_count": (1,),
        "expert_gating_func": (4,),  # sqrt(softplus)
        "expert_weights_norm": (True,),
        "expert_group_count": (0, 1),
        "expert_group_used_count": (0, 1),
    }
    for key, allowed in supported.items():
        if (found := keys.get(key)) is not None and found not in allowed:
            wanted = " or ".join(str(value) for value in allowed)
            raise CheckpointError(
                f"{keys.name(key)}: expected {wanted}, file has {found!r}; this variant is not supported"
            )


def _nextn_blocks(file: GGUF) -> set[int]:
    return {int(match[1]) for name in file.tensors if (match := _NEXTN.fullmatch(name))}


def _layer_count(keys: _Keys) -> int:
    """Decoder layers: the blocks that are present, less the MTP block."""
    file = keys.file
    nextn = _nextn_blocks(file)
    blocks = {int(match[1]) for name in file.tensors if (match := _BLOCK.match(name))} - nextn
    layers = len(blocks)
    if missing := set(range(max(blocks) + 1)) - blocks:
        raise CheckpointError(f"{file}: all tensors of blk.{min(missing)} are missing; convert or download it again")
    declared = keys.integer("block_count", lambda _: layers)
    if declared not in (layers, layers + len(nextn)):
        raise CheckpointError(
            f"{keys.name('block_count')}: file says {declared}, but has blocks 0 to {layers - 1}; "
            "convert or download it again"
        )
    return layers


def _mtp_block(main: GGUF, mtp: GGUF | None, layers: int) -> str | None:
    block = mtp_prefix(mtp or main)
    if mtp is not None and block is None:
        raise CheckpointError(
            f"{mtp}: expected an MTP block (mtp.0.e_proj.weight or blk.{layers}.nextn.eh_proj.weight), "
            f"found architecture {mtp.architecture!r} without one; leave the MTP file out"
        )
    if block not in (None, "mtp.0", f"blk.{layers}"):
        raise CheckpointError(f"{mtp or main}: expected the MTP block as blk.{layers}, found {block}; wrong MTP file")
    return block


def _ratios(keys: _Keys, layers: int, has_mtp: bool) -> tuple[int, ...]:
    key = "attention.compress_ratios"
    found = keys.get(key)
    if found is None:
        apes = [keys.file.tensors.get(f"blk.{layer}.attn_compressor_ape.weight") for layer in range(layers)]
        return tuple(0 if ape is None else ape.shape[0] for ape in apes)
    whole = isinstance(found, list) and all(isinstance(ratio, int) and ratio >= 0 for ratio in found)
    if not whole or len(found) < layers:
        raise CheckpointError(
            f"{keys.name(key)}: expected at least {layers} numbers, file has {found!r}; convert it again"
        )
    if has_mtp and len(found) > layers and found[layers] != 0:
        raise CheckpointError(
            f"{keys.name(key)}: expected 0 for the MTP block, file has {found[layers]}; convert it again"
        )
    return tuple(found[:layers])


def _indexer(keys: _Keys, ratios: tuple[int, ...]) -> tuple[int, int, int]:
    """Heads, head size and top-k of the indexer; zeros if no layer has one."""
    if 4 not in ratios:
        return 0, 0, 0
    prefix = f"blk.{ratios.index(4)}."
    return (
        keys.integer("attention.indexer.head_count", _axis(prefix + "indexer.proj.weight", 0)),
        keys.integer("attention.indexer.key_length", _axis(prefix + "indexer_compressor_norm.weight", 0)),
        keys.integer("attention.indexer.top_k"),
    )


def _yarn_factor(keys: _Keys) -> float:
    """YaRN is on wherever a factor is given; converters disagree about `rope.scaling.type`."""
    announced = keys.get("rope.scaling.type") == "yarn" or keys.get("rope.scaling.original_context_length") is not None
    return keys.real("rope.scaling.factor", None if announced else 1.0)


def _hash_layers(file: GGUF) -> int:
    return sum(name.endswith(".ffn_gate_tid2eid.weight") for name in file.tensors)


def _axis(name: str, axis: int, divisor: int = 1) -> Callable[[GGUF], int | None]:
    """Derives a size from an axis of a tensor."""

    def derive(file: GGUF) -> int | None:
        tensor = file.tensors.get(name)
        return tensor.shape[axis] // divisor if tensor is not None and len(tensor.shape) > axis else None

    return derive


def _output_groups(width: int) -> Callable[[GGUF], int | None]:
    columns = _axis("blk.0.attn_output_a.weight", 1)
    return lambda file: width // size if (size := columns(file)) else None


class _Keys:
    """Typed access to the hyperparameters of a file; integers of any width, floats of any width."""

    def __init__(self, file: GGUF) -> None:
        self.file = file

    def name(self, key: str) -> str:
        return f"{self.file}: {ARCHITECTURE}.{key}"

    def get(self, key: str) -> Any:
        """Value of a key, None if absent; a list of equal values counts as that value except for schedules."""
        found = self.file.metadata.get(f"{ARCHITECTURE}.{key}")
        if isinstance(found, list) and found and found.count(found[0]) == len(found) and "ratios" not in key:
            return found[0]
        return found

    def integer(self, key: str, derive: Callable[[GGUF], int | None] | None = None) -> int:
        """A key, or what `derive` reads off the tensors."""
        found = self.get(key)
        if found is None and derive is not None:
            found = derive(self.file)
        if found is None:
            raise self._missing(key)
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise CheckpointError(f"{self.name(key)}: expected a whole number, file has {found!r}; convert it again")
        return found

    def real(self, key: str, default: float | None = None) -> float:
        found = self.get(key)
        if found is None:
            found = default
        if found is None:
            raise self._missing(key)
        if not isinstance(found, (int, float)) or isinstance(found, bool):
            raise CheckpointError(f"{self.name(key)}: expected a number, file has {found!r}; convert it again")
        return float(found)

    def per_layer(
        self, key: str, layers: int, mtp: GGUF | None, default: tuple[float, ...] | None = None
    ) -> tuple[float, ...]:
        """One number for each layer and the MTP block, from a scalar or an array.

        An array that ends before the MTP block is continued by the MTP file's, or by its own last entry.
        """
        if self.get(key) is None and default is not None:
            return default
        found = self.file.metadata.get(f"{ARCHITECTURE}.{key}")
        if not isinstance(found, list):
            return (self.real(key),) * (layers + 1)
        if len(found) < layers or not all(isinstance(entry, (int, float)) for entry in found):
            raise CheckpointError(
                f"{self.name(key)}: expected a number or at least {layers}, file has {found!r}; convert it again"
            )
        other = mtp.metadata.get(f"{ARCHITECTURE}.{key}") if mtp is not None else None
        if isinstance(other, list) and len(other) > layers:
            found = [*found[:layers], other[layers]]
        return tuple(float(entry) for entry in [*found, found[-1]][: layers + 1])

    def _missing(self, key: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name(key)}: missing, and the tensors do not show it; convert the file again with a converter "
            "that writes it"
        )
