"""Speculation with the demonstration model: the same text, whatever its MTP block is worth, and what it is worth."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from test_demo import HELD_OUT

import ds4jax
from ds4jax.decode.sampling import GREEDY, Sampling
from ds4jax.model.transformer import DeepSeekV4

SETTINGS = {"greedy": GREEDY, "sampled": Sampling(temperature=0.8, top_p=0.97)}
PROMPTS = ["Once upon a time there was a", '"Where are you going?" asked the fox. "I am going']

# Held out of the training, like the first: of the same book, and of Hugh Lofting, The Story of Doctor Dolittle (1920).
PASSAGES = [
    HELD_OUT,
    "By this time the people of the house were all gathered at the gate, but Irene stood alone in front of "
    "them. When the horsemen pulled up she ran to the side of the white horse and held up her arms. The king "
    "stopped and took her hands. In an instant she was on the saddle and clasped in his great strong arms.\n\nI "
    "wish I could describe the king so that you could see him in your mind. He had gentle, blue eyes, but a "
    "nose that made him look like an eagle. A long dark beard, streaked with silvery lines, flowed from his "
    "mouth almost to his waist, and as Irene sat on the saddle and hid her glad face upon his bosom it mingled "
    "with the golden hair which her mother had given her, and the two together were like a cloud with streaks "
    "of the sun woven through it.",
    "So there they stayed the whole night through.\n\nThey often heard the King's men searching and talking in the"
    " jungle round about. But they were quite safe, for no one knew of that hiding-place but Chee-Chee--not "
    "even the other monkeys.\n\nAt last, when daylight began to come through the thick leaves overhead, they heard"
    " Queen Ermintrude saying in a very tired voice that it was no use looking any more--that they might as "
    "well go back and get some sleep.\n\nAs soon as the soldiers had all gone home, Chee-Chee brought the Doctor "
    "and his animals out of the hiding-place and they set off for the Land of the Monkeys.\n\nIt was a long, long "
    "way; and they often got very tired--especially Gub-Gub. But when he cried they gave him milk out of the "
    "cocoanuts, which he was very fond of.",
]


@functools.cache
def demo(speculative: str | int) -> ds4jax.Engine:
    return ds4jax.load(context=256, speculative=speculative)


@functools.cache
def answer(speculative: str | int, prompt: str, setting: str) -> Any:
    options: Any = {"sampling": SETTINGS[setting], "seed": 3, "max_new_tokens": 60, "stop_ids": [], "logprobs": True}
    return demo(speculative).generate(prompt, **options)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_text(prompt, setting):
    want, result = answer("off", prompt, setting), answer(2, prompt, setting)
    assert result.tokens == want.tokens and len(set(want.tokens)) > 20
    assert result.logprobs.tobytes() == want.logprobs.tobytes()
    assert result.stats.steps < want.stats.steps * (0.75 if setting == "greedy" else 0.85)


def test_the_same_text_with_a_hostile_block(monkeypatch):
    """Weights of the right kinds in the wrong places: every leaf's first axis is shuffled."""
    chance, engine = np.random.default_rng(0), demo(2)
    mixed = jax.tree.map(lambda a: a[chance.permutation(len(a))] if a.ndim else a, engine.params["mtp"])
    monkeypatch.setattr(engine, "params", {**engine.params, "mtp": mixed})
    want, result = answer("off", PROMPTS[0], "sampled"), answer.__wrapped__(2, PROMPTS[0], "sampled")
    assert result.tokens == want.tokens
    assert result.logprobs.tobytes() == want.logprobs.tobytes()
    assert result.stats.accepted[0] < result.stats.drafted[0] / 10


