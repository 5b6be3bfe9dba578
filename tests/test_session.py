"""Sessions: whatever of a prompt an earlier request had evaluated, the answer is that of a fresh session."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.decode.constrained import BIAS, Biased
from ds4jax.decode.sampling import Sampling
from ds4jax.engine import load
from ds4jax.engine_session import Ask, Session, Sessions
from ds4jax.errors import RequestError
from ds4jax.model.transformer import DeepSeekV4

DRAWN = Ask(10, sampling=Sampling(temperature=0.8), seed=3)


def answer(session: Session, ids: list[int], ask: Ask = DRAWN, most: int = 10**6) -> tuple[int, list[int]]:
    """Tokens reused and tokens of the answer, of at most so many bursts, always one burst ahead."""
    reused, tokens = session.begin(ids, ask), []
    session.launch()
    for _ in range(most):
        session.launch()
        progress = session.take()
        tokens += progress.tokens
        if progress.done:
            break
    session.end()
    return reused, tokens


@pytest.fixture(scope="module")
def fresh(sessions: Any) -> Callable[[list[int]], list[int]]:
    """Answers of sessions that have seen nothing else."""
    return functools.cache(lambda *ids: answer(Session(sessions), list(ids))[1])


@pytest.fixture(scope="module")
def prompt(sessions: Any) -> list[int]:
    return sessions.engine.encode(
        "Once upon a time there was a queen who had a golden ball, and every day she threw it over the castle wall, "
        "and her sons ran after it through the wood."
    )


def test_goes_on_where_it_was(sessions, prompt, fresh):
    session = Session(sessions)
    reused, first = answer(session, prompt)
    assert reused == 0 and len(first) == 10
    # The token chosen last is not in the cache yet.
    following = [*prompt, *first, *sessions.engine.tokenizer.encode(" Then the king said")]
    reused, second = answer(session, following)
    assert reused == len(prompt) + len(first) - 1
    assert second == fresh(*following)


@pytest.mark.parametrize("back", [1, 8])
def test_rolls_back_as_far_as_the_rings_reach(sessions, prompt, back, fresh):
    session = Session(sessions)
    first = answer(session, prompt)[1]
    timeline = session.ids
    assert timeline == [*prompt, *first[:-1]]
    other = [*timeline[: len(timeline) - back], 700, 701, 702]
    reused, second = answer(session, other)
    assert reused == len(timeline) - back
    assert second == fresh(*other)


def test_goes_back_to_the_end_of_a_prompt_and_a_little_before(sessions, prompt, fresh):
    session, ask = Session(sessions), dataclasses.replace(DRAWN, most=16)  # more than the rings could take back
    first = answer(session, prompt, ask)[1]
    assert answer(session, prompt, ask) == (len(prompt) - 1, first)
    longer = [*prompt, *first[:3], 700, 701]
    reused, second = answer(session, longer)
    assert reused == len(prompt)
    assert second == fresh(*longer)
    # To the first prompt again: the second one's end is forgotten with it.
    assert answer(session, prompt, ask) == (len(prompt) - 1, first)
    assert answer(session, longer)[1] == second


def test_starts_anew_where_nothing_else_is_possible(sessions, prompt, fresh):
    session = Session(sessions)
    answer(session, prompt)
    other = [*prompt[:10], 700, 701]
    reused, second = answer(session, other)
    assert reused == 0
    assert second == fresh(*other)


@pytest.mark.parametrize("bursts", [1, 4])
def test_cancelled_at_any_time_it_can_be_used_on(sessions, prompt, bursts, fresh):
    whole = fresh(*prompt)
    session = Session(sessions)
    answer(session, prompt, most=bursts)
    reused, tokens = answer(session, prompt)
    assert reused > 0 and tokens == whole


def test_another_bias_or_a_guide_at_every_token(sessions, prompt, fresh):
    plain = fresh(*prompt)
    banned = np.zeros(sessions.engine.config.vocab_size, np.float32)
    banned[plain[2]] = -np.inf
    ask = dataclasses.replace(DRAWN, bias=banned)
    biased = answer(Session(sessions), prompt, ask)[1]
    assert biased[:2] == plain[:2] and plain[2] not in biased

    guide = Forbid(banned)
    assert answer(Session(sessions), prompt, dataclasses.replace(DRAWN, guide=guide))[1] == biased
    assert guide.seen == biased


def test_alternatives_are_those_of_the_plain_model(sessions, prompt, fresh):
    session, ask = Session(sessions), dataclasses.replace(DRAWN, alternatives=True)
    session.begin(prompt, ask)
    tokens, told = [], []
    while len(tokens) < ask.most:
        session.launch()
        progress = session.take()
        tokens += progress.tokens
        told += progress.alternatives
    assert tokens == fresh(*prompt)
    np.testing.assert_array_equal([one.logprob for one in told], session._state.logprobs[0, : len(tokens)])
    for token, one in zip(tokens, told, strict=True):
        assert len(one.ids) == 20 and one.logprobs == sorted(one.logprobs, reverse=True)
        assert one.logprob <= one.logprobs[0]
        if token in one.ids:
            assert one.logprobs[one.ids.index(token)] == one.logprob


class Forbid:
    """Forbids some tokens at every place, and remembers what was chosen."""

    def __init__(self, banned: np.ndarray) -> None:
        self.banned = banned
        self.seen: list[int] = []

    def bias(self) -> np.ndarray:
        return self.banned

    def accept(self, token: int) -> None:
        self.seen.append(token)


def test_a_bias_and_a_guide_hold_under_speculation(tmp_path):
    """Also if drafts are a few tokens only."""
    (tmp_path / "list.txt").write_text("\n".join(map(str, range(0, 320, 3))))
    main, mtp = (golden.DATA / "oracle" / f"tiny-f32{part}.gguf" for part in ("", "-mtp"))
    # As many rows in a step as in a chunk: one program for both.
    (session,) = Sessions(
        load(main, mtp=mtp, context=64, chunk=3, speculative=2, draft_tokens=tmp_path / "list.txt"), 1, 64
    ).all
    ids, ask = [5, 6, 7, 8], dataclasses.replace(DRAWN, most=12)
    banned = np.zeros(320, np.float32)
    # A guide leaves no room for drafts, so this is what the model says without them.
    free = answer(session, ids, dataclasses.replace(ask, guide=Forbid(banned)))[1]
    assert answer(session, ids, ask)[1] == free
    banned[free[3:9]] = -np.inf
    guide = Forbid(banned)
    guided = answer(session, ids, dataclasses.replace(ask, guide=guide))[1]
    assert guided == guide.seen and guided[:3] == free[:3] and not set(guided) & set(free[3:9])
    session.begin(ids, dataclasses.replace(ask, bias=banned))
    tokens, drafted = [], 0
    while len(tokens) < ask.most:
        session.launch()
        progress = session.take()
        tokens, drafted = tokens + progress.tokens, progress.drafted
    assert tokens == guided and drafted > 0


def test_limits(sessions, prompt):
    session = Session(sessions)
    for ids in ([], [5] * 1024):
        with pytest.raises(RequestError, match="expected 1 to 1023"):
            session.begin(ids, DRAWN)
    assert len(answer(session, prompt, dataclasses.replace(DRAWN, most=1))[1]) == 1


def test_a_bias_of_zero_changes_no_bit():
    (config, params), numerics = golden.oracle("tiny-f32"), golden.EXACT
    rng = np.random.default_rng(0)
    streams = jnp.asarray(rng.normal(size=(1, 3, config.hc_mult, config.hidden_size)).astype(np.float32))
    live = jnp.ones((1, 3), bool)

    def logits(model: DeepSeekV4, params: Any) -> np.ndarray:
        run = jax.jit(lambda p, s: model.apply({"params": p}, s, live, method="logits"))
        return np.asarray(run(params, streams))

    plain = logits(DeepSeekV4(config, numerics), params)
    bias = np.zeros(config.vocab_size, np.float32)
    np.testing.assert_array_equal(logits(Biased(config, numerics), {**params, BIAS: jnp.asarray(bias)}), plain)
    bias[[3, 5]] = -np.inf, 2.5
    biased = logits(Biased(config, numerics), {**params, BIAS: jnp.asarray(bias)})
    np.testing.assert_array_equal(biased, plain + bias)
