"""What the tables of `ds4jax bench` share: lists of numbers, numerics, and files that are whole after every line."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

import typer

from ds4jax.cli_load import read_run
from ds4jax.errors import ConfigError

if TYPE_CHECKING:
    from ds4jax.config import Numerics

Csv = Annotated[Path | None, typer.Option("--csv", help="File to write the table to.")]
Number = TypeVar("Number", int, float)


def numerics_of(changes: list[str] | None) -> tuple[str, Numerics]:
    """What to call the numerics that changes to the strict ones give, and these."""
    return " ".join(changes or ["strict"]), read_run("strict", changes).numerics


def numbers(option: str, text: str | None, number: Callable[[str], Number] = int) -> list[Number]:
    """Numbers with commas between; none if the option is not given."""
    try:
        return [number(part) for part in text.split(",")] if text is not None else []
    except ValueError as error:
        whole = "whole numbers" if number is int else "numbers"
        raise ConfigError(f"{option} {text}: expected {whole} with commas between") from error


def take_whole_card() -> None:
    """A measurement has the card to itself; JAX would take 75 % of it, unless the user has said otherwise."""
    from ds4jax import checkpoint_memory

    checkpoint_memory.take_whole_card()


def say(line: str) -> None:
    print(line, flush=True)


class Table:
    """A CSV file that is complete after every line; nothing if there is no file.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        try:
            self._file: TextIO | None = None if path is None else path.open("w", newline="")
        except OSError as error:
            raise ConfigError(f"{path}: expected a file to write to: {error.strerror}") from error
        self._began = False

    def __enter__(self) -> Table:
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
