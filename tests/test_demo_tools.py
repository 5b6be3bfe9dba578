"""Corpus, tokenizer, token tables and GGUF export of the demonstration model."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import flax.traverse_util
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFReader

from ds4jax.checkpoint_config import read_config
from ds4jax.checkpoint_gguf import open_gguf
from ds4jax.checkpoint_table import make_plan
from ds4jax.config import ModelConfig
from ds4jax.model import DeepSeekV4
from ds4jax.tokenizer import Tokenizer
from tools.demo_model import corpus, export, train
from tools.demo_model.config import CONFIG
from tools.demo_model.encoders import decode
from tools.demo_model.tokenizer import FIRST, LAST, train_tokenizer

STORY = (
    'Once upon a time there was a king, whose name was Hans 12345.\n\n"Who\'s there?" said the fox; nobody answered.\n'
)
TINY = dataclasses.replace(
    CONFIG,
    vocab_size=320,
    num_hidden_layers=4,
    compress_ratios=(0, 4, 32, 4),
    swiglu_limit=(10.0,) * 5,
    swiglu_limit_shared=(10.0,) * 5,
    n_routed_experts=4,
)


@pytest.fixture(scope="module")
def metadata() -> dict[str, object]:
    return train_tokenizer([STORY * 20], TINY.vocab_size)


def test_vocabulary_is_laid_out_like_the_real_one(metadata: dict[str, object]) -> None:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert len(tokens) == len(types) == TINY.vocab_size
    assert tuple(tokens[:3]) == FIRST
    assert (tokens[3], tokens[30]) == ("!", "<")  # ids of the real vocabulary
    assert tokens[-len(LAST) :] == list(LAST)
    assert {t for t, kind in zip(tokens, types, strict=True) if kind == 4} == {"<think>", "</think>", "｜DSML｜"}


def test_tokenizer_reads_its_own_metadata(metadata: dict[str, object]) -> None:
    tokenizer = Tokenizer.from_gguf(metadata)
    text = STORY + "ünseen ☃ <｜User｜>\x00"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < TINY.vocab_size - len(LAST)
    assert len(tokenizer.encode(STORY)) < len(STORY) / 2
    assert tokenizer.encode("12345") == tokenizer.encode("123") + tokenizer.encode("45")


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="too little text"):
        train_tokenizer(["abc"], 1000)


TEXT = """<|book|>The Story of Doctor Dolittle -- Hugh Lofting

CHAPTER I

Once there was a doctor.
<|book|>Grimms' Fairy Tales -- The Brothers Grimm

THE GOLDEN BIRD

A certain king had a garden.

He SHOUTED.

HANS IN LUCK

Hans served.
<|book|>Peter Pan -- J. M. Barrie

CHAPTER 1 - PETER BREAKS THROUGH

