"""What the kernels of a decode step take, by kind of layer and by their place in it.

In a CUDA graph the profiler knows kernels by their names alone. The compiled program says which kernels an iteration of
its loop starts, in which order, and where each stems from: the i-th kernel of a name that ran is the i-th of that name
in the program.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from ds4jax.bench.device_time import Event
from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.errors import DeviceError

OUTSIDE, OTHER = "outside layers", "other"

_LOOP = re.compile(r" while\(.*\bbody=%?([\w.\-]+)")
_STARTED = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = .*?[\])}] (fusion|custom-call)\(")
_KERNEL = re.compile(r'backend_config=({.*\bname = "(\w+)", num_stages.*)')
_FIRST = re.compile(r'deduplicated_name="([^"]*)"')
_PATH = re.compile(r'op_name="([^"]*)"')
_LAYER = re.compile(r"layers_(\d+)$")
_HELPERS = re.compile(r"\.(op|linears?|normed|quantised|store)$")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Kernels of one name and origin in all layers of a kind.

    kind: "window", "CSA" or "HCA" layers, outside of all layers, or other: what could not be found in the program.
    place: module or method of the model that they stem from. per_step: how many there are in a step.
    microseconds: their time in a step; alone: the part of it in which no other kernel ran. percent: of the time of all
        kernels of a step.
    """

    kind: str
    layers: int
    place: str
    kernel: str
    per_step: float
    microseconds: float
    alone: float
    percent: float


@dataclasses.dataclass(frozen=True)
class Stages:
    """Stages of a step of some rows at a context.

    total: microseconds of all kernels of a step. busy: in which any kernel ran; less than the total, because branches
    of a graph overlap. span: from the start of the first to the end of the last, per step; the rest of it is waiting.
    """

    rows: int
    context: int
    stages: tuple[Stage, ...]
    total: float
    busy: float
    span: float

    @staticmethod
    def of(
        program: Sequence[tuple[str, str]],
        events: Sequence[Event],
        steps: int,
        config: ModelConfig,
        rows: int,
        context: int,
    ) -> Stages:
        """From `loop_kernels` of a program, and the kernels of `steps` iterations of its loop as they ran.

        What ran before the first of these kernels and after the last is left out.
        """
        bases = {base(name) for name, _ in program}
        inside = [index for index, event in enumerate(events) if base(event.name) in bases]
        events = events[inside[0] : inside[-1] + 1] if inside else events
        layers = Counter(map(_kind, config.compress_ratios))
        alone, busy = _alone(events)
        sums: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
        for index, path in _origins(program, events, steps):
            kind, place = (OTHER, "") if path is None else _place(path, config)
            sums[kind, place, events[index].name].append((events[index].duration, alone[index]))
        total = sum(event.duration for event in events)
        stages = []
        for (kind, place, kernel), times in sums.items():
            time, exposed = (sum(column) for column in zip(*times, strict=True))
            shares = len(times) / steps, time / steps, exposed / steps, 100 * time / total
            stages.append(Stage(kind, layers[kind], place, kernel, *shares))
        kinds = [*layers, OUTSIDE, OTHER]
        stages.sort(key=lambda stage: (kinds.index(stage.kind), -stage.microseconds))
        span = max(event.start + event.duration for event in events) - events[0].start
        return Stages(rows, context, tuple(stages), total / steps, busy / steps, span / steps)

    def __str__(self) -> str:
        """Sums of the kinds of layers."""
        parts = []
        for kind, mine in itertools.groupby(self.stages, lambda stage: stage.kind):
            stages = list(mine)
            layers, count = stages[0].layers, sum(stage.per_step for stage in stages)
            time = sum(stage.microseconds for stage in stages)
            each = f" ({layers} layers of {count / layers:.1f} in {time / layers:.1f} us)" if layers else ""
            parts.append(f"{kind} {count:.0f} in {time:.0f} us{each}")
        return (
            f"rows {self.rows}, context {self.context}: {sum(stage.per_step for stage in self.stages):.0f} kernels in "
            f"{self.total:.0f} us per step, {self.span:.0f} us from first to last, {self.busy:.0f} of them busy: "
            f"{', '.join(parts)}"
        )


