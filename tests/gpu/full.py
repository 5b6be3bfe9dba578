"""The full model's sizes on a GPU.

`PYTHONPATH=.:tests python tests/gpu/full.py [--layers N] [--tokens N] [--drafts K ...]`

Random weights in the real file's types, but the indexers choose fewer rows, so that there is something to choose. Four
layers are compared with the XLA reference; then the strict answers with and without drafts must have the same bits.
Random weights would accept no draft, so a part of the drafts is taken from the answer without drafts. Exits with the
number of failed checks.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from planned import Planned
from runs import run

from ds4jax.bench.synthetic import flash, make_params
from ds4jax.config import ModelConfig, Numerics
from ds4jax.decode.generate import Generate
from ds4jax.decode.sampling import GREEDY, Sampling
from ds4jax.decode.speculation import Speculation
from ds4jax.decode.state import Generation, Limits
from gpu.run import FLOATS, KERNELS, REFERENCE, Report, on_card

BOUND = 1e-4  # of logits, relative to the largest: float dots of up to 16,384 products in another order, four layers
PROMPT = np.arange(1, 145, dtype=np.int32) * 897  # longer than a window of the layers that compress most
TOP_K = 32  # rows that an indexer chooses: fewer than the prompt has
ROWS = 16  # of a call, to read the prompt
HOT = Sampling(temperature=0.8, top_p=0.95)
RIGHT = 0.7  # share of drafts that are taken from the answer


def four_layers() -> tuple[bool, str]:
    """Logits of a prompt by kernels and by the reference, with float activations."""
    config = dataclasses.replace(flash(4), index_topk=TOP_K)
    params, pieces = make_params(config, seed=1), [ROWS] * (len(PROMPT) // ROWS)

    def logits(numerics: Numerics) -> np.ndarray:
        return run(config, numerics.replace(**FLOATS), params, PROMPT, pieces, context=2 * len(PROMPT)).logits

    got, want = logits(KERNELS), logits(REFERENCE)
    worst = float(np.abs(got - want).max() / np.abs(want).max())
    return bool(np.isfinite(got).all()) and worst <= BOUND, f"logits differ by at most {worst:.1e} of the largest"


def programs(config: ModelConfig, params: Any, drafts: list[int], limits: Limits) -> dict[int, tuple[Generate, Any]]:
    """The step with each number of drafts, compiled side by side. Prompts are read with the rows of a step."""
    made, lowered = {}, {}
    for depth in drafts:
        size = dataclasses.replace(limits, chunk=1 + depth)
        made[depth] = generate = Generate(Planned(config, KERNELS), size, Speculation(depth))
        request, nobody = generate.prepare(PROMPT), jnp.zeros(1, bool)
        state = jax.eval_shape(generate.programs.start)
        lowered[depth] = generate.programs.run.lower(params, request, state, jnp.int32(0), nobody)
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda low: low.compile(), lowered.values())
        return {depth: (made[depth], program) for depth, program in zip(lowered, compiled, strict=True)}


def answer(generate: Generate, program: Any, params: Any, sampling: Sampling) -> Generation:
    request, nobody = generate.prepare(PROMPT, sampling=sampling, key=5), jnp.zeros(1, bool)
    return program(params, request, generate.programs.start(), jnp.int32(2**30), nobody)[1]


def streams(layers: int, tokens: int, drafts: list[int]) -> tuple[bool, str]:
    """Strict answers, greedy and sampled, with every number of drafts."""
    config = dataclasses.replace(flash(layers), has_mtp=True, index_topk=TOP_K)
    limits = Limits(batch=1, prompt=len(PROMPT), new_tokens=tokens, chunk=1)
    free = jnp.full((1, limits.context + 1), -1, jnp.int32)
    params = {**make_params(config, seed=2), "plan": free}
    found, good = programs(config, params, drafts, limits), True
    for name, sampling in (("greedy", GREEDY), ("sampled", HOT)):
        want = answer(*found[drafts[0]], params, sampling)
        ids, odds = np.asarray(want.tokens)[0], np.asarray(want.logprobs)[0]
        chance = np.random.default_rng(0)
        plan = np.full(free.shape, -1, np.int32)
        right = chance.random(tokens) < RIGHT
        plan[0, len(PROMPT) : len(PROMPT) + tokens] = np.where(right, ids[:tokens], -1)
        for depth in drafts:
            got = answer(*found[depth], {**params, "plan": jnp.asarray(plan)}, sampling)
            same = (
                np.array_equal(np.asarray(got.tokens)[0], ids)
                and np.asarray(got.logprobs)[0].tobytes() == odds.tobytes()
            )
            good &= same and bool(np.isfinite(odds).all()) and int(want.length[0]) == tokens
            accepted, steps = np.asarray(got.accepted)[0].tolist(), int(got.steps[0])
            print(
                f"     {name}, {depth} drafts: {steps} steps, accepted {accepted}, {'same' if same else 'OTHER'}",
                flush=True,
            )
    return good, f"{layers} layers, {tokens} tokens, log-probabilities included, drafts {drafts}: the same {good}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=43)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--drafts", type=int, nargs="*", default=[0, 1, 2, 3])
    given = parser.parse_args()
    drafts = sorted({0, *given.drafts})  # with what the others are compared, first
    report = Report()
    if not on_card():
        return 1
    report.check("four layers", four_layers)
    report.check("strict answers", lambda: streams(given.layers, given.tokens, drafts))
    return report.failed


if __name__ == "__main__":
    sys.exit(main())
