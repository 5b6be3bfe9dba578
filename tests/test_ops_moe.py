"""Router and experts: scores, choices with ties, weights, the clamp, and sums in a fixed order."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantised_numpy import (
    joint_sum_numpy,
    packed,
    quantised_dot_numpy,
    quantised_terms_numpy,
    random_blocks,
)

from ds4jax.activation import Activation
from ds4jax.ops import moe
from ds4jax.ops.quantise import quantise

PURE = golden.pure()


@functools.partial(jax.jit, static_argnames=("top_k", "scale"))
def route(x, *args, top_k, scale):
    return moe.route(Activation(x, None), *args, top_k=top_k, scale=scale, precision="highest")


def experts(function, **settings):
    """An operation over rows of floats."""
    return jax.jit(lambda x, *args: function(quantise(x, act=settings["act"]), *args, **settings))


router_scores = jax.jit(functools.partial(moe.router_scores, precision="highest"))
swiglu = jax.jit(moe.swiglu, static_argnames="limit")
EXPERT_TYPES = {"w1": "IQ2_XXS", "w3": "IQ2_XXS", "w2": "Q2_K"}
SETTINGS = {"act": "f32", "precision": "highest"}


def through_identity(logits: np.ndarray, bias=None, ids=None, top_k: int = 6, scale: float = 1.5):
    """Routes on given logits: an identity gate hands them through exactly."""
    gate = jnp.eye(logits.shape[1])
    ids, weights = route(jnp.asarray(logits), ids, gate, bias, top_k=top_k, scale=scale)
    return np.asarray(ids), np.asarray(weights)


def test_scores_match_golden():
    got = router_scores(jnp.asarray(PURE["route_logits"]), jnp.eye(256))
    np.testing.assert_allclose(np.asarray(got), PURE["route_scores"], rtol=2e-6, atol=1e-9)


def test_scores_at_extreme_logits():
    """sqrt(softplus) neither overflows nor loses small values."""
    logits = np.array([[-80, -40, -20.5, -1, 0, 1, 19.9, 20.1, 90, 1e4]], np.float32)
    got = router_scores(jnp.asarray(logits), jnp.eye(10))
    want = np.sqrt(np.logaddexp(logits.astype(np.float64), 0))
    np.testing.assert_allclose(np.asarray(got), want, rtol=2e-6)


def test_routing_matches_golden():
    """The bias decides who is chosen, not what the weight is; best first."""
    ids, weights = through_identity(PURE["route_logits"], jnp.asarray(PURE["route_bias"]))
    np.testing.assert_array_equal(ids, PURE["route_ids"])
    np.testing.assert_allclose(weights, PURE["route_weights"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1.5, rtol=1e-6)


def test_equal_scores_take_the_lower_expert():
    ids, _ = through_identity(PURE["route_tie_logits"], jnp.zeros(256))
    np.testing.assert_array_equal(ids, PURE["route_tie_ids"])


def test_all_equal_scores_take_the_first_experts():
    ids, weights = through_identity(np.zeros((3, 40), np.float32), jnp.zeros(40), top_k=4, scale=2.0)
    np.testing.assert_array_equal(ids, np.broadcast_to(np.arange(4), (3, 4)))
    np.testing.assert_allclose(weights, 0.5, rtol=1e-6)


def test_given_ids_keep_their_order_and_get_router_weights():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 8)).astype(np.float32)
    given = np.stack([rng.permutation(8)[:3] for _ in range(5)]).astype(np.int32)
    ids, weights = through_identity(logits, ids=jnp.asarray(given), top_k=3, scale=2.5)
    scores = np.take_along_axis(np.sqrt(np.logaddexp(logits.astype(np.float64), 0)), given, 1)
    np.testing.assert_array_equal(ids, given)
    np.testing.assert_allclose(weights, 2.5 * scores / scores.sum(1, keepdims=True), rtol=2e-6)


def test_swiglu_matches_golden():
    got = swiglu(jnp.asarray(PURE["swiglu_gate"]), jnp.asarray(PURE["swiglu_up"]), 10.0)
    np.testing.assert_allclose(np.asarray(got), PURE["swiglu_out"], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("limit", [0.0, 1.5])
def test_swiglu_clamps_gate_above_only_and_up_on_both_sides(limit):
    gate, up = (a.ravel().astype(np.float32) for a in np.meshgrid(np.linspace(-6, 6, 25), np.linspace(-6, 6, 25)))
    g, u = gate.astype(np.float64), up.astype(np.float64)
    if limit:
        g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    got = swiglu(jnp.asarray(gate), jnp.asarray(up), limit)
    np.testing.assert_allclose(np.asarray(got), g / (1 + np.exp(-g)) * u, rtol=2e-6, atol=1e-6)


def expert_numpy(x: np.ndarray, w1: np.ndarray, w3: np.ndarray, w2: np.ndarray, limit: float) -> np.ndarray:
    gate, up = np.minimum(w1 @ x, limit), np.clip(w3 @ x, -limit, limit)
    return w2 @ (gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("rows", [1, 5])
def test_routed_experts_match_float64(rows):
    rng = np.random.default_rng(1)
    x, ids = rng.standard_normal((rows, 16)), rng.integers(0, 6, (rows, 3))
    weights, w1, w3 = rng.uniform(0, 1, (rows, 3)), rng.standard_normal((6, 12, 16)), rng.standard_normal((6, 12, 16))
    w2 = rng.standard_normal((6, 16, 12))
    want = [
        sum(weight * expert_numpy(x[t], w1[e], w3[e], w2[e], 2.0) for e, weight in zip(ids[t], weights[t], strict=True))
        for t in range(rows)
    ]
    floats = [jnp.asarray(a.astype(np.float32)) for a in (weights, w1, w3, w2)]
    function = experts(moe.routed_experts, limit=2.0, **SETTINGS)
    got = function(jnp.asarray(x.astype(np.float32)), jnp.asarray(ids.astype(np.int32)), *floats)
    np.testing.assert_allclose(np.asarray(got), np.stack(want), rtol=0, atol=3e-5)


def test_quantised_experts_match_numpy_exactly():
    """Gate, up, clamp, router weight before `w2`, down, and the sum in order, with int8 activations throughout."""
    rng, rows, width, count = np.random.default_rng(3), 3, 256, 4
    raw = {name: random_blocks(kind, count * width, 1, seed) for seed, (name, kind) in enumerate(EXPERT_TYPES.items())}
    shape = (count, width, width)
    stored = {n: packed(kind, raw[n].reshape(count, width, -1), shape) for n, kind in EXPERT_TYPES.items()}
    x = rng.standard_normal((rows, width)).astype(np.float32)
    ids = np.stack([rng.permutation(count)[:2] for _ in range(rows)]).astype(np.int32)
    weights = rng.uniform(0.1, 1, (rows, 2)).astype(np.float32)
    want = []
    for t in range(rows):
        parts = []
        for e, weight in zip(ids[t], weights[t], strict=True):
            block = {name: raw[name].reshape(count, width, -1)[e] for name in raw}
            gate, up = (quantised_dot_numpy(EXPERT_TYPES[n], x[t : t + 1], block[n]) for n in ("w1", "w3"))
            hidden = np.asarray(swiglu(gate, up, limit=2.0)) * weight
            parts.append(quantised_terms_numpy(EXPERT_TYPES["w2"], hidden, block["w2"])[0])
        want.append(joint_sum_numpy(parts))
    function = experts(moe.routed_experts, limit=2.0, act="q8", precision="highest")
    got = function(jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights), stored["w1"], stored["w3"], stored["w2"])
    np.testing.assert_array_equal(np.asarray(got), np.stack(want))


def test_shared_expert_matches_float64():
    rng = np.random.default_rng(2)
    x, w1, w3, w2 = (rng.standard_normal(s) for s in ((4, 16), (12, 16), (12, 16), (16, 12)))
    want = np.stack([expert_numpy(row, w1, w3, w2, 1.0) for row in x])
    function = experts(moe.shared_expert, limit=1.0, **SETTINGS)
    got = function(*(jnp.asarray(a.astype(np.float32)) for a in (x, w1, w3, w2)))
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=2e-5)
