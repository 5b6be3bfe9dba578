"""Speculation: whatever is drafted, however deep, and however much of it is accepted, the answer is the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from speculating import (
    CONFIG,
    HOT,
    LIMITS,
    PARAMS,
    PROMPT,
    QUICK,
    SETTINGS,
    accounted,
    block,
    plain,
    plan,
    planned,
    program,
    same,
    states,
    tokens_of,
)

from ds4jax.checkpoint_drafts import with_draft_head
from ds4jax.decode.sampling import GREEDY, Sampling
from ds4jax.decode.state import Limits
from ds4jax.model.cache import init_cache
from ds4jax.model.transformer import DeepSeekV4

EVERY = pytest.mark.parametrize("drafts", [1, 2, 3, 4])
LISTS = {1: np.array([17]), 3: np.arange(0, CONFIG.vocab_size, 2)}
"""The tokens that a single draft, or one of three, may be; two and four may be any."""


def listed(params: dict[str, Any], drafts: int) -> dict[str, Any]:
    return with_draft_head(params, LISTS[drafts]) if drafts in LISTS else params


# ------------------------------------------------------------------------------------------------- the same answer


@EVERY
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_blocks_own_drafts(drafts, setting):
    params = listed(PARAMS, drafts)
    result = program(drafts)(params, PROMPT, sampling=SETTINGS[setting], key=7, logprobs=True)
    same(result, plain(setting))
    assert np.asarray(result.drafted).min() > 100


@pytest.mark.parametrize("setting", SETTINGS)
def test_hostile_drafts(setting):
    """Weights that overflow: the drafts are worth nothing, and neither are the block's streams and rows."""
    hostile = {**PARAMS, "mtp": jax.tree.map(lambda leaf: leaf * 1e30, block(1))}
    result = program(4)(hostile, PROMPT, sampling=SETTINGS[setting], key=7, logprobs=True)
    same(result, plain(setting))
    assert np.asarray(result.accepted)[0, 0] < np.asarray(result.drafted)[0, 0] / 4


@EVERY
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_accept_length(drafts, setting):
    want, counts = plain(setting), np.zeros(drafts + 1, int)
    answer = tokens_of(want)
    for seed in range(8):
        drafted, lengths = plan(answer, drafts, seed)
        params = listed(planned(drafted), drafts)
        result = program(drafts)(params, PROMPT, sampling=SETTINGS[setting], key=7, logprobs=True)
        same(result, want)
        accepted = np.asarray(result.accepted)[0]
        reached = np.append(int(result.steps[0]), accepted) - np.append(accepted, 0)  # steps by drafts accepted
        counts += lengths
        # The plan ends within K tokens of the answer's end, where the limit cuts the steps.
        assert np.abs(reached - lengths).sum() <= drafts
        if counts.min() >= 200:
            break
    assert counts.min() >= 200


@pytest.mark.parametrize("setting", SETTINGS)
def test_automatic_depth(setting):
    result = program("auto")(PARAMS, PROMPT, sampling=SETTINGS[setting], key=7, logprobs=True)
    same(result, plain(setting))


@pytest.mark.parametrize("chunk", [2, 9])
def test_sequences_with_different_patterns_equal_each_alone(chunk):
    """Own prompts, seeds, settings, plans and limits; with small chunks, some draft while others read their prompts."""
    limits, drafts = dataclasses.replace(LIMITS, batch=4, chunk=chunk), 3
    prompts, seeds, wanted = [[3], PROMPT, list(range(1, 17)), [9, 8, 7]], [1, 2, 3, 4], [300, 250, 200, 150]
    settings = {"temperature": [0.8, 0.8, 0.0, 1.2], "top_p": [0.97, 0.97, 1.0, 1.0], "top_k": [0, 0, 0, 20]}
    padded = np.zeros((4, 16), np.int32)
    alone, plans = [], []
    for b, prompt in enumerate(prompts):
        padded[b, : len(prompt)] = prompt
        one = Sampling(**{name: values[b] for name, values in settings.items()})
        free = program("off")(PARAMS, prompt, sampling=one, key=seeds[b], max_new_tokens=wanted[b], logprobs=True)
        alone.append(free)
        plans.append(plan(tokens_of(free), drafts, b, len(prompt))[0])
    together = program(drafts, limits=limits)(
        {**PARAMS, "plan": jnp.asarray(np.stack(plans))},
        padded,
        [len(prompt) for prompt in prompts],
        sampling=Sampling(**settings),
        key=seeds,
        max_new_tokens=wanted,
        logprobs=True,
    )
    for b in range(4):
        same(together, alone[b], b)
    assert len({tuple(row) for row in np.asarray(together.accepted).tolist()}) == 4


