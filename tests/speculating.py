"""A tiny model whose drafts follow a plan, and the answers that it should give: for the tests of speculation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
from planned import Planned

from ds4jax.decode.generate import Generate
from ds4jax.decode.sampling import GREEDY, Sampling
from ds4jax.decode.speculation import Speculation
from ds4jax.decode.state import DecodeState, Generation, Limits
from ds4jax.model.transformer import DeepSeekV4

# Quick compiling matters more here than quick code.
QUICK = golden.EXACT.replace(
    act="q8",
    sim_kv=True,
    sim_index=True,
    cache="f16",
    xla=(*golden.EXACT.xla, ("xla_backend_optimization_level", 0)),
)
# Three layers, one of each kind, and a block of random weights.
CONFIG = dataclasses.replace(golden.load("tiny_c").config, has_mtp=True)
LIMITS = Limits(batch=1, prompt=16, new_tokens=1000, chunk=2)
PROMPT = [0, 40, 41, 42, 40, 41, 42]
HOT = Sampling(temperature=0.8, top_p=0.97)
SETTINGS = {"greedy": GREEDY, "sampled": HOT}


def block(seed: int) -> Any:
    """Random parameters of an MTP block."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    init = jax.jit(functools.partial(DeepSeekV4(CONFIG, QUICK).init, method="initialise"))
    return init(jax.random.key(seed), tokens)["params"]["mtp"]


FREE = jnp.full((1, LIMITS.context + 1), -1, jnp.int32)
PARAMS = {**golden.load("tiny_c").params, "mtp": block(0), "plan": FREE}


@functools.cache
def program(speculative: str | int, limits: Limits = LIMITS) -> Generate:
    return Generate(Planned(CONFIG, QUICK), limits, Speculation.of(speculative, 0.2))


@functools.cache
def plain(setting: str, seed: int = 7) -> Generation:
    """The answer without speculation."""
    return program("off")(PARAMS, PROMPT, sampling=SETTINGS[setting], key=seed, logprobs=True)


def tokens_of(result: Generation, b: int = 0) -> list[int]:
    return np.asarray(result.tokens)[b, : int(result.length[b])].tolist()


def same(result: Generation, want: Generation, b: int = 0) -> None:
    """The same tokens with the same bits of log-probability, and counters that account for them."""
    assert tokens_of(result, b) == tokens_of(want)
    length = int(want.length[0])
    assert np.asarray(result.logprobs)[b, :length].tobytes() == np.asarray(want.logprobs)[0, :length].tobytes()
    accounted(result, b)


def accounted(result: Generation, b: int = 0) -> None:
    drafted, accepted = np.asarray(result.drafted)[b], np.asarray(result.accepted)[b]
    assert int(result.length[b]) == 1 + int(result.steps[b]) + accepted.sum()
    assert (accepted <= drafted).all() and (np.diff(drafted) <= 0).all() and (np.diff(accepted) <= 0).all()


def plan(answer: list[int], drafts: int, seed: int = 0, start: int = len(PROMPT)) -> tuple[np.ndarray, np.ndarray]:
    """Drafts `[positions]` with mistakes such that every step accepts a planned number of them; how often each occurs.

    A step that accepts n drafts gives n + 1 tokens, so a mistake stands at the last of them.
    """
    chance = np.random.default_rng(seed)
    drafted = np.zeros(LIMITS.context + 1, np.int32)
    drafted[start : start + len(answer)] = answer
    at, lengths = 1, []
    while at + drafts < len(answer):
        accepted = int(chance.integers(0, drafts + 1))
        at += accepted + 1
        drafted[start + at - 1] = (answer[at - 1] + 1) % CONFIG.vocab_size
        lengths.append(accepted)
    return drafted, np.bincount(lengths, minlength=drafts + 1)


def planned(drafted: np.ndarray | list[int], start: int = 0) -> dict[str, Any]:
    """Parameters with a plan: `drafted` from position `start` on, token 0 elsewhere."""
    plan = np.zeros((1, LIMITS.context + 1), np.int32)
    plan[0, start : start + len(drafted)] = drafted
    return {**PARAMS, "plan": jnp.asarray(plan)}


def states(generate: Generate, params: Any, most: int, sampling: Sampling = HOT) -> Iterator[DecodeState]:
    """The state after every step."""
    request = generate.prepare(PROMPT, sampling=sampling, key=7, max_new_tokens=most)
    state, _ = generate.programs.begin(params, request)
    while not np.asarray(state.done).all():
        state, _ = generate.programs.burst(params, request, state, 1, np.zeros(1, bool))
        yield state
