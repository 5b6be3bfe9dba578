"""The generation loop with a table for a model, then with a real tiny model: one shot, bursts, batches, traces."""

import collections
import dataclasses
import functools
import re
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from ds4jax.config import ModelConfig
from ds4jax.decode.generate import Generate, build_generate
from ds4jax.decode.sampling import Sampling, position_noise
from ds4jax.decode.score import build_score
from ds4jax.decode.state import Limits
from ds4jax.errors import ConfigError, RequestError
from ds4jax.model.transformer import DeepSeekV4

VOCABULARY = 61
TRACED: collections.Counter[str] = collections.Counter()
COUNTS: list[list[int]] = []
# Quick compiling matters more here than quick code.
QUICK = golden.EXACT.replace(xla=(*golden.EXACT.xla, ("xla_backend_optimization_level", 0)))


class Table(DeepSeekV4):
    """Stands in for the model: the logits after a token are a row of a table, chosen by token and position."""

    def setup(self) -> None:
        pass

    def __call__(self, tokens: Any, cache: Any, start: Any, count: Any) -> Any:
        TRACED["forward"] += 1
        position = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        place = (tokens * 31 + position * 17) % self.config.hidden_size
        streams = jax.nn.one_hot(place, self.config.hidden_size, dtype=jnp.float32)[:, :, None]
        return streams, cache

    def logits(self, streams: Any, live: Any) -> Any:
        return jnp.einsum("brhd,dv->brv", streams, self.get_variable("params", "table"), precision="highest")


class Counting(Table):
    """Tells how many rows every call really has."""

    def __call__(self, tokens: Any, cache: Any, start: Any, count: Any) -> Any:
        jax.debug.callback(lambda count: COUNTS.append(count.tolist()), count)
        return super().__call__(tokens, cache, start, count)


def table_config() -> ModelConfig:
    return dataclasses.replace(
        golden.load("tiny_c").config,
        vocab_size=VOCABULARY,
        hidden_size=101,
        hc_mult=1,
        num_hidden_layers=0,
        num_hash_layers=0,
        compress_ratios=(),
        swiglu_limit=(0.0,),
        swiglu_limit_shared=(0.0,),
    )


TABLE = {"table": jnp.asarray(np.random.default_rng(0).standard_normal((101, VOCABULARY)).astype(np.float32) * 3)}


@functools.cache
def table(limits: Limits) -> Generate:
    return Generate(Table(table_config(), QUICK), limits)


def by_hand(prompt: list[int], steps: int) -> list[int]:
    """Greedy continuation by the table."""
    tokens, logits = list(prompt), np.asarray(TABLE["table"])
    for _ in range(steps):
        tokens.append(int(np.argmax(logits[(tokens[-1] * 31 + (len(tokens) - 1) * 17) % 101])))
    return tokens[len(prompt) :]


def new_tokens(result: Any, b: int = 0) -> list[int]:
    return np.asarray(result.tokens)[b, : int(result.length[b])].tolist()


LIMITS = Limits(batch=1, prompt=20, new_tokens=30, chunk=4)  # one body for prompt and answer
WIDE = dataclasses.replace(LIMITS, chunk=11)  # two
PROMPT = [3, 14, 15, 9, 26, 5, 35]


def test_greedy_follows_the_table():
    result = table(LIMITS)(TABLE, PROMPT)
    assert new_tokens(result) == by_hand(PROMPT, 30)
    assert int(result.steps[0]) == 29 and bool(result.done[0]) and not bool(result.stopped[0])
    assert result.logprobs is None


@pytest.mark.parametrize("limits", [LIMITS, WIDE])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11, 12, 20])
def test_prompts_around_the_chunk_size(limits, length):
    prompt = list(range(1, length + 1))
    assert new_tokens(table(limits)(TABLE, prompt, max_new_tokens=6)) == by_hand(prompt, 6)


@pytest.mark.parametrize("limits", [LIMITS, WIDE])
@pytest.mark.parametrize("limit", [0, 1, 2, 30])
def test_limit(limits, limit):
    result = table(limits)(TABLE, PROMPT, max_new_tokens=limit, logprobs=True)
    assert new_tokens(result) == by_hand(PROMPT, limit)
    assert int(result.steps[0]) == max(limit - 1, 0)
    assert not np.asarray(result.tokens)[0, limit:].any() and not np.asarray(result.logprobs)[0, limit:].any()