def test_far_positions():
    """A cache of random rows stands for the text so far; most drafts are planned to be right."""
    starts, most = (4_090, 65_530, 262_130, 999_970), 40
    limits = Limits(batch=1, prompt=4, new_tokens=most, chunk=2, context=starts[-1] + most + 4)
    blank, chance = program(0, limits=limits).programs.start(), np.random.default_rng(0)
    filled = jax.tree.map(lambda a: jnp.asarray(chance.standard_normal(a.shape, np.float32), a.dtype), blank.cache)
    for start in starts:
        # Rings differ in capacity with the rows of a step: row p of one goes to place p mod capacity of the other.
        past = np.arange(start - 8, start)

        def placed(target: jax.Array, source: jax.Array, past: np.ndarray = past) -> jax.Array:
            if target.ndim == 1 or target.shape[1] > 100:  # the length, compressed rows
                return jnp.array(source)
            return target.at[:, past % target.shape[1]].set(source[:, past % source.shape[1]])

        results: list[Any] = []
        for drafts in (0, 4):
            generate, drafted = program(drafts, limits=limits), np.zeros((1, limits.context), np.int32)
            if drafts:
                drafted[0, start + 1 : start + most] = results[0].tokens[0, 1:]
                drafted[0, start + 3 : start + most : 7] += 1
            params = {**PARAMS, "plan": jnp.asarray(drafted % CONFIG.vocab_size)}
            state = generate.programs.start()
            cache = jax.tree.map(placed, state.cache, filled)
            cache = dataclasses.replace(cache, length=jnp.asarray([start], jnp.int32))
            state = dataclasses.replace(state, cache=cache, next=jnp.asarray([5]), length=jnp.asarray([1]))
            request = generate.prepare([1], sampling=HOT, key=7)
            results.append(generate.programs.burst(params, request, state, most, np.zeros(1, bool))[1])
        assert len(set(tokens_of(results[0]))) > 10
        same(results[1], results[0])
        assert int(results[1].steps[0]) < 20


def test_drafts_are_the_blocks_chain():
    """As from an empty block that is given all true pairs at once: then each draft on the one before, a position on."""
    model, steps, generate = DeepSeekV4(CONFIG, QUICK), 40, program(4)
    answer = tokens_of(plain("greedy"))[: steps + 20]
    text = np.array(PROMPT + answer)
    streams = jnp.asarray(runs.run(CONFIG, QUICK, PARAMS, text, [len(text)]).streams)[None]
    prefill, draft = (
        jax.jit(
            lambda *arguments, name=name: model.apply({"params": PARAMS}, *arguments, method=name),
            compiler_options=QUICK.compiler_options,
        )
        for name in ("draft_prefill", "draft")
    )
    request = generate.prepare(PROMPT)
    own = jax.jit(
        lambda state: generate._steps._draft(PARAMS, request, state, jnp.full(1, 4, jnp.int32), 4)[0],
        compiler_options=QUICK.compiler_options,
    )
    different = set()
    for state, _ in zip(states(generate, PARAMS, 1000, GREEDY), range(steps), strict=False):
        length = int(state.cache.length[0])
        cache = init_cache(CONFIG, QUICK, 1, len(text) + 8, len(text))
        pairs = jnp.asarray(text[None, 1:]), streams[:, :-1]
        cache = prefill(*pairs, cache, jnp.asarray([1]), jnp.asarray([length - 1]))
        token, hidden, chain = text[length], streams[:, length - 1, None], []
        for depth in range(4):
            given = jnp.asarray([[token]], jnp.int32), hidden, cache, jnp.asarray([length + depth]), jnp.asarray([1])
            logits, hidden, cache = draft(*given)
            token = int(logits.argmax())
            chain.append(token)
        assert np.asarray(own(state))[0].tolist() == chain
        different.add(tuple(chain))
    assert len(different) > steps / 2


