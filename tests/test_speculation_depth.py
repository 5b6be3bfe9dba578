"""Speculation: how many tokens a step drafts, in one program."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speculating import CONFIG, LIMITS, PROMPT, QUICK, plain, planned, program, states, tokens_of

from ds4jax.decode.generate import build_generate
from ds4jax.decode.sampling import GREEDY
from ds4jax.decode.speculation import HOPE, MEMORY, Speculation, draft_cost
from ds4jax.decode.state import Generation
from ds4jax.errors import ConfigError
from ds4jax.runconfig import load_numerics


def test_one_program_for_every_depth_and_no_way_out_of_it():
    """The depth follows the plan: right for a while, then wrong, then right again, as only another try can tell."""
    answer = tokens_of(plain("greedy"))
    drafted = np.array([*PROMPT, *answer])
    drafted[200:400] = (drafted[200:400] + 1) % CONFIG.vocab_size
    params = planned(drafted)
    generate = program("auto")
    request, run = generate.prepare(PROMPT), generate.programs.run
    nobody = jnp.zeros(1, bool)
    text = str(run.trace(params, request, generate.programs.start(), jnp.int32(1), nobody).jaxpr)
    assert "while" in text and not any(word in text for word in ("callback", "infeed", "outfeed", "device_put"))
    depths, before = {}, 0
    for state in states(generate, params, LIMITS.new_tokens, GREEDY):
        depths[int(state.cache.length[0])] = int(state.drafted.sum()) - before
        before = int(state.drafted.sum())
    assert tokens_of(Generation.of(state)) == answer
    assert {depth for length, depth in depths.items() if length < 200} == {4}
    assert [depth for length, depth in depths.items() if 300 < length < 400].count(0) > 80
    assert {depth for length, depth in depths.items() if 500 < length < 1000} == {4}
    assert run._cache_size() == 1


# --------------------------------------------------------------------------------------------------------- the depth


def depth(rule: Speculation, acceptance: list[float]) -> int:
    return int(rule.depth(jnp.asarray([acceptance], jnp.float32))[0])


@pytest.mark.parametrize(
    ("acceptance", "cost", "want"),
    [
        ([0.9, 0.9, 0.9, 0.9], 0.2, 4),
        ([0.8, 0.6, 0.4, 0.2], 0.2, 2),
        ([0.8, 0.2, 0.2, 0.2], 0.2, 1),
        ([0.3, 0.9, 0.1, 0.1], 0.35, 0),
        ([0.25, 1.0, 1.0, 0.1], 0.2, 3),
        ([0.19, 1.0, 1.0, 1.0], 0.2, 0),
        ([1.0, 1.0, 1.0, 1.0], 1.0, 0),
        ([1.0, 1.0, 1.0, 1.0], 0.99, 4),
    ],
)
def test_depth_gives_the_most_tokens_per_time(acceptance, cost, want):
    rates = [(1 + np.cumprod(acceptance)[:d].sum()) / (1 + cost * d) for d in range(5)]
    assert int(np.argmax(rates)) == want
    assert depth(Speculation.of("auto", cost), acceptance) == want
    assert depth(Speculation(3), acceptance) == 3


def test_estimates_follow_what_was_tried():
    before, up, down, rise = jnp.full((1, 4), 0.5, jnp.float32), 0.5 + MEMORY / 2, 0.5 - MEMORY / 2, 0.5 + HOPE / 2
    for tried, accepted, want in (
        (3, 1, [up, down, rise, rise]),
        (2, 2, [up, up, rise, rise]),
        (4, 0, [down, rise, rise, rise]),
        (0, 0, [rise, rise, rise, rise]),
    ):
        assert (
            np.asarray(Speculation(4).learn(before, jnp.asarray([tried]), jnp.asarray([accepted])))[0].tolist() == want
        )


def test_a_sequence_that_accepts_nothing_hardly_drafts_and_one_that_accepts_some_goes_on():
    rule, chance = Speculation.of("auto", 0.2), np.random.default_rng(0)
    step = jax.jit(
        lambda acceptance, luck: (rule.depth(acceptance), rule.learn(acceptance, rule.depth(acceptance), luck))
    )
    for share, least, most in ((0.0, 0.03, 0.12), (0.4, 0.7, 1.0)):
        acceptance, drafted = jnp.ones((1, 4), jnp.float32), []
        for _ in range(600):
            luck = int(chance.random() < share)
            tries, acceptance = step(acceptance, jnp.minimum(jnp.asarray([luck]), rule.depth(acceptance)))
            drafted.append(int(tries[0]) > 0)
        assert least < np.mean(drafted[100:]) < most


@pytest.mark.parametrize("preset", ["strict", "perf"])
def test_the_presets_draft_nothing_of_themselves(preset):
    """On a CPU a draft takes the time of a token: nothing is gained even where every draft is right."""
    rule = Speculation.of("auto", draft_cost(load_numerics(preset)))
    acceptance = jnp.ones((1, 4), jnp.float32)
    for _ in range(3):
        assert int(rule.depth(acceptance)[0]) == 0
        acceptance = rule.learn(acceptance, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))


def test_kernels_have_a_draft_cost_of_their_own():
    numerics = load_numerics("strict")
    kernels = numerics.replace(impl=tuple((op, "pallas") for op, _ in numerics.impl))
    assert draft_cost(kernels) == numerics.draft_cost_kernels < draft_cost(numerics) == numerics.draft_cost


@pytest.mark.parametrize("wrong", ["on", "5", 5, -1, "auto "])
def test_settings_that_do_not_exist(wrong):
    with pytest.raises(ConfigError, match='expected "off", "auto" or a number from 0 to 4'):
        build_generate(CONFIG, QUICK, LIMITS, wrong)


def test_what_speculation_needs():
    assert Speculation.of("off", 0.2) == Speculation.of(0, 0.2) == Speculation.of("0", 0.2)
    with pytest.raises(ConfigError, match="MTP block"):
        build_generate(dataclasses.replace(CONFIG, has_mtp=False), QUICK, LIMITS, 1)
