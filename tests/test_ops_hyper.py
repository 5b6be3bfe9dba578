"""Hyper-connections: Sinkhorn to its own tolerance, collapse, mixing and head against float64."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.ops import hyper

PURE = golden.pure()
STATIC = ("iters", "eps", "hc_eps", "precision")
sinkhorn = jax.jit(hyper.sinkhorn, static_argnames=("iters", "eps"))
hyper_pre = jax.jit(hyper.hyper_pre, static_argnames=STATIC)
hyper_post = jax.jit(hyper.hyper_post)
hyper_head = jax.jit(hyper.hyper_head, static_argnames=STATIC[1:])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def sinkhorn_numpy(logits: np.ndarray, iters: int, eps: float) -> np.ndarray:
    m = np.exp(logits - logits.max(-1, keepdims=True))
    m = m / m.sum(-1, keepdims=True) + eps
    for step in range(iters):
        if step:
            m = m / (m.sum(-1, keepdims=True) + eps)
        m = m / (m.sum(-2, keepdims=True) + eps)
    return m


def mix_numpy(x: np.ndarray, fn: np.ndarray, eps: float) -> np.ndarray:
    flat = x.reshape(len(x), -1).astype(np.float64)
    return flat / np.sqrt((flat**2).mean(-1, keepdims=True) + eps) @ fn.T.astype(np.float64)


def case(streams: int, outputs: int, scales: int) -> tuple[np.ndarray, ...]:
    """Streams of different magnitude, and a projection with its scale and base."""
    rng = np.random.default_rng(streams)
    x = rng.standard_normal((6, streams, 24)) * 10.0 ** rng.uniform(-2, 1, (6, streams, 1))
    fn = rng.standard_normal((outputs, streams * 24)) / np.sqrt(streams * 24)
    arrays = x, fn, rng.uniform(0.5, 2, scales), rng.standard_normal(outputs)
    return tuple(array.astype(np.float32) for array in arrays)


@pytest.mark.parametrize("iters", [1, 20])
def test_sinkhorn_matches_golden(iters):
    got = sinkhorn(jnp.asarray(PURE["sinkhorn_in"].astype(np.float32)), iters, 1e-6)
    np.testing.assert_allclose(np.asarray(got), PURE[f"sinkhorn_out_{iters}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("iters, eps", [(7, 2e-2), (19, 1e-6), (20, 1e-6), (21, 1e-6)])
def test_sinkhorn_matches_float64(iters, eps):
    """Slowly converging logits, on which one iteration more or less shows."""
    logits = (np.random.default_rng(0).standard_normal((40, 3, 3)) * 4).astype(np.float32)
    want = sinkhorn_numpy(logits.astype(np.float64), iters, eps)
    assert np.abs(want - sinkhorn_numpy(logits.astype(np.float64), iters + 1, eps)).max() > 1e-5
    np.testing.assert_allclose(np.asarray(sinkhorn(jnp.asarray(logits), iters, eps)), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("streams", [1, 3, 4])
def test_pre_matches_float64(streams):
    h, eps, hc_eps = streams, 1e-3, 2e-2
    x, fn, scale, base = case(h, (2 + h) * h, 3)
    mix = mix_numpy(x, fn, eps)
    pre = sigmoid(mix[:, :h] * scale[0] + base[:h]) + hc_eps
    post = 2 * sigmoid(mix[:, h : 2 * h] * scale[1] + base[h : 2 * h])
    mixing = sinkhorn_numpy((mix[:, 2 * h :] * scale[2] + base[2 * h :]).reshape(-1, h, h), 7, hc_eps)
    arguments = [jnp.asarray(a) for a in (x, fn, scale, base)]
    got = hyper_pre(*arguments, iters=7, eps=eps, hc_eps=hc_eps, precision="highest")
    for value, want in zip(got, (np.einsum("th,thd->td", pre, x), post, mixing), strict=True):
        np.testing.assert_allclose(np.asarray(value), want, rtol=0, atol=2e-6 * max(1, np.abs(want).max()))


def test_pre_reads_float16_projections_exactly():
    x, fn, scale, base = (jnp.asarray(a) for a in case(4, 24, 3))
    narrow = fn.astype(jnp.float16)
    settings = {"iters": 20, "eps": 1e-6, "hc_eps": 1e-6, "precision": "highest"}
    got, want = (
        hyper_pre(x, narrow, scale, base, **settings),
        hyper_pre(x, narrow.astype(jnp.float32), scale, base, **settings),
    )
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=0, atol=1e-6)


def test_post_sums_over_source_streams():
    rng = np.random.default_rng(1)
    out, x = rng.standard_normal((5, 12)), rng.standard_normal((5, 3, 12))
    post, mixing = rng.uniform(0, 2, (5, 3)), rng.uniform(0, 1, (5, 3, 3))
    want = np.stack([post[:, k, None] * out + (mixing[:, :, k, None] * x).sum(1) for k in range(3)], axis=1)
    got = hyper_post(*(jnp.asarray(a.astype(np.float32)) for a in (out, x, post, mixing)))
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("streams", [1, 3, 4])
def test_head_matches_float64(streams):
    x, fn, scale, base = case(streams, streams, 1)
    weights = sigmoid(mix_numpy(x, fn, 1e-3) * scale[0] + base) + 2e-2
    want = np.einsum("th,thd->td", weights, x)
    arguments = [jnp.asarray(a) for a in (x, fn, scale, base)]
    got = hyper_head(*arguments, eps=1e-3, hc_eps=2e-2, precision="highest")
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=2e-6 * max(1, np.abs(want).max()))