def loop_kernels(text: str) -> list[tuple[str, str]]:
    """Names and origins of the kernels that an iteration of a program's loop starts, in order.

    The text is the scheduled HLO of an XLA program for GPUs, whose fusions and Triton calls are kernels. Equal ones are
    compiled once, under the name of the first; others of the same name are numbered.

    Raises:
        DeviceError: the program has no loop.
    """
    loop = _LOOP.search(text, max(text.find("\nENTRY "), 0))
    if loop is None:
        raise DeviceError("expected a compiled program with a loop of decode steps, found none")
    lines = iter(text.splitlines())
    next(line for line in lines if re.match(rf"%?{re.escape(loop[1])} \(", line))
    found: list[tuple[str, str]] = []
    names: dict[str, str] = {}
    for line in itertools.takewhile(lambda line: not line.startswith("}"), lines):
        if started := _STARTED.match(line):
            kernel, first, path = _KERNEL.search(line), _FIRST.search(line), _PATH.search(line)
            name = kernel[2] if kernel else started[1].replace(".", "_")
            key = kernel[1] if kernel else first[1] if first else name
            if key not in names:
                number = sum(base(name) == base(other) for other in names.values()) if kernel else 0
                names[key] = f"{name}__{number}" if number else name
            found.append((names[key], path[1] if path else ""))
    return found


def base(name: str) -> str:
    """Name of a kernel without the number that tells it from others: `linear__2`, `loop_select_fusion_4`."""
    return re.sub(r"(__?\d+)+$", "", name)


def _origins(
    program: Sequence[tuple[str, str]], events: Sequence[Event], steps: int
) -> Iterator[tuple[int, str | None]]:
    """Number and origin of every event; None where the program has not just as many kernels of its name.

    Where the numbers of names differ from what the program promises, they are left out of account.
    """
    ran, promised = Counter(event.name for event in events), Counter(name for name, _ in program)
    off = {base(name) for name in ran | promised if ran[name] != steps * promised[name]}

    def key(name: str) -> str:
        return base(name) if base(name) in off else name

    paths: dict[str, list[str]] = defaultdict(list)
    for name, path in program:
        paths[key(name)].append(path)
    same: dict[str, list[int]] = defaultdict(list)
    for index, event in enumerate(events):
        same[key(event.name)].append(index)
    for name, mine in same.items():
        known = len(mine) == steps * len(paths[name])
        yield from zip(mine, paths[name] * steps if known else [None] * len(mine), strict=True)


def _alone(events: Sequence[Event]) -> tuple[list[float], float]:
    """How long each kernel ran while no other did, and how long any ran."""
    edges = [(at, index) for index, event in enumerate(events) for at in (event.start, event.start + event.duration)]
    running: set[int] = set()
    alone, busy, before = [0.0] * len(events), 0.0, 0.0
    for time, index in sorted(edges):
        busy += time - before if running else 0.0
        if len(running) == 1:
            alone[next(iter(running))] += time - before
        running ^= {index}
        before = time
    return alone, busy


def _place(path: str, config: ModelConfig) -> tuple[str, str]:
    """Kind of layer, and the modules or methods on the path below it.

    `jit(run)/while/body/DeepSeekV4/layers_2/attn/attn.output/attn.op/jit(_run)/act_codes/pallas_call` is `attn.output`
    in a CSA layer; a path without an inner `jit` ends with a primitive.
    """
    inside = path.partition("/body/")[2]
    modules, *operation = re.split(r"/?\bjit\(", inside)
    parts = modules.split("/") if operation else modules.split("/")[:-1]
    kind, names = OUTSIDE, list[str]()
    for part in parts:
        if layer := _LAYER.match(part):
            kind, names = _kind(config.compress_ratios[int(layer[1])]), []
        elif not _HELPERS.search(part):
            # A method follows the module that it belongs to.
            if names and part.partition(".")[0] == names[-1].partition(".")[0]:
                names.pop()
            names.append(part)
    return kind, "/".join(names) or ("loop" if kind == OUTSIDE else "layer")


def _kind(ratio: int) -> str:
    return {0: "window", CSA_RATIO: "CSA"}.get(ratio, "HCA")
