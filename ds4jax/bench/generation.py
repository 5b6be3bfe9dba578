"""Time of generation as it is run: the whole step with drafts whose acceptance is simulated, and reading of prompts."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ds4jax.bench.decode import check_finite, milliseconds
from ds4jax.bench.measure import REPEATS, Job, Line, Subject
from ds4jax.bench.synthetic import at_length, make_cache, weight_bytes
from ds4jax.checkpoint_drafts import with_draft_head
from ds4jax.config import ModelConfig
from ds4jax.decode.generate import Generate
from ds4jax.decode.sampling import Sampling
from ds4jax.decode.speculation import MOST_DRAFTS, Speculation
from ds4jax.decode.state import DecodeState, Generation, Limits, Request
from ds4jax.decode.steps import Steps
from ds4jax.engine import default_chunk
from ds4jax.errors import ConfigError
from ds4jax.model.cache import Cache, commit
from ds4jax.model.transformer import DeepSeekV4

# Random weights give nearly every token the same chance, so that tokens and experts differ from step to step.
SAMPLING = Sampling(temperature=1.0)
SIMULATION = np.uint32(2**32 - 3)  # sets the noise of acceptance apart from that of tokens


@dataclasses.dataclass(frozen=True)
class SimulatedSteps(Steps):
    """The step of generation, but whether a draft is right is drawn by lot.

    accept: chance of the draft at each depth, those before it being right.
    """

    accept: tuple[float, ...]

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
        """The true choice is made, and then replaced where a row follows a draft."""
        chosen, logprobs = super()._choose(params, streams, position, live, request, drafted, odds)
        depth = drafted.shape[1]
        if depth == 0:
            return chosen, logprobs

        def lots(key: Key[Array, ""], at: Int[Array, ""]) -> Float[Array, " K"]:
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, SIMULATION), at), (depth,))

        right = jax.vmap(lots)(request.keys, position[:, 0]) < jnp.asarray(self.accept[:depth], jnp.float32)
        own = chosen[:, :depth]
        other = jnp.where(own == drafted, (own + 1) % self.model.config.vocab_size, own)
        simulated = jnp.where(live[:, 1:], jnp.where(right, drafted, other), own)
        return jnp.concatenate([simulated, chosen[:, depth:]], axis=1), logprobs


def expected_tokens(accept: Sequence[float]) -> float:
    """Tokens per step that these chances promise."""
    return 1 + float(np.sum(np.cumprod(accept)))


def check_acceptance(drafts: Sequence[int], accept: Sequence[float]) -> None:
    """Raises ConfigError unless there is a chance for every draft, and drafts for every chance."""
    if not all(0 <= number <= MOST_DRAFTS for number in drafts):
        raise ConfigError(f"--drafts: {list(drafts)}, expected numbers from 0 to {MOST_DRAFTS}")
    most = max(drafts, default=0)
    if len(accept) != most:
        raise ConfigError(
            f"--accept: {len(accept)} rates and at most {most} drafts, expected a rate for every draft, for instance "
            "--drafts 0,1,2 --accept 0.79,0.58"
        )
    if not all(0 <= rate <= 1 for rate in accept):
        raise ConfigError(f"--accept: {list(accept)}, expected rates from 0 to 1")


def check_draft_rows(config: ModelConfig, drafts: Sequence[int], rows: Sequence[int]) -> None:
    """Raises ConfigError unless these are numbers of tokens, and there are drafts to be one of them."""
    if rows and not any(drafts):
        raise ConfigError(f"--draft-rows: {list(rows)} and no drafts, expected --drafts; add them")
    if not all(1 <= number <= config.vocab_size for number in rows):
        raise ConfigError(f"--draft-rows: {list(rows)}, expected numbers from 1 to {config.vocab_size}")


def with_draft_rows(subject: Subject, rows: int) -> Subject:
    """A subject whose drafts are one of `rows` tokens, spread evenly over the vocabulary; itself if that is all."""
    size = subject.config.vocab_size
    if rows == size:
        return subject
    ids = np.arange(rows) * size // rows
    return dataclasses.replace(subject, params=with_draft_head(subject.params, ids.astype(np.int32)))


def check_prompts(config: ModelConfig, prompts: Sequence[int]) -> None:
    """Raises ConfigError unless the model can read prompts of these lengths."""
    most = config.max_position_embeddings - 1
    if not all(1 <= length <= most for length in prompts):
        raise ConfigError(f"--prefill: {list(prompts)}, expected lengths from 1 to {most}")


def generation_job(
    subject: Subject, drafts: int, accept: Sequence[float], contexts: Sequence[int], steps: int, seed: int
) -> Job:
    """Steps of generation with `drafts` drafts each, at each context of a cache filled with random rows."""
    draft_rows = subject.params["mtp"].get("head", subject.params["head"]).shape[0] if drafts else 0
    config, numerics, params, capacity = subject.config, subject.numerics, subject.params, max(contexts)
    rates = tuple(accept[:drafts])
    limits = Limits(batch=1, prompt=1, new_tokens=(1 + drafts) * (2 + steps), chunk=1, context=capacity)
    make_steps = functools.partial(SimulatedSteps, accept=rates)
    generate = Generate(DeepSeekV4(config, numerics), limits, Speculation(drafts), make_steps)
    request, nobody = generate.prepare(np.zeros(1, np.int32), sampling=SAMPLING, key=seed), jnp.zeros(1, bool)

    def lower() -> Any:
        state = jax.eval_shape(generate.programs.start)
        return generate.programs.run.lower(params, request, state, jnp.int32(0), nobody)

    def lines(program: Any) -> Iterator[Line]:
        cache = make_cache(config, numerics, capacity, 1 + drafts)
        state = _fresh(jax.eval_shape(generate.programs.start), cache)
        seen = Generation.of(state)

        def run(context: int, count: int) -> float:
            """Seconds that `count` steps take; however many drafts are right, the last ends within `context`."""
            nonlocal state, seen
            start = at_length(context - count * (1 + drafts))
            state = jax.block_until_ready(_fresh(state, commit(state.cache, start)))
            began = time.perf_counter()
            state, seen = jax.block_until_ready(program(params, request, state, jnp.int32(count), nobody))
            return time.perf_counter() - began

        for context in contexts:
            run(context, 2)
            check_finite(state.cache, context)
            taken = milliseconds(functools.partial(run, context), steps)
            yield Line(
                measure="generation",
                acceptance=f"simulated {','.join(map(str, rates))}" if drafts else "no drafts",
                layers=config.num_hidden_layers,
                rows=1 + drafts,
                drafts=drafts,
                context=context,
                capacity=capacity,
                steps=steps,
                milliseconds=taken,
                tokens_per_step=int(seen.length[0]) / int(seen.steps[0]),
                expected_tokens=expected_tokens(rates),
                weight_bytes=weight_bytes(params, config, 1 + drafts, drafts),
                gbps=subject.gbps,
                draft_rows=draft_rows,
            )

    return Job(f"drafts {drafts}" + (f" of {draft_rows} tokens" if drafts else ""), lower, lines)


def _fresh(like: DecodeState, cache: Cache) -> DecodeState:
    """A state of the shapes of another before its first token: zeros, but for the cache."""
    rest: Any = dataclasses.replace(like, cache=None)  # type: ignore[arg-type]
    return dataclasses.replace(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest), cache=cache)


def prefill_job(subject: Subject, prompts: Sequence[int], seed: int) -> Job:
    """Reading of random prompts of these lengths into an empty cache, and the choice of the token after each."""
    config, numerics, params = subject.config, subject.numerics, subject.params
    limits = Limits(batch=1, prompt=max(prompts), new_tokens=1, chunk=default_chunk(numerics))
    generate = Generate(DeepSeekV4(config, numerics), limits)
    nobody = jnp.zeros(1, bool)
    tokens = np.random.default_rng(seed).integers(config.vocab_size, size=max(prompts), dtype=np.int32)

    def lower() -> Any:
        state = jax.eval_shape(generate.programs.start)
        request = generate.prepare(tokens, sampling=SAMPLING, key=seed)
        return generate.programs.read.lower(params, request, state, jnp.int32(0), nobody)

    def lines(program: Any) -> Iterator[Line]:
        programs = dataclasses.replace(generate.programs, read=program)
        for length in prompts:
            request = generate.prepare(tokens[:length], sampling=SAMPLING, key=seed)

            def run(request: Any = request) -> float:
                began = time.perf_counter()
                jax.block_until_ready(programs.begin(params, request)[1])
                return time.perf_counter() - began

            run()
            seconds, chunks = min(run() for _ in range(REPEATS)), -(-length // programs.chunk)
            yield Line(
                measure="prefill",
                acceptance="no drafts",
                layers=config.num_hidden_layers,
                rows=programs.chunk,
                drafts=0,
                context=length,
                capacity=limits.context,
                steps=chunks,
                milliseconds=seconds * 1e3 / chunks,
                tokens_per_step=length / chunks,
                expected_tokens=length / chunks,
                weight_bytes=weight_bytes(params, config, programs.chunk),
                gbps=subject.gbps,
            )

    return Job("prefill", lower, lines)
