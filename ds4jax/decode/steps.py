"""The step of generation: a pure function from state to state, the same for whole generations and for bursts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ds4jax.decode.sampling import draft_rows, sample_rows, verified_rows
from ds4jax.decode.speculation import Speculation
from ds4jax.decode.state import DecodeState, Limits, Request
from ds4jax.model.cache import Cache, commit, init_cache
from ds4jax.model.transformer import DeepSeekV4
from ds4jax.ops import absent_rows_are_free, implementation

SHARED_ROWS = 8  # largest chunk that shares its program with decoding


@dataclasses.dataclass(frozen=True)
class Steps:
    """Generation with one model within fixed limits."""

    model: DeepSeekV4
    limits: Limits
    speculation: Speculation

    @property
    def rows(self) -> int:
        """Rows of a step once the prompts are read: 1 + K, or more where a step also reads prompts."""
        return max(self.limits.chunk, 1 + self.speculation.drafts) if self._shared else 1 + self.speculation.drafts

    @property
    def chunk(self) -> int:
        """Rows of a step that reads prompts."""
        return self.rows if self._shared else self.limits.chunk

    @property
    def _shared(self) -> bool:
        """Whether both kinds of step are one: a small chunk where absent rows cost nothing.

        One program compiles in half the time of two.
        """
        return absent_rows_are_free(self.model.numerics) and self.limits.chunk <= SHARED_ROWS

    @property
    def _together(self) -> bool:
        """Whether tokens are chosen for all rows at once: on a GPU, where every turn of a loop waits for the host."""
        return implementation(self.model.numerics, "linear") == "pallas"

    def start(self) -> DecodeState:
        """The state before anything is evaluated."""
        size, config = self.limits, self.model.config
        nothing = jnp.zeros(size.batch, jnp.int32)
        by_depth = jnp.zeros((size.batch, self.speculation.drafts), jnp.int32)
        return DecodeState(
            tokens=jnp.zeros((size.batch, size.new_tokens), jnp.int32),
            logprobs=jnp.zeros((size.batch, size.new_tokens), jnp.float32),
            length=nothing,
            done=nothing < 0,
            stopped=nothing < 0,
            next=nothing,
            streams=jnp.zeros((size.batch, config.hc_mult, config.hidden_size), jnp.float32),
            cache=init_cache(config, self.model.numerics, size.batch, size.context, max(self.rows, self.chunk)),
            steps=nothing,
            drafted=by_depth,
            accepted=by_depth,
            acceptance=jnp.ones(by_depth.shape, jnp.float32),
        )

    def step(self, params: Any, request: Request, state: DecodeState, rows: int) -> DecodeState:
        """Evaluates up to `rows` rows of every sequence that is not done, and chooses what follows.

        A sequence whose prompt is not read yet reads on; the step that finishes it chooses the first new token. Other
        sequences evaluate their next token, which is always right, and drafts of the tokens after it: the token chosen
        after a row is right if the row is, and a row is right if it holds the token chosen before it.
        """
        # A step that only reads prompts drafts nothing, so that it compiles sooner.
        drafts = self.speculation.drafts if rows == self.rows else 0
        start = state.cache.length
        unread = request.lengths - start
        reading = unread > 0
        depth = jnp.minimum(self.speculation.depth(state.acceptance), request.limit - state.length - 1)
        depth = jnp.where(reading | state.done, 0, jnp.minimum(depth, drafts))
        count = jnp.where(state.done, 0, jnp.where(reading, jnp.minimum(unread, rows), 1 + depth))
        position = start[:, None] + jnp.arange(rows, dtype=jnp.int32)
        prompt = jnp.take_along_axis(request.prompt, jnp.minimum(position, self.limits.prompt - 1), axis=1)
        drafted, odds, cache = self._draft(params, request, state, depth, drafts)
        guesses = jnp.concatenate([state.next[:, None], drafted], axis=1)
        guesses = jnp.pad(guesses, [(0, 0), (0, rows - 1 - drafts)])
        tokens = jnp.where(reading[:, None], prompt, guesses)
        result: Any = self.model.apply({"params": params}, tokens, cache, start, count)
        streams, cache = result

        # Rows whose successor is wanted: the last of a prompt, or all of a sequence that has read its prompt.
        heads = jnp.where(reading, count - 1, 0)[:, None] + jnp.arange(1 + drafts, dtype=jnp.int32)
        live = ~state.done[:, None] & (unread <= rows)[:, None] & (heads < count[:, None])
        last = _take_rows(streams, jnp.minimum(heads, rows - 1))
        chosen, logprobs = self._choose(params, last, start[:, None] + heads + 1, live, request, drafted, odds)
        equal = (chosen[:, :drafts] == drafted) & (jnp.arange(drafts, dtype=jnp.int32) < depth[:, None])
        accepted = jnp.sum(jnp.cumprod(equal.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
        after, kept = _append(state, chosen, logprobs, live[:, 0].astype(jnp.int32) + accepted, request)
        good = jnp.where(reading, count, kept)

        # The block's rows of the tokens that stay, from the trunk's streams: those of the drafts came from its own.
        before = jnp.concatenate([state.streams[:, None], streams], axis=1)
        if self.speculation.drafts:
            cache = self._draft_method("draft_prefill", params, tokens, before[:, :-1], cache, start, good)
        index = jnp.arange(self.speculation.drafts, dtype=jnp.int32)
        became_tokens = jnp.where(reading, 0, kept - 1)
        return dataclasses.replace(
            after,
            streams=_take_rows(before, good[:, None])[:, 0],
            cache=commit(cache, start + good),
            steps=state.steps + jnp.where(reading | state.done, 0, 1).astype(jnp.int32),
            drafted=state.drafted + (index < depth[:, None]).astype(jnp.int32),
            accepted=state.accepted + (index < became_tokens[:, None]).astype(jnp.int32),
            acceptance=self.speculation.learn(state.acceptance, depth, accepted),
        )

    def _draft(
        self, params: Any, request: Request, state: DecodeState, depth: Int[Array, " B"], most: int
    ) -> tuple[Int[Array, "B K"], Float[Array, "B K+1 V"] | None, Cache]:
        """The first `depth` tokens after `next`, as the MTP block would choose them, and the cache with its rows.

        The first row pairs `next` with the trunk's streams; each further row pairs the draft before it with the
        block's own streams, one position on. Coupled drafts are chosen from the block's logits as the trunk's tokens
        are from its own, with the same noise. Otherwise the distributions that they were drawn from come with them, 0
        where there is no draft, as after the last of them.
        """
        batch = depth.shape[0]
        drafted, odds = jnp.zeros((batch, most), jnp.int32), None
        if most == 0:
            return drafted, odds, state.cache
        if self.model.numerics.accept == "rejection":
            odds = jnp.zeros((batch, most + 1, self.model.config.vocab_size), jnp.float32)

        def one(index: Array, carry: Any) -> Any:
            token, streams, cache, drafted, odds = carry
            position, live = (state.cache.length + index)[:, None], (index < depth)[:, None]
            logits, streams, cache = self._draft_method(
                "draft", params, token, streams, cache, position[:, 0], live[:, 0].astype(jnp.int32)
            )
            chance = request.sampling, request.keys, position + 1, live
            if odds is None:
                token, _ = sample_rows(logits, *chance, together=self._together)
            else:
                token, drawn_from = draft_rows(logits, *chance, together=self._together)
                odds = lax.dynamic_update_slice(odds, drawn_from, (jnp.int32(0), index, jnp.int32(0)))
            return token, streams, cache, lax.dynamic_update_slice(drafted, token, (jnp.int32(0), index)), odds

        carry = state.next[:, None], state.streams[:, None], state.cache, drafted, odds
        _, _, cache, drafted, odds = lax.fori_loop(0, jnp.max(depth), one, carry)
        return drafted, odds, cache

    def _draft_method(self, name: str, params: Any, *arguments: Any) -> Any:
        return self.model.apply({"params": params}, *arguments, method=name)

    def _choose(
        self,
        params: Any,
        streams: Float[Array, "B R H D"],
        position: Int[Array, "B R"],
        live: Bool[Array, "B R"],
        request: Request,
        drafted: Int[Array, "B K"],
        odds: Float[Array, "B R V"] | None,
    ) -> tuple[Int[Array, "B R"], Float[Array, "B R"]]:
        """The token that follows each row, at `position`, and its log-probability; drafts as from `_draft`."""
        logits: Any = self.model.apply({"params": params}, streams, live, method="logits")
        chance = request.sampling, request.keys, position, live
        if odds is None:
            return sample_rows(logits, *chance, together=self._together)
        drafts = jnp.pad(drafted, [(0, 0), (0, 1)])
        return verified_rows(logits, drafts, odds, *chance, together=self._together)


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
