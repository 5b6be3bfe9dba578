"""Test-wide settings; they must be in force before jax and ds4jax are first imported."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# On a CPU with FMA, XLA contracts multiply-add, and results then differ from NumPy's by a rounding step.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX".strip()
# `JAX_PLATFORMS=cuda pytest` runs the same tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# A test compiles hundreds of small programs; what has not changed since the last run need not be compiled again.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))


def _pytree_of_anything(cls: type, *arguments: Any, **options: Any) -> type:
    """Registers a dataclass whose constructor is not type-checked: JAX rebuilds it with whatever a tree may hold."""
    registered = _register_dataclass(cls, *arguments, **options)
    registered.__no_type_check__ = True
    return registered


_register_dataclass = jax.tree_util.register_dataclass
jax.tree_util.register_dataclass = _pytree_of_anything
jaxtyping.install_import_hook("ds4jax", "beartype.beartype")


SLOW = ("test_training", "test_demo", "test_strict", "test_speculation_demo", "test_speculation", "test_acceptance")
"""Files that take minutes: they go first, or one process would still be at them when the other has nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(scope="session")
def sessions() -> Any:
    """Programs of the demonstration model for sessions of 1024 tokens."""
    from ds4jax.engine import load
    from ds4jax.engine_session import Sessions

    return Sessions(load(context=1024), 2, 1024)


@pytest.fixture(scope="session")
def server(sessions: Any) -> Any:
    """A server of the demonstration model that listens on a port of its own."""
    from serving import Serving

    with Serving(sessions) as serving:
        yield serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, for one file: while it is there, an event loop runs, and tests elsewhere want their own."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium to show the chat page in; Debian's is the package chromium")
    with sync_playwright() as playwright:
        # The tests may run as root, for whom Chromium has no sandbox; they show nothing foreign.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


MOST_MAPS = 30000
"""Of a process's memory. Every program that XLA:CPU has compiled takes some, and Linux allows 65,530: beyond them
compiling crashes."""


@pytest.fixture(scope="module", autouse=True)
def _bounded_maps() -> Iterator[None]:
    """Lets go of compiled programs between files before there are too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
