"""The demonstration model that ships with the package: what it holds, what it predicts, and strictness end to end."""

import math
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ds4jax
from ds4jax.checkpoint import open_gguf, read_config
from ds4jax.model import DeepSeekV4

# From a book that was held out of the training: George MacDonald, The Princess and the Goblin (1872).
HELD_OUT = (
    "There was once a little princess whose father was king over a great country full of mountains and valleys. "
    "His palace was built upon one of the mountains, and was very grand and beautiful. The princess, whose name was "
    "Irene, was born there, but she was sent soon after her birth, because her mother was not very strong, to be "
    "brought up by country people in a large house, half castle, half farmhouse, on the side of another mountain, "
    "about half-way between its base and its peak."
)


@pytest.fixture(scope="module")
def engine():
    return ds4jax.load(context=256)


def test_file_has_the_real_types_and_fits_the_package():
    with resources.as_file(resources.files("ds4jax") / "demo" / "stories.gguf") as path:
        file = open_gguf(path)
        assert path.stat().st_size < 16e6
    types = {name.removeprefix("blk."): info.format for name, info in file.tensors.items()}
    assert types["5.ffn_gate_exps.weight"] == types["5.ffn_up_exps.weight"] == "IQ2_XXS"
    assert types["5.ffn_down_exps.weight"] == "Q2_K"
    assert types["8.ffn_down_exps.weight"] == types["8.ffn_up_exps.weight"] == "Q4_K"
    assert types["5.attn_q_b.weight"] == types["output.weight"] == types["5.ffn_up_shexp.weight"] == "Q8_0"
    config = read_config(file)
    assert {0, 4} < set(config.compress_ratios) and config.num_hash_layers == 3 and config.has_mtp
    assert config.sliding_window < 100 and config.index_topk * 4 < config.max_position_embeddings


def test_predicts_unseen_prose(engine):
    """1.54 bits per character over both held-out books; 1.9 leaves room for one paragraph's own difficulty."""
    bits = -engine.logprobs(HELD_OUT).sum() / math.log(2) / len(HELD_OUT)
    assert bits < 1.9
    words = HELD_OUT.split()
    shuffled = " ".join(np.random.default_rng(0).permutation(words))
    assert -engine.logprobs(shuffled).sum() / math.log(2) / len(shuffled) > bits + 0.5


def test_stream_equals_one_shot_and_repeats(engine):
    options = {"max_new_tokens": 40, "seed": 3, "sampling": ds4jax.Sampling(temperature=0.8, top_p=0.95)}
    whole = engine.generate("Once upon a time", **options)
    assert "".join(engine.stream("Once upon a time", **options)) == whole.text
    assert engine.generate("Once upon a time", **options).text == whole.text
    assert len(whole.text.split()) > 10


def test_training_form_equals_inference(engine):
    """The quantised model through the form it was trained in, with float activations."""
    numerics = engine.numerics.replace(rows="batch", act="f32", cache="f32")
    ids = engine.encode(HELD_OUT)[:96]
    module, variables = DeepSeekV4(engine.config, numerics), {"params": engine.params}
    tokens = jnp.asarray(ids, jnp.int32)[None]

    def logits(variables, tokens):
        run = module.apply(variables, tokens, method="sequence")
        return module.apply(variables, run.streams, jnp.ones(tokens.shape, bool), method="logits")[0]

    quick = {"xla_backend_optimization_level": 0}
    trained = jax.jit(logits, compiler_options=quick)(variables, tokens)
    cached = ds4jax.Engine(engine.config, numerics, engine.params, engine.tokenizer, context=128).logprobs(ids)
    picked = np.asarray(trained)[np.arange(95), ids[1:]] - np.logaddexp.reduce(np.asarray(trained)[:95], axis=-1)
    # A value on the edge of an FP8 or FP4 step may fall either way in another order of sums.
    assert np.median(np.abs(picked - cached)) < 1e-3
    assert np.max(np.abs(picked - cached)) < 0.3