def test_a_limit_of_nothing_still_reads_the_prompt():
    request = table(LIMITS).prepare(PROMPT, max_new_tokens=0)
    state, _ = table(LIMITS).programs.begin(TABLE, request)
    assert bool(state.done[0]) and int(state.cache.length[0]) == len(PROMPT)


def test_a_sequence_costs_what_it_needs():
    """Rows per step and sequence: chunks of a prompt, then one, then none."""
    generate = Generate(Counting(table_config(), QUICK), BATCH)
    request = generate.prepare(np.ones((3, 9), np.int32), [9, 1, 6], max_new_tokens=[1, 2, 3])
    state, COUNTS[:] = generate.programs.start(), []
    for _ in range(6):
        state, _ = generate.programs.burst(TABLE, request, state, 1, np.zeros(3, bool))
    jax.effects_barrier()
    assert COUNTS == [[4, 1, 4], [4, 1, 2], [1, 0, 1], [0, 0, 1]]
    assert np.asarray(state.steps).tolist() == [0, 1, 2]


def test_stop_ids():
    free = by_hand(PROMPT, 30)
    for stop in (free[0], free[5], free[17]):
        result = table(LIMITS)(TABLE, PROMPT, stop_ids=[VOCABULARY - 1, stop] if stop != VOCABULARY - 1 else [stop])
        cut = min(free.index(s) for s in {stop, VOCABULARY - 1} & set(free)) + 1
        assert new_tokens(result) == free[:cut]
        assert bool(result.stopped[0])
        assert not np.asarray(result.tokens)[0, cut:].any()


def test_a_stop_id_on_the_last_allowed_token_counts_as_stopped():
    free = by_hand(PROMPT, 30)
    at = next(i for i in range(3, 30) if free[i] not in free[:i])
    assert bool(table(LIMITS)(TABLE, PROMPT, stop_ids=[free[at]], max_new_tokens=at + 1).stopped[0])
    assert not bool(table(LIMITS)(TABLE, PROMPT, stop_ids=[free[at]], max_new_tokens=at).stopped[0])


BATCH = Limits(batch=3, prompt=20, new_tokens=30, chunk=4)


