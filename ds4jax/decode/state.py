"""What generation carries: its limits, the request, the state between steps, and the result."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int, Key

from ds4jax.decode.sampling import Sampling
from ds4jax.errors import ConfigError
from ds4jax.model.cache import Cache


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes that a generate program is compiled for; whatever stays within them runs without recompiling.

    batch: sequences B.
    prompt: longest prompt P.
    new_tokens: most tokens a sequence may get.
    chunk: prompt tokens that a sequence reads per step.
    context: positions a sequence may reach; 0 stands for `prompt + new_tokens`.
    """

    batch: int
    prompt: int
    new_tokens: int
    chunk: int = 128
    context: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "new_tokens", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"limits: {name} = {getattr(self, name)}, expected at least 1")
        if self.context == 0:
            object.__setattr__(self, "context", self.prompt + self.new_tokens)
        if self.context < self.prompt:
            raise ConfigError(f"limits: context {self.context} is smaller than the longest prompt {self.prompt}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a call; run-time values, constant over its steps.

    prompt: ids, padded. lengths: real length of each prompt, at least 1. sampling: fields `[B]`. keys: one per
    sequence. limit: most new tokens of each sequence. stop_ids: ids that end a sequence, padded with -1.
    """

    prompt: Int[Array, "B P"]
    lengths: Int[Array, " B"]
    sampling: Sampling
    keys: Key[Array, " B"]
    limit: Int[Array, " B"]
    stop_ids: Int[Array, " S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """State between two steps; K is the most drafts per step, 0 without speculation.

    Once a prompt is read, the last token of its sequence has been chosen but not evaluated: the cache holds the prompt
    and all new tokens but that one.

    tokens: new tokens, `[B, new_tokens]`, zero beyond `length`.
    logprobs: the model's log-probability of each new token.
    length: new tokens so far.
    done: the sequence has stopped, reached its limit or been halted; steps leave it as it is.
    stopped: the sequence ended with one of the stop ids, its last token.
    next: the token to evaluate next.
    streams: streams of the last committed position `[B, H, D]`, from which a draft starts.
    cache: committed up to `cache.length`.
    steps: steps of each sequence after its prompt was read.
    drafted, accepted: drafts made by depth, and those of them that became tokens: a sequence has got one token from its
        prompt, one from each step and one from each accepted draft.
    acceptance: running estimate of how often the draft at each depth is accepted when those before it are.
    """

    tokens: Int[Array, "B new"]
    logprobs: Float[Array, "B new"]
    length: Int[Array, " B"]
    done: Bool[Array, " B"]
    stopped: Bool[Array, " B"]
    next: Int[Array, " B"]
    streams: Float[Array, "B H D"]
    cache: Cache
    steps: Int[Array, " B"]
    drafted: Int[Array, "B K"]
    accepted: Int[Array, "B K"]
    acceptance: Float[Array, "B K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """Tokens and counters, final or so far; the fields are those of `DecodeState`. `logprobs` is None unless asked for.

    `tokens[b, :length[b]]` are the new tokens; a stop id that ended the sequence is the last of them.
    """

    tokens: Int[Array, "B new"]
    length: Int[Array, " B"]
    done: Bool[Array, " B"]
    stopped: Bool[Array, " B"]
    logprobs: Float[Array, "B new"] | None
    steps: Int[Array, " B"]
    drafted: Int[Array, "B K"]
    accepted: Int[Array, "B K"]

    @staticmethod
    def of(state: DecodeState) -> Generation:
        """What a caller may see of a state."""
        return Generation(**{field.name: getattr(state, field.name) for field in dataclasses.fields(Generation)})
