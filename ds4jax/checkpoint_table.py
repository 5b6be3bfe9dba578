"""The one table: GGUF tensor name -> parameter path, allowed types and shape; and its check against a file.

Every tensor of every file is either assigned to a parameter exactly once or ignored for a stated reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from ds4jax.checkpoint_config import mtp_prefix
from ds4jax.checkpoint_gguf import GGUF, TensorInfo, listed
from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.errors import CheckpointError
from ds4jax.quants import FORMATS, block_size

ParamPath = tuple[str, ...]
Kind = Literal["matrix", "floats", "vector", "ids"]

_FLOATS = ("F32", "F16", "BF16")
TYPES: dict[Kind, tuple[str, ...]] = {
    "matrix": (*_FLOATS, *FORMATS),
    "floats": _FLOATS,
    "vector": _FLOATS,
    "ids": ("I32",),
}
"""GGML types that a tensor of each kind may have. Vectors become f32; all others keep their type."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor of a file goes. With several paths its columns are divided evenly among them, in order."""

    name: str
    paths: tuple[ParamPath, ...]
    kind: Kind
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do with every tensor.

    assigned: tensors with their slots, in file order. shared: parameter path -> path of the parameter it equals.
    ignored: `file: tensor` -> why it is not needed.
    """

    assigned: tuple[tuple[TensorInfo, Slot], ...]
    shared: dict[ParamPath, ParamPath]
    ignored: dict[str, str]


def make_plan(main: GGUF, mtp: GGUF | None, config: ModelConfig) -> Plan:
    """Assigns every tensor of the files to a parameter.

    Raises CheckpointError for a missing or surplus tensor and for one of the wrong shape or type.
    """
    assigned: list[tuple[TensorInfo, Slot]] = []
    ignored: dict[str, str] = {}
    shared: dict[ParamPath, ParamPath] = {}
    slots, skip = list(trunk_slots(config)), _unused_in_trunk(main, config)
    if config.has_mtp and mtp is None:
        block, shared = _mtp(main, config, own_head=False)
        slots += block
    elif (prefix := mtp_prefix(main)) is not None:
        why = f"the MTP block of {mtp} is used" if mtp is not None else "the MTP block is not used"
        skip |= {name: why for name in main.tensors if name.startswith(f"{prefix}.")}
    assigned += _match(main, slots, skip, ignored)
    if mtp is not None:
        assert config.has_mtp, "an MTP file for a model without an MTP block"
        slots, shared = _mtp(mtp, config, own_head=True)
        assigned += _match(mtp, slots, _unused_in_mtp(mtp, slots), ignored)
    return Plan(tuple(assigned), shared, ignored)


def _match(
    file: GGUF, slots: list[Slot], skip: dict[str, str], ignored: dict[str, str]
) -> list[tuple[TensorInfo, Slot]]:
    """Pairs tensors with slots, in file order, and enters the skipped ones into `ignored`."""
    wanted = {slot.name: slot for slot in slots}
    assert len(wanted) == len(slots), "a tensor name appears twice in the table"
    present = file.tensors.keys() - skip.keys()
    if missing := [name for name in wanted if name not in present]:
        surplus = sorted(present - wanted.keys())
        hint = f"; found instead, among others, {surplus[0]}" if surplus else ""
        raise CheckpointError(
            f"{file}: {listed(missing)} missing{hint}; the file is incomplete or from an early converter, get another"
        )
    if surplus := [name for name in file.tensors if name in present and name not in wanted]:
        raise CheckpointError(
            f"{file}: {listed(surplus)} not expected; the metadata and tensors of the file disagree, "
            "or it is from an early converter: convert it again"
        )
    ignored |= {f"{file}: {name}": why for name, why in skip.items()}
    pairs = [(tensor, wanted[name]) for name, tensor in file.tensors.items() if name in present]
    for tensor, slot in pairs:
        _check(tensor, slot)
    return pairs


def _check(tensor: TensorInfo, slot: Slot) -> None:
    allowed = TYPES[slot.kind]
    if tensor.format not in allowed:
        kinds = ", ".join(allowed[:3]) + (" or a quantised type" if len(allowed) > 3 else "")
        raise CheckpointError(
            f"{tensor.path.name}: {slot.name}: expected {kinds} {list(slot.shape)}, file has {tensor}; "
            f"quantise it to one of {', '.join(allowed)}"
        )
    if tensor.shape != slot.shape:
        raise CheckpointError(
            f"{tensor.path.name}: {slot.name}: expected {tensor.format} {list(slot.shape)}, file has {tensor}; "
            "the metadata and tensors of the file disagree: convert it again"
        )
    columns = slot.shape[-1] // len(slot.paths)
    if tensor.format in FORMATS and columns % block_size(tensor.format)[0]:
        raise CheckpointError(
            f"{tensor.path.name}: {slot.name}: expected a type whose blocks divide its "
            f"{len(slot.paths)} parts of {columns} columns, file has {tensor}; "
            "quantise it to a type with smaller blocks"
        )


# The table itself.


def trunk_slots(config: ModelConfig) -> Iterator[Slot]:
    """Slots of every tensor of a main file, layer by layer."""
    V, D = config.vocab_size, config.hidden_size
    yield _slot("token_embd.weight", ("embed",), "matrix", V, D)
    yield _slot("output.weight", ("head",), "matrix", V, D)
    yield _slot("output_norm.weight", ("norm",), "vector", D)
    yield from _hc_head("output_hc_", ("hc_head",), config)
    for layer, ratio in enumerate(config.compress_ratios):
        yield from _layer(f"blk.{layer}.", (f"layers_{layer}",), config, ratio, config.is_hash_layer(layer))


def mtp_slots(config: ModelConfig) -> Iterator[Slot]:
    """Slots of every tensor of a separate MTP file in DeepSeek's naming."""
    D = config.hidden_size
    yield from _layer("mtp.0.", ("mtp", "layer"), config, ratio=0, hashed=False)
    for name in ("enorm", "hnorm", "norm"):
        yield _slot(f"mtp.0.{name}.weight", ("mtp", name), "vector", D)
    for name in ("e_proj", "h_proj"):
        yield _slot(f"mtp.0.{name}.weight", ("mtp", name), "matrix", D, D)
    yield from _hc_head("mtp.0.hc_head_", ("mtp", "hc_head"), config)