# -------------------------------------------------------------------------------------- stops, limits and counters


@pytest.mark.parametrize("place", range(1, 9))
def test_nothing_after_a_stop_id_is_returned_or_counted(place):
    """All drafts are right, and one of them, at every place of a step in turn, ends the answer."""
    answer = tokens_of(plain("sampled"))
    first = next(i for i in range(20, 400) if answer[i] not in answer[:i] and i % 5 == place % 5)
    params = planned(answer, len(PROMPT))
    result = program(4)(params, PROMPT, sampling=HOT, key=7, stop_ids=[answer[first]])
    assert tokens_of(result) == answer[: first + 1]
    assert not np.asarray(result.tokens)[0, first + 1 :].any()
    assert bool(result.stopped[0]) and int(result.steps[0]) == -(-first // 5)
    accounted(result)


@pytest.mark.parametrize("limit", range(1, 8))
def test_the_limit_bounds_the_drafts(limit):
    """A full context: no row is evaluated beyond the last position."""
    answer = tokens_of(plain("greedy"))
    small = Limits(batch=1, prompt=len(PROMPT), new_tokens=7, chunk=2)
    result = program(4, limits=small)(planned(answer, len(PROMPT)), PROMPT, max_new_tokens=limit)
    assert tokens_of(result) == answer[:limit]
    steps = -(-(limit - 1) // 5)
    assert int(result.steps[0]) == steps
    assert int(np.asarray(result.drafted).sum()) == int(np.asarray(result.accepted).sum()) == limit - 1 - steps
    accounted(result)


# -------------------------------------------------------------------------------------------------------- in bursts


def test_bursts_of_changing_size_give_what_one_shot_gives():
    """After every burst the cache holds all tokens but the last, so that a burst may be the last."""
    want = plain("sampled")
    generate, params = program(4), planned(plan(tokens_of(want), 4)[0])
    request = generate.prepare(PROMPT, sampling=HOT, key=7)
    state, seen = generate.programs.begin(params, request)
    chance, lengths = np.random.default_rng(3), []
    while not bool(seen.done[0]):
        state, seen = generate.programs.burst(params, request, state, int(chance.integers(0, 60)), np.zeros(1, bool))
        tokens, length = tokens_of(seen), int(seen.length[0])
        assert tokens == tokens_of(want)[:length]
        assert int(state.next[0]) == tokens[-1] and int(state.cache.length[0]) == len(PROMPT) + length - 1
        lengths.append(length)
    same(seen, want)
    assert len(lengths) > 8


def test_a_sequence_halted_between_bursts_keeps_what_it_has_and_the_others_go_on():
    limits = dataclasses.replace(LIMITS, batch=4, chunk=2)
    want = [
        program("off")(PARAMS, PROMPT, sampling=HOT, key=seed, max_new_tokens=60, logprobs=True) for seed in range(4)
    ]
    drafted = np.stack([plan(tokens_of(w), 3, b)[0] for b, w in enumerate(want)])
    generate, params = program(3, limits=limits), {**PARAMS, "plan": jnp.asarray(drafted)}
    request = generate.prepare(np.array([PROMPT] * 4), sampling=HOT, key=list(range(4)), max_new_tokens=60)
    state, _ = generate.programs.begin(params, request)
    state, before = generate.programs.burst(params, request, state, 5, np.zeros(4, bool))
    state, after = generate.programs.burst(params, request, state, 3, np.array([False, True, False, False]))
    state, after = generate.programs.burst(params, request, state, 99, np.array([False, False, False, True]))
    for b in (0, 2):
        same(after, want[b], b)
    halted, later = tokens_of(after, 1), tokens_of(after, 3)
    assert halted == tokens_of(before, 1) == tokens_of(want[1])[: len(halted)] and 5 < len(halted) < 30
    assert later == tokens_of(want[3])[: len(later)] and len(tokens_of(before, 3)) < len(later) < 60
    lengths = np.asarray(after.length)
    assert np.asarray(state.cache.length).tolist() == (len(PROMPT) + lengths - 1).tolist()
    for b in range(4):
        accounted(after, b)
