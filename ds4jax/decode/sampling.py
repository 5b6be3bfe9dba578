"""Choosing a token from logits: temperature, top-k, top-p, min-p, and noise that depends on seed and position only."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from ds4jax.errors import RequestError
from ds4jax.ops.rows import Live, map_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; values are run-time arrays, so that changing them never recompiles.

    Each field is one number for all sequences or an array `[B]`. The filters apply in the order of the fields, each
    to the distribution that the one before it left:

    temperature: logits are divided by it; 0 keeps the largest logit alone (greedy).
    top_k: the k largest logits stay; 0 = off.
    top_p: the smallest number of tokens, most probable first, whose probabilities sum to at least p; 1 = off.
    min_p: tokens at least p times as probable as the most probable one stay; 0 = off.

    Among equal logits the lower id comes first everywhere, so that the kept set is exact.
    """

    temperature: Any = 0.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0

    def broadcast(self, batch: int) -> Sampling:
        """The same settings as arrays `[B]`, checked.

        Raises:
            RequestError: a value is out of range, or an array is not of length B.
        """
        rules = {
            "temperature": (np.float32, lambda v: v >= 0, "at least 0"),
            "top_k": (np.int32, lambda v: v >= 0, "at least 0"),
            "top_p": (np.float32, lambda v: (v > 0) & (v <= 1), "above 0 and at most 1"),
            "min_p": (np.float32, lambda v: (v >= 0) & (v <= 1), "from 0 to 1"),
        }
        arrays = {}
        for name, (dtype, allowed, words) in rules.items():
            value = np.asarray(getattr(self, name))
            if value.shape not in ((), (batch,)):
                raise RequestError(f"sampling: {name} has shape {value.shape}, expected one number or [{batch}]")
            if dtype is np.int32 and not np.issubdtype(value.dtype, np.integer):
                raise RequestError(f"sampling: {name} = {value}, expected a whole number")
            if not np.all(allowed(value)):
                raise RequestError(f"sampling: {name} = {value}, expected {words}")
            arrays[name] = np.broadcast_to(value.astype(dtype), (batch,))
        return Sampling(**arrays)


GREEDY = Sampling()


def filtered_logits(logits: Float[Array, " V"], sampling: Sampling) -> Float[Array, " V"]:
    """Logits of the distribution that the filters leave: the largest is 0, tokens outside are -inf.

    `sampling` holds scalars. Every filter keeps a prefix of the tokens sorted by falling logit and rising id, so the
    kept set is all tokens up to one (logit, id) pair.
    """
    best = jnp.argmax(logits).astype(jnp.int32)
    ids = jnp.arange(logits.shape[0], dtype=jnp.int32)
    greedy = sampling.temperature == 0
    # Relative to the maximum before dividing: a tiny temperature cannot overflow.
    scaled = (logits - logits[best]) / jnp.where(greedy, jnp.float32(1), sampling.temperature)
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p

    def last_kept() -> tuple[Array, Array]:
        falling, order = lax.sort((-scaled, ids), is_stable=True, num_keys=1)
        mass = jnp.exp(-falling)
        inside = (ids < top_k) | (top_k == 0)
        sums = jnp.cumsum(jnp.where(inside, mass, jnp.float32(0)))
        before = jnp.concatenate([jnp.zeros(1, jnp.float32), sums[:-1]])
        inside &= (before < top_p * sums[-1]) | (top_p >= 1)
        inside &= mass >= min_p
        last = jnp.maximum(jnp.sum(inside, dtype=jnp.int32) - 1, 0)
        return -falling[last], order[last]

    def no_filter() -> tuple[Array, Array]:
        return jnp.float32(-jnp.inf), jnp.int32(logits.shape[0])

    filtering = (top_k > 0) | (top_p < 1) | (min_p > 0)
    value, token = lax.cond(filtering & ~greedy, last_kept, no_filter)
    kept = (scaled > value) | ((scaled == value) & (ids <= token))
    return jnp.where(jnp.where(greedy, ids == best, kept), scaled, -jnp.inf)


def position_noise(key: Key[Array, ""], position: Int[Array, ""], size: int) -> Float[Array, " V"]:
    """Gumbel noise for the token at an absolute position of a request."""
    # "high": with 23 random bits per value a token rarer than 1e-7 could never be drawn.
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32, mode="high")


def sample_token(
    logits: Float[Array, " V"], sampling: Sampling, key: Key[Array, ""], position: Int[Array, ""]
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Draws the token at `position` by the Gumbel-max rule and returns it with its log-probability.

    The noise belongs to the position, so the result depends on the logits, the seed and the position alone: not on
    how many tokens a step evaluates, nor on a draft. The log-probability is the model's own, before any filter.
    """

    def drawn() -> Array:
        return jnp.argmax(filtered_logits(logits, sampling) + position_noise(key, position, logits.shape[0]))

    token = lax.cond(sampling.temperature > 0, drawn, lambda: jnp.argmax(logits)).astype(jnp.int32)
    return token, token_logprob(logits, token)


def token_logprob(logits: Float[Array, " V"], token: Int[Array, ""]) -> Float[Array, ""]:
    """The model's log-probability of a token: log-softmax of the plain logits."""
    return jax.nn.log_softmax(logits)[token]


def sample_rows(
    logits: Float[Array, "B R V"],
    sampling: Sampling,
    keys: Key[Array, " B"],
    position: Int[Array, "B R"],
    live: Bool[Array, "B R"],
) -> tuple[Int[Array, "B R"], Float[Array, "B R"]]:
    """`sample_token` of every live row, one row at a time; `sampling` and `keys` are per sequence.

    Returns tokens and log-probabilities, zero where a row is absent.
    """
    batch, rows, size = logits.shape
    sequence = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), rows)

    def one(row: Array, b: Array, at: Array) -> tuple[Array, Array]:
        token, logprob = sample_token(row[0], jax.tree.map(lambda a: a[b[0]], sampling), keys[b[0]], at[0])
        return token[None], logprob[None]

    tokens, logprobs = map_rows(
        one, Live.of(live.reshape(-1)), logits.reshape(-1, size), sequence, position.reshape(-1)
    )
    return tokens.reshape(batch, rows), logprobs.reshape(batch, rows)
