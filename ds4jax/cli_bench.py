"""`ds4jax bench`: tables of what the kernels and the decode step take."""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ds4jax.cli_load import open_model, read_run
from ds4jax.cli_options import Model, NumericsChange
from ds4jax.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from ds4jax.config import ModelConfig, Numerics

bench = typer.Typer(no_args_is_help=True, help="Measures kernels and decoding.")

_Rows = Annotated[str, typer.Option("--rows", metavar="N,...", help="Rows of a call, commas between.")]
_Csv = Annotated[Path | None, typer.Option("--csv", help="File to write the table to.")]


@bench.command()
def kernels(
    names: Annotated[list[str] | None, typer.Argument(metavar="[CASE]...", help="Cases; default: all.")] = None,
    rows: _Rows = "1,3",
    numerics: NumericsChange = None,
    csv_file: _Csv = None,
) -> None:
    """Shows the device time of every kernel at the full model's shapes, and how near it is to a copy's bandwidth."""
    from ds4jax.bench.cases import CASES
    from ds4jax.bench.kernels import copy_bandwidth, measure
    from ds4jax.bench.machine import Machine, require_gpu
    from ds4jax.checkpoint_memory import take_whole_card

    take_whole_card()
    counts = _numbers("--rows", rows)
    if unknown := [name for name in names or [] if name not in CASES]:
        raise RequestError(f"unknown cases {unknown}, expected some of {', '.join(CASES)}")
    name, settings = _numerics(numerics)
    require_gpu("bench kernels")
    machine, gbps = Machine.of(name, settings), copy_bandwidth()
    _say(f"{machine}; copy {gbps:.0f} GB/s")
    _say(f"{'kernel':<28} {'case':<26} {'rows':>4} {'us':>8} {'GB/s':>7} {'% copy':>6}")
    with _Table(csv_file) as table:
        for timing in measure(settings, names or CASES, counts):
            share = 100 * timing.bandwidth / gbps
            _say(
                f"{timing.kernel:<28} {timing.case:<26} {timing.rows:>4} {timing.microseconds:>8.2f} "
                f"{timing.bandwidth:>7.0f} {share:>6.1f}"
            )
            row = dataclasses.asdict(timing) | {"gbps": round(timing.bandwidth, 1), "copy_gbps": round(gbps, 1)}
            table.write(row | {"percent_of_copy": round(share, 1)} | dataclasses.asdict(machine))


@bench.command()
def decode(
    synthetic: Annotated[
        str | None, typer.Option("--synthetic", metavar="flash[:LAYERS]", help="Random weights of these shapes.")
    ] = None,
    model: Model = None,
    context: Annotated[
        str, typer.Option("--context", metavar="N,...", help="Positions in the cache, commas between.")
    ] = "2048",
    rows: _Rows = "1,3",
    steps: Annotated[int, typer.Option("--steps", help="Steps of a run.")] = 64,
    numerics: NumericsChange = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random weights.")] = 0,
    csv_file: _Csv = None,
) -> None:
    """Shows the time of decode steps with a filled cache: trunk, head and greedy choice in a loop on the device.

    All contexts share a cache with room for the largest. Of several rows, all are committed.
    """
    if synthetic is not None and model is not None:
        raise RequestError(f"--synthetic {synthetic} and --model {model} are both given; leave one out")
    import jax

    from ds4jax.bench.decode import check_frontiers, measure
    from ds4jax.bench.kernels import copy_bandwidth
    from ds4jax.bench.machine import Machine, config_hash
    from ds4jax.bench.synthetic import nbytes
    from ds4jax.checkpoint_memory import take_whole_card

    take_whole_card()
    contexts, counts = _numbers("--context", context), _numbers("--rows", rows)
    name, settings = _numerics(numerics)
    config, load = _model(synthetic, model, seed)
    check_frontiers(config, contexts, counts, steps)
    machine = Machine.of(name, settings)
    gbps = copy_bandwidth() if jax.default_backend() == "gpu" else 0.0
    _say(f"{machine}; copy {gbps:.0f} GB/s")
    source = f"{synthetic or model or 'demonstration model'} {config_hash(config)}"
    began = time.perf_counter()
    params = jax.block_until_ready(load(settings, max(contexts), max(counts)))
    _say(f"{source}: {nbytes(params) / 2**30:.2f} GiB of weights in {time.perf_counter() - began:.1f} s")
    failed: list[str] = []

    def say(line: str) -> None:
        _say(line)
        failed.extend([line] if "failed" in line else [])

    with _Table(csv_file) as table:
        for step in measure(config, settings, params, contexts=contexts, rows=counts, steps=steps, gbps=gbps, say=say):
            _say(
                f"rows {step.rows}, context {step.context}: {step.milliseconds:.3f} ms/step, "
                f"{step.tokens_per_second:.1f} tokens/s, weights {step.weight_bytes / 1e9:.2f} GB/step, "
                f"{step.bandwidth_percent:.1f} % of copy, peak {step.peak_bytes / 2**30:.2f} GiB"
            )
            derived = {"tokens_per_second": step.tokens_per_second, "percent_of_copy": step.bandwidth_percent}
            table.write({"model": source} | dataclasses.asdict(step) | derived | dataclasses.asdict(machine))
    if failed:
        raise RequestError(f"{len(failed)} of {len(counts)} row counts failed; see above")


def _model(synthetic: str | None, model: Path | None, seed: int) -> tuple[ModelConfig, Callable[..., Any]]:
    """Sizes of the model, and the function of numerics, context and rows that makes or loads its parameters."""
    import jax

    from ds4jax.bench import synthetic as made
    from ds4jax.checkpoint import load_params, read_config
    from ds4jax.checkpoint_memory import check_device
    from ds4jax.model.cache import cache_nbytes

    if synthetic is not None:
        sizes = made.parse(synthetic)

        def make(settings: Numerics, context: int, rows: int) -> Any:
            weights = made.params_nbytes(sizes)
            check_device(jax.local_devices()[0], weights, cache_nbytes(sizes, settings, 1, context, rows))
            return made.make_params(sizes, seed)

        return sizes, make
    file = open_model(model)
    config = read_config(file, None)

    def load(settings: Numerics, context: int, rows: int) -> Any:
        return load_params(file, None, config, cache_bytes=cache_nbytes(config, settings, 1, context, rows))[0]

    return config, load


def _numerics(changes: list[str] | None) -> tuple[str, Numerics]:
    """Numerics and what to call them."""
    return " ".join(changes or ["strict"]), read_run("strict", changes).numerics


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: expected whole numbers with commas between") from error


def _say(line: str) -> None:
    print(line, flush=True)


class _Table:
    """A CSV file that is complete after every line; nothing if there is no file."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None if path is None else path.open("w", newline="")
        self._began = False

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        writer = csv.DictWriter(self._file, row)
        if not self._began:
            writer.writeheader()
            self._began = True
        writer.writerow(row)
        self._file.flush()