@pytest.mark.parametrize("chunk", [4, 9])
def test_each_sequence_has_its_own_length_limit_seed_and_settings(chunk):
    prompts = [[5], [7, 8, 9, 10, 11, 12, 13, 14, 15], [1, 2, 3]]
    padded = np.zeros((3, 9), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    settings = {"temperature": [0.0, 0.7, 1.5], "top_p": [1.0, 0.9, 1.0], "top_k": [0, 0, 7]}
    limits, seeds, lengths = [30, 4, 17], [1, 2, 3], [len(p) for p in prompts]
    stop = by_hand(prompts[0], 12)[-1]
    together = table(dataclasses.replace(BATCH, chunk=chunk))(
        TABLE,
        padded,
        lengths,
        sampling=Sampling(**settings),
        key=seeds,
        max_new_tokens=limits,
        stop_ids=[stop],
        logprobs=True,
    )
    lengths_seen = set()
    for b, prompt in enumerate(prompts):
        alone = table(LIMITS)(
            TABLE,
            prompt,
            sampling=Sampling(**{name: values[b] for name, values in settings.items()}),
            key=seeds[b],
            max_new_tokens=limits[b],
            stop_ids=[stop],
            logprobs=True,
        )
        assert new_tokens(together, b) == new_tokens(alone)
        assert np.asarray(together.logprobs)[b].tobytes() == np.asarray(alone.logprobs)[0].tobytes()
        assert int(together.steps[b]) == int(alone.steps[0]) and bool(together.stopped[b]) == bool(alone.stopped[0])
        lengths_seen.add(int(alone.length[0]))
    assert len(lengths_seen) == 3


def test_seeds():
    def run(key: Any) -> list[int]:
        return new_tokens(table(LIMITS)(TABLE, PROMPT, sampling=Sampling(temperature=1.0), key=key))

    assert run(7) == run(7) == run(jax.random.key(7, impl="threefry2x32"))
    assert len({tuple(run(seed)) for seed in (7, 8, 2**40 + 7, 2**64 - 1)}) == 4


def test_noise_is_that_of_the_absolute_position():
    key, logits, tokens = jax.random.key(3, impl="threefry2x32"), np.asarray(TABLE["table"]), list(PROMPT)
    for position in range(len(PROMPT), len(PROMPT) + 10):
        row = logits[(tokens[-1] * 31 + (position - 1) * 17) % 101]
        tokens.append(int(np.argmax(row + np.asarray(position_noise(key, jnp.int32(position), VOCABULARY)))))
    result = table(LIMITS)(TABLE, PROMPT, sampling=Sampling(temperature=1.0), key=3, max_new_tokens=10)
    assert new_tokens(result) == tokens[len(PROMPT) :] != by_hand(PROMPT, 10)


@pytest.mark.parametrize("limits", [LIMITS, WIDE])
def test_state_between_bursts(limits):
    """The last token is chosen but not evaluated; the streams are those of the position before it."""
    programs = table(limits).programs
    request = table(limits).prepare(PROMPT)
    state, _ = programs.begin(TABLE, request)
    for steps in (0, 1, 5):
        state, _ = programs.burst(TABLE, request, state, steps, [False])
        tokens = PROMPT + new_tokens(state)
        assert int(state.next[0]) == tokens[-1] and int(state.cache.length[0]) == len(tokens) - 1
        place = (tokens[-2] * 31 + (len(tokens) - 2) * 17) % 101
        assert np.flatnonzero(np.asarray(state.streams[0, 0])).tolist() == [place]
    assert len(tokens) == len(PROMPT) + 7


def bursts(generate: Generate, params: Any, sizes: list[int], *args: Any, **settings: Any) -> Any:
    """Runs in bursts of the given sizes, the last one repeated, one burst ahead as a stream does."""
    request = generate.prepare(*args, **settings)
    state, seen = generate.programs.begin(params, request)
    nobody, results = np.zeros(generate.limits.batch, bool), [seen]
    for burst in range(1000):
        size = sizes[min(burst, len(sizes) - 1)]
        state, ahead = generate.programs.burst(params, request, state, size, nobody)
        if np.asarray(results[-1].done).all():
            return results
        results.append(ahead)
    raise AssertionError("the stream does not end")


@pytest.mark.parametrize("limits", [LIMITS, WIDE])
@pytest.mark.parametrize("sizes", [[1], [2], [7], [29], [100], [0, 3, 1, 5]])
def test_bursts_give_what_one_shot_gives(limits, sizes):
    settings = {"sampling": Sampling(temperature=0.9, top_p=0.95), "key": 5}
    whole = table(limits)(TABLE, PROMPT, logprobs=True, **settings)
    parts = bursts(table(limits), TABLE, sizes, PROMPT, **settings)
    for name in ("tokens", "length", "logprobs", "steps", "stopped", "done"):
        assert np.asarray(getattr(parts[-1], name)).tobytes() == np.asarray(getattr(whole, name)).tobytes(), name
    # What an earlier burst reported is still there after later ones took over its state.
    assert all(new_tokens(part) == new_tokens(whole)[: int(part.length[0])] for part in parts)
    assert int(parts[0].length[0]) == 1


def test_halting_one_sequence_leaves_the_others():
    generate = table(BATCH)
    programs, prompts = generate.programs, np.array([[5, 6], [7, 8], [9, 10]])
    request = generate.prepare(prompts)
    state, _ = programs.begin(TABLE, request)
    state, _ = programs.burst(TABLE, request, state, 4, np.zeros(3, bool))
    state, result = programs.burst(TABLE, request, state, 1000, np.array([False, True, False]))
    assert np.asarray(state.cache.length).tolist() == [2 + 29, 2 + 4, 2 + 29]
    assert np.asarray(result.length).tolist() == [30, 5, 30]
    for b in range(3):
        assert new_tokens(result, b) == by_hand(prompts[b].tolist(), int(result.length[b]))


def test_a_sequence_halted_in_its_prompt_gets_no_tokens():
    generate = table(BATCH)
    programs, request = generate.programs, generate.prepare(np.ones((3, 9), np.int32))
    state, _ = programs.burst(TABLE, request, programs.start(), 2, np.zeros(3, bool))
    assert np.asarray(state.cache.length).tolist() == [8, 8, 8]
    state, result = programs.burst(TABLE, request, state, 3, np.array([False, True, False]))
    assert np.asarray(result.length).tolist() == [3, 0, 3]
    assert np.asarray(state.cache.length).tolist() == [11, 8, 11]


@pytest.mark.parametrize(("chunk", "bodies"), [(4, 1), (9, 2)])
def test_nothing_recompiles_within_the_limits(chunk, bodies):
    generate = Generate(Table(table_config(), QUICK), Limits(batch=1, prompt=16, new_tokens=16, chunk=chunk))
    before = TRACED["forward"]
    generate(TABLE, PROMPT)
    traces = TRACED["forward"] - before
    assert traces == bodies
    for prompt, settings in (
        (PROMPT[:3], {"max_new_tokens": 2}),
        (list(range(16)), {"key": 9, "stop_ids": [4, 5, 6]}),
        (PROMPT, {"sampling": Sampling(temperature=0.3, top_k=4, top_p=0.5, min_p=0.1), "logprobs": True}),
        (np.array([PROMPT + [0, 0]]), {"lengths": [7]}),
    ):
        generate(TABLE, prompt, **settings)
        assert TRACED["forward"] - before == traces
    for size in (1, 5):
        bursts(generate, TABLE, [size], PROMPT)
    both = TRACED["forward"] - before
    assert both == 2 * bodies
    for size, prompt in ((1, PROMPT[:2]), (3, PROMPT), (50, [1])):
        bursts(generate, TABLE, [size], prompt, max_new_tokens=11, stop_ids=[3])
    assert TRACED["forward"] - before == both


@pytest.mark.parametrize("limits", [LIMITS, WIDE])
def test_compile_ahead_gives_the_same_programs(limits):
    generate = table(limits)
    programs = generate.compile(TABLE)
    assert programs.trace_seconds > 0 and programs.compile_seconds > 0
    request = generate.prepare(PROMPT, stop_ids=[2])
    state, _ = programs.begin(TABLE, request)
    _, result = programs.burst(TABLE, request, state, 99, np.zeros(1, bool))
    assert new_tokens(result) == new_tokens(generate(TABLE, PROMPT, stop_ids=[2]))


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([[1, 2], [3, 4]], {}, "expected 1 sequences"),
        ([], {}, "from 1 to"),
        (list(range(21)), {}, "from 1 to 20"),
        ([1, 2], {"lengths": [3]}, "from 1 to 2"),
        ([1, VOCABULARY], {}, "expected 0 to 60"),
        ([-1], {}, "expected 0 to 60"),
        ([1], {"max_new_tokens": 31}, "expected 0 to"),
        ([1], {"max_new_tokens": -1}, "expected 0 to"),
        ([1], {"key": -1}, "seed"),
        ([1], {"key": [1, 2]}, "seed"),
        ([1], {"stop_ids": range(17)}, "at most 16"),
        ([1], {"sampling": Sampling(top_p=2.0)}, "top_p"),
    ],
)
def test_bad_requests_are_named(prompt, settings, words):
    with pytest.raises(RequestError, match=words):
        table(LIMITS)(TABLE, np.asarray(prompt, np.int32), **settings)


