"""Memory that is free on the host and on a device, and the refusal to start what will not fit."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from ds4jax.errors import CapacityError

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
    remedy = "use a shorter context, a smaller quantisation or a device with more memory"
    if device.platform != "cpu":
        remedy += "; JAX takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says more, for instance 0.97"
    raise CapacityError(
        f"expected {_gib(weights + cache)} of free memory ({_gib(weights)} weights, {_gib(cache)} cache), "
        f"found {_gib(available)} on {device.device_kind}; {remedy}"
    )


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
