"""Trains the demonstration model's byte-level BPE and lays it out like the real vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from ds4jax.tokenizer import SPLITS

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # GGUF token types

FIRST = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
"""BOS, EOS and padding, ids 0 to 2."""

LAST = {
    "<｜fim▁hole｜>": CONTROL,
    "<｜fim▁begin｜>": CONTROL,
    "<｜fim▁end｜>": CONTROL,
    "<｜User｜>": CONTROL,
    "<｜Assistant｜>": CONTROL,
    "<|EOT|>": CONTROL,
    "<think>": USER_DEFINED,
    "</think>": USER_DEFINED,
    "｜DSML｜": USER_DEFINED,
    "<｜latest_reminder｜>": CONTROL,
    "<｜action｜>": CONTROL,
    "<｜query｜>": CONTROL,
    "<｜authority｜>": CONTROL,
    "<｜domain｜>": CONTROL,
    "<｜title｜>": CONTROL,
    "<｜read_url｜>": CONTROL,
}
"""Added tokens after the merged ones, with their types: those that chat rendering writes, in the original's order."""


def train_tokenizer(documents: Iterable[str], size: int) -> dict[str, Any]:
    """GGUF tokenizer metadata of a BPE with `size` tokens: 3 controls, 256 bytes by alphabet, merged, added tokens.

    Raises ValueError if the documents are too short for so many merges.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(FIRST) - len(LAST), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents, trainer)

    merges = [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = [*FIRST, *alphabet, *merged, *LAST]
    if len(tokens) != size or len(set(tokens)) != size:
        raise ValueError(f"expected {size} distinct tokens, found {len(set(tokens))} of {len(tokens)}: too little text")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "joyai-llm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (256 + len(merged)) + list(LAST.values()),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
