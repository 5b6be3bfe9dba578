"""Trains the demonstration model and writes its GGUF.

    python -m tools.demo_model.train --data build/demo --out build/demo/run

Stops after `--minutes` with a checkpoint and goes on from it when called again. The last part of the training is
quantisation-aware: experts, projections and head take the values that their GGUF types can hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ds4jax.config import ModelConfig
from ds4jax.model import DeepSeekV4
from tools.demo_model import objective
from tools.demo_model.config import CONFIG
from tools.demo_model.corpus import hash_table
from tools.demo_model.export import export, quantised_types
from tools.demo_model.fakequant import fake_all

Flat = dict[str, Any]
BATCH, LENGTH = 8, 2048
QAT_START = 0.5  # part of the steps after which weights take their stored values
CONSTANT = 0.4  # part of the steps before the learning rate decays
QAT_REFRESH = 10  # steps between two fits of the stored values
CORRUPTION = 0.15  # share of input tokens replaced by random ones: the corpus is small and repeats many times
OPENINGS = 2  # windows of a batch that begin with a document, as a prompt does
BOS = 0
BIAS_RATE = 1e-3  # router bias per step, towards equal shares (arXiv 2408.15664)


def initial(config: ModelConfig, counts: np.ndarray, seed: int) -> Flat:
    """Flat parameters; hyper-connections start near independent streams, outputs of sub-layers small."""
    model = DeepSeekV4(config, objective.TRAINING)
    tokens = jnp.zeros((1, 2 * config.sliding_window), jnp.int32)
    shapes = jax.eval_shape(functools.partial(model.init, method="initialise"), jax.random.key(0), tokens)["params"]
    shapes = flax.traverse_util.flatten_dict(shapes, sep="/")
    rng, h, flat = np.random.default_rng(seed), config.hc_mult, {}
    for name, shape in ((name, value.shape) for name, value in shapes.items()):
        leaf = name.rsplit("/", 1)[-1]
        if leaf == "tid2eid":
            layer = int(name.split("/")[0].removeprefix("layers_"))
            value = hash_table(counts, config.n_routed_experts, config.num_experts_per_tok, layer)
        elif "hc_" in name and leaf == "base":
            value = 0.3 * rng.standard_normal(shape)
            if value.size > h:
                value[2 * h :] += 3.0 * np.eye(h).reshape(-1)
        elif "hc_" in name and leaf == "scale":
            value = np.full(shape, 0.1)
        elif len(shape) == 1:
            value = np.zeros(shape) if leaf in ("bias", "sink") else np.ones(shape)
        elif leaf == "ape":
            value = np.zeros(shape)
        else:
            value = rng.standard_normal(shape) * (1.0 if leaf == "embed" else shape[-1] ** -0.5)
            if leaf in ("wo_b", "w2"):
                value /= math.sqrt(2 * config.num_hidden_layers)
        flat[name] = jnp.asarray(value, jnp.int32 if leaf == "tid2eid" else jnp.float32)
    return flat


def is_fixed(name: str) -> bool:
    """Whether a parameter is not trained by gradients: token tables, and the router bias, which has its own rule."""
    return name.endswith(("/tid2eid", "/bias"))


def nest(flat: Flat) -> dict[str, Any]:
    """The nested parameters of the model."""
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def balance(config: ModelConfig, fixed: Flat, load: jax.Array) -> Flat:
    """Router biases after one step: up for experts below their share, down for those above."""
    moved = dict(fixed)
    for name, value in fixed.items():
        if name.endswith("/bias"):
            head = name.split("/")[0]
            row = config.num_hidden_layers if head == "mtp" else int(head.removeprefix("layers_"))
            bias = value + BIAS_RATE * jnp.sign(1.0 / config.n_routed_experts - load[row])
            moved[name] = bias - jnp.mean(bias)
    return moved


def stored(flat: Flat) -> Flat:
    """What the file will hold minus what is trained, for every quantised parameter."""
    types = quantised_types(flat)
    values = fake_all(flat, types)
    return {name: values[name] - flat[name] for name in types}


def add(flat: Flat, delta: Flat) -> Flat:
    """Parameters with their stored values and straight-through gradients."""
    return {
        name: value + jax.lax.stop_gradient(delta[name]) if name in delta else value for name, value in flat.items()
    }


def optimizer(steps: int, peak: float) -> optax.GradientTransformation:
    """AdamW with a short warm-up and a linear decay to zero; vectors are not decayed."""
    warm, flat = min(100, steps // 10), int(CONSTANT * steps)
    schedule = optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, peak, warm),
            optax.schedules.constant_schedule(peak),
            optax.schedules.linear_schedule(peak, 0.0, steps - flat),
        ],
        [warm, flat],
    )

    def decayed(flat: Flat) -> dict[str, bool]:
        return {name: value.ndim > 1 and "hc_" not in name for name, value in flat.items()}

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.97, weight_decay=0.15, mask=decayed),
    )


def batch(tokens: np.ndarray, step: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a step, the same for the same step whenever training was interrupted."""
    rng = np.random.default_rng(step)
    starts = rng.integers(0, len(tokens) - LENGTH - 1, BATCH)
    openings = np.flatnonzero(tokens[: -LENGTH - 1] == BOS)
    starts[:OPENINGS] = rng.choice(openings, OPENINGS)
    window = np.stack([tokens[s : s + LENGTH + 1] for s in starts]).astype(np.int32)
    inputs = window[:, :-1].copy()
    noise = rng.random(inputs.shape) < CORRUPTION * rng.random((BATCH, 1)) * 2
    inputs[noise] = rng.integers(3, vocabulary, int(noise.sum()))
    return inputs, window[:, 1:]


