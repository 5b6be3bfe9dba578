"""A model whose drafts follow a plan."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ds4jax.model.transformer import DeepSeekV4


class Planned(DeepSeekV4):
    """Runs the block, but drafts what a plan `params["plan"]` `[B, positions]` says where it is not negative."""

    def draft(self, tokens: Any, streams: Any, cache: Any, start: Any, count: Any) -> Any:
        logits, streams, cache = super().draft(tokens, streams, cache, start, count)
        planned = jnp.take_along_axis(self.get_variable("params", "plan"), start[:, None] + 1, axis=1)
        certain = 1e9 * jax.nn.one_hot(planned, self.config.vocab_size, dtype=jnp.float32)
        return jnp.where(planned[:, :, None] < 0, logits, certain), streams, cache
