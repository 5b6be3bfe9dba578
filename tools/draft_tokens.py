"""Fewer tokens to draft, with the demonstration model: is the text the same, and how many drafts does it cost?

`python -m tools.draft_tokens stories.txt 200` takes the most frequent tokens of the training books, continues eight
passages of the held-out ones by 200 tokens each, greedy and sampled, and prints what docs/speculation.md shows.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

import ds4jax
from ds4jax.engine_run import Result
from ds4jax.tokenizer import frequent_tokens
from tools.demo_model.corpus import HELD_OUT, read_books

SIZES = (4096, 2048, 1024, 512)
SETTINGS = {"greedy": ds4jax.Sampling(), "sampled": ds4jax.Sampling(temperature=0.8, top_p=0.95)}
PASSAGES, LENGTH = 4, 64  # of each held-out book, and tokens of each


def answers(prompts: list[list[int]], tokens: int, speculative: int, few: Path | None) -> dict[str, list[Result]]:
    """Answers to all prompts for each of the settings."""
    engine = ds4jax.load(speculative=speculative, draft_tokens=few, context=LENGTH + tokens)
    options = {"max_new_tokens": tokens, "seed": 5, "stop_ids": [], "logprobs": True}
    return {name: engine.generate_batch(prompts, sampling=s, **options) for name, s in SETTINGS.items()}


def main() -> None:
    books, tokens = read_books(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2])
    tokenizer = ds4jax.load().tokenizer
    counts: Counter[int] = Counter()
    for title, text in books.items():
        if title not in HELD_OUT:
            counts.update(tokenizer.encode(text))
    held = [tokenizer.encode(books[title]) for title in HELD_OUT]
    starts = [(ids, len(ids) * (1 + i) // (1 + PASSAGES)) for ids in held for i in range(PASSAGES)]
    prompts = [[tokenizer.bos_id, *ids[start : start + LENGTH - 1]] for ids, start in starts]
    plain = answers(prompts, tokens, 0, None)
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            few = frequent_tokens(tokenizer, counts, size)
            file = Path(folder, f"{size}.txt")
            file.write_text("\n".join(map(str, few)))
            for speculative in (1, 2):
                for name, results in answers(prompts, tokens, speculative, file).items():
                    report(f"{size} tokens, K = {speculative}, {name}", results, plain[name], set(few))


def report(title: str, results: list[Result], plain: list[Result], few: set[int]) -> None:
    """Tokens per step, acceptance of each depth given the one before, and the share of the text's tokens listed."""
    pairs = zip(results, plain, strict=True)
    same = all(a.tokens == b.tokens and np.array_equal(a.logprobs, b.logprobs) for a, b in pairs)
    steps, accepted, drafted = (
        np.sum([getattr(result.stats, name) for result in results], axis=0) for name in ("steps", "accepted", "drafted")
    )
    shares = accepted / [drafted[0], *accepted[:-1]]
    text = [token for result in plain for token in result.tokens]
    listed = np.mean([token in few for token in text])
    print(
        f"{title}: {1 + accepted.sum() / steps:.3f} tokens per step, accepted {' '.join(f'{s:.3f}' for s in shares)}, "
        f"{listed:.1%} of the text listed, {'same' if same else 'other'} text",
        flush=True,
    )


if __name__ == "__main__":
    main()