def test_context_bounds_prompt_and_answer_together():
    generate = table(Limits(batch=1, prompt=20, new_tokens=20, chunk=4, context=20))
    assert int(generate(TABLE, PROMPT).length[0]) == 13
    with pytest.raises(RequestError, match="expected 0 to"):
        generate(TABLE, PROMPT, max_new_tokens=14)


def test_build_is_cached_and_limits_are_checked():
    config = table_config()
    assert build_generate(config, QUICK, LIMITS) is build_generate(config, QUICK, LIMITS)
    with pytest.raises(ConfigError, match="prompt"):
        Limits(1, 0, 5)
    with pytest.raises(ConfigError, match="context"):
        Limits(1, 10, 5, context=9)


# The real model: three layers, one of each kind, simulated casts on.
MODEL = golden.load("tiny_c")
NUMERICS = QUICK.replace(sim_kv=True, sim_index=True, cache="f16")
REAL = Limits(batch=1, prompt=32, new_tokens=64, chunk=5)


def real(limits: Limits) -> Generate:
    return build_generate(MODEL.config, NUMERICS, limits)


def stepwise(ids: list[int]) -> np.ndarray:
    """Logits [T, V] token by token."""
    return runs.run(MODEL.config, NUMERICS, MODEL.params, np.asarray(ids), [1] * len(ids), context=96).logits


