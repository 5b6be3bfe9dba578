"""Memory that is free on the host and on a device, what JAX takes of a GPU, and the refusal to start what will not fit.

JAX takes its share of a GPU as it starts, 75 % unless told otherwise, and can neither grow nor shrink it afterwards. So
the share of a program that runs one model is set before, from what the files and the driver say.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from importlib import metadata
from pathlib import Path

import jax
from jax._src import xla_bridge  # the only place that tells whether JAX has started without starting it

from ds4jax.errors import CapacityError

SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Variables that say what share of a GPU JAX takes; it refuses to start if both are set."""

WORKSPACE_BYTES = 2 << 30
"""JAX's memory beside weights and caches: slabs while loading, 0.3 GiB; then temporaries of programs, 0.2 GiB for a
chunk of 128 rows at a context of 2^20; and gaps between arrays, which have most of it."""

OUTSIDE_BYTES = 1 << 30
"""Memory of a GPU that JAX's share cannot have: CUDA's context, and the code and graphs of programs."""

_UNCOUNTED = 0.01  # of the memory that the driver counts, at most, CUDA keeps for itself, so that JAX does not see it

_REMEDY = "use a shorter --context, fewer --sessions, a smaller quantisation or a device with more memory"
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def host_bytes(cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO) -> int:
    """Memory that this process can still take: free and reclaimable memory of the host, or of its container if less."""
    machine, container = _machine_bytes(meminfo), _container_bytes(cgroup)
    return machine if container is None else min(machine, container)


def device_bytes(device: jax.Device) -> int | None:
    """Memory free on a device, of what JAX may use; host memory for the CPU; None if the backend does not tell."""
    if device.platform == "cpu":
        return host_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))


def check_device(device: jax.Device, weights: int, cache: int, available: int | None = None) -> None:
    """Raises CapacityError if weights and cache (bytes) exceed what is available on a device."""
    if available is None:
        available = device_bytes(device)
    if available is None or weights + cache <= available:
        return
    remedy = _REMEDY
    if device.platform != "cpu":
        remedy += f"; JAX takes 75 % of a GPU unless {SHARES[0]} says more when it starts, for instance 0.95"
    raise CapacityError(
        f"expected {_gib(weights + cache)} of free memory ({_gib(weights)} weights, {_gib(cache)} cache), "
        f"found {_gib(available)} on {device.device_kind}; {remedy}"
    )


@dataclasses.dataclass(frozen=True)
class Card:
    """Memory of a GPU as its driver counts it, in bytes."""

    total: int
    free: int


def read_card() -> Card | None:
    """The GPU that JAX will put the model on, asked of its driver; None if there is none or it does not tell."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    query = ["nvidia-smi", f"--id={first}", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        total, free = (int(number) << 20 for number in answer.split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Card(total, free)


def share_of(card: Card, weights: int, cache: int, most: int) -> float:
    """Share of a card that JAX needs for weights, working space and caches: `most` bytes, or less if not free.

    Raises CapacityError if not even `cache` bytes of them fit.
    """
    need, room = weights + cache + WORKSPACE_BYTES, card.free - OUTSIDE_BYTES
    if need > room:
        parts = f"{_gib(weights)} weights, {_gib(cache)} cache, {_gib(WORKSPACE_BYTES + OUTSIDE_BYTES)} for programs"
        raise CapacityError(
            f"expected {_gib(need + OUTSIDE_BYTES)} of free memory on the GPU ({parts}), "
            f"found {_gib(card.free)} of {_gib(card.total)}; {_REMEDY}, or end other programs on it"
        )
    return min((need - cache + max(cache, most)) / (1 - _UNCOUNTED), room) / card.total


def take_share(weights: int, cache: int, most: int) -> None:
    """Has JAX, before it starts, take what weights and caches need of the GPU, see `share_of`.

    Does nothing if JAX runs already or will not use a GPU, or if the environment says how much it takes. Raises
    CapacityError if they do not fit.
    """
    if xla_bridge.backends_are_initialized() or not _will_use_gpu() or any(os.environ.get(name) for name in SHARES):
        return
    if (card := read_card()) is not None:
        os.environ[SHARES[0]] = f"{share_of(card, weights, cache, most):.4f}"


def take_whole_card() -> None:
    """Has JAX, before it starts, take almost all of the GPU, unless the environment says how much it takes."""
    if not any(os.environ.get(name) for name in SHARES):
        os.environ[SHARES[0]] = "0.95"


def _will_use_gpu() -> bool:
    """Whether JAX is to look for a GPU, and is installed with what it takes to use one."""
    platforms = jax.config.values["jax_platforms"]
    if platforms and platforms.split(",")[0] not in ("cuda", "gpu"):
        return False
    return any("cuda" in plugin.name for plugin in metadata.entry_points(group="jax_plugins"))


def check_host(needed: int, available: int | None = None) -> None:
    """Raises CapacityError if the host cannot hold what loading needs."""
    if available is None:
        available = host_bytes()
    if needed > available:
        raise CapacityError(
            f"expected {_gib(needed)} of free host memory for loading, found {_gib(available)}; end other programs"
        )


def _machine_bytes(meminfo: Path) -> int:
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_bytes(cgroup: Path) -> int | None:
    """What the memory limit of a container (control groups 2 or 1) leaves; the page cache counts as free."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_cache"),
    ):
        if (cgroup / limit).is_file() and (text := (cgroup / limit).read_text().strip()) != "max":
            statistics = (cgroup / limit).with_name("memory.stat").read_text().splitlines()
            reclaimable = next((int(line.split()[1]) for line in statistics if line.split()[0] == cached), 0)
            return int(text) - int((cgroup / used).read_text()) + reclaimable
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
