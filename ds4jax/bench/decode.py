"""Time of decode steps: the trunk, the head and the choice of the next token, in a loop on the device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ds4jax.bench.synthetic import at_length, make_cache, weight_bytes
from ds4jax.config import ModelConfig, Numerics
from ds4jax.errors import ConfigError, DeviceError
from ds4jax.model.cache import Cache, commit
from ds4jax.model.transformer import DeepSeekV4

REPEATS = 3
SPREAD = 7919  # a prime: rows and steps get different tokens even where random weights always choose the same

Say = Callable[[str], None]
"""Called with a line about what is going on."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of the table.

    context: positions in the cache at the last step. capacity: positions that it has room for.
    milliseconds: of one step of `rows` rows. weight_bytes: read by it. gbps: copy bandwidth of the card, 0 if unknown.
    peak_bytes: most device memory ever in use, weights and cache included; 0 if unknown.
    """

    layers: int
    rows: int
    context: int
    capacity: int
    steps: int
    milliseconds: float
    weight_bytes: int
    gbps: float
    trace_seconds: float
    compile_seconds: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Of one sequence if every row becomes a token, as in plain decoding, where rows = 1."""
        return self.rows * 1000 / self.milliseconds

    @property
    def bandwidth_percent(self) -> float:
        """Weights read in this time, as a share of what a copy moves."""
        return self.weight_bytes / self.milliseconds / 1e4 / self.gbps if self.gbps else 0.0


def check_frontiers(config: ModelConfig, contexts: Sequence[int], rows: Sequence[int], steps: int) -> None:
    """Raises ConfigError unless every run of steps lies inside its context and the model's."""
    needed = max(rows) * steps + config.sliding_window
    if min(rows) < 1 or steps < 1:
        raise ConfigError(f"rows = {list(rows)}, steps = {steps}: expected at least 1 of each")
    for context in contexts:
        if not needed <= context <= config.max_position_embeddings:
            raise ConfigError(
                f"context = {context}: expected {needed} (a window and {steps} steps of {max(rows)} rows) to "
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


def measure(
    config: ModelConfig,
    numerics: Numerics,
    params: dict[str, Any],
    *,
    contexts: Sequence[int],
    rows: Sequence[int],
    steps: int,
    gbps: float,
    say: Say,
) -> Iterator[Step]:
    """Times steps at each context, one program per number of rows; what fails is told and left out.

    All contexts share one cache with room for the largest, filled with random rows. The programs are compiled side by
    side: time of the machine is what a measurement has least of.
    """
    capacity = max(contexts)
    cache = functools.partial(make_cache, config, numerics, capacity, max(rows))
    prepared = []
    with ThreadPoolExecutor(len(rows)) as pool:
        for count in rows:
            with _telling(f"rows {count}", say):
                prepared.append((count, *_prepare(config, numerics, params, cache, count, pool, say)))
    for count, trace_seconds, compiling in prepared:
        with _telling(f"rows {count}", say):
            program, compile_seconds = compiling.result()
            for context, milliseconds in _times(program, params, cache(), count, contexts, steps):
                yield Step(
                    config.num_hidden_layers,
                    count,
                    context,
                    capacity,
                    steps,
                    milliseconds,
                    weight_bytes(params, config, count),
                    gbps,
                    trace_seconds,
                    compile_seconds,
                    peak_bytes(),
                )


@contextlib.contextmanager
def _telling(what: str, say: Say) -> Iterator[None]:
    """A program that does not compile or run costs its own lines of the table, not the others."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        say(f"{what}: failed: {type(error).__name__}: {reason}")


def _prepare(
    config: ModelConfig,
    numerics: Numerics,
    params: Any,
    cache: Callable[[], Cache],
    rows: int,
    pool: ThreadPoolExecutor,
    say: Say,
) -> tuple[float, Future[tuple[Any, float]]]:
    """Seconds that tracing and lowering took, and the program with the seconds that compiling will have taken."""
    began = time.perf_counter()
    jitted = jax.jit(
        decode_loop(config, numerics, rows), donate_argnums=(1, 2), compiler_options=numerics.compiler_options
    )
    tokens = jax.ShapeDtypeStruct((1, rows), jnp.int32)
    lowered = jitted.lower(params, tokens, jax.eval_shape(cache), jnp.int32(0))
    seconds = time.perf_counter() - began
    say(f"rows {rows}: traced and lowered in {seconds:.1f} s")

    def compile() -> tuple[Any, float]:
        began = time.perf_counter()
        program = lowered.compile()
        elapsed = time.perf_counter() - began
        usage = program.memory_analysis()
        temporary = 0 if usage is None else usage.temp_size_in_bytes
        say(f"rows {rows}: compiled in {elapsed:.1f} s, {temporary / 2**20:.1f} MiB of temporaries")
        return program, elapsed

    return seconds, pool.submit(compile)


def _times(
    program: Any, params: Any, cache: Cache, rows: int, contexts: Sequence[int], steps: int
) -> Iterator[tuple[int, float]]:
    """Milliseconds of a step at each context."""
    state = jnp.arange(rows, dtype=jnp.int32)[None], cache

    def run(context: int, count: int) -> float:
        """Seconds that `count` steps take, the last of which ends at `context`."""
        nonlocal state
        tokens, cache = state
        state = jax.block_until_ready((tokens, commit(cache, at_length(context - count * rows))))
        began = time.perf_counter()
        state = jax.block_until_ready(program(params, *state, jnp.int32(count)))
        return time.perf_counter() - began

    for context in contexts:
        run(context, 2)
        if not bool(jnp.isfinite(state[1].layers[-1].raw).all()):
            raise DeviceError(f"context {context}: the last layer's rows are not finite, so times mean nothing")
        # What a call costs beside its steps drops out of the difference.
        short, long = (min(run(context, count) for _ in range(REPEATS)) for count in (1, 1 + steps))
        yield context, (long - short) / steps * 1e3


def peak_bytes() -> int:
    """Most device memory ever in use; 0 where the device does not tell."""
    return int((jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))
