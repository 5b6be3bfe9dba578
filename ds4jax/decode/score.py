"""Log-probabilities of a given text."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ds4jax.config import ModelConfig, Numerics
from ds4jax.decode.sampling import token_logprob
from ds4jax.errors import RequestError
from ds4jax.model.cache import commit, init_cache
from ds4jax.model.transformer import DeepSeekV4
from ds4jax.ops.rows import Live, map_rows


class Score:
    """Log-probabilities of texts of up to `size` tokens, evaluated `chunk` tokens at a time."""

    def __init__(self, model: DeepSeekV4, size: int, chunk: int) -> None:
        self._model, self._size, self._chunk = model, size, chunk
        self._program = jax.jit(self._run, compiler_options=model.numerics.compiler_options)

    def __call__(self, params: Any, ids: Any) -> np.ndarray:
        """The model's log-probability of `ids[1:]`, each after the tokens before it: float32 `[T - 1]`.

        Raises:
            RequestError: fewer than 2 or more than `size` ids, or an id out of range.
        """
        tokens = np.asarray(ids)
        vocabulary = self._model.config.vocab_size
        if tokens.ndim != 1 or not 2 <= len(tokens) <= self._size:
            raise RequestError(f"text of {tokens.size} tokens, expected from 2 to {self._size}; change its length")
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise RequestError(f"ids span {tokens.min()} to {tokens.max()}, expected 0 to {vocabulary - 1}")
        padded = np.zeros(self._size, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(self._program(params, jnp.asarray(padded), jnp.int32(len(tokens))))[: len(tokens) - 1]

    def _run(self, params: Any, ids: Int[Array, " P"], length: Int[Array, ""]) -> Float[Array, " padded"]:
        model: Any = self._model
        rows = self._chunk
        cache = init_cache(model.config, model.numerics, 1, self._size, rows)
        padded = jnp.pad(ids, (0, -self._size % rows + 1))

        def one(logits: Array, token: Array) -> Array:
            return token_logprob(logits[0], token[0])[None]

        def chunk(carry: Any) -> Any:
            done, cache, scores = carry
            tokens = lax.dynamic_slice_in_dim(padded, done, rows)
            following = lax.dynamic_slice_in_dim(padded, done + 1, rows)
            count = jnp.minimum(rows, length - 1 - done)[None]
            live = jnp.arange(rows, dtype=jnp.int32) < count
            streams, cache = model.apply({"params": params}, tokens[None], cache, cache.length, count)
            logits = model.apply({"params": params}, streams, live[None], method="logits")[0]
            scores = lax.dynamic_update_slice_in_dim(scores, map_rows(one, Live.of(live), logits, following), done, 0)
            return done + rows, commit(cache, cache.length + count), scores

        blank = jnp.zeros(padded.shape[0] - 1, jnp.float32)
        carry = (jnp.int32(0), cache, blank)
        return lax.while_loop(lambda carry: carry[0] < length - 1, chunk, carry)[2]


@functools.cache
def build_score(config: ModelConfig, numerics: Numerics, size: int, chunk: int = 128) -> Score:
    """The scoring program for texts of up to `size` tokens; the same arguments give the same object."""
    return Score(DeepSeekV4(config, numerics), size, chunk)