def _mtp(file: GGUF, config: ModelConfig, own_head: bool) -> tuple[list[Slot], dict[ParamPath, ParamPath]]:
    """Slots of the MTP block in `file`, and the parameters that it shares with the trunk.

    `own_head` tells that the file is not the trunk's, so that its `output_norm` and `output_hc_*` are the block's own
    (stand-alone files in llama.cpp's naming).
    """
    D = config.hidden_size
    prefix = mtp_prefix(file)
    if prefix == "mtp.0":
        return list(mtp_slots(config)), {}
    slots = list(_layer(f"{prefix}.", ("mtp", "layer"), config, ratio=0, hashed=False))
    extra = f"{prefix}.nextn."
    for name in ("enorm", "hnorm"):
        slots.append(_slot(f"{extra}{name}.weight", ("mtp", name), "vector", D))
    if f"{extra}eh_proj.weight" in file.tensors:
        paths = ("mtp", "e_proj"), ("mtp", "h_proj")
        slots.append(Slot(f"{extra}eh_proj.weight", paths, "matrix", (D, 2 * D)))
    else:
        slots += [_slot(f"{extra}{name}.weight", ("mtp", name), "matrix", D, D) for name in ("e_proj", "h_proj")]
    shared: dict[ParamPath, ParamPath] = {}
    if f"{extra}shared_head_norm.weight" in file.tensors:
        slots.append(_slot(f"{extra}shared_head_norm.weight", ("mtp", "norm"), "vector", D))
    elif own_head and "output_norm.weight" in file.tensors:
        slots.append(_slot("output_norm.weight", ("mtp", "norm"), "vector", D))
    else:
        shared["mtp", "norm"] = ("norm",)
    if f"{extra}hc_head_fn.weight" in file.tensors:
        slots += _hc_head(f"{extra}hc_head_", ("mtp", "hc_head"), config)
    elif own_head and "output_hc_fn.weight" in file.tensors:
        slots += _hc_head("output_hc_", ("mtp", "hc_head"), config)
    else:
        shared["mtp", "hc_head"] = ("hc_head",)
    return slots, shared


