"""What does not fit is refused before loading, and JAX's share of a GPU is set before JAX starts."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from gguf_variants import F32, load

from ds4jax import checkpoint_memory, engine
from ds4jax.checkpoint import describe, open_gguf
from ds4jax.checkpoint_memory import OUTSIDE_BYTES, SHARES, Card, read_card, share_of, take_share
from ds4jax.errors import CapacityError

GIB = 1 << 30


def test_too_little_memory_is_said_before_loading():
    seen: list[Any] = []
    with pytest.raises(
        CapacityError, match=r"\(0\.00 GiB weights, 1048576\.00 GiB cache\), found [\d.]+ GiB on cpu; use a"
    ):
        load(F32, progress=lambda *step: seen.append(step), cache_bytes=1 << 50)
    assert seen == []
    device = jax.local_devices()[0]
    checkpoint_memory.check_device(device, 3 << 30, 1 << 30, available=4 << 30)
    with pytest.raises(
        CapacityError, match=r"expected 4\.00 GiB .* \(3\.00 GiB weights, 1\.00 GiB cache\), found 3\.99"
    ):
        checkpoint_memory.check_device(device, 3 << 30, 1 << 30, available=(4 << 30) - (10 << 20))
    with pytest.raises(CapacityError, match=r"expected 2\.00 GiB of free host memory for loading, found 1\.00 GiB"):
        checkpoint_memory.check_host(2 << 30, available=1 << 30)


def test_free_memory_of_a_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemAvailable:     800 kB\n")
    assert checkpoint_memory.host_bytes(tmp_path, meminfo) == 800 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert checkpoint_memory.host_bytes(tmp_path, meminfo) == 800 * 1024
    (tmp_path / "memory.max").write_text("600000\n")
    (tmp_path / "memory.current").write_text("500000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\nfile 250000\n")
    assert checkpoint_memory.host_bytes(tmp_path, meminfo) == 350000


# ------------------------------------------------------------------------------------------------- share of a GPU


@pytest.mark.parametrize(
    ("total", "free", "most", "pool"),
    [
        (140, 139, 7, 83 + 7 + 2),  # all that is wanted
        (96, 95, 14, 94),  # what is free, less what JAX cannot have
        (96, 87, 14, 86),  # just enough
        (96, 95, 0, 83 + 1 + 2),  # never less than what is needed
    ],
)
def test_share_of_a_card(total, free, most, pool):
    share = share_of(Card(total * GIB, free * GIB), 83 * GIB, 1 * GIB, most * GIB)
    assert pool * GIB <= share * total * GIB <= (free * GIB - OUTSIDE_BYTES)
    assert share * total <= pool * 1.011


def test_a_card_that_is_too_small_or_too_full():
    message = (
        r"expected 87\.00 GiB of free memory on the GPU \(83\.00 GiB weights, 1\.00 GiB cache, "
        r"3\.00 GiB for programs\), found 86\.99 GiB of 96\.00 GiB; "
        r"use a shorter --context, fewer --sessions, .* or end other programs on it"
    )
    with pytest.raises(CapacityError, match=message):
        share_of(Card(96 * GIB, 87 * GIB - (10 << 20)), 83 * GIB, 1 * GIB, 20 * GIB)


@contextlib.contextmanager
def platforms(value: str | None) -> Iterator[None]:
    """`JAX_PLATFORMS`, as JAX reads it."""
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", value)
    try:
        yield
    finally:
        jax.config.update("jax_platforms", before)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of 80 GiB that JAX has not taken yet."""
    for name in SHARES:
        monkeypatch.delenv(name, raising=False)
    state = SimpleNamespace(started=False, plugins=["xla_cuda13"], card=Card(80 * GIB, 79 * GIB))
    plugins = lambda group: [SimpleNamespace(name=name) for name in state.plugins if group == "jax_plugins"]  # noqa: E731
    monkeypatch.setattr(checkpoint_memory.xla_bridge, "backends_are_initialized", lambda: state.started)
    monkeypatch.setattr(metadata, "entry_points", plugins)
    monkeypatch.setattr(checkpoint_memory, "read_card", lambda: state.card)
    with platforms(None):
        yield state
    os.environ.pop(SHARES[0], None)


