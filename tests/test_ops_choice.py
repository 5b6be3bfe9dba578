"""Which implementation carries out an operation."""

import jax
import jax.numpy as jnp
import pytest

from ds4jax import load_numerics, ops
from ds4jax.config import OPS
from ds4jax.errors import ConfigError
from ds4jax.ops.quantise import quantise
from ds4jax.ops.rows import Live
from ds4jax.pallas import KERNELS
from ds4jax.quants import QTensor

STRICT = load_numerics("strict")
READABLE = QTensor({"word": jnp.zeros((2, 8, 1), jnp.int32), "d": jnp.zeros((2, 1), jnp.float16)}, "Q8_0", (2, 32))
OTHER = QTensor({"raw": jnp.zeros((2, 1, 210), jnp.uint8)}, "Q6_K", (2, 256))


def demanding(implementation: str):
    return STRICT.replace(impl=tuple((op, implementation) for op in OPS))


def test_every_operation_has_a_kernel():
    assert set(KERNELS) == set(OPS)


@pytest.mark.parametrize(("backend", "want"), [("cpu", "xla"), ("gpu", "pallas")])
def test_auto_follows_the_device(monkeypatch, backend, want):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert {ops.implementation(demanding("auto"), op) for op in OPS} == {want}
    for named in ("xla", "pallas", "interpret"):
        assert {ops.implementation(demanding(named), op) for op in OPS} == {named}


def test_auto_leaves_other_formats_to_the_reference(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert ops._choose(demanding("auto"), "linear", (READABLE,)) == "pallas"
    assert ops._choose(demanding("auto"), "linear", (READABLE, OTHER)) == "xla"
    assert ops._choose(demanding("pallas"), "linear", (OTHER,)) == "pallas"


def test_a_demand_that_cannot_be_met_is_an_error():
    a = quantise(jnp.ones((1, 256)), act="q8")
    with pytest.raises(ConfigError, match="no kernel reads Q6_K weights"):
        ops.call("linear", demanding("interpret"), Live.all(1), (a, ()), (OTHER,), precision="highest")


def test_interpret_runs_the_kernel():
    a = quantise(jnp.arange(32, dtype=jnp.float32)[None], act="q8")
    args = (Live.all(1), (a, ()), (READABLE,))
    got, want = (ops.call("linear", demanding(i), *args, precision="highest") for i in ("interpret", "xla"))
    assert jnp.array_equal(got[0], want[0])
    text = jax.jit(lambda *args: ops.call("linear", demanding("interpret"), *args, precision="highest")).trace(*args)
    assert "pallas_call" in str(text.jaxpr)
