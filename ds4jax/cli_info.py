"""What `ds4jax info` prints."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from ds4jax.checkpoint import Description
from ds4jax.config import ModelConfig

_PER_LAYER = ("compress_ratios", "swiglu_limit", "swiglu_limit_shared")


def show(description: Description) -> None:
    """Prints a model's files, sizes, layers, tensors by type, and where it fits."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(f"{description.name}: {', '.join(map(str, description.paths))}")
    for table in (_sizes(description.config), _layers(description.config), _tensors(description)):
        console.print(table)
    for name, why in description.census.ignored.items():
        console.print(f"ignored: {name}: {why}")
    if description.fits:
        console.print(_fits(description))


def size(count: int) -> str:
    """Bytes in the largest binary unit that keeps the number above one: `81.2 GiB`."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _sizes(config: ModelConfig) -> Table:
    table = Table(title="sizes", title_justify="left", show_header=False)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _PER_LAYER:
            table.add_row(field.name, f"{value:g}" if isinstance(value, float) else str(value))
    return table


def _layers(config: ModelConfig) -> Table:
    """One row for all layers of a kind."""
    kinds = {0: "window", 4: "compressed sparse, 4 to 1"}
    layers: dict[tuple[str, ...], list[str]] = {}
    for layer, limits in enumerate(zip(config.swiglu_limit, config.swiglu_limit_shared, strict=True)):
        is_mtp = layer == config.num_hidden_layers
        if is_mtp and not config.has_mtp:
            continue
        ratio = 0 if is_mtp else config.compress_ratios[layer]
        attention = kinds.get(ratio, f"heavily compressed, {ratio} to 1")
        routing = "token table" if config.is_hash_layer(layer) else "router"
        kind = (attention, routing, *(f"{limit:g}" for limit in limits))
        layers.setdefault(kind, []).append("MTP" if is_mtp else str(layer))
    table = Table("attention", "routing", "clamp", "clamp shared", "layers", title="schedule", title_justify="left")
    for kind, names in layers.items():
        table.add_row(*kind, " ".join(names))
    return table


def _tensors(description: Description) -> Table:
    census = description.census
    table = Table("type", "tensors", "bytes in the file", title="tensors", title_justify="left")
    for name, (count, nbytes) in census.by_type.items():
        table.add_row(name, str(count), size(nbytes))
    table.add_section()
    table.add_row("all", str(sum(count for count, _ in census.by_type.values())), size(census.file_bytes))
    table.add_row("on the device", "", size(census.device_bytes))
    return table


def _fits(description: Description) -> Table:
    cards = sorted({fit.card for fit in description.fits})
    table = Table(
        "context", "cache", *(f"{card} GiB card" for card in cards), title="memory left", title_justify="left"
    )
    for context in sorted({fit.context for fit in description.fits}):
        row = {fit.card: fit for fit in description.fits if fit.context == context}
        left = (size(row[card].left_bytes) if row[card].left_bytes >= 0 else "does not fit" for card in cards)
        table.add_row(str(context), size(next(iter(row.values())).cache_bytes), *left)
    return table
