"""`ds4jax bench`: tables of what the kernels and the decode step take."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from ds4jax.cli_bench_decode import decode
from ds4jax.cli_bench_load import load
from ds4jax.cli_bench_table import Csv, Table, numbers, numerics_of, say, take_whole_card
from ds4jax.cli_options import NumericsChange
from ds4jax.errors import RequestError

bench = typer.Typer(no_args_is_help=True, help="Measures kernels, decoding and loading.")


@bench.command()
def kernels(
    names: Annotated[list[str] | None, typer.Argument(metavar="[CASE]...", help="Cases; default: all.")] = None,
    rows: Annotated[str, typer.Option("--rows", metavar="N,...", help="Rows of a call, commas between.")] = "1,3",
    numerics: NumericsChange = None,
    csv_file: Csv = None,
) -> None:
    """Shows the device time of every kernel at the full model's shapes, and how near it is to a copy's bandwidth."""
    take_whole_card()
    from ds4jax.bench.cases import CASES
    from ds4jax.bench.kernels import copy_bandwidth, measure
    from ds4jax.bench.machine import Machine, require_gpu

    counts = numbers("--rows", rows)
    if unknown := [name for name in names or [] if name not in CASES]:
        raise RequestError(f"unknown cases {unknown}, expected some of {', '.join(CASES)}")
    name, settings = numerics_of(numerics)
    require_gpu("bench kernels")
    machine, gbps = Machine.of(name, settings), copy_bandwidth()
    say(f"{machine}; copy {gbps:.0f} GB/s")
    say(f"{'kernel':<28} {'case':<26} {'rows':>4} {'us':>8} {'GB/s':>7} {'% copy':>6}")
    with Table(csv_file) as table:
        for timing in measure(settings, names or CASES, counts):
            share = 100 * timing.bandwidth / gbps
            say(
                f"{timing.kernel:<28} {timing.case:<26} {timing.rows:>4} {timing.microseconds:>8.2f} "
                f"{timing.bandwidth:>7.0f} {share:>6.1f}"
            )
            row = dataclasses.asdict(timing) | {"gbps": round(timing.bandwidth, 1), "copy_gbps": round(gbps, 1)}
            table.write(row | {"percent_of_copy": round(share, 1)} | dataclasses.asdict(machine))


bench.command()(decode)
bench.command()(load)