def evaluate(
    config: ModelConfig, flat: Flat, tokens: np.ndarray, characters: int, windows: int | None
) -> dict[str, Any]:
    """Loss in bits per character and draft agreement on held-out text, every token predicted from at least half a
    window of context (the first window from its start)."""
    half, measure = LENGTH // 2, _measure(config)
    starts = list(range(0, len(tokens) - 1, half))[:windows]
    params, totals, loads = nest(flat), {}, []
    for i in range(0, len(starts), BATCH):
        rows, aims, counted = (np.zeros((BATCH, LENGTH), t) for t in (np.int32, np.int32, bool))
        for b, start in enumerate(starts[i : i + BATCH]):
            piece = tokens[start : start + LENGTH + 1]
            n = len(piece) - 1
            rows[b, :n], aims[b, :n] = piece[:-1], piece[1:]
            counted[b, (half if start else 0) : n] = True
        out = jax.device_get(measure(params, rows, aims, counted))
        loads.append(out.pop("load"))
        for name, value in out.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    share = characters * totals["tokens"] / (len(tokens) - 1)
    return {
        "bits_per_character": totals["nats"] / math.log(2) / share,
        "nats_per_token": totals["nats"] / totals["tokens"],
        "greedy_equals_text": totals["greedy"] / totals["tokens"],
        "draft1": totals["draft1"] / totals["draft1_of"],
        "draft2_given_draft1": totals["draft2"] / max(totals["draft2_of"], 1),
        "largest_expert_share": float(np.max(np.mean(loads, axis=0))),
    }


@functools.cache
def _measure(config: ModelConfig) -> Any:
    return jax.jit(functools.partial(objective.measure, config))


def record(out: Path, name: str, figures: dict[str, Any]) -> None:
    """Prints measured figures and keeps them beside the checkpoint."""
    path = out / "figures.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {key: round(value, 4) for key, value in figures.items()}
    path.write_text(json.dumps(known, indent=1))
    print(json.dumps({name: known[name]}), flush=True)


