"""Engine and streams on a model that recites a script, so that every answer is known; loading on a real file."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import engine as engine_module
from ds4jax.checkpoint import open_gguf, read_config
from ds4jax.config import check_simulation
from ds4jax.decode.generate import Generate
from ds4jax.decode.sampling import Sampling
from ds4jax.engine import Engine, load
from ds4jax.engine_run import Answer
from ds4jax.errors import CapacityError, CheckpointError, ConfigError, RequestError
from ds4jax.model.transformer import DeepSeekV4
from ds4jax.runconfig import load_numerics
from ds4jax.tokenizer import BOS, Tokenizer

FILE = golden.DATA / "oracle" / "tiny-f32.gguf"
POSITIONS = 128
TOKENIZER = Tokenizer.from_gguf(open_gguf(FILE).metadata)
PROMPT = [0, 40, 41, 42]
# Quick compiling matters more here than quick code.
QUICK = golden.EXACT.replace(xla=(*golden.EXACT.xla, ("xla_backend_optimization_level", 0)))


class Script(DeepSeekV4):
    """Stands in for the model: the logits after position p are row p of a table, whatever the tokens."""

    def setup(self) -> None:
        pass

    def __call__(self, tokens: Any, cache: Any, start: Any, count: Any) -> Any:
        position = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return jax.nn.one_hot(position, POSITIONS, dtype=jnp.float32)[:, :, None], cache

    def logits(self, streams: Any, live: Any) -> Any:
        return jnp.einsum("brhd,dv->brv", streams, self.get_variable("params", "table"), precision="highest")


def table_of(tokens: list[int], start: int = len(PROMPT)) -> dict[str, jax.Array]:
    """Logits that favour `tokens` from position `start` on."""
    table = np.zeros((POSITIONS, TOKENIZER.vocab_size), np.float32)
    for place, token in enumerate(tokens):
        table[start - 1 + place, token] = 9.0
    return {"table": jnp.asarray(table)}


@pytest.fixture(scope="module")
def reciter() -> Any:
    """An engine whose model recites; `params` decide what."""
    config = dataclasses.replace(
        golden.oracle("tiny-f32")[0],
        hidden_size=POSITIONS,
        hc_mult=1,
        num_hidden_layers=0,
        num_hash_layers=0,
        compress_ratios=(),
        swiglu_limit=(0.0,),
        swiglu_limit_shared=(0.0,),
        max_position_embeddings=POSITIONS,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "build_generate", lambda c, n, limits, *_: Generate(Script(c, n), limits))
        yield Engine(config, QUICK, table_of([]), TOKENIZER, chunk=16)


def recite(engine: Engine, tokens: list[int], start: int = len(PROMPT)) -> Engine:
    engine.params = table_of(tokens, start)
    return engine


TEXT = "She said: « né à Zürich » 🙂, and 日本語 too."
IDS = TOKENIZER.encode(TEXT)
END = TOKENIZER.eos_id


def test_answer_ends_at_the_stop_token(reciter):
    result = recite(reciter, [*IDS, END, 50, 51]).generate(PROMPT, logprobs=True)
    assert (result.text, result.tokens, result.finish) == (TEXT, [*IDS, END], "stop")
    assert result.logprobs.shape == (len(IDS) + 1,) and (result.logprobs < 0).all() and (result.logprobs > -1).all()
    assert recite(reciter, [*IDS, END]).generate(PROMPT).logprobs is None


@pytest.mark.parametrize("burst", [1, 2, 3, 7, 500])
def test_a_stream_gives_the_same_text(reciter, burst):
    stream = recite(reciter, [*IDS, END]).stream(PROMPT, burst=burst)
    pieces = list(stream)
    assert "".join(pieces) == TEXT
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 20 if burst == 1 else len(pieces) <= -(-len(IDS) // burst) + 1
    result = stream.result()
    assert (result.text, result.tokens, result.finish) == (TEXT, [*IDS, END], "stop")


@pytest.mark.parametrize("limit", [0, 1, 5, 12])
def test_limit(reciter, limit):
    stream = recite(reciter, [*IDS, END]).stream(PROMPT, max_new_tokens=limit)
    shown = "".join(stream)
    result = stream.result()
    assert (result.text, result.tokens, result.finish) == (TOKENIZER.decode(IDS[:limit]), IDS[:limit], "length")
    assert shown == result.text


def test_an_unfinished_character_at_the_limit_is_shown_as_such(reciter):
    face = TOKENIZER.encode("🙂")
    assert len(face) > 1
    stream = recite(reciter, [60, *face]).stream(PROMPT, max_new_tokens=2)
    assert "".join(stream) == stream.result().text == TOKENIZER.decode([60, face[0]])


@pytest.mark.parametrize("burst", [1, 4, 500])
@pytest.mark.parametrize(
    ("stop", "text"), [(["rich"], "She said: « né à Zü"), (["xyz", "said: « n", ": «"], "She said")]
)
def test_stop_strings(reciter, burst, stop, text):
    stream = recite(reciter, [*IDS, END]).stream(PROMPT, burst=burst, stop=stop)
    assert "".join(stream) == text
    result = stream.result()
    assert (result.text, result.finish) == (text, "stop")
    assert result.tokens == IDS[: len(result.tokens)]
    # The tokens reach to the one that completes the stop string, however many steps the device was ahead.
    whole = TOKENIZER.decode(result.tokens)
    assert any(s in whole for s in stop) and not any(s in TOKENIZER.decode(result.tokens[:-1]) for s in stop)
    assert reciter.generate(PROMPT, stop=stop).tokens == result.tokens


def test_the_beginning_of_a_stop_string_is_shown_once_it_is_none(reciter):
    stream = recite(reciter, [*IDS, END]).stream(PROMPT, burst=1, stop=["and 日本人", "too. The"])
    assert "".join(stream) == TEXT
    assert stream.result().finish == "stop"


def test_no_text_after_a_stop_string_is_shown_on_the_way():
    answer = Answer(TOKENIZER, ["<end>"], ())
    pieces = [answer.extend([token]) for token in TOKENIZER.encode("a <en<end> b")]
    assert "".join(pieces) == answer.text == "a <en"
    assert answer.finish == "stop"


def test_answers_against_a_plain_definition():
    chance = random.Random(1)
    letters = [TOKENIZER.encode(letter)[0] for letter in "ab"]
    cut = 0
    for _ in range(300):
        tokens = [chance.choice(letters) for _ in range(chance.randrange(12))]
        stop = ["".join(chance.choice("ab") for _ in range(chance.randrange(1, 5))) for _ in range(2)]
        shown, answer, rest = "", Answer(TOKENIZER, stop, ()), list(tokens)
        while rest:
            size = chance.randrange(1, 4)
            shown += answer.extend(rest[:size])
            rest = rest[size:]
        shown += answer.end("length")
        text, finish, count = TOKENIZER.decode(tokens), "length", len(tokens)
        for n in range(len(tokens) + 1):
            places = [place for place in (text[:n].find(s) for s in stop) if place >= 0]
            if places:
                text, finish, count = text[: min(places)], "stop", n
                break
        assert (shown, answer.text, answer.finish, len(answer.tokens)) == (text, text, finish, count)
        cut += finish == "stop"
    assert 50 < cut < 300


def test_closing_a_stream_cancels_and_leaves_the_engine_usable(reciter):
    recite(reciter, [*IDS, END])
    with reciter.stream(PROMPT, burst=2) as stream:
        first = next(stream)
    assert list(stream) == []
    result = stream.result()
    assert result.finish == "cancelled" and result.text == first and TEXT.startswith(first) and result.tokens
    unread = reciter.stream(PROMPT)
    assert unread.result().finish == "cancelled" and unread.result().tokens == []
    assert reciter.generate(PROMPT).text == TEXT


def test_bos_is_added_exactly_once(reciter):
    bos = TOKENIZER.bos_id
    assert reciter.encode("hi") == [bos, *TOKENIZER.encode("hi")]
    assert reciter.encode(f"{BOS}hi", parse_special=True) == [bos, *TOKENIZER.encode("hi")]
    assert reciter.encode("") == [bos]
    assert reciter.encode([5, 6]) == [5, 6]
    start = len(reciter.encode("hi"))
    assert recite(reciter, [*IDS, END], start).generate("hi").text == TEXT
    assert reciter.generate("hi").stats.prompt_tokens == start


def test_batch(reciter):
    recite(reciter, [*IDS, END])
    results = reciter.generate_batch([PROMPT, [0] * 10, "the"], stop=["Zürich"], max_new_tokens=20)
    assert {r.finish for r in results} == {"length", "stop"}
    for result, prompt in zip(results, (PROMPT, [0] * 10, "the"), strict=True):
        alone = reciter.generate(prompt, stop=["Zürich"], max_new_tokens=20)
        assert (result.text, result.tokens) == (alone.text, alone.tokens)
        assert result.stats.prompt_tokens == len(reciter.encode(prompt))


def test_sampling_and_seed_reach_the_model(reciter):
    recite(reciter, [])  # all tokens equally likely
    hot = Sampling(temperature=1.0)

    def run(**options: Any) -> list[int]:
        return reciter.generate(PROMPT, max_new_tokens=10, stop_ids=[], **options).tokens

    assert run(sampling=hot, seed=1) == run(sampling=hot, seed=1) != run(sampling=hot, seed=2)
    assert run() == [0] * 10
    assert set(run(sampling=Sampling(temperature=1.0, top_k=1), seed=1)) == {0}
    assert reciter.generate(PROMPT, max_new_tokens=10).tokens == [0]  # BOS is one of the tokenizer's stop ids


def test_stats(reciter):
    stats = recite(reciter, [*IDS, END]).generate(PROMPT).stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.steps) == (len(PROMPT), len(IDS) + 1, len(IDS))
    assert stats.prefill_rate > 0 and stats.decode_rate > 0
    assert stats.compile_seconds == 0  # compiled by an earlier request
    fresh = Engine(reciter.config, QUICK, reciter.params, TOKENIZER, chunk=16, context=64)
    stats = fresh.generate(PROMPT, max_new_tokens=1).stats
    assert stats.compile_seconds > 0 and stats.trace_seconds > 0 and stats.decode_rate == 0


def test_requests_that_cannot_be_carried_out(reciter):
    with pytest.raises(RequestError, match="128 tokens, expected fewer than the context of 128"):
        reciter.generate([1] * 128)
    for prompt, options, words in (
        ([], {}, "prompts"),
        (PROMPT, {"stop": "text"}, "stop"),
        (PROMPT, {"stop": [""]}, "stop"),
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens"),
        (PROMPT, {"seed": -1}, "seed"),
        ([TOKENIZER.vocab_size], {}, "ids"),
        (PROMPT, {"temperature": 0.5}, "unknown options temperature, .*sampling=Sampling"),
    ):
        with pytest.raises(RequestError, match=words):
            reciter.generate(prompt, **options)
    with pytest.raises(RequestError, match="burst"):
        reciter.stream(PROMPT, burst=0)
    # The context ends an answer that asks for more.
    result = recite(reciter, [60] * 9, 120).generate([1] * 120, max_new_tokens=50)
    assert (len(result.tokens), result.finish) == (8, "length")


def test_load_scores_text_as_llama_cpp_does():
    seen = []
    engine = load(FILE, numerics=QUICK, context=64, chunk=40, progress=lambda *step: seen.append(step))
    assert engine.load_seconds > 0 and engine.census.by_type.keys() == {"F32", "I32"}
    assert seen[-1][0] == seen[-1][1]
    recorded = np.load(golden.DATA / "oracle" / "logits_tiny-f32.npz")
    ids, logits = recorded["tokens_40"], recorded["logits_40"].astype(np.float64)
    want = logits[np.arange(39), ids[1:]] - np.log(np.exp(logits[:-1]).sum(-1))
    np.testing.assert_allclose(engine.logprobs(ids.tolist()), want, atol=1e-3)
    with pytest.raises(RequestError, match="from 2 to 64"):
        engine.logprobs([1] * 65)


def test_load_refuses_what_cannot_work(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="context = 4096"):
        load(FILE, context=4096)
    with pytest.raises(ConfigError, match="chunk"):
        load(FILE, chunk=0)
    with pytest.raises(ConfigError, match="MTP block"):
        load(FILE, speculative=1)
    with pytest.raises(ConfigError, match="speculative"):
        load(FILE, speculative="always")
    with pytest.raises(ConfigError, match="numerics"):
        load(FILE, numerics=tmp_path / "none.toml")
    seen: list[object] = []
    with pytest.raises(ConfigError, match="xla: No such compile option: 'foo'"):
        load(FILE, numerics=QUICK.replace(xla=(("foo", 1),)), progress=lambda *step: seen.append(step))
    assert not seen, "found before loading, which takes long"
    for change, words in (
        ({"head_dim": 90}, "58 features.*sim_kv = false"),
        ({"index_head_dim": 96}, "sim_index = false"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_simulation(dataclasses.replace(read_config(open_gguf(FILE)), **change), load_numerics("strict"))
    with pytest.raises(CheckpointError):
        load(tmp_path / "none.gguf")
    monkeypatch.setattr("ds4jax.checkpoint_memory.host_bytes", lambda: 1 << 20)
    with pytest.raises(CapacityError, match="weights"):
        load(FILE)
