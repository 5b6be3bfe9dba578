"""The checks of `run.py` under pytest, where there is a GPU."""

import jax
import pytest

if jax.default_backend() != "gpu":
    pytest.skip("no GPU", allow_module_level=True)

from gpu import run


@pytest.mark.parametrize("name", ["instructions", "loading", "grids", "contracted", "cpu_floats", "cpu_strict"])
def test_checks(name):
    passed, detail = getattr(run, name)()
    assert passed, detail


@pytest.mark.parametrize("name", run.CASES)
def test_kernel(name):
    passed, detail = run.kernel(name, 8)
    assert passed, detail


def test_streams():
    passed, detail = run.streams(["off", "1", "2", "3", "auto"], 200)
    assert passed, detail
