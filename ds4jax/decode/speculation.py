"""How many tokens a step drafts ahead: a fixed number, or what has been worth its time so far."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ds4jax.config import ModelConfig, Numerics
from ds4jax.errors import ConfigError
from ds4jax.ops import implementation

MOST_DRAFTS = 4
MEMORY = 1 / 16  # weight of the newest outcome in the estimates
HOPE = 1 / 1024  # share of the way to certainty that an estimate goes in a step which tells nothing about it


def draft_cost(numerics: Numerics) -> float:
    """Time of a draft and of its row, as a share of a step without drafts, for the implementations in use."""
    kernels = implementation(numerics, "linear") != "xla"
    return numerics.draft_cost_kernels if kernels else numerics.draft_cost


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How many tokens a step may draft.

    drafts: K, the most drafts per step.
    cost: None drafts K tokens in every step. Otherwise the time of a draft and of its row in the trunk, as a share of
        a step without drafts; each sequence drafts as many tokens as give it the most tokens per time.
    """

    drafts: int = 0
    cost: float | None = None

    @staticmethod
    def of(speculative: str | int, draft_cost: float) -> Speculation:
        """From a setting: "off", a number of drafts, or "auto".

        Raises:
            ConfigError: the setting is none of these, or the cost is not positive.
        """
        if not draft_cost > 0:
            raise ConfigError(f"draft_cost = {draft_cost}, expected above 0")
        if speculative == "auto":
            return Speculation(MOST_DRAFTS, draft_cost)
        if str(speculative) in ("off", *map(str, range(MOST_DRAFTS + 1))):
            return Speculation(0 if speculative == "off" else int(speculative))
        raise ConfigError(f'speculative = {speculative!r}, expected "off", "auto" or a number from 0 to {MOST_DRAFTS}')

    def check(self, config: ModelConfig) -> Speculation:
        """Itself, if the model can do it.

        Raises:
            ConfigError: there is something to draft but no MTP block to do it.
        """
        if self.drafts and not config.has_mtp:
            raise ConfigError("speculation needs the MTP block, which the model lacks; name its file, or turn it off")
        return self

    def depth(self, acceptance: Float[Array, "B K"]) -> Int[Array, " B"]:
        """Drafts of the next step, with these estimates of `learn`."""
        if self.cost is None:
            return jnp.full(acceptance.shape[0], self.drafts, jnp.int32)
        # The draft at depth j yields a token if it and all before it are accepted.
        tokens = 1 + jnp.cumsum(jnp.cumprod(acceptance, axis=1), axis=1)
        rate = tokens / (1 + self.cost * jnp.arange(1, self.drafts + 1, dtype=jnp.float32))
        return jnp.argmax(jnp.pad(rate, [(0, 0), (1, 0)], constant_values=1.0), axis=1).astype(jnp.int32)

    def learn(
        self, acceptance: Float[Array, "B K"], depth: Int[Array, " B"], accepted: Int[Array, " B"]
    ) -> Float[Array, "B K"]:
        """Estimates of how often a draft is accepted when those before it are, after one more step.

        Moving averages. Where a depth was not tried, or not reached, its estimate slowly rises, so that now and then it
        seems worth another try.
        """
        index = jnp.arange(self.drafts, dtype=jnp.int32)
        tried = (index < depth[:, None]) & (index <= accepted[:, None])
        outcome = (index < accepted[:, None]).astype(jnp.float32)
        toward, share = jnp.where(tried, outcome, 1.0), jnp.where(tried, MEMORY, HOPE)
        return acceptance + share * (toward - acceptance)


PLAIN = Speculation()