def _layer(prefix: str, path: ParamPath, config: ModelConfig, ratio: int, hashed: bool) -> Iterator[Slot]:
    D, d, N, R_q = config.hidden_size, config.head_dim, config.num_attention_heads, config.q_lora_rank
    G, R_o = config.o_groups, config.o_lora_rank
    for half in ("attn", "ffn"):
        mixes = (2 + config.hc_mult) * config.hc_mult
        yield _slot(f"{prefix}hc_{half}_fn.weight", (*path, f"hc_{half}", "fn"), "floats", mixes, config.hc_mult * D)
        yield _slot(f"{prefix}hc_{half}_base.weight", (*path, f"hc_{half}", "base"), "vector", mixes)
        yield _slot(f"{prefix}hc_{half}_scale.weight", (*path, f"hc_{half}", "scale"), "vector", 3)
        yield _slot(f"{prefix}{half}_norm.weight", (*path, f"{half}_norm"), "vector", D)
    attn = (*path, "attn")
    yield _slot(f"{prefix}attn_q_a.weight", (*attn, "wq_a"), "matrix", R_q, D)
    yield _slot(f"{prefix}attn_q_a_norm.weight", (*attn, "q_norm"), "vector", R_q)
    yield _slot(f"{prefix}attn_q_b.weight", (*attn, "wq_b"), "matrix", N * d, R_q)
    yield _slot(f"{prefix}attn_kv.weight", (*attn, "wkv"), "matrix", d, D)
    yield _slot(f"{prefix}attn_kv_a_norm.weight", (*attn, "kv_norm"), "vector", d)
    yield _slot(f"{prefix}attn_sinks.weight", (*attn, "sink"), "vector", N)
    yield _slot(f"{prefix}attn_output_a.weight", (*attn, "wo_a"), "matrix", G * R_o, N * d // G)
    yield _slot(f"{prefix}attn_output_b.weight", (*attn, "wo_b"), "matrix", D, G * R_o)
    if ratio:
        yield from _compressor(f"{prefix}attn_compressor_", (*attn, "compressor"), D, d, ratio)
    if ratio == CSA_RATIO:
        N_I, d_I = config.index_n_heads, config.index_head_dim
        yield _slot(f"{prefix}indexer.attn_q_b.weight", (*attn, "indexer", "wq_b"), "matrix", N_I * d_I, R_q)
        yield _slot(f"{prefix}indexer.proj.weight", (*attn, "indexer", "w"), "matrix", N_I, D)
        yield from _compressor(f"{prefix}indexer_compressor_", (*attn, "indexer", "compressor"), D, d_I, ratio)
    moe, E, F = (*path, "moe"), config.n_routed_experts, config.moe_intermediate_size
    yield _slot(f"{prefix}ffn_gate_inp.weight", (*moe, "gate"), "floats", E, D)
    if hashed:
        ids = (config.vocab_size, config.num_experts_per_tok)
        yield _slot(f"{prefix}ffn_gate_tid2eid.weight", (*moe, "tid2eid"), "ids", *ids)
    else:
        yield _slot(f"{prefix}exp_probs_b.bias", (*moe, "bias"), "vector", E)
    for name, leaf, rows, columns in (("gate", "w1", F, D), ("up", "w3", F, D), ("down", "w2", D, F)):
        yield _slot(f"{prefix}ffn_{name}_exps.weight", (*moe, leaf), "matrix", E, rows, columns)
        yield _slot(f"{prefix}ffn_{name}_shexp.weight", (*moe, "shared", leaf), "matrix", rows, columns)


def _compressor(prefix: str, path: ParamPath, D: int, d: int, ratio: int) -> Iterator[Slot]:
    width = 2 * d if ratio == CSA_RATIO else d  # CSA windows overlap: two halves per token
    yield _slot(f"{prefix}kv.weight", (*path, "wkv"), "matrix", width, D)
    yield _slot(f"{prefix}gate.weight", (*path, "wgate"), "matrix", width, D)
    yield _slot(f"{prefix}ape.weight", (*path, "ape"), "floats", ratio, width)
    yield _slot(f"{prefix}norm.weight", (*path, "norm"), "vector", d)


def _hc_head(prefix: str, path: ParamPath, config: ModelConfig) -> Iterator[Slot]:
    H = config.hc_mult
    yield _slot(f"{prefix}fn.weight", (*path, "fn"), "floats", H, H * config.hidden_size)
    yield _slot(f"{prefix}base.weight", (*path, "base"), "vector", H)
    yield _slot(f"{prefix}scale.weight", (*path, "scale"), "vector", 1)


def _slot(name: str, path: ParamPath, kind: Kind, *shape: int) -> Slot:
    return Slot(name, (path,), kind, shape)


# Tensors that are known and not needed.


def _unused_in_trunk(main: GGUF, config: ModelConfig) -> dict[str, str]:
    unused = {f"blk.{layer}.exp_probs_b.bias": "hash layers have no bias" for layer in range(config.num_hash_layers)}
    unused |= _copies(mtp_prefix(main))
    return {name: why for name, why in unused.items() if name in main.tensors}


def _unused_in_mtp(mtp: GGUF, slots: list[Slot]) -> dict[str, str]:
    why = "a copy of the main model's"
    unused = dict.fromkeys(("token_embd.weight", "output.weight", "output_norm.weight"), why)
    unused |= dict.fromkeys((f"output_hc_{part}.weight" for part in ("fn", "base", "scale")), why)
    unused |= _copies(mtp_prefix(mtp))
    used = {slot.name for slot in slots}
    return {name: why for name, why in unused.items() if name in mtp.tensors and name not in used}


def _copies(prefix: str | None) -> dict[str, str]:
    names = ("embed_tokens", "shared_head_head")
    return {f"{prefix}.nextn.{name}.weight": "a copy of the main model's" for name in names}