def test_greedy_is_the_argmax_of_stepwise_logits():
    prompt = MODEL.ids[:13].tolist()
    result = real(REAL)(MODEL.params, prompt, logprobs=True)
    tokens = new_tokens(result)
    assert len(tokens) == 64 and len(set(tokens)) > 8
    logits = stepwise(prompt + tokens)[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(logits.argmax(-1), tokens)
    wide = logits.astype(np.float64)
    want = wide[np.arange(64), tokens] - np.log(np.exp(wide).sum(-1))
    np.testing.assert_allclose(np.asarray(result.logprobs)[0], want, rtol=1e-5, atol=1e-5)


def test_two_sequences_together_equal_each_alone():
    lengths, limits, seeds = [17, 6], [40, 64], [3, 4]
    padded = np.stack([MODEL.ids[:17], np.roll(MODEL.ids, 9)[:17]])
    sampling = Sampling(temperature=np.array([0.0, 1.0]), top_p=np.array([1.0, 0.95]))
    both = real(dataclasses.replace(REAL, batch=2, chunk=9))(
        MODEL.params, padded, lengths, sampling=sampling, key=seeds, max_new_tokens=limits, logprobs=True
    )
    for b in range(2):
        one = jax.tree.map(
            lambda a, b=b: a[b], Sampling(sampling.temperature, [0, 0], sampling.top_p, [0.0, 0.0]).broadcast(2)
        )
        alone = real(REAL)(
            MODEL.params, padded[b], [lengths[b]], sampling=one, key=seeds[b], max_new_tokens=limits[b], logprobs=True
        )
        assert new_tokens(both, b) == new_tokens(alone)
        assert np.asarray(both.logprobs)[b].tobytes() == np.asarray(alone.logprobs)[0].tobytes()


def test_bursts_of_the_model_give_what_one_shot_gives():
    settings = {"sampling": Sampling(temperature=0.8), "key": 12, "max_new_tokens": 50}
    whole = real(REAL)(MODEL.params, MODEL.ids[:9], logprobs=True, **settings)
    for sizes in ([3], [20, 1, 100]):
        parts = bursts(real(REAL), MODEL.params, sizes, MODEL.ids[:9], **settings)
        assert np.asarray(parts[-1].tokens).tobytes() == np.asarray(whole.tokens).tobytes()
        assert np.asarray(parts[-1].logprobs).tobytes() == np.asarray(whole.logprobs).tobytes()


def check_updated_in_place(generate: Generate, params: Any) -> None:
    """A step copies no array of the trunk's cache. The context must be so long that these are most of the memory."""
    state = generate.programs.start()
    arrays = jax.tree.leaves(state.cache.layers)
    inputs = params, generate.prepare([[1]]), state, jnp.int32(1), jnp.zeros(1, bool)
    program = generate.programs.run.lower(*inputs).compile()
    shapes = {tuple(array.shape) for array in arrays}
    copied = []
    for line in program.as_text().splitlines():
        found = re.search(r"= \w+\[([\d,]*)\]\S* copy(?:-start)?\(", line)
        if found and tuple(int(n) for n in found[1].split(",") if n) in shapes:
            copied.append(line.strip()[:120])
    assert not copied, "\n".join(copied)
    memory = program.memory_analysis()
    state_bytes = sum(array.size * array.dtype.itemsize for array in arrays)
    assert memory.alias_size_in_bytes >= state_bytes  # the donated state is the new state
    assert memory.temp_size_in_bytes < state_bytes / 8


@pytest.mark.parametrize("rows", ["loop", "batch"])
def test_cache_is_updated_in_place(rows):
    limits = Limits(batch=1, prompt=8, new_tokens=60_000, chunk=5)
    check_updated_in_place(build_generate(MODEL.config, NUMERICS.replace(rows=rows), limits), MODEL.params)


def test_score_equals_the_logprobs_of_generation():
    prompt = MODEL.ids[:13].tolist()
    result = real(REAL)(MODEL.params, prompt, logprobs=True)
    scores = build_score(MODEL.config, NUMERICS, 96, 32)(MODEL.params, prompt + new_tokens(result))
    assert scores.shape == (13 + 64 - 1,)
    assert scores[12:].tobytes() == np.asarray(result.logprobs)[0].tobytes()
    with pytest.raises(RequestError, match="from 2 to 96"):
        build_score(MODEL.config, NUMERICS, 96, 32)(MODEL.params, [1])
