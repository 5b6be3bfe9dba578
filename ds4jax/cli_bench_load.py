"""`ds4jax bench load`: what loading a model takes."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from ds4jax.cli_bench_table import Csv, Table, numerics_of, say, take_whole_card
from ds4jax.errors import CapacityError


def load(
    model: Annotated[
        Path | None, typer.Option("-m", "--model", help="GGUF file; default: one of random blocks, written first.")
    ] = None,
    gib: Annotated[float, typer.Option("--gib", help="Most GiB of the file that is written.")] = 4.0,
    folder: Annotated[
        Path, typer.Option("--folder", help="Where it is written: /dev/shm is memory, others lie on a disk.")
    ] = Path("/dev/shm"),
    cold: Annotated[
        bool, typer.Option("--cold", help="Have the kernel drop the file before it is read, instead of reading it.")
    ] = False,
    csv_file: Csv = None,
) -> None:
    """Shows the time of loading a model, and of reading, uploading and rearranging its bytes by themselves.

    The written file has the full model's shapes and types, with fewer layers and experts; it is removed in the end.
    """
    take_whole_card()
    import jax

    from ds4jax.bench.load import FULL_BYTES, file_nbytes, measure, sized, write_model
    from ds4jax.bench.machine import Machine

    with contextlib.ExitStack() as stack:
        table = stack.enter_context(Table(csv_file))
        machine = Machine.of(*numerics_of(None))
        say(str(machine))
        if model is None:
            config = sized(gib)
            size = file_nbytes(config)
            if (free := shutil.disk_usage(folder).free) < size:
                raise CapacityError(
                    f"--gib {gib:g}: expected {size / 2**30:.1f} GiB free in {folder}, found {free / 2**30:.1f}; "
                    "give fewer or another --folder"
                )
            model = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ds4jax-", dir=folder))) / "model.gguf"
            began = time.perf_counter()
            write_model(model, config)
            shape = f"{config.num_hidden_layers} layers, {config.n_routed_experts} experts"
            say(f"{model}: {shape}, {size / 2**30:.2f} GiB written in {time.perf_counter() - began:.1f} s")
        for stage in measure(model, jax.local_devices()[0], cold):
            say(
                f"{stage.stage:<16} {stage.nbytes / 2**30:7.2f} GiB {stage.seconds:8.2f} s {stage.gbps:8.2f} GB/s, "
                f"{100 * stage.resident:.0f} % of the file in memory before"
            )
            row = {"model": str(model)} | dataclasses.asdict(stage) | {"gbps": round(stage.gbps, 3)}
            table.write(row | dataclasses.asdict(machine))
        say(f"81 GiB would take {FULL_BYTES / stage.gbps / 1e9:.1f} s at this rate (extrapolated)")
