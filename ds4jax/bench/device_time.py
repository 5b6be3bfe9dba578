"""Time that kernels spend on the device, from the profiler."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax
from jax.profiler import ProfileData

from ds4jax.errors import DeviceError


def device_times(run: Callable[[], None]) -> dict[str, list[float]]:
    """Durations of every kernel that `run` starts, in microseconds, by kernel name.

    `run` must wait for its work. Copies and fills count as kernels.

    Raises:
        DeviceError: the profiler saw no GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        times: dict[str, list[float]] = defaultdict(list)
        for file in files:
            for plane in ProfileData.from_file(str(file)).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            times[event.name].append(event.duration_ns / 1000)
    if not times:
        raise DeviceError("the profiler recorded no GPU kernels; expected a run on an NVIDIA GPU")
    return dict(times)
