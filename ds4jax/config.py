"""Model sizes and numerics: frozen, hashable descriptions that are static arguments of every jitted function.

`ModelConfig` holds what a GGUF file's metadata determines; nothing is hard-coded to one model. `Numerics` holds
everything that can change a bit of the result without changing the model.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from typing import Any

from ds4jax.errors import ConfigError

OPS = (
    "embed",
    "norm",
    "quantise",
    "linear",
    "linear_store",
    "grouped_linear",
    "rope_table",
    "q_norm_rope",
    "kv_store",
    "hyper_enter",
    "hyper_post",
    "hyper_leave",
    "router",
    "experts",
    "compress_store",
    "indexer",
    "attention",
)
"""Names of the operations whose implementation `Numerics.impl` chooses."""

DRAFT_COSTS = ("draft_cost", "draft_cost_kernels")

IMPLEMENTATIONS = ("auto", "xla", "pallas", "interpret")

CSA_RATIO = 4
"""The ratio whose compressed windows overlap and that has an indexer, in every reference implementation."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and schedule of a DeepSeek-V4 model, under the names of its `config.json`.

    `compress_ratios` has one entry per decoder layer: 0 window only, 4 compressed sparse attention (CSA) with an
    indexer, any other value heavily compressed attention (HCA) at that ratio. `swiglu_limit` and
    `swiglu_limit_shared` are per layer with one more entry for the MTP block; 0 means no clamp.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    num_hidden_layers: int  # L
    compress_ratios: tuple[int, ...]  # [L]
    num_hash_layers: int
    hc_mult: int  # H
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    num_attention_heads: int  # N
    head_dim: int  # d
    qk_rope_head_dim: int  # r
    q_lora_rank: int  # R_q
    o_groups: int  # G
    o_lora_rank: int  # R_o
    sliding_window: int  # W
    index_n_heads: int  # N_I
    index_head_dim: int  # d_I
    index_topk: int  # K_I
    n_routed_experts: int  # E
    num_experts_per_tok: int  # K
    moe_intermediate_size: int  # F
    routed_scaling_factor: float
    swiglu_limit: tuple[float, ...]  # [L + 1]
    swiglu_limit_shared: tuple[float, ...]  # [L + 1]
    rope_theta: float
    compress_rope_theta: float
    rope_factor: float  # YaRN, compressed layers only
    original_seq_len: int
    beta_fast: float
    beta_slow: float
    max_position_embeddings: int
    has_mtp: bool = False

    def __post_init__(self) -> None:
        layers = self.num_hidden_layers
        _require(
            len(self.compress_ratios) == layers,
            f"compress_ratios has {len(self.compress_ratios)} entries, expected {layers}",
        )
        for name in ("swiglu_limit", "swiglu_limit_shared"):
            _require(
                len(getattr(self, name)) == layers + 1,
                f"{name} has {len(getattr(self, name))} entries, expected {layers + 1}",
            )
        _require(
            self.num_attention_heads % self.o_groups == 0,
            f"{self.num_attention_heads} heads do not divide into {self.o_groups} output groups",
        )
        _require(self.qk_rope_head_dim % 2 == 0, f"rotary size {self.qk_rope_head_dim} is odd")
        _require(
            self.qk_rope_head_dim <= self.head_dim,
            f"rotary size {self.qk_rope_head_dim} exceeds head size {self.head_dim}",
        )
        _require(
            self.num_experts_per_tok <= self.n_routed_experts,
            f"{self.num_experts_per_tok} experts per token of {self.n_routed_experts}",
        )
        if CSA_RATIO in self.compress_ratios:
            _require(
                self.qk_rope_head_dim <= self.index_head_dim,
                f"rotary size {self.qk_rope_head_dim} exceeds indexer head size {self.index_head_dim}",
            )

    def is_hash_layer(self, layer: int) -> bool:
        """Whether a decoder layer takes its expert ids from a token table."""
        return layer < self.num_hash_layers


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Everything that may change a bit of the result: row handling, formats, simulated casts, drafts, implementations.

    rows: "loop" runs each XLA operation one row at a time inside a loop with a run-time trip count, so that a row's
        result cannot depend on how many rows ride along; "batch" hands all rows to XLA at once.
    act: activations of quantised matmuls; "q8" int8 per 32 values (Q8_0, IQ2_XXS) or 256 (Q2_K, Q4_K), "f32" floats.
    sim_kv: FP8 round trip of raw and compressed attention rows, as the model was trained.
    sim_index: Hadamard transform and FP4 round trip of indexer queries and rows, as the model was trained.
    cache: storage of attention and indexer rows, "f32" or "f16".
    precision: float dots in XLA, "highest" (float32) or "default" (TF32 on GPUs).
    accept: how drafts become tokens when sampling; "coupled" if they equal what is drawn without drafts, so that the
        text is the same, "rejection" with the probability that leaves the distribution the same.
    draft_cost: time of a draft and of its row in the trunk, as a share of a step without drafts, measured, for
        choosing how many tokens to draft: of the XLA references on a CPU. draft_cost_kernels: of kernels, whose rows
        share the reading of weights.
    impl: implementation of every operation in `OPS`: "xla" the reference, "pallas" its GPU kernel, "interpret" the
        kernel run by Pallas's interpreter on any device, "auto" the kernel where JAX runs on a GPU and there is one
        that reads the weights' format, otherwise the reference. A name is a demand.
    xla: compiler options handed to `jax.jit` for every executable.
    """

    rows: str
    act: str
    sim_kv: bool
    sim_index: bool
    cache: str
    precision: str
    accept: str
    draft_cost: float
    draft_cost_kernels: float
    impl: tuple[tuple[str, str], ...]
    xla: tuple[tuple[str, bool | int | str], ...]

    def __post_init__(self) -> None:
        _check_choices(vars(self))
        for name in DRAFT_COSTS:
            _require(getattr(self, name) > 0, f"{name} = {getattr(self, name)}, expected above 0")
        names = [name for name, _ in self.impl]
        missing, unknown = sorted(set(OPS) - set(names)), sorted(set(names) - set(OPS))
        _require(
            sorted(names) == sorted(OPS),
            f"impl must name every operation once; missing {missing}, unknown {unknown}",
        )
        for name, chosen in self.impl:
            _require(
                chosen in IMPLEMENTATIONS, f"impl.{name} = {chosen!r}, expected one of {', '.join(IMPLEMENTATIONS)}"
            )

    def implementation(self, op: str) -> str:
        """The implementation demanded for an operation."""
        return dict(self.impl)[op]

    @property
    def compiler_options(self) -> dict[str, bool | int | str]:
        """Options for `jax.jit(..., compiler_options=...)`."""
        return dict(self.xla)

    def replace(self, **changes: Any) -> Numerics:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @staticmethod
    def from_mapping(table: Mapping[str, Any]) -> Numerics:
        """Builds Numerics from a parsed TOML table; an unknown or missing key is a `ConfigError`."""
        fields = {field.name for field in dataclasses.fields(Numerics)}
        _require(
            set(table) == fields,
            f"numerics keys: missing {sorted(fields - set(table))}, unknown {sorted(set(table) - fields)}",
        )
        values = dict(table)
        for name in ("impl", "xla"):
            _require(isinstance(values[name], Mapping), f"{name} must be a table")
            values[name] = tuple(sorted(values[name].items()))
        _check_choices(values)
        for name in DRAFT_COSTS:
            cost = values[name]
            _require(type(cost) in (int, float), f"{name} = {cost!r}, expected a number")
            values[name] = float(cost)
        for name, option in values["xla"]:
            _require(
                type(option) in (bool, int, str),
                f"xla.{name} = {option!r}, expected true, false, a whole number or a string",
            )
        return Numerics(**values)

    @staticmethod
    def from_toml(text: str) -> Numerics:
        """Parses a numerics TOML document such as `configs/strict.toml`."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"not a TOML document: {error}") from error
        return Numerics.from_mapping(table)


