"""Cuts the story corpus into documents, trains the tokenizer and writes token files.

    python -m tools.demo_model.corpus stories.txt --out build/demo

Writes tokens_train.npy, tokens_heldout.npy (uint16, every document as BOS, text, EOS), heldout.txt (the held-out text
that the tokens spell) and tokenizer.json (GGUF metadata).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.tokenizer import Tokenizer
from tools.demo_model.config import CONFIG
from tools.demo_model.tokenizer import train_tokenizer

HELD_OUT = ("The Princess and the Goblin", "The Story of Doctor Dolittle")
"""Whole books kept from training; no other book of the corpus shares a passage or a sequel with them."""

CAPITALS = r"[A-Z][A-Z0-9 ,.'!-]{3,}"
STORY_HEADINGS = {
    "Aesop's Fables": CAPITALS,
    "Andersen's Fairy Tales": CAPITALS,
    "Grimms' Fairy Tales": CAPITALS,
    "The Book of Dragons": r"[IVX]+\. .*",
    "Christmas Stories": r"[^\n]*\n\nPublished \d{4}",
}
"""Collections of stories, each story a document of its own: what stands between them."""


def read_books(text: str) -> dict[str, str]:
    """Title to text of every book of the corpus, without the title lines."""
    books = {}
    for part in text.split("<|book|>")[1:]:
        title, body = part.split("\n", 1)
        books[title.split(" -- ")[0]] = re.sub("\u2060", "", body).strip() + "\n"
    return books


def documents(title: str, book: str) -> list[str]:
    """The stories of a collection without their headings, or the whole book."""
    if title not in STORY_HEADINGS:
        return [book]
    parts = re.split(rf"(?:\A|\n\n+){STORY_HEADINGS[title]}(?=\n)", book)
    return [part.strip() + "\n" for part in parts if part.strip()]


def tokenise(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """BOS, text, EOS of every document, uint16 [n]."""
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    return np.array(ids, np.uint16)


def hash_table(counts: np.ndarray, experts: int, top_k: int, layer: int) -> np.ndarray:
    """Expert ids of every token for a hash-routed layer, int32 [V, top_k]: distinct, balanced, unlike other layers'.

    Tokens go from frequent to rare, each to the experts with the least traffic so far; noise of the size of the token's
    own traffic varies which experts meet.
    """
    rng = np.random.default_rng(layer)
    load = np.zeros(experts)
    table = np.empty((len(counts), top_k), np.int32)
    for token in np.argsort(-counts, kind="stable"):
        traffic = counts[token] + 1.0  # unseen tokens spread as well
        chosen = np.argsort(load + traffic * rng.random(experts), kind="stable")[:top_k]
        load[chosen] += traffic
        table[token] = chosen
    return table


def prepare(text: str, vocabulary: int) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
    """Tokenizer metadata, token arrays "train" and "heldout", and the held-out text."""
    books = read_books(text)
    train = [part for title, book in books.items() if title not in HELD_OUT for part in documents(title, book)]
    held = [books[title] for title in HELD_OUT]
    metadata = train_tokenizer(train, vocabulary)
    tokenizer = Tokenizer.from_gguf(metadata)
    return metadata, {"train": tokenise(tokenizer, train), "heldout": tokenise(tokenizer, held)}, "".join(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    args = parser.parse_args()
    metadata, tokens, held = prepare(args.stories.read_text(encoding="utf-8"), CONFIG.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tokenizer.json").write_text(json.dumps(metadata, ensure_ascii=False), encoding="utf-8")
    (args.out / "heldout.txt").write_text(held, encoding="utf-8")
    for name, ids in tokens.items():
        np.save(args.out / f"tokens_{name}.npy", ids)
        print(f"{name}: {len(ids)} tokens, {int((ids == 0).sum())} documents")
    print(f"held-out text: {len(held)} characters, {len(held.encode())} bytes")


if __name__ == "__main__":
    main()