def test_jax_is_told_its_share(gpu):
    for value in (None, "cuda,cpu", "gpu"):
        os.environ.pop(SHARES[0], None)
        with platforms(value):
            take_share(38 * GIB, 0, 0)
        assert 40 / 80 < float(os.environ[SHARES[0]]) < 41 / 80
    del os.environ[SHARES[0]]
    with pytest.raises(CapacityError):
        take_share(78 * GIB, 0, 0)


@pytest.mark.parametrize("why", ["started", "plugins", "platforms", "card", *SHARES])
def test_jax_is_left_alone(gpu, monkeypatch, why):
    """Also where the model would not fit: then the check after the start says so."""
    if why in SHARES:
        monkeypatch.setenv(why, "0.5")
    elif why != "platforms":
        setattr(gpu, why, {"started": True, "plugins": ["xla_tpu"], "card": None}[why])
    before = dict(os.environ)
    with platforms("cpu" if why == "platforms" else None):
        take_share(100 * GIB, 0, 0)
    assert os.environ == before


def test_a_measurement_takes_the_card_unless_told_otherwise(gpu, monkeypatch):
    checkpoint_memory.take_whole_card()
    assert os.environ.pop(SHARES[0]) == "0.95"
    monkeypatch.setenv(SHARES[1], "0.3")
    checkpoint_memory.take_whole_card()
    assert SHARES[0] not in os.environ, "JAX refuses both variables"


def test_the_driver_is_asked_for_the_card_that_jax_uses(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if not any(Path(folder, "nvidia-smi").exists() for folder in ("/usr/bin", "/bin")):
        assert read_card() is None
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=0*memory.total,memory.free*) echo 81559, 80995;; *) exit 6;; esac\n')
    tool.chmod(0o755)
    assert read_card() == Card(81559 << 20, 80995 << 20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert read_card() is None
    tool.write_text("#!/bin/sh\necho '[N/A], [N/A]'\n")
    assert read_card() is None


# ------------------------------------------------------------------------------------------------- what is asked for


def test_loading_asks_for_weights_and_caches(monkeypatch, tmp_path):
    asked: list[tuple[int, ...]] = []

    def refuse(*sizes: int) -> None:
        asked.append(sizes)
        raise CapacityError("too small")

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("nothing is loaded before")

    monkeypatch.setattr(engine, "take_share", refuse)
    monkeypatch.setattr(engine, "load_params", never)
    monkeypatch.setattr(engine, "cache_nbytes", lambda config, numerics, batch, context, rows: batch * context)
    for limits in ({}, {"context": 64}, {"context": 64, "sequences": 3}, {"default_context": 512}):
        with pytest.raises(CapacityError):
            engine.load(F32, fit_card=True, **limits)
    weights = describe(open_gguf(F32)).census.device_bytes
    assert asked == [(weights, 1024, 1024), (weights, 64, 64), (weights, 192, 192), (weights, 512, 512)]
    (tmp_path / "list.txt").write_text("5\n7\n")
    head = 2 * 64 * 4 + 320 * 4  # two rows of the head, and the place of every token
    for speculative, more in (("off", 0), (0, 0), (1, head), ("auto", head)):
        with pytest.raises(CapacityError):
            engine.load(F32, fit_card=True, context=64, draft_tokens=tmp_path / "list.txt", speculative=speculative)
        assert asked[-1] == (weights + more, 64, 64)
    monkeypatch.setattr(engine, "SMALLEST_CONTEXT", 256)
    with pytest.raises(CapacityError):
        engine.load(F32, fit_card=True)
    assert asked[-1] == (weights, 256, 1024)  # as long as a request may be, if there is room


COMMANDS = """
import sys
from jax._src import xla_bridge
from ds4jax import cli, engine

def note(weights, cache, most):
    print(xla_bridge.backends_are_initialized(), cache == most, cache)
    raise SystemExit

engine.take_share = note
for command in ("generate -p a", "logprobs -p a", "chat", "serve --port 0 --sessions 3", "serve --port 0 --sessions 6"):
    try:
        cli.app(command.split())
    except SystemExit:
        pass
"""


def test_no_command_starts_jax_before_its_share_is_set():
    """One that did would get 75 %, whatever is set then."""
    found = subprocess.run([sys.executable, "-c", COMMANDS], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in found.splitlines()]
    assert [line[0] for line in lines] == ["False"] * 5, found
    assert int(lines[4][2]) == 2 * int(lines[3][2])
