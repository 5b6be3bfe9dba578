"""The training form: the same function as inference, and differentiable."""

import dataclasses
import functools

import flax.traverse_util
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from ds4jax.model import DeepSeekV4, init_cache
from ds4jax.ops.simulate import fp4_round_trip, fp8_round_trip

BATCH = golden.QUICK.replace(rows="batch")
OPTIONS = BATCH.compiler_options  # every function runs once: compiling is what takes time


def applied(module, variables, method, static=()):
    """A method of the module as one program."""
    return jax.jit(
        functools.partial(module.apply, variables, method=method), compiler_options=OPTIONS, static_argnums=static
    )


@pytest.mark.parametrize("name, simulate", [("tiny_a", False), ("tiny_b", False), ("tiny_c", True)])
def test_equals_inference(name, simulate):
    model = golden.load(name)
    numerics = dataclasses.replace(BATCH, sim_kv=simulate, sim_index=simulate)
    inference = runs.run(model.config, numerics, model.params, model.ids, [len(model.ids)])
    module, variables = DeepSeekV4(model.config, numerics), {"params": model.params}
    tokens = jnp.asarray(np.stack([model.ids, model.ids[::-1]]))
    run = applied(module, variables, "sequence")(tokens)
    got = applied(module, variables, "logits")(run.streams, jnp.ones(tokens.shape, bool))
    # Values up to 7 after sums in another order: a few units of float32's last place.
    np.testing.assert_allclose(got[0], inference.logits, atol=5e-5)
    np.testing.assert_allclose(run.streams[0], inference.streams, atol=5e-5)
    np.testing.assert_allclose(jnp.sum(run.load, axis=-1), 1.0, atol=1e-6)


def test_drafts_equal_inference():
    """Depth 1 over all rows, and depth 2 as a chain from one row on."""
    model = golden.load("tiny_a", mtp=True)
    config, total, at = model.config, len(model.ids), 30
    module, variables = DeepSeekV4(config, BATCH), {"params": model.params}
    ids = jnp.asarray(model.ids)[None]
    trunk = applied(module, variables, "sequence")(ids)
    sequence, draft = applied(module, variables, "draft_sequence", 2), applied(module, variables, "draft")
    one = sequence(ids[:, 1:], trunk.streams[:, :-1], 1)
    two = sequence(ids[:, 2:], one.streams[:, :-1], 2, one.keys[:, 1:])
    logits = applied(module, variables, "draft_logits")(one.streams)

    cache, start = init_cache(config, BATCH, 1, 64, total), jnp.asarray([1], jnp.int32)
    known = jnp.asarray([at], jnp.int32)
    want, streams, cache = draft(ids[:, 1:], trunk.streams[:, :-1], cache, start, known)
    np.testing.assert_allclose(logits[:, :at], want[:, :at], atol=2e-5)
    chained = streams[:, at - 1 : at]  # of the row at position `at`
    token = ids[:, at + 1 : at + 2]
    _, deeper, _ = draft(token, chained, cache, known + 1, jnp.ones(1, jnp.int32))
    np.testing.assert_allclose(two.streams[:, at - 1], deeper[:, 0], atol=2e-5)


GROUPS = {
    "attention": "attn/w",
    "sink": "sink",
    "compressor": "/compressor/",
    "experts": "moe/w",
    "shared expert": "/shared/",
    "router": "/gate",
    "hyper-connections": "hc_",
    "norms": "norm",
    "embedding and head": "e",
    "draft": "mtp",
}


def test_gradients_match_finite_differences():
    """Directional derivatives of every kind of parameter against central differences in float32.

    Every expert and every compressed row is chosen, so that no choice flips between the two sides of a difference.
    """
    model = golden.load("tiny_a", mtp=True)
    experts, ids = model.config.n_routed_experts, jnp.asarray(model.ids)[None]
    config = dataclasses.replace(model.config, num_experts_per_tok=experts, index_topk=ids.shape[1])
    module = DeepSeekV4(config, BATCH)
    flat = flax.traverse_util.flatten_dict(model.params, sep="/")
    fixed = {name: value for name, value in flat.items() if name.endswith("moe/bias")}
    table = jnp.broadcast_to(jnp.arange(experts, dtype=jnp.int32), (config.vocab_size, experts))
    fixed |= {name: table for name in flat if name.endswith("tid2eid")}
    free = {name: value.astype(jnp.float32) for name, value in flat.items() if name not in fixed}
    probe = jnp.asarray(np.random.default_rng(0).standard_normal((2, config.vocab_size)), jnp.float32)

    def loss(free):
        variables = {"params": flax.traverse_util.unflatten_dict({**free, **fixed}, sep="/")}
        run = module.apply(variables, ids, method="sequence")
        logits = module.apply(variables, run.streams, jnp.ones(ids.shape, bool), method="logits")
        draft = module.apply(variables, ids[:, 1:], run.streams[:, :-1], 1, method="draft_sequence")
        drafted = module.apply(variables, draft.streams, method="draft_logits")
        return jnp.mean(logits * probe[0]) + jnp.mean(drafted * probe[1])

    slope = jax.jit(jax.grad(loss), compiler_options=OPTIONS)(free)
    loss = jax.jit(loss, compiler_options=OPTIONS)
    for group, part in GROUPS.items():
        names = [n for n in free if part in n and "indexer" not in n] if part != "e" else ["embed", "head"]
        # Along the gradient's own signs, a step that moves the loss by about 0.02: large against rounding.
        expected = sum(float(jnp.sum(jnp.abs(slope[n]))) for n in names)
        step = min(0.01 / expected, 1e-3)

        def moved(by, names=names):
            return float(loss({**free, **{n: free[n] + by * jnp.sign(slope[n]) for n in names}}))

        measured = (moved(step) - moved(-step)) / (2 * step)
        assert abs(measured - expected) < 0.02 * expected, (group, measured, expected)


def test_the_indexer_learns_from_its_own_loss_only():
    model = golden.load("tiny_a")
    module, ids = DeepSeekV4(model.config, BATCH), jnp.asarray(model.ids)[None]
    flat = flax.traverse_util.flatten_dict(model.params, sep="/")
    fixed = {name: value for name, value in flat.items() if name.endswith(("tid2eid", "moe/bias"))}
    free = {name: value.astype(jnp.float32) for name, value in flat.items() if name not in fixed}

    def run(free):
        variables = {"params": flax.traverse_util.unflatten_dict({**free, **fixed}, sep="/")}
        return module.apply(variables, ids, method="sequence")

    by_index = jax.jit(jax.grad(lambda free: run(free).index_loss), compiler_options=OPTIONS)(free)
    by_streams = jax.jit(jax.grad(lambda free: jnp.mean(run(free).streams ** 2)), compiler_options=OPTIONS)(free)
    for name in free:
        touched = float(jnp.max(jnp.abs(by_index[name]))) > 0
        assert touched == ("/indexer/" in name), name
        if "/indexer/" in name:
            assert float(jnp.max(jnp.abs(by_streams[name]))) == 0, name


@pytest.mark.parametrize("function", [fp8_round_trip, fp4_round_trip])
def test_rounding_passes_gradients_through(function):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64)), jnp.float32)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(function(x) * 3.0))(x), jnp.full(x.shape, 3.0))
