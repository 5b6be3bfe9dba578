"""Generation under a bias: tokens that are forbidden, made likelier or made rarer, and what else was probable."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ds4jax.config import ModelConfig, Numerics
from ds4jax.decode.generate import Generate
from ds4jax.decode.sampling import log_probabilities
from ds4jax.decode.speculation import Speculation, draft_cost
from ds4jax.decode.state import Limits
from ds4jax.model.transformer import DeepSeekV4

BIAS = "bias"
MOST_ALTERNATIVES = 20


class Biased(DeepSeekV4):
    """The model with a bias on the logits of the next token, float32 `[V]`, which rides with the parameters as `BIAS`.

    -inf forbids a token. A token whose bias is 0 keeps its logit bit for bit.
    """

    def logits(self, streams: Float[Array, "B R H D"], live: Bool[Array, "B R"]) -> Float[Array, "B R V"]:
        """Biased logits of the next token from the trunk's streams."""
        plain = super().logits(streams, live)
        bias: Any = self.get_variable("params", BIAS)
        return jnp.where(bias == 0, plain, plain + bias)


@functools.cache
def build_biased(
    config: ModelConfig,
    numerics: Numerics,
    limits: Limits,
    speculative: str | int = "off",
) -> Generate:
    """As `build_generate`, for parameters that hold a bias.

    Drafts are made without it: what the bias changes costs drafts, but every token is chosen under it.
    """
    return Generate(Biased(config, numerics), limits, Speculation.of(speculative, draft_cost(numerics)))


@functools.cache
def build_alternatives(config: ModelConfig, numerics: Numerics) -> Any:
    """The program `(params, streams [1, H, D], token [1]) -> (log-probability, ids [n], log-probabilities [n])`.

    The token's log-probability after these streams, and those of the n = `MOST_ALTERNATIVES` most probable tokens,
    most probable first; the model's own, before any bias or filter.
    """
    model = DeepSeekV4(config, numerics)

    def alternatives(
        params: Any, streams: Float[Array, "1 H D"], token: Int[Array, " 1"]
    ) -> tuple[Float[Array, ""], Int[Array, " n"], Float[Array, " n"]]:
        live = jnp.ones((1, 1), bool)
        logits: Any = model.apply({"params": params}, streams[:, None], live, method="logits")
        scores = log_probabilities(logits[0, 0])
        best, ids = lax.top_k(scores, min(MOST_ALTERNATIVES, config.vocab_size))
        return scores[token[0]], ids.astype(jnp.int32), best

    return jax.jit(alternatives, compiler_options=numerics.compiler_options)
