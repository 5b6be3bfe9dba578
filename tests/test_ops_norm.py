"""Root-mean-square norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.ops import norm

rms_norm = jax.jit(norm.rms_norm, static_argnames="eps")


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
@pytest.mark.parametrize("weighted", [True, False])
def test_matches_float64(eps, weighted):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((9, 3, 40)) * 10.0 ** rng.uniform(-4, 3, (9, 3, 1))).astype(np.float32)
    weight = rng.standard_normal(40).astype(np.float32) if weighted else None
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * (1.0 if weight is None else weight)
    got = np.asarray(rms_norm(jnp.asarray(x), None if weight is None else jnp.asarray(weight), eps))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


def test_zero_row_stays_zero():
    np.testing.assert_array_equal(np.asarray(rms_norm(jnp.zeros((2, 8)), None, 1e-6)), np.zeros((2, 8)))