All children grow up.
"""


def test_books_and_stories() -> None:
    books = corpus.read_books(TEXT)
    assert list(books) == ["The Story of Doctor Dolittle", "Grimms' Fairy Tales", "Peter Pan"]
    stories = corpus.documents("Grimms' Fairy Tales", books["Grimms' Fairy Tales"])
    assert stories == ["A certain king had a garden.\n\nHe SHOUTED.\n", "Hans served.\n"]
    assert corpus.documents("Peter Pan", books["Peter Pan"]) == [books["Peter Pan"]]


def test_held_out_text_is_what_its_tokens_spell() -> None:
    text = TEXT + "<|book|>The Princess and the Goblin -- George MacDonald\n\nA princess.\n" + STORY * 20
    metadata, tokens, held = corpus.prepare(text.replace("A princess", "A princess <think>"), 290)
    tokenizer = Tokenizer.from_gguf(metadata)
    spelled = tokenizer.decode(tokens["heldout"].tolist())
    assert spelled.replace(FIRST[0], "").replace(FIRST[1], "") == held
    assert [int((tokens[part] == 0).sum()) for part in ("train", "heldout")] == [3, 2]
    assert "garden" not in held
    assert "doctor" not in tokenizer.decode(tokens["train"].tolist())


def test_hash_table_is_balanced_and_differs_by_layer() -> None:
    rng = np.random.default_rng(0)
    counts = np.maximum(1e5 / np.arange(1, 2001) - 60, 0).astype(int)  # Zipf, the tail unseen
    rng.shuffle(counts)
    tables = [corpus.hash_table(counts, 8, 2, layer) for layer in range(3)]
    for table in tables:
        assert table.dtype == np.int32
        assert table.shape == (2000, 2)
        assert (table[:, 0] != table[:, 1]).all()
        load = np.bincount(table.ravel(), weights=np.repeat(counts, 2), minlength=8)
        assert load.max() / load.mean() < 1.01
        assert np.bincount(table[counts == 0].ravel(), minlength=8).min() > 0
    assert (np.sort(tables[0]) == np.sort(tables[1])).all(-1).mean() < 0.2
    assert (tables[0] == corpus.hash_table(counts, 8, 2, 0)).all()


def random_params(config: ModelConfig) -> dict[str, object]:
    """Parameters of the shapes that the model itself declares."""
    numerics = golden.EXACT.replace(rows="batch", sim_kv=True, sim_index=True, xla=())
    init = functools.partial(DeepSeekV4(config, numerics).init, method="initialise")
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 64), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: (
            rng.integers(0, 4, s.shape).astype(np.int32)
            if s.dtype == jnp.int32
            else rng.standard_normal(s.shape).astype(np.float32) * np.float32(0.05)
        ),
        shapes,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, object]) -> tuple[Path, dict[str, object]]:
    path, params = tmp_path_factory.mktemp("demo") / "tiny.gguf", random_params(TINY)
    export.export(path, params, TINY, metadata)
    return path, params


def test_exported_tensors_hold_the_parameters(written: tuple[Path, dict[str, object]]) -> None:
    path, params = written
    tensors = {t.name: t for t in GGUFReader(path).tensors}
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    names = {export.stored_as(name, TINY.num_hidden_layers)[0]: name for name in flat}
    assert set(tensors) == set(names)
    assert len(names) == len(flat)
    limits = {"IQ2_XXS": 0.34, "Q2_K": 0.28, "Q4_K": 0.08, "Q8_0": 0.006, "F16": 1e-3, "F32": 0, "I32": 0}
    for tensor, name in names.items():
        value, stored = np.asarray(flat[name]), tensors[tensor]
        kind = stored.tensor_type.name
        assert tuple(int(n) for n in stored.shape[::-1]) == value.shape, tensor
        raw = np.asarray(stored.data)
        found = raw if kind in ("F32", "F16", "I32") else decode(kind, raw)
        error = np.sqrt(((found.astype(np.float64) - value) ** 2).sum() / (value.astype(np.float64) ** 2).sum())
        assert error <= limits[kind], tensor


def test_exported_types_are_those_of_the_real_files(written: tuple[Path, dict[str, object]]) -> None:
    types = {t.name: t.tensor_type.name for t in GGUFReader(written[0]).tensors}
    expected = {
        "token_embd.weight": "F16",
        "output.weight": "Q8_0",
        "output_hc_fn.weight": "F16",
        "blk.0.ffn_gate_tid2eid.weight": "I32",
        "blk.1.indexer.attn_q_b.weight": "F16",
        "blk.1.indexer_compressor_ape.weight": "F16",
        "blk.2.attn_compressor_norm.weight": "F32",
        "blk.3.exp_probs_b.bias": "F32",
        "blk.3.ffn_gate_inp.weight": "F16",
        "blk.3.ffn_gate_exps.weight": "IQ2_XXS",
        "blk.3.ffn_up_exps.weight": "IQ2_XXS",
        "blk.3.ffn_down_exps.weight": "Q2_K",
        "blk.3.attn_output_a.weight": "Q8_0",
        "blk.4.ffn_down_exps.weight": "Q4_K",
        "blk.4.ffn_gate_inp.weight": "F32",
        "blk.4.hc_attn_fn.weight": "F32",
        "blk.4.nextn.e_proj.weight": "Q8_0",
        "blk.4.nextn.hc_head_fn.weight": "F32",
        "blk.4.nextn.shared_head_norm.weight": "F32",
    }
    assert {name: types.get(name) for name in expected} == expected
    assert "blk.0.exp_probs_b.bias" not in types
    assert not any(name.startswith("blk.0.attn_compressor") for name in types)


def test_exported_metadata(written: tuple[Path, dict[str, object]], metadata: dict[str, object]) -> None:
    fields = {name: field.contents() for name, field in GGUFReader(written[0]).fields.items()}
    expected = {
        "general.architecture": "deepseek4",
        "deepseek4.block_count": 5,
        "deepseek4.nextn_predict_layers": 1,
        "deepseek4.attention.compress_ratios": [0, 4, 32, 4, 0],
        "deepseek4.attention.head_count": 8,
        "deepseek4.attention.key_length": 128,
        "deepseek4.attention.indexer.top_k": 16,
        "deepseek4.attention.compress_rope_freq_base": 160000.0,
        "deepseek4.expert_weights_norm": True,
        "deepseek4.swiglu_clamp_exp": [10.0] * 5,
        "deepseek4.hyper_connection.epsilon": pytest.approx(1e-6),
        "deepseek4.rope.scaling.type": "yarn",
        "deepseek4.context_length": 2048,
        **metadata,
    }
    assert {key: fields.get(key) for key in expected} == expected


def test_loader_takes_every_exported_tensor_and_size(written: tuple[Path, dict[str, object]]) -> None:
    file = open_gguf(written[0])
    config = read_config(file)
    assert dataclasses.replace(config, rms_norm_eps=1e-6, hc_eps=1e-6) == TINY  # the file keeps them as float32
    assert (config.rms_norm_eps, config.hc_eps) == (pytest.approx(1e-6), pytest.approx(1e-6))
    plan = make_plan(file, None, config)
    assert not plan.ignored
    assert len(plan.assigned) == len(file.tensors)


def test_quantised_types_leave_out_plain_floats() -> None:
    names = [
        "embed",
        "head",
        "layers_3/moe/w1",
        "layers_3/moe/bias",
        "mtp/layer/moe/w1",
        "mtp/h_proj",
        "layers_0/attn/sink",
    ]
    assert export.quantised_types(names) == {
        "head": "Q8_0",
        "layers_3/moe/w1": "IQ2_XXS",
        "mtp/layer/moe/w1": "Q4_K",
        "mtp/h_proj": "Q8_0",
    }
    with pytest.raises(KeyError):
        export.stored_as("layers_3/moe/w4", 8)


def test_training_goes_on_from_where_it_stopped(tmp_path: Path) -> None:
    """Each run passes its deadline after one step; together they do what one long run does."""
    for name in ("tokens_train", "tokens_heldout"):
        np.save(tmp_path / f"{name}.npy", np.zeros(8, np.uint16))
    (tmp_path / "heldout.txt").write_text("text")

    def step_of(step: int, state: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, float]]:
        return {"moment": state["moment"] * 2 + step}, {"loss": 0.0}

    def run(out: str, deadline: float) -> tuple[bool, float]:
        job = train.Job(CONFIG, tmp_path, tmp_path / out, deadline)
        done, state = job.run("trunk", {"moment": jnp.ones(())}, 4, step_of)
        return done, float(state["moment"])

    want = run("whole", math.inf)
    assert want[0]
    seen = [run("parts", -math.inf) for _ in range(5)]
    assert [done for done, _ in seen] == [False, False, False, True, True]
    assert seen[3] == seen[4] == want
