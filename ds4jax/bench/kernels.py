"""Device time of every kernel at the full model's shapes, against the bytes that it must read."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp

from ds4jax.bench.case import Case
from ds4jax.bench.cases import CASES
from ds4jax.bench.device_time import device_times
from ds4jax.bench.synthetic import nbytes
from ds4jax.config import Numerics
from ds4jax.ops.rows import Live

ROTATED = 400 << 20  # bytes of weights to rotate through: several times the largest L2
REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """One line of the table: device time of a call's kernel, with the bytes of weights and caches read over it."""

    case: str
    rows: int
    kernel: str
    microseconds: float
    nbytes: int

    @property
    def bandwidth(self) -> float:
        """GB/s."""
        return self.nbytes / self.microseconds / 1e3


def copy_bandwidth() -> float:
    """GB/s of copies of 2 GiB on the device, bytes read plus bytes written; the best of three runs."""
    copies = 20
    x = jnp.zeros(1 << 29, jnp.float32)
    size = 2 * x.nbytes
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run(count: int) -> float:
        """Seconds of copies in a row: starting one takes less time than the one before it runs."""
        nonlocal x
        began = time.perf_counter()
        for _ in range(count):
            x = bump(x)
        x.block_until_ready()
        return time.perf_counter() - began

    run(1)
    short, long = (min(run(count) for _ in range(3)) for count in (1, 1 + copies))
    return copies * size / (long - short) / 1e9


def time_case(name: str, case: Case, num: Numerics, rows: int) -> list[Timing]:
    """Mean device time of a call over rotated weights: one line per kernel, and one of their sum."""
    size = nbytes(jax.eval_shape(case.shared, jax.random.key(0)))
    active = case.active(rows) if case.active else size
    copies = max(1, min(8, math.ceil(ROTATED / max(active, 1))))
    make = jax.jit(case.shared)
    shared = [case.parted(make(jax.random.key(i))) for i in range(copies)]
    weights, caches = [read for read, _ in shared], [written for _, written in shared]
    # Rotated rows choose other experts.
    inputs = [jax.jit(case.rows, static_argnums=1)(jax.random.key(100 + i), rows) for i in range(8)]
    live = Live.all(rows)

    # Donated, as in a decode step, for caches to be written in place.
    call = jax.jit(functools.partial(case.call, num), compiler_options=num.compiler_options, donate_argnums=3)

    def run(calls: int) -> None:
        outs = []
        for i in range(calls):
            out, caches[i % copies] = call(live, inputs[i % 8], weights[i % copies], caches[i % copies])
            outs.append(out)
        jax.block_until_ready((outs, caches))

    run(1)
    calls = 8 * REPEATS
    means = {kernel: sum(times) / calls for kernel, times in device_times(lambda: run(calls)).items()}
    parts = sorted(means.items(), key=lambda item: -item[1])
    lines = [*parts, ("all", sum(means.values()))] if len(parts) > 1 else parts
    return [Timing(name, rows, kernel, mean, active) for kernel, mean in lines]


def measure(num: Numerics, names: Iterable[str] = CASES, rows: Iterable[int] = (1, 3)) -> Iterator[Timing]:
    """Times the named cases one after another."""
    for name in names:
        for count in rows:
            yield from time_case(name, CASES[name], num, count)
