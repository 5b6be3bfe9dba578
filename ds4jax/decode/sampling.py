"""Choosing a token from logits: temperature, top-k, top-p, min-p, and noise that depends on seed and position only.

Drafts are chosen and judged here too, by either rule of `Numerics.accept`. Coupled drafts are drawn from the draft's
logits as tokens are from the model's, with the same noise: there is nothing to do but `sample_rows` for both. Rejection
has `draft_rows` and `verified_rows`. By either rule a draft was right if the token chosen at its position equals it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from ds4jax.errors import RequestError
from ds4jax.ops.rows import Live, map_rows
from ds4jax.ops.sums import parted_sum


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

    @property
    def filters(self) -> Any:
        """Whether any filter is on."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))

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


def filtered_logits(logits: Float[Array, " V"], sampling: Sampling, *, filters: bool = True) -> Float[Array, " V"]:
    """Logits of the distribution that the filters leave: the largest is 0, tokens outside are -inf.

    `sampling` holds scalars. Every filter keeps a prefix of the tokens sorted by falling logit and rising id, so the
    kept set is all tokens up to one (logit, id) pair. Without `filters` there are none but the temperature.
    """
    best = jnp.argmax(logits).astype(jnp.int32)
    ids = jnp.arange(logits.shape[0], dtype=jnp.int32)
    greedy = sampling.temperature == 0
    # A product, because XLA divides rows one way and a single row another. The smallest normal number: 1 / T is finite.
    factor = 1.0 / jnp.maximum(jnp.where(greedy, jnp.float32(1), sampling.temperature), np.finfo(np.float32).tiny)
    # Relative to the maximum: a tiny temperature cannot overflow.
    scaled = (logits - logits[best]) * factor
    if not filters:
        return jnp.where(greedy & (ids != best), -jnp.inf, scaled)
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

    value, token = lax.cond(sampling.filters, last_kept, no_filter)
    kept = (scaled > value) | ((scaled == value) & (ids <= token))
    return jnp.where(jnp.where(greedy, ids == best, kept), scaled, -jnp.inf)


# Rejection needs further noise at a position, independent of that of its token; no position reaches these numbers.
DRAFTING, JUDGING = np.uint32(2**32 - 1), np.uint32(2**32 - 2)


def position_noise(key: Key[Array, ""], position: Int[Array, ""], size: int) -> Float[Array, " V"]:
    """Gumbel noise for the token at an absolute position of a request."""
    # "high": with 23 random bits per value a token rarer than 1e-7 could never be drawn.
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32, mode="high")