def test_stop_strings_and_the_limit_cut_an_accepted_run():
    """An answer may end at any token of a step; what the device has done beyond it is not part of it."""
    whole, engine = answer("off", PROMPTS[0], "greedy").tokens, demo(2)
    cut = 0
    for end, burst in zip(range(10, 14), (1, 2, 3, 8), strict=True):
        text = engine.tokenizer.decode(whole[: end + 1])
        last = text[len(engine.tokenizer.decode(whole[:end])) :]
        stop = text[-max(6, len(last)) :]
        options: Any = {"sampling": SETTINGS["greedy"], "seed": 3, "stop_ids": [], "logprobs": True}
        stopped = engine.stream(PROMPTS[0], burst=burst, stop=[stop], max_new_tokens=60, **options)
        shown, result = "".join(stopped), stopped.result()
        assert (shown, result.finish) == (text[: text.index(stop)], "stop")
        assert result.tokens == whole[: len(result.tokens)] and len(result.logprobs) == len(result.tokens)
        cut += len(result.tokens) == end + 1
        limited = engine.stream(PROMPTS[0], burst=burst, max_new_tokens=end, **options)
        assert ("".join(limited), limited.result().finish) == (engine.tokenizer.decode(whole[:end]), "length")
        stats = limited.result().stats
        assert limited.result().tokens == whole[:end] and 1 + stats.steps + sum(stats.accepted) == end
    assert cut > 2


def test_a_cancelled_stream_leaves_the_engine_as_it_was():
    want = answer(2, PROMPTS[0], "sampled")
    options: Any = {"sampling": SETTINGS["sampled"], "seed": 3, "max_new_tokens": 60, "stop_ids": []}
    with demo(2).stream(PROMPTS[0], burst=2, **options) as stream:
        begun = next(stream) + next(stream)
    result = stream.result()
    assert result.finish == "cancelled" and want.text.startswith(result.text) and result.text.startswith(begun)
    assert result.tokens == want.tokens[: len(result.tokens)] and len(result.tokens) < 30
    assert demo(2).generate(PROMPTS[0], **options).tokens == want.tokens


def test_drafts_are_as_good_as_they_were():
    """An alarm for wrong numerics that leave the text as it is: shares of right drafts, defined as in the model card.

    The card's 0.622 and 0.628 hold after 1024 tokens. Over these passages from their beginnings, the training form
    with float activations gives 0.491 and 0.477, as the card says too; rounded activations change a few choices.
    """
    engine = demo("off")
    config, numerics, params = engine.config, engine.numerics, engine.params
    draft = functools.partial(DeepSeekV4(config, numerics).apply, {"params": params}, method="draft")

    def position(cache: Any, pair: Any) -> Any:
        """Two drafts from one position of the text; the next position overwrites the row of the second."""
        token, streams, at = pair
        one = jnp.ones(1, jnp.int32)
        logits, own, cache = draft(token[None, None], streams[None, None], cache, at[None], one)
        first = logits.argmax(-1).astype(jnp.int32)
        logits, _, cache = draft(first, own, cache, at[None] + 1, one)
        return cache, (first[0, 0], logits.argmax(-1)[0, 0])

    chain = jax.jit(
        lambda cache, *pairs: jax.lax.scan(position, cache, pairs)[1], compiler_options=numerics.compiler_options
    )
    right, given = [], []
    for passage in PASSAGES:
        ids = np.array(engine.encode(passage))
        run = runs.run(config, numerics, params, ids, runs.chunks(len(ids), (8,)), context=256)
        size, greedy = len(ids) - 2, run.logits.argmax(-1)
        padded = np.zeros(255, np.int32)
        padded[: len(ids) - 1] = ids[1:]
        streams = np.zeros((255, *run.streams.shape[1:]), np.float32)
        streams[: len(ids)] = run.streams[:255]
        cache = runs.empty_cache(config, numerics, 256, 2)
        drafts = chain(cache, padded, streams, np.arange(1, 256, dtype=np.int32))
        first, second = (np.asarray(d)[:size] for d in drafts)
        hit = first == greedy[1:-1]
        went_on = hit & (first == ids[2:])
        right.append(hit)
        given.append((second == greedy[2:])[went_on])
    one, two = np.concatenate(right), np.concatenate(given)
    assert len(one) > 500 and len(two) > 75
    assert abs(one.mean() - 0.491) < 0.03, one.mean()
    assert abs(two.mean() - 0.477) < 0.06, two.mean()
