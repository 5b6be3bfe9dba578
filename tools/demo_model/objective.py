"""What the demonstration model is trained for: the next token, the indexer's choice, and two chained drafts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ds4jax.config import ModelConfig
from ds4jax.model import DeepSeekV4
from ds4jax.runconfig import load_numerics

TRAINING = load_numerics("perf").replace(act="f32", cache="f32", precision="default")
"""All rows at once, the simulated cache formats on, TF32 dots where the device has them."""

WEIGHTS = {"index": 0.1, "draft1": 0.4, "draft2": 0.3}


def _cross_entropy(logits: Float[Array, "B S V"], targets: Int[Array, "B S"]) -> Float[Array, "B S"]:
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _distil(teacher: Float[Array, "B S V"], student: Float[Array, "B S V"]) -> Float[Array, ""]:
    p = jax.nn.softmax(jax.lax.stop_gradient(teacher), axis=-1)
    return -jnp.mean(jnp.sum(p * jax.nn.log_softmax(student, axis=-1), axis=-1))


def run(config: ModelConfig, params: Any, tokens: Int[Array, "B S"]) -> dict[str, Any]:
    """Trunk and both draft depths over whole sequences, every row teacher-forced.

    Draft 1 of row j pairs token j with the trunk's streams of j - 1; draft 2 pairs it with draft 1's streams of j - 1
    and sees draft 1's rows of earlier positions. Both predict what the trunk predicts at j.
    """
    model, variables = DeepSeekV4(config, TRAINING), {"params": params}
    trunk = model.apply(variables, tokens, method="sequence")
    one = model.apply(variables, tokens[:, 1:], trunk.streams[:, :-1], 1, method="draft_sequence")
    two = model.apply(
        variables, tokens[:, 2:], one.streams[:, :-1], 2, earlier=one.keys[:, 1:], method="draft_sequence"
    )
    return {
        "logits": model.apply(variables, trunk.streams, jnp.ones(tokens.shape, bool), method="logits"),
        "draft1": model.apply(variables, one.streams, method="draft_logits"),
        "draft2": model.apply(variables, two.streams, method="draft_logits"),
        "index": trunk.index_loss,
        "load": jnp.concatenate([trunk.load, one.load]),
    }


def loss(
    config: ModelConfig, params: Any, inputs: Int[Array, "B S"], targets: Int[Array, "B S"]
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Training loss and its parts. `inputs` may be corrupted, `targets` are the next tokens of the text."""
    out = run(config, params, inputs)
    parts = {
        "nll": jnp.mean(_cross_entropy(out["logits"], targets)),
        "index": out["index"],
        "draft1": _distil(out["logits"][:, 1:], out["draft1"]),
        "draft2": _distil(out["logits"][:, 2:], out["draft2"]),
    }
    total = parts["nll"] + sum(WEIGHTS[name] * parts[name] for name in WEIGHTS)
    return total, {**parts, "load": out["load"]}


def draft_loss(config: ModelConfig, params: Any, inputs: Int[Array, "B S"]) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Loss of the two draft depths alone, and its parts."""
    out = run(config, params, inputs)
    parts = {
        "draft1": _distil(out["logits"][:, 1:], out["draft1"]),
        "draft2": _distil(out["logits"][:, 2:], out["draft2"]),
    }
    return parts["draft1"] + parts["draft2"], parts


def measure(
    config: ModelConfig, params: Any, tokens: Int[Array, "B S"], targets: Int[Array, "B S"], counted: Array
) -> dict[str, Array]:
    """Sums over the counted positions `[B, S]`: nats, and how often drafts equal the trunk's greedy token.

    Draft 2 is counted where draft 1 equalled the trunk and the text went on with that token, so that the chained
    token is the one the row was computed for.
    """
    out = run(config, params, tokens)
    greedy = jnp.argmax(out["logits"], axis=-1)
    first = jnp.argmax(out["draft1"], axis=-1) == greedy[:, 1:]
    second = jnp.argmax(out["draft2"], axis=-1) == greedy[:, 2:]
    given = first[:, :-1] & (greedy[:, 1:-1] == targets[:, 1:-1]) & counted[:, 2:]
    return {
        "nats": jnp.sum(_cross_entropy(out["logits"], targets) * counted),
        "tokens": jnp.sum(counted),
        "draft1": jnp.sum(first & counted[:, 1:]),
        "draft1_of": jnp.sum(counted[:, 1:]),
        "draft2": jnp.sum(second & given),
        "draft2_of": jnp.sum(given),
        "greedy": jnp.sum((greedy == targets) & counted),
        "load": out["load"],
    }