def save(path: Path, step: int, state: Any) -> None:
    """Writes a checkpoint in one move, so that an interrupted write loses nothing."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    part = path.with_suffix(".part.npz")
    np.savez(part, step=step, **{f"leaf{i}": leaf for i, leaf in enumerate(leaves)})
    part.replace(path)


def restore(path: Path, state: Any) -> tuple[int, Any]:
    """Reads what `save` wrote into the structure of `state`."""
    with np.load(path) as file:
        leaves = [jnp.asarray(file[f"leaf{i}"]) for i in range(len(jax.tree.leaves(state)))]
        return int(file["step"]), jax.tree.unflatten(jax.tree.structure(state), leaves)


@dataclasses.dataclass
class Job:
    """Where a run reads and writes, and when it has to stop."""

    config: ModelConfig
    data: Path
    out: Path
    deadline: float

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.tokens = np.load(self.data / "tokens_train.npy")
        self.held = np.load(self.data / "tokens_heldout.npy")
        self.characters = len((self.data / "heldout.txt").read_text(encoding="utf-8"))
        self.began = time.monotonic()

    def evaluate(self, name: str, flat: Flat, windows: int | None = None) -> None:
        """Measures parameters on the held-out text and records the figures."""
        figures = evaluate(self.config, flat, self.held, self.characters, windows)
        record(self.out, name, figures)

    def run(self, name: str, state: Any, steps: int, step_of: Any) -> tuple[bool, Any]:
        """Takes the remaining steps of a stage; returns whether the stage is complete, and its state."""
        path, first = self.out / f"{name}.npz", 0
        if path.exists():
            first, state = restore(path, state)
        for step in range(first, steps):
            state, parts = step_of(step, state)
            if step % 200 == 0 or step == steps - 1:
                shown = {key: round(float(value), 4) for key, value in parts.items()}
                spent = round(time.monotonic() - self.began)
                print(json.dumps({"stage": name, "step": step, **shown, "seconds": spent}), flush=True)
            if time.monotonic() > self.deadline:
                save(path, step + 1, state)
                print(f"{name}: stopped after step {step}; call again to go on", flush=True)
                return step + 1 == steps, state
        if first < steps:
            save(path, steps, state)
        return True, state


def split(flat: Flat) -> tuple[Flat, Flat]:
    """Parameters trained by gradients, and the others."""
    fixed = {name: value for name, value in flat.items() if is_fixed(name)}
    return {name: value for name, value in flat.items() if name not in fixed}, fixed


def train(job: Job, steps: int, peak: float, seed: int, quantise: bool) -> tuple[bool, Flat]:
    """Trunk and MTP block together; returns whether all steps are done, and the master weights."""
    config, rule = job.config, optimizer(steps, peak)
    free, fixed = split(initial(config, np.bincount(job.tokens, minlength=config.vocab_size), seed))

    @functools.partial(jax.jit, donate_argnums=(0,))
    def update(state: Any, delta: Flat, inputs: jax.Array, targets: jax.Array) -> tuple[Any, dict[str, Any]]:
        free, fixed, moments = state

        def objective_of(free: Flat) -> Any:
            return objective.loss(config, nest({**add(free, delta), **fixed}), inputs, targets)

        (_, parts), slope = jax.value_and_grad(objective_of, has_aux=True)(free)
        change, moments = rule.update(slope, moments, free)
        fixed = balance(config, fixed, parts.pop("load"))
        return (optax.apply_updates(free, change), fixed, moments), {**parts, "slope": optax.global_norm(slope)}

    refresh = jax.jit(stored)
    delta = jax.tree.map(jnp.zeros_like, jax.eval_shape(stored, free))
    turn = int(QAT_START * steps) if quantise else steps

    def step_of(step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        nonlocal delta
        if step == turn:
            job.evaluate("before the quantisation-aware part", {**state[0], **state[1]})
        if step >= turn and (step % QAT_REFRESH == 0 or not np.any(delta["head"])):
            delta = refresh(state[0])
        if step % 400 == 399:
            job.evaluate(f"step {step}", {**add(state[0], delta), **state[1]}, 16)
        return update(state, delta, *batch(job.tokens, step, config.vocab_size))

    done, state = job.run("trunk", (free, fixed, rule.init(free)), steps, step_of)
    return done, {**state[0], **state[1]}


def refine(job: Job, flat: Flat, steps: int, peak: float) -> tuple[bool, Flat]:
    """The MTP block alone, towards the finished trunk's distribution; returns as `train` does."""
    config, rule = job.config, optimizer(steps, peak)
    free, fixed = split(flat)
    trunk = {**add(free, jax.jit(stored)(free)), **fixed}
    trunk = {name: value for name, value in trunk.items() if name not in free or not name.startswith("mtp/")}
    block = {name: value for name, value in free.items() if name.startswith("mtp/")}

    @functools.partial(jax.jit, donate_argnums=(0,))
    def update(state: Any, trunk: Flat, delta: Flat, inputs: jax.Array) -> tuple[Any, dict[str, Any]]:
        block, moments = state

        def objective_of(block: Flat) -> Any:
            return objective.draft_loss(config, nest({**trunk, **add(block, delta)}), inputs)

        (_, parts), slope = jax.value_and_grad(objective_of, has_aux=True)(block)
        change, moments = rule.update(slope, moments, block)
        return (optax.apply_updates(block, change), moments), parts

    refresh = jax.jit(stored)
    delta = refresh(block)

    def step_of(step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        nonlocal delta
        if step % QAT_REFRESH == 0:
            delta = refresh(state[0])
        if step % 800 == 799:
            job.evaluate(f"drafts, step {step}", {**trunk, **add(state[0], delta)}, 16)
        inputs, _ = batch(job.tokens, 1_000_000 + step, config.vocab_size)
        return update(state, trunk, delta, inputs)

    done, state = job.run("drafts", (block, rule.init(block)), steps, step_of)
    return done, {**flat, **state[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/demo"))
    parser.add_argument("--out", type=Path, default=Path("build/demo/run"))
    parser.add_argument("--steps", type=int, default=1600, help="steps of trunk and MTP block together")
    parser.add_argument("--draft-steps", type=int, default=2500, help="further steps of the MTP block alone")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop with a checkpoint after this time")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float", action="store_true", help="no quantisation-aware part and no file: for comparison")
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.out.parent / "jax_cache"))
    job = Job(CONFIG, args.data, args.out, time.monotonic() + 60 * args.minutes)
    done, flat = train(job, args.steps, args.peak, args.seed, not args.float)
    if done and args.float:
        return job.evaluate("float", flat)
    if done:
        done, flat = refine(job, flat, args.draft_steps, args.peak / 2)
    if done:
        free, fixed = split(flat)
        job.evaluate("stored", {**add(free, jax.jit(stored)(free)), **fixed})
        tokenizer = json.loads((args.data / "tokenizer.json").read_text(encoding="utf-8"))
        export(args.out / "stories.gguf", nest(flat), CONFIG, tokenizer)


if __name__ == "__main__":
    main()
