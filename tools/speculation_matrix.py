"""Speculation with the demonstration model: is the text the same, and what do the drafts save?

`python tools/speculation_matrix.py 1000 1 2 3 4 auto` continues eight prompts by 1000 tokens each, greedy and sampled,
without drafts and with every given setting, and prints what docs/speculation.md shows. For "auto" a draft costs 0.2:
at what it costs on a CPU, nothing would be drafted.
"""

from __future__ import annotations

import sys

import numpy as np

import ds4jax
from ds4jax.engine_run import Result

PROMPTS: dict[str, str | list[int]] = {
    "prose": "In the middle of the forest there stood a house",
    "dialogue": '"Where are you going?" asked the fox.',
    "list": "There were apples, pears, plums, and",
    "numbered list": "1. Wake up early. 2. Wash your face. 3.",
    "repeated phrase": "the cat and the dog and the cat and the dog and the cat",
    "repeated request": " ".join(["tell me a story"] * 6),
    "fable": "Once upon a time there was a king",
    "random tokens": [0, *np.random.default_rng(0).integers(260, 4000, 24).tolist()],
}
SETTINGS = {"greedy": ds4jax.Sampling(), "sampled": ds4jax.Sampling(temperature=0.8, top_p=0.95)}


def answers(speculative: str, accept: str, tokens: int) -> dict[str, list[Result]]:
    """Answers to all prompts for each of the settings."""
    numerics = ds4jax.load_numerics("strict").replace(accept=accept, draft_cost=0.2)
    engine = ds4jax.load(speculative=speculative, numerics=numerics, context=tokens + 64)
    options = {"max_new_tokens": tokens, "seed": 5, "stop_ids": [], "logprobs": True}
    prompts = list(PROMPTS.values())
    return {name: engine.generate_batch(prompts, sampling=s, **options) for name, s in SETTINGS.items()}


def report(title: str, results: list[Result], plain: list[Result]) -> None:
    """One line per prompt: tokens per step, acceptance of each depth given the one before, the same text or not."""
    print(title)
    for name, result, want in zip(PROMPTS, results, plain, strict=True):
        same = result.tokens == want.tokens and np.array_equal(result.logprobs, want.logprobs)
        stats = result.stats
        reached = [stats.drafted[0], *stats.accepted[:-1]]
        shares = " ".join(f"{a / max(d, 1):.2f}" for a, d in zip(stats.accepted, reached, strict=True))
        print(
            f"  {name:17} {stats.tokens_per_step:.2f} tokens per step  {shares:20} {'same' if same else 'other'} text"
        )


def main() -> None:
    tokens, speculative = int(sys.argv[1]), sys.argv[2:]
    plain = answers("off", "coupled", tokens)
    for setting in speculative:
        for name, results in answers(setting, "coupled", tokens).items():
            report(f"{setting}, {name}", results, plain[name])
    report("2, sampled, by rejection", answers("2", "rejection", tokens)["sampled"], plain["sampled"])


if __name__ == "__main__":
    main()