def check_simulation(config: ModelConfig, numerics: Numerics) -> None:
    """Checks that a model's sizes admit the simulated formats.

    Raises:
        ConfigError: they do not; the message names the field to switch off.
    """
    plain = config.head_dim - config.qk_rope_head_dim
    _require(
        not numerics.sim_kv or plain % 64 == 0,
        f"sim_kv rounds in blocks of 64, but a head has {plain} features without rotation; set sim_kv = false",
    )
    width = config.index_head_dim
    _require(
        not numerics.sim_index
        or CSA_RATIO not in config.compress_ratios
        or (width % 32 == 0 and width & (width - 1) == 0),
        f"sim_index needs an indexer head size that is a power of two from 32, found {width}; set sim_index = false",
    )


_CHOICES: dict[str, tuple[str | bool, ...]] = {
    "rows": ("loop", "batch"),
    "act": ("q8", "f32"),
    "sim_kv": (True, False),
    "sim_index": (True, False),
    "cache": ("f32", "f16"),
    "precision": ("highest", "default"),
    "accept": ("coupled", "rejection"),
}


def _check_choices(values: Mapping[str, Any]) -> None:
    for name, allowed in _CHOICES.items():
        value = values[name]
        _require(
            value in allowed and type(value) is type(allowed[0]),  # 0 == False
            f"{name} = {value!r}, expected one of {', '.join(map(str, allowed))}",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
