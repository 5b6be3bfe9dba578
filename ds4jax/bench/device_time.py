"""Time that kernels spend on the device, from the profiler."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax
from jax.profiler import ProfileData

from ds4jax.errors import DeviceError


@dataclasses.dataclass(frozen=True, order=True)
class Event:
    """A kernel's start and duration in microseconds, and its name; a copy or fill counts as a kernel."""

    start: float
    duration: float
    name: str


def device_events(run: Callable[[], object]) -> list[Event]:
    """Every kernel that `run` starts, in the order of their starts. `run` must wait for its work.

    Raises:
        DeviceError: the profiler saw no GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        events = [
            Event(event.start_ns / 1000, event.duration_ns / 1000, event.name)
            for file in sorted(Path(folder).rglob("*.xplane.pb"))
            for plane in ProfileData.from_file(str(file)).planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    if not events:
        raise DeviceError("the profiler recorded no GPU kernels; expected a run on an NVIDIA GPU")
    return sorted(events)


def device_times(run: Callable[[], object]) -> dict[str, list[float]]:
    """Durations of `device_events`, in microseconds, by kernel name."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in device_events(run):
        times[event.name].append(event.duration)
    return dict(times)
