"""What a table of decoding is made of: programs that are compiled side by side, and lines with their times."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from ds4jax.config import ModelConfig, Numerics

REPEATS = 3

Say = Callable[[str], None]
"""Called with a line about what is going on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What is measured: a model, and the copy bandwidth of the card, 0 if unknown."""

    config: ModelConfig
    numerics: Numerics
    params: dict[str, Any]
    gbps: float


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table.

    measure: "rows" (the trunk, the head and the greedy choice), "generation" (the whole step of generation) or
        "prefill". acceptance: what becomes of the rows of a step.
    rows: of a step, or of a chunk of a prompt. context: positions in the cache at the last step; capacity: positions
        that it has room for.
    draft_rows: rows of the head that a draft reads, 0 without drafts.
    milliseconds: of a step or chunk. tokens_per_step: that a step or chunk yielded or read. expected_tokens: what the
        rates of a simulated acceptance promise in its place. weight_bytes: read by it.
    peak_bytes: most device memory ever in use, weights and cache included; 0 if unknown.
    """

    measure: str
    acceptance: str
    layers: int
    rows: int
    drafts: int
    context: int
    capacity: int
    steps: int
    milliseconds: float
    tokens_per_step: float
    expected_tokens: float
    weight_bytes: int
    gbps: float
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0
    peak_bytes: int = 0
    draft_rows: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of one sequence."""
        return self.tokens_per_step * 1000 / self.milliseconds

    @property
    def bandwidth_percent(self) -> float:
        """Weights read in this time, as a share of what a copy moves."""
        return self.weight_bytes / self.milliseconds / 1e4 / self.gbps if self.gbps else 0.0


@dataclasses.dataclass(frozen=True)
class Job:
    """A program and what to do with it.

    what: its name in messages. lower: traces and lowers it. lines: times it, once it is compiled.
    """

    what: str
    lower: Callable[[], Any]
    lines: Callable[[Any], Iterator[Line]]


def measure(jobs: Sequence[Job], say: Say) -> Iterator[Line]:
    """Carries out jobs one after another; what fails is told and left out.

    The programs are compiled side by side: time of the machine is what a measurement has least of.
    """
    prepared = []
    with ThreadPoolExecutor(max(len(jobs), 1)) as pool:
        for job in jobs:
            with _telling(job.what, say):
                prepared.append((job, *_prepare(job, pool, say)))
    for job, trace_seconds, compiling in prepared:
        with _telling(job.what, say):
            program, compile_seconds = compiling.result()
            for line in job.lines(program):
                yield dataclasses.replace(
                    line, trace_seconds=trace_seconds, compile_seconds=compile_seconds, peak_bytes=_peak_bytes()
                )


@contextlib.contextmanager
def _telling(what: str, say: Say) -> Iterator[None]:
    """A program that does not compile or run costs its own lines of the table, not the others."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        say(f"{what}: failed: {type(error).__name__}: {reason}")


def _prepare(job: Job, pool: ThreadPoolExecutor, say: Say) -> tuple[float, Future[tuple[Any, float]]]:
    """Seconds that tracing and lowering took, and the program with the seconds that compiling will have taken."""
    began = time.perf_counter()
    lowered = job.lower()
    seconds = time.perf_counter() - began
    say(f"{job.what}: traced and lowered in {seconds:.1f} s")

    def compile() -> tuple[Any, float]:
        began = time.perf_counter()
        program = lowered.compile()
        elapsed = time.perf_counter() - began
        usage = program.memory_analysis()
        temporary = 0 if usage is None else usage.temp_size_in_bytes
        say(f"{job.what}: compiled in {elapsed:.1f} s, {temporary / 2**20:.1f} MiB of temporaries")
        return program, elapsed

    return seconds, pool.submit(compile)


def _peak_bytes() -> int:
    """Most device memory ever in use; 0 where the device does not tell."""
    return int((jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))
