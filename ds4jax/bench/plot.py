"""A picture of a table: tokens per second of decoding against context."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ds4jax.bench.measure import Line
from ds4jax.errors import ConfigError

FORMATS = (".png", ".svg", ".pdf")


def check_plot(file: Path) -> None:
    """Raises ConfigError unless a plot can be written to this file."""
    if file.suffix not in FORMATS:
        raise ConfigError(f"--plot {file}: expected a name that ends with one of {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot: expected matplotlib, which is not installed; pip install 'ds4jax[plot]'")


def plot(lines: Sequence[Line], title: str, file: Path) -> None:
    """Draws a curve for every number and kind of drafts, and a dashed one for every number of rows of bare steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(map(_curve, lines)):
        mine = sorted((line.context, line.tokens_per_second) for line in lines if _curve(line) == name)
        axes.plot(*zip(*mine, strict=True), "o-" if name.startswith("generation") else "o--", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="context, tokens", ylabel="tokens/s")
    ticks = sorted({line.context for line in lines})
    axes.set_xticks(ticks, [f"{tick / 1024:g}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def _curve(line: Line) -> str:
    if line.measure == "generation":
        return f"generation, {line.acceptance}" + (f", of {line.draft_rows} tokens" if line.drafts else "")
    return f"bare steps, rows {line.rows}, all committed"