def sample_token(
    logits: Float[Array, " V"],
    sampling: Sampling,
    key: Key[Array, ""],
    position: Int[Array, ""],
    *,
    filters: bool = True,
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Draws the token at `position` by the Gumbel-max rule and returns it with its log-probability.

    The noise belongs to the position, so the result depends on the logits, the seed and the position alone: not on
    how many tokens a step evaluates, nor on a draft. The log-probability is the model's own, before any filter.
    """

    def drawn() -> Array:
        kept = filtered_logits(logits, sampling, filters=filters)
        return jnp.argmax(kept + position_noise(key, position, logits.shape[0]))

    token = lax.cond(sampling.temperature > 0, drawn, lambda: jnp.argmax(logits)).astype(jnp.int32)
    return token, token_logprob(logits, token)


def log_probabilities(logits: Float[Array, " V"]) -> Float[Array, " V"]:
    """The model's own log-probabilities: log-softmax of the plain logits, the sum in the order of `parted_sum`."""
    relative = logits - jnp.max(logits)
    return relative - jnp.log(parted_sum(jnp.exp(relative)))


def token_logprob(logits: Float[Array, " V"], token: Int[Array, ""]) -> Float[Array, ""]:
    """That of one token."""
    return log_probabilities(logits)[token]


def draft_token(
    logits: Float[Array, " V"],
    sampling: Sampling,
    key: Key[Array, ""],
    position: Int[Array, ""],
    *,
    filters: bool = True,
) -> tuple[Int[Array, ""], Float[Array, " V"]]:
    """Draws a draft with noise of its own; returns it with the distribution that it was drawn from."""
    kept = filtered_logits(logits, sampling, filters=filters)
    noise = position_noise(jax.random.fold_in(key, DRAFTING), position, logits.shape[0])
    return jnp.argmax(kept + noise).astype(jnp.int32), jax.nn.softmax(kept)


def verified_token(
    logits: Float[Array, " V"],
    draft: Int[Array, ""],
    odds: Float[Array, " V"],
    sampling: Sampling,
    key: Key[Array, ""],
    position: Int[Array, ""],
    *,
    filters: bool = True,
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The draft, or a token in its place, distributed as that of `sample_token` is; and its log-probability.

    `odds` is the distribution that the draft was drawn from; where it is 0 there is no draft, and the token is that of
    `sample_token`. A draft d stays with probability min(1, p(d) / odds(d)), p being the filtered distribution of the
    logits; otherwise the token is drawn from max(0, p - odds), normalised (Leviathan et al., arXiv 2211.17192, and Chen
    et al., arXiv 2302.01318).
    """
    kept = filtered_logits(logits, sampling, filters=filters)
    chances = jax.nn.softmax(kept)
    judged = jax.random.fold_in(jax.random.fold_in(key, JUDGING), position)
    drafted = odds[draft] > 0
    stays = drafted & (jax.random.uniform(judged, (), jnp.float32) * odds[draft] < chances[draft])
    left = jnp.log(jnp.maximum(chances - odds, jnp.float32(0)))
    # Nothing is left if the two distributions differ by rounding alone.
    left = jnp.where(drafted & jnp.any(left > -jnp.inf), left, kept)
    drawn = jnp.argmax(left + position_noise(key, position, logits.shape[0])).astype(jnp.int32)
    token = jnp.where(stays, draft, drawn)
    return token, token_logprob(logits, token)


def sample_rows(
    logits: Float[Array, "B R V"],
    sampling: Sampling,
    keys: Key[Array, " B"],
    position: Int[Array, "B R"],
    live: Bool[Array, "B R"],
    *,
    together: bool = False,
) -> tuple[Int[Array, "B R"], Float[Array, "B R"]]:
    """`sample_token` of every live row; `sampling` and `keys` are per sequence.

    Rows are taken one at a time, or all `together` where no filter is on: the same values either way. One at a time,
    absent rows cost nothing; together, there is no loop, which on a GPU waits for the host at every turn.

    Returns tokens and log-probabilities, zero where a row is absent.
    """
    return _each_row(sample_token, together, sampling, keys, position, live, logits)


def draft_rows(
    logits: Float[Array, "B R V"],
    sampling: Sampling,
    keys: Key[Array, " B"],
    position: Int[Array, "B R"],
    live: Bool[Array, "B R"],
    *,
    together: bool = False,
) -> tuple[Int[Array, "B R"], Float[Array, "B R V"]]:
    """`draft_token` of every live row, as `sample_rows`."""
    return _each_row(draft_token, together, sampling, keys, position, live, logits)


def verified_rows(
    logits: Float[Array, "B R V"],
    drafts: Int[Array, "B R"],
    odds: Float[Array, "B R V"],
    sampling: Sampling,
    keys: Key[Array, " B"],
    position: Int[Array, "B R"],
    live: Bool[Array, "B R"],
    *,
    together: bool = False,
) -> tuple[Int[Array, "B R"], Float[Array, "B R"]]:
    """`verified_token` of every live row, as `sample_rows`."""
    return _each_row(verified_token, together, sampling, keys, position, live, logits, drafts, odds)


def _each_row(
    function: Callable[..., Any],
    together: bool,
    sampling: Sampling,
    keys: Key[Array, " B"],
    position: Int[Array, "B R"],
    live: Bool[Array, "B R"],
    *rows: Shaped[Array, "B R ..."],
) -> Any:
    """Applies `function(*rows, sampling, key, position)` to every live row; zeros where a row is absent."""
    batch, per_sequence = live.shape
    sequence = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), per_sequence)

    def flat(a: Array) -> Array:
        return a.reshape(-1, *a.shape[2:])

    alive, arguments = Live.of(flat(live)), (sequence, *map(flat, (position, *rows)))

    def one(filters: bool, b: Array, at: Array, *row: Array) -> Any:
        settings = jax.tree.map(lambda a: a[b], sampling)
        return function(*row, settings, keys[b], at, filters=filters)

    def in_turn() -> Any:
        def alone(*arrays: Array) -> Any:
            return jax.tree.map(lambda a: a[None], one(True, *(a[0] for a in arrays)))

        return map_rows(alone, alive, *arguments)

    def at_once() -> Any:
        def kept(a: Array) -> Array:
            mask = alive.mask.reshape(-1, *[1] * (a.ndim - 1))
            return jnp.where(mask, a, jnp.zeros((), a.dtype))

        return jax.tree.map(kept, jax.vmap(functools.partial(one, False))(*arguments))

    results = lax.cond(jnp.any(live & sampling.filters[:, None]), in_turn, at_once) if together else in_turn()
    return jax.tree.map(lambda a: a.reshape(batch, per_sequence, *a.shape[1:]), results)
