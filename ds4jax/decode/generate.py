"""Compiled generation: a whole answer as one program, or prefill and bursts of steps for streaming."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from ds4jax.config import ModelConfig, Numerics
from ds4jax.decode.sampling import GREEDY, Sampling
from ds4jax.decode.speculation import PLAIN, Speculation, draft_cost
from ds4jax.decode.state import DecodeState, Generation, Limits, Request
from ds4jax.decode.steps import Steps
from ds4jax.errors import RequestError
from ds4jax.model.transformer import DeepSeekV4

KEY_KIND = "threefry2x32"  # named, so that a seed means the same whatever JAX's default is
MOST_STOP_IDS = 16


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of a generation in pieces: `begin`, then `burst` until all sequences are done.

    chunk: prompt tokens that a sequence reads per step.
    start: makes the first state.
    read, run: `(params, request, state, most steps, halt) -> (state, what callers see of it)`, with the rows of a
        prompt chunk and of a step; one and the same where these are equal. The state given in is used up.
    trace_seconds, compile_seconds: what preparing them took, where that was done ahead.
    """

    chunk: int
    start: Any
    read: Any
    run: Any
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0

    def begin(self, params: Any, request: Request) -> tuple[DecodeState, Generation]:
        """Reads all prompts and chooses the first token of each sequence (shorter ones may get some more)."""
        steps = -(-int(np.max(np.asarray(request.lengths))) // self.chunk)
        nobody = jnp.asarray(np.zeros(request.lengths.shape, bool))
        return self.read(params, request, self.start(), jnp.int32(steps), nobody)

    def burst(
        self, params: Any, request: Request, state: DecodeState, steps: int, halt: Any
    ) -> tuple[DecodeState, Generation]:
        """Up to `steps` steps, after ending the sequences in `halt` `[B]`; returns before they are carried out."""
        return self.run(params, request, state, jnp.int32(steps), jnp.asarray(halt))


class Generate:
    """Generation with one model within fixed limits.

    Calling it runs a whole generation as one compiled program; `programs` run the same steps in pieces, for requests
    from `prepare`. Programs are compiled on first use, once per layout of the parameters, or ahead by `compile`.
    """

    def __init__(
        self,
        model: DeepSeekV4,
        limits: Limits,
        speculation: Speculation = PLAIN,
        make_steps: Callable[[DeepSeekV4, Limits, Speculation], Steps] = Steps,
    ) -> None:
        """Raises `ConfigError` if there is to be speculation and the model has no MTP block."""
        self.config, self.limits = model.config, limits
        self._steps = make_steps(model, limits, speculation.check(model.config))
        jit = functools.partial(jax.jit, compiler_options=model.numerics.compiler_options)
        self._whole = jit(self._generate)
        start, chunk, rows = jit(self._steps.start), self._steps.chunk, self._steps.rows
        advance = {n: jit(functools.partial(self._advance, n), donate_argnames="state") for n in {chunk, rows}}
        self.programs = Programs(chunk, start, advance[chunk], advance[rows])

    def __call__(
        self,
        params: Any,
        prompt: Any,
        lengths: Any = None,
        *,
        sampling: Sampling = GREEDY,
        key: Any = 0,
        max_new_tokens: Any = None,
        stop_ids: Sequence[int] = (),
        logprobs: bool = False,
    ) -> Generation:
        """Generates until every sequence has stopped or reached its limit.

        Args:
            prompt: int32 ids `[P]` or `[B, P]`, no longer than the limits allow.
            lengths: real length of each prompt `[B]`; all of P if not given.
            key: a seed, a JAX key, or one of either per sequence. One for all gives each sequence what it would be
                alone.
            max_new_tokens: one number or `[B]`; as many as the limits allow if not given.
            stop_ids: ids that end a sequence.
            logprobs: whether the result includes log-probabilities.

        Raises:
            RequestError: the request does not fit the limits, or an id or a setting is out of range.
        """
        request = self.prepare(
            prompt, lengths, sampling=sampling, key=key, max_new_tokens=max_new_tokens, stop_ids=stop_ids
        )
        result = self._whole(params, request)
        return result if logprobs else dataclasses.replace(result, logprobs=None)

    def prepare(
        self,
        prompt: Any,
        lengths: Any = None,
        *,
        sampling: Sampling = GREEDY,
        key: Any = 0,
        max_new_tokens: Any = None,
        stop_ids: Sequence[int] = (),
    ) -> Request:
        """Checks a request, with the arguments of `__call__`, and brings it to the shapes of the programs."""
        size = self.limits
        ids = np.asarray(prompt)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or ids.shape[0] != size.batch:
            raise RequestError(f"prompt has shape {ids.shape}, expected {size.batch} sequences [{size.batch}, P]")
        counts = np.full(size.batch, ids.shape[1]) if lengths is None else np.asarray(lengths)
        if counts.shape != (size.batch,) or counts.min() < 1 or counts.max() > min(ids.shape[1], size.prompt):
            longest = min(ids.shape[1], size.prompt)
            raise RequestError(f"prompt lengths {counts.tolist()}, expected {size.batch} from 1 to {longest}")
        padded = np.zeros((size.batch, size.prompt), np.int32)
        for row, sequence, count in zip(padded, ids, counts, strict=True):
            row[:count] = sequence[:count]
        if padded.min() < 0 or padded.max() >= self.config.vocab_size:
            raise RequestError(
                f"prompt ids span {padded.min()} to {padded.max()}, expected 0 to {self.config.vocab_size - 1}"
            )
        most = np.minimum(size.new_tokens, size.context - counts)
        limit = most if max_new_tokens is None else np.broadcast_to(np.asarray(max_new_tokens), (size.batch,))
        if np.any(limit < 0) or np.any(limit > most):
            raise RequestError(
                f"max_new_tokens = {limit.tolist()} after prompts of {counts.tolist()} tokens, "
                f"expected 0 to {most.tolist()}"
            )
        if len(stop_ids) > MOST_STOP_IDS:
            raise RequestError(f"{len(stop_ids)} stop ids, expected at most {MOST_STOP_IDS}")
        stops = np.full(MOST_STOP_IDS, -1, np.int32)
        stops[: len(stop_ids)] = stop_ids
        return Request(
            prompt=jnp.asarray(padded),
            lengths=jnp.asarray(counts.astype(np.int32)),
            sampling=jax.tree.map(jnp.asarray, sampling.broadcast(size.batch)),
            keys=_keys(key, size.batch),
            limit=jnp.asarray(limit.astype(np.int32)),
            stop_ids=jnp.asarray(stops),
        )

    def compile(self, params: Any) -> Programs:
        """The programs compiled, side by side, before the first request."""
        begun = time.perf_counter()
        chunk, start = self.programs.chunk, self.programs.start
        read, run = self.programs.read, self.programs.run
        request = self.prepare(np.zeros((self.limits.batch, 1), np.int32))
        nobody = jnp.asarray(np.zeros(self.limits.batch, bool))
        inputs = params, request, start(), jnp.int32(0), nobody
        lowered = {program: program.lower(*inputs) for program in {read, run}}
        del inputs
        traced = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            compiled = dict(zip(lowered, pool.map(_compile, lowered.values()), strict=True))
        seconds = time.perf_counter() - traced
        return Programs(chunk, start, compiled[read], compiled[run], traced - begun, seconds)

    def _generate(self, params: Any, request: Request) -> Generation:
        """A whole generation."""

        def unread(state: DecodeState) -> Bool[Array, ""]:
            return jnp.any((state.cache.length < request.lengths) & ~state.done)

        def unfinished(state: DecodeState) -> Bool[Array, ""]:
            return ~jnp.all(state.done)

        def step(rows: int) -> Callable[[DecodeState], DecodeState]:
            return lambda state: self._steps.step(params, request, state, rows)

        state = self._steps.start()
        if self._steps.rows != self._steps.chunk:
            state = lax.while_loop(unread, step(self._steps.chunk), state)
        return Generation.of(lax.while_loop(unfinished, step(self._steps.rows), state))

    def _advance(
        self,
        rows: int,
        params: Any,
        request: Request,
        state: DecodeState,
        most: Int[Array, ""],
        halt: Bool[Array, " B"],
    ) -> tuple[DecodeState, Generation]:
        """Up to `most` steps of `rows` rows."""

        def more(carry: tuple[Array, DecodeState]) -> Bool[Array, ""]:
            return (carry[0] < most) & ~jnp.all(carry[1].done)

        def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
            return carry[0] + 1, self._steps.step(params, request, carry[1], rows)

        state = dataclasses.replace(state, done=state.done | halt)
        _, state = lax.while_loop(more, body, (jnp.int32(0), state))
        return state, Generation.of(state)


@functools.cache
def build_generate(
    config: ModelConfig,
    numerics: Numerics,
    limits: Limits,
    speculative: str | int = "off",
) -> Generate:
    """The generation program for a model within limits; the same arguments give the same, already compiled, object.

    Args:
        speculative: "off", the number of tokens that every step drafts with the model's MTP block, or "auto": as many
            as are worth their time by the numerics' cost of a draft.

    Raises:
        ConfigError: one of these is out of range, or the model has no MTP block to draft with.
    """
    return Generate(DeepSeekV4(config, numerics), limits, Speculation.of(speculative, draft_cost(numerics)))


def _keys(key: Any, batch: int) -> jax.Array:
    """One JAX key per sequence."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape not in ((), (batch,)):
            raise RequestError(f"key has shape {key.shape}, expected one key or [{batch}]")
        return jnp.broadcast_to(key, (batch,))
    seeds = list(key) if isinstance(key, (list, tuple, np.ndarray)) else [key] * batch
    if len(seeds) != batch or not all(0 <= int(seed) < 1 << 64 for seed in seeds):
        raise RequestError(f"key = {key}, expected a seed from 0 to 2^64 - 1, or {batch} of them")
    words = np.array([[int(seed) >> 32, int(seed) & 0xFFFFFFFF] for seed in seeds], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=KEY_KIND)


def _compile(lowered: Any) -> Any:
    return lowered.compile()
