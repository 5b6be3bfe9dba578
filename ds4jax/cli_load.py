"""From flags and run files to a loaded model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds4jax.checkpoint import GGUF
    from ds4jax.engine import Engine
    from ds4jax.runconfig import RunConfig

# jax, and what needs it, is imported where it is needed: `--help` must not wait.


def read_run(config: str, numerics: list[str] | None, **changes: Any) -> RunConfig:
    """The run file or preset with the command line's changes."""
    from ds4jax.runconfig import RunConfig, change_numerics, load_numerics, parse_assignment

    run = RunConfig.read(config).override(**changes)
    for change in numerics or []:
        changed = change_numerics(run.numerics, parse_assignment(change)) if "=" in change else load_numerics(change)
        run = run.override(numerics=changed)
    return run


def open_model(model: Path | None) -> GGUF:
    from ds4jax.checkpoint import open_gguf
    from ds4jax.engine import open_demo

    return open_demo() if model is None else open_gguf(model)


def load_engine(run: RunConfig, sequences: int = 1, default_context: int | None = None) -> Engine:
    """The loaded model with room for so many sequences; a bar on a terminal shows the progress."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from ds4jax.engine import load

    keep_compiled_programs()
    console = Console(stderr=True)
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        return load(
            run.model,
            mtp=run.mtp,
            numerics=run.numerics,
            context=run.context,
            default_context=default_context,
            sequences=sequences,
            chunk=run.chunk,
            speculative=run.speculative,
            draft_tokens=run.draft_tokens,
            fit_card=True,
            progress=lambda done, total, _: bar.update(task, completed=done, total=total),
        )


def keep_compiled_programs() -> None:
    """Has JAX keep compiled programs in the user's cache directory, unless it was told of another place."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "ds4jax" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
