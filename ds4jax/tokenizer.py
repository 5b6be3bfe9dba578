"""Text to token ids and back: the byte-level BPE of DeepSeek-V4, built from GGUF metadata.

`Tokenizer` encodes; `Decoder` turns a stream of ids into text without ever showing half a character.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from ds4jax.errors import CheckpointError, RequestError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # GGUF token types
_MODEL = "gpt2"
_PRE = ("joyai-llm", "deepseek-v3")  # two names of one splitter

# Each pattern cuts every piece that the one before it left; what lies between matches is a piece too.
SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"""|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
"""Patterns that cut text before the merges, applied in turn."""


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_CHARACTER_OF_BYTE = _byte_alphabet()
_LATIN1_OF_CHARACTER = {ord(character): byte for byte, character in _CHARACTER_OF_BYTE.items()}


class Span(NamedTuple):
    """A stretch of text; in trusted text, added tokens written out become their ids (leftmost, longest)."""

    text: str
    trusted: bool


class Tokenizer:
    """A vocabulary with its merges; ids are positions in the GGUF file's token list.

    vocab_size: number of tokens, the width of the logits.
    bos_id, eos_id: first token of every prompt, last token of every answer.
    stop_ids: ids that end an answer: EOS, and BOS and the turn marks, after which nothing valid can follow.
    special_ids: text -> id of every added token (control or user-defined).
    """

    def __init__(self, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str]) -> None:
        self._tokens, self._types = tokens, types
        vocabulary = {token: i for i, token in enumerate(tokens)}
        _check_vocabulary(vocabulary, tokens, types)
        # Ordinary text cannot reach an added token: no merge produces one.
        self._bpe = tokenizers.Tokenizer(_bpe_model(vocabulary, merges))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self._bpe.decoder = decoders.ByteLevel()

        self.vocab_size = len(tokens)
        self.special_ids = {
            token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if _is_added(kind)
        }
        for required in (BOS, EOS):
            if required not in self.special_ids:
                raise CheckpointError(f"tokenizer.ggml.tokens: expected the control token {required}, found none")
        self.bos_id = self.special_ids[BOS]
        self.eos_id = self.special_ids[EOS]
        self.stop_ids = tuple(self.special_ids[t] for t in (EOS, BOS, USER, ASSISTANT) if t in self.special_ids)

    @staticmethod
    def from_gguf(meta: Mapping[str, Any]) -> Tokenizer:
        """Builds the tokenizer from GGUF metadata, a mapping from keys to Python values.

        Raises `CheckpointError` for a missing key, another kind of vocabulary, or a list that contradicts another.
        """
        kind, pre = (_required(meta, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        if kind != _MODEL or pre not in _PRE:
            raise CheckpointError(
                f"unsupported vocabulary: expected tokenizer.ggml.model {_MODEL} with pre {' or '.join(_PRE)}, "
                f"found {kind} with {pre}; convert the file from a DeepSeek-V4 checkpoint"
            )
        tokens, types, merges = (_required(meta, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
        if len(tokens) != len(types):
            raise CheckpointError(f"tokenizer.ggml.token_type: expected {len(tokens)} entries, found {len(types)}")
        tokenizer = Tokenizer(tokens, types, merges)
        for key, expected in (("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id)):
            found = meta.get(f"tokenizer.ggml.{key}", expected)
            if found != expected:
                raise CheckpointError(
                    f"tokenizer.ggml.{key}: expected {expected} ({tokens[expected]}), found {found}; correct the key"
                )
        return tokenizer

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a text; no BOS is added.

        parse_special: whether added tokens written out in the text become their ids (leftmost, longest) or stay text.
        Raises `RequestError` for text that is not valid Unicode.
        """
        return self.encode_spans([Span(text, trusted=parse_special)])

    def encode_spans(self, spans: Iterable[Span]) -> list[int]:
        """Ids of texts that follow one another; what lies between two added tokens is encoded as one piece.

        Raises `RequestError` for text that is not valid Unicode.
        """
        ids: list[int] = []
        ordinary: list[str] = []
        for text, trusted in spans:
            end = 0
            for match in self._added.finditer(text) if trusted else ():
                ordinary.append(text[end : match.start()])
                ids += self._encode_ordinary("".join(ordinary))
                ids.append(self.special_ids[match.group()])
                ordinary, end = [], match.end()
            ordinary.append(text[end:])
        return ids + self._encode_ordinary("".join(ordinary))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; added tokens appear as their literal text, invalid UTF-8 as U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """Exact bytes of every id, [vocab_size]; added tokens have the bytes of their literal text."""
        return [
            token.translate(_LATIN1_OF_CHARACTER).encode("latin-1") if kind == _NORMAL else token.encode()
            for token, kind in zip(self._tokens, self._types, strict=True)
        ]

    @functools.cached_property
    def _added(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    def _encode_ordinary(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"text is not valid Unicode: {error.reason} at character {error.start}") from error
        return self._bpe.encode(text, add_special_tokens=False).ids if text else []


def frequent_tokens(tokenizer: Tokenizer, counts: Mapping[int, int], size: int) -> list[int]:
    """The ids of `size` tokens: those that end an answer, then the most frequent by these counts, the lower id first.

    Tokens without a count come last. Raises `RequestError` if the vocabulary is smaller, or those of the end are more.
    """
    ends = tokenizer.stop_ids
    if not len(ends) <= size <= tokenizer.vocab_size:
        raise RequestError(f"{size} tokens, expected {len(ends)}, those that end an answer, to {tokenizer.vocab_size}")
    others = (token for token in range(tokenizer.vocab_size) if token not in ends)
    return [*ends, *sorted(others, key=lambda token: -counts.get(token, 0))][:size]


class Decoder:
    """Incremental decoding: text is handed out as soon as its last byte is known, never half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        return self._utf8.decode(self._token_bytes[id])

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing. The decoder can be used again."""
        return self._utf8.decode(b"", final=True)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _is_added(kind: int) -> bool:
    return kind in (_CONTROL, _USER_DEFINED)


def _required(meta: Mapping[str, Any], key: str) -> Any:
    if key not in meta:
        raise CheckpointError(f"{key} is missing; use a model file with its tokenizer (an MTP or draft file has none)")
    return meta[key]


def _check_vocabulary(vocabulary: Mapping[str, int], tokens: Sequence[str], types: Sequence[int]) -> None:
    if len(vocabulary) != len(tokens):
        raise CheckpointError(
            f"tokenizer.ggml.tokens: expected distinct tokens, found {len(tokens) - len(vocabulary)} repeated"
        )
    missing = [byte for byte, character in _CHARACTER_OF_BYTE.items() if character not in vocabulary]
    if missing:
        raise CheckpointError(f"tokenizer.ggml.tokens: expected a token for every byte, found none for {missing[:8]}")
    normal = "".join(token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL)
    foreign = set(normal) - set(_CHARACTER_OF_BYTE.values())
    if foreign:
        raise CheckpointError(f"tokenizer.ggml.tokens: not a byte-level vocabulary, found {sorted(foreign)[:8]}")


def _bpe_model(vocabulary: dict[str, int], merges: Sequence[str]) -> models.BPE:
    pairs: Any = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        return models.BPE(vocab=vocabulary, merges=pairs)
    except Exception as error:  # plain Exception for a merge of unknown tokens, TypeError for one that is not a pair
        raise CheckpointError(f"tokenizer.ggml.merges: not pairs of known tokens: {error}") from error
