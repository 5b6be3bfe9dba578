"""Speculation: after every step, the cache and the logits are those of steps without drafts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from speculating import (
    CONFIG,
    HOT,
    LIMITS,
    PARAMS,
    PROMPT,
    QUICK,
    Planned,
    plain,
    plan,
    planned,
    program,
    tokens_of,
)
from test_generate import check_updated_in_place
from test_strict import visible

from ds4jax.decode.speculation import Speculation
from ds4jax.decode.state import DecodeState, Limits
from ds4jax.decode.steps import Steps

MOST = 250
TRACED: list[Any] = []


class Observed(Planned):
    """Leaves the logits of the step that is being traced in `TRACED`."""

    def logits(self, streams: Any, live: Any) -> Any:
        TRACED[:] = [super().logits(streams, live)]
        return TRACED[0]


@functools.cache
def observed(drafts: int) -> Any:
    """The start and the step: `(params, request, state) -> (state, logits [B, 1 + K, V])`."""
    steps = Steps(Observed(CONFIG, QUICK), LIMITS, Speculation(drafts))

    def step(params: Any, request: Any, state: DecodeState) -> Any:
        return steps.step(params, request, state, steps.rows), TRACED[0]

    return jax.jit(steps.start), jax.jit(step, compiler_options=QUICK.compiler_options)


def walk(drafts: int, params: Any) -> Iterator[tuple[int, int, DecodeState, np.ndarray]]:
    """Every step after the prompt: committed length before and after it, state and logits."""
    start, step = observed(drafts)
    request = program("off").prepare(PROMPT, sampling=HOT, key=7, max_new_tokens=MOST)
    state = start()
    while not bool(state.done[0]):
        before = int(state.cache.length[0])
        state, logits = step(params, request, state)
        if before >= len(PROMPT):
            yield before, int(state.cache.length[0]), state, np.asarray(logits)[0]


def mtp_rows(state: DecodeState, length: int) -> np.ndarray:
    """Rows of the block's ring that a draft at position `length` sees."""
    assert state.cache.mtp is not None
    ring = np.asarray(state.cache.mtp.raw[0])
    return ring[np.arange(max(1, length - CONFIG.sliding_window + 1), length) % len(ring)]


def test_every_rollback():
    """For every number of accepted drafts from every phase of the windows: logits of all committed rows, raw rings,
    compressors and the block's ring, also where a rejected draft had completed a window."""
    answer, drafts = tokens_of(plain("sampled"))[:MOST], 4
    serial, logits = {}, {}
    for before, length, state, rows in walk(0, PARAMS):
        serial[length], logits[before] = visible(state.cache, CONFIG, length), rows[0]
    wrong = (np.array(answer) + 1) % CONFIG.vocab_size
    block = {length: mtp_rows(state, length) for _, length, state, _ in walk(drafts, planned(wrong, len(PROMPT)))}
    assert len(block) == len(serial) == MOST - 1
    # 8, the ratio of the HCA layer, is a multiple of 4, that of the CSA layer.
    phases = max(CONFIG.compress_ratios)
    assert set(CONFIG.compress_ratios) == {0, 4, phases} and phases % 4 == 0
    seen, every = set(), {(accepted, phase) for accepted in range(drafts + 1) for phase in range(phases)}
    for seed in range(16):
        if seen == every:
            break
        for before, length, state, rows in walk(drafts, planned(plan(answer, drafts, seed)[0])):
            for row, position in zip(rows, range(before, length), strict=False):
                np.testing.assert_array_equal(row, logits[position])
            for got, want in zip(visible(state.cache, CONFIG, length), serial[length], strict=True):
                np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(mtp_rows(state, length), block[length])
            seen.add((length - before - 1, before % phases))
    assert seen == every


def test_cache_is_updated_in_place():
    check_updated_in_place(program(2, limits=Limits(batch=1, prompt=8, new_tokens=60_000, chunk=3)), PARAMS)
