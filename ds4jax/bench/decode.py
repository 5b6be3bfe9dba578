"""Time of decode steps of some rows: the trunk, the head and the choice of the next token, in a loop on the device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ds4jax.bench.device_time import device_events
from ds4jax.bench.measure import REPEATS, Job, Line, Subject
from ds4jax.bench.stages import Stages, loop_kernels
from ds4jax.bench.synthetic import at_length, make_cache, weight_bytes
from ds4jax.config import ModelConfig, Numerics
from ds4jax.errors import ConfigError, DeviceError
from ds4jax.model.cache import Cache, commit
from ds4jax.model.transformer import DeepSeekV4

SPREAD = 7919  # a prime: rows and steps get different tokens even where random weights always choose the same
PROFILED = 8  # steps of a profile


def check_frontiers(config: ModelConfig, contexts: Sequence[int], rows: Sequence[int], steps: int) -> None:
    """Raises ConfigError unless every run of steps lies inside its context and the model's."""
    if min(rows) < 1 or steps < 1:
        raise ConfigError(f"rows = {list(rows)}, steps = {steps}: expected at least 1 of each")
    needed = max(rows) * (1 + steps) + config.sliding_window
    for context in contexts:
        if not needed <= context <= config.max_position_embeddings:
            raise ConfigError(
                f"context = {context}: expected {needed} (a window and {1 + steps} steps of {max(rows)} rows) to "
                f"{config.max_position_embeddings}; change --context or --steps"
            )


def decode_loop(config: ModelConfig, numerics: Numerics, rows: int) -> Callable[..., Any]:
    """`(params, tokens, cache, steps) -> (tokens, cache)`: steps of `rows` rows, all of which are committed."""
    model = DeepSeekV4(config, numerics)
    offset = jnp.arange(1, rows + 1, dtype=jnp.int32)[None]

    def run(
        params: Any, tokens: Int[Array, "1 rows"], cache: Cache, steps: Int[Array, ""]
    ) -> tuple[Int[Array, "1 rows"], Cache]:
        def step(_: Array, state: tuple[Array, Cache]) -> tuple[Array, Cache]:
            tokens, cache = state
            start, count = cache.length, jnp.full((1,), rows, jnp.int32)
            result: Any = model.apply({"params": params}, tokens, cache, start, count)
            streams, cache = result
            live = jnp.ones((1, rows), bool)
            logits: Any = model.apply({"params": params}, streams, live, method="logits")
            chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            spread = (chosen + SPREAD * (start[:, None] + offset) % config.vocab_size) % config.vocab_size
            return spread, commit(cache, start + count)

        return lax.fori_loop(0, steps, step, (tokens, cache))

    return run


def rows_job(
    subject: Subject, rows: int, contexts: Sequence[int], steps: int, report: Callable[[Stages], None] | None = None
) -> Job:
    """Steps of `rows` rows at each context of a cache with room for the largest, filled with random rows.

    `report` is called with the stages of a step at each context.
    """
    config, numerics, capacity = subject.config, subject.numerics, max(contexts)

    def cache() -> Cache:
        return make_cache(config, numerics, capacity, rows)

    def lower() -> Any:
        jitted = jax.jit(
            decode_loop(config, numerics, rows), donate_argnums=(1, 2), compiler_options=numerics.compiler_options
        )
        tokens = jax.ShapeDtypeStruct((1, rows), jnp.int32)
        return jitted.lower(subject.params, tokens, jax.eval_shape(cache), jnp.int32(0))

    def lines(program: Any) -> Iterator[Line]:
        state = jnp.arange(rows, dtype=jnp.int32)[None], cache()

        def run(context: int, count: int) -> float:
            """Seconds that `count` steps take, the last of which ends at `context`."""
            nonlocal state
            tokens, cache = state
            state = jax.block_until_ready((tokens, commit(cache, at_length(context - count * rows))))
            began = time.perf_counter()
            state = jax.block_until_ready(program(subject.params, *state, jnp.int32(count)))
            return time.perf_counter() - began

        for context in contexts:
            run(context, 2)
            check_finite(state[1], context)
            yield Line(
                measure="rows",
                acceptance="all rows",
                layers=config.num_hidden_layers,
                rows=rows,
                drafts=0,
                context=context,
                capacity=capacity,
                steps=steps,
                milliseconds=milliseconds(functools.partial(run, context), steps),
                tokens_per_step=float(rows),
                expected_tokens=float(rows),
                weight_bytes=weight_bytes(subject.params, config, rows),
                gbps=subject.gbps,
            )
        if report is not None:  # after all times, which a failure here does not cost
            kernels = loop_kernels(program.as_text())
            for context in contexts:
                events = device_events(functools.partial(run, context, PROFILED))
                report(Stages.of(kernels, events, PROFILED, config, rows, context))

    return Job(f"rows {rows}", lower, lines)


def milliseconds(run: Callable[[int], float], steps: int) -> float:
    """Time of a step, from the seconds that a number of steps takes; what a call costs beside its steps drops out."""
    short, long = (min(run(count) for _ in range(REPEATS)) for count in (1, 1 + steps))
    return (long - short) / steps * 1e3


def check_finite(cache: Cache, context: int) -> None:
    """Raises DeviceError unless all rows of the last layer are finite."""
    if not bool(jnp.isfinite(cache.layers[-1].raw).all()):
        raise DeviceError(f"context {context}: the last layer's rows are not finite, so times mean nothing")
