"""The step of generation: a pure function from state to state, the same for whole generations and for bursts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ds4jax.decode.sampling import sample_rows
from ds4jax.decode.state import DecodeState, Limits, Request
from ds4jax.model.cache import commit, init_cache
from ds4jax.model.transformer import DeepSeekV4

SHARED_ROWS = 8  # largest chunk that shares its program with decoding


@dataclasses.dataclass(frozen=True)
class Steps:
    """Generation with one model within fixed limits; K, the most drafts per step, is 0."""

    model: DeepSeekV4
    limits: Limits

    @property
    def rows(self) -> int:
        """Rows of a step once the prompts are read: 1 + K.

        A small chunk is used for both where absent rows cost nothing, because one program compiles in half the time
        of two.
        """
        shared = self.model.numerics.rows == "loop" and self.limits.chunk <= SHARED_ROWS
        return self.limits.chunk if shared else 1

    def start(self) -> DecodeState:
        """The state before anything is evaluated."""
        size, config = self.limits, self.model.config
        nothing = jnp.zeros(size.batch, jnp.int32)
        return DecodeState(
            tokens=jnp.zeros((size.batch, size.new_tokens), jnp.int32),
            logprobs=jnp.zeros((size.batch, size.new_tokens), jnp.float32),
            length=nothing,
            done=nothing < 0,
            stopped=nothing < 0,
            next=nothing,
            streams=jnp.zeros((size.batch, config.hc_mult, config.hidden_size), jnp.float32),
            cache=init_cache(config, self.model.numerics, size.batch, size.context, size.chunk),
            steps=nothing,
            drafted=jnp.zeros(0, jnp.int32),
            accepted=jnp.zeros(0, jnp.int32),
        )

    def step(self, params: Any, request: Request, state: DecodeState, rows: int) -> DecodeState:
        """Evaluates up to `rows` rows of every sequence that is not done, and chooses what follows.

        A sequence whose prompt is not read yet reads on; the step that finishes it chooses the first new token. Other
        sequences evaluate their next token, which is always right (rows beyond it would be drafts).
        """
        start = state.cache.length
        unread = request.lengths - start
        reading = unread > 0
        count = jnp.where(state.done, 0, jnp.where(reading, jnp.minimum(unread, rows), 1))
        position = start[:, None] + jnp.arange(rows, dtype=jnp.int32)
        prompt = jnp.take_along_axis(request.prompt, jnp.minimum(position, self.limits.prompt - 1), axis=1)
        tokens = jnp.where(reading[:, None], prompt, state.next[:, None])
        result: Any = self.model.apply({"params": params}, tokens, state.cache, start, count)
        streams, cache = result

        # Rows whose successor is wanted: the last of a prompt, or all 1 + K of a sequence that has read its prompt.
        heads = jnp.where(reading, count - 1, 0)[:, None] + jnp.arange(1, dtype=jnp.int32)
        live = ~state.done[:, None] & (unread <= rows)[:, None] & (heads < count[:, None])
        chosen, logprobs = self._choose(params, _take_rows(streams, heads), start[:, None] + heads + 1, live, request)
        after, kept = _append(state, chosen, logprobs, jnp.sum(live, axis=1, dtype=jnp.int32), request)
        good = jnp.where(reading, count, kept)
        last = _take_rows(streams, jnp.maximum(good - 1, 0)[:, None])[:, 0]
        return dataclasses.replace(
            after,
            streams=jnp.where((good > 0)[:, None, None], last, state.streams),
            cache=commit(cache, start + good),
            steps=state.steps + jnp.where(reading | state.done, 0, 1).astype(jnp.int32),
        )

    def _choose(
        self,
        params: Any,
        streams: Float[Array, "B R H D"],
        position: Int[Array, "B R"],
        live: Bool[Array, "B R"],
        request: Request,
    ) -> tuple[Int[Array, "B R"], Float[Array, "B R"]]:
        """The token that follows each row, at `position`, and its log-probability."""
        logits: Any = self.model.apply({"params": params}, streams, live, method="logits")
        return sample_rows(logits, request.sampling, request.keys, position, live)


def _take_rows(streams: Float[Array, "B R H D"], rows: Int[Array, "B r"]) -> Float[Array, "B r H D"]:
    return jnp.take_along_axis(streams, rows[:, :, None, None], axis=1)


def _append(
    state: DecodeState,
    chosen: Int[Array, "B R"],
    logprobs: Float[Array, "B R"],
    fresh: Int[Array, " B"],
    request: Request,
) -> tuple[DecodeState, Int[Array, " B"]]:
    """Adds the first `fresh` chosen tokens of each sequence, up to its limit and to the first stop id, that included.

    Returns the state and how many tokens were kept.
    """
    batch, rows = chosen.shape
    offset = jnp.arange(rows, dtype=jnp.int32)
    room = jnp.minimum(fresh, request.limit - state.length)
    stops = jnp.any(chosen[:, :, None] == request.stop_ids, axis=-1) & (offset < room[:, None])
    stopped = jnp.any(stops, axis=1)
    kept = jnp.where(stopped, jnp.argmax(stops, axis=1).astype(jnp.int32) + 1, room)
    place = jnp.where(offset < kept[:, None], state.length[:, None] + offset, state.tokens.shape[1])
    sequence = jnp.arange(batch)[:, None]
    length = state.length + kept
    last = jnp.take_along_axis(chosen, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
    state = dataclasses.replace(
        state,
        tokens=state.tokens.at[sequence, place].set(chosen, mode="drop"),
        logprobs=state.logprobs.at[sequence, place].set(logprobs, mode="drop"),
        length=length,
        done=state.done | stopped | ((fresh > 0) & (length >= request.limit)),
        stopped=state.stopped | stopped,
        next=jnp.where(kept > 0, last, state.next),
    )
    return state, kept
