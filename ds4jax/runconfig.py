"""What one run needs, as a TOML file that command line flags can override; and the numerics presets of `configs/`."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ds4jax.config import DRAFT_COST, Numerics
from ds4jax.errors import ConfigError

PRESETS = ("strict", "perf")
"""Numerics presets that ship with the package."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A complete run. In a run file, sampling and limits are tables and numerics a name, a path or a table.

    model, mtp: GGUF files; no model means the demonstration model that ships with the package.
    numerics: see `Numerics`; in a file `"strict"`, `"perf"`, the path of a numerics file, or a table of fields that
        replace those of its `preset`.
    prompt, prompt_file: the text to continue, or the file that holds it.
    temperature, top_k, top_p, min_p, seed: sampling; temperature 0 is greedy.
    context: most tokens, prompt and answer together, that the cache holds; as many as the request needs if not given.
    max_new_tokens: most tokens to generate.
    chunk: prompt tokens per call of the model; the engine's choice if not given.
    speculative: "off", tokens to draft in every step, or "auto": as many as are worth their time.
    draft_cost: for "auto", time of a draft and of its row in the trunk, as a share of a step without drafts.
    """

    model: Path | None = None
    mtp: Path | None = None
    numerics: Numerics = dataclasses.field(default_factory=lambda: load_numerics("strict"))
    prompt: str | None = None
    prompt_file: Path | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    context: int | None = None
    max_new_tokens: int = 256
    chunk: int | None = None
    speculative: str | int = "off"
    draft_cost: float = DRAFT_COST

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt_file is not None:
            raise ConfigError("prompt and prompt_file are both given; remove one")

    @staticmethod
    def from_toml(text: str, directory: Path) -> RunConfig:
        """Parses a run file; relative paths in it start at `directory`.

        Raises `ConfigError` for a document that is not TOML, an unknown key (naming the nearest known one) or a value
        of the wrong type.
        """
        table = _parse(text)
        _check_keys(table, {*_PLAIN, *_TABLES, "numerics"}, "run file")
        values = {name: value for name, value in table.items() if name in _PLAIN}
        for name, keys in _TABLES.items():
            section = table.get(name, {})
            if not isinstance(section, Mapping):
                raise ConfigError(f"{name} = {section!r}, expected a table [{name}]")
            _check_keys(section, keys, f"[{name}]")
            values |= section
        values = {name: _typed(name, value) for name, value in values.items()}
        for name in _PATHS & set(values):
            values[name] = directory / values[name]
        if "numerics" in table:
            values["numerics"] = _numerics_of(table["numerics"], directory)
        return RunConfig(**values)

    @staticmethod
    def read(name_or_path: str) -> RunConfig:
        """The run that a run file describes, or the default run with a numerics preset given by name."""
        if name_or_path in PRESETS:
            return RunConfig(numerics=load_numerics(name_or_path))
        path = Path(name_or_path)
        return RunConfig.from_toml(_read(path, f"a run file or one of {', '.join(PRESETS)}"), path.parent)

    def override(self, **changes: Any) -> RunConfig:
        """A copy with every field replaced whose new value is not None; a new prompt replaces both kinds of prompt."""
        given = {name: value for name, value in changes.items() if value is not None}
        if given.keys() & {"prompt", "prompt_file"}:
            given = {"prompt": None, "prompt_file": None} | given
        return dataclasses.replace(self, **given)

    def prompt_text(self) -> str | None:
        """The prompt or the text of its file, or None if neither is given."""
        return self.prompt if self.prompt_file is None else _read(self.prompt_file, "a text file")


_PATHS = {"model", "mtp", "prompt_file"}
_PLAIN = {"prompt", *_PATHS, "speculative", "draft_cost"}
_TABLES = {
    "sampling": {"temperature", "top_k", "top_p", "min_p", "seed"},
    "limits": {"context", "max_new_tokens", "chunk"},
}
_FLOATS = {"temperature", "top_p", "min_p", "draft_cost"}


def load_numerics(name_or_path: str | Path, directory: Path = Path()) -> Numerics:
    """Numerics from a preset's name or from a TOML file that names every field; its path starts at `directory`.

    Raises `ConfigError` if there is no such preset or file, or for an unknown or missing key.
    """
    if name_or_path in PRESETS:
        return Numerics.from_toml((configs() / f"{name_or_path}.toml").read_text())
    return Numerics.from_toml(_read(directory / name_or_path, f"a numerics file or one of {', '.join(PRESETS)}"))


def change_numerics(numerics: Numerics, changes: Mapping[str, Any]) -> Numerics:
    """A copy with some fields changed; `impl` and `xla` are tables whose entries replace those of the same name.

    Raises `ConfigError` for an unknown field or operation, or a value that is not allowed.
    """
    table = {field.name: getattr(numerics, field.name) for field in dataclasses.fields(Numerics)}
    table |= {"impl": dict(numerics.impl), "xla": dict(numerics.xla)}
    _check_keys(changes, table, "numerics")
    for name, value in changes.items():
        if name in ("impl", "xla"):
            if not isinstance(value, Mapping):
                raise ConfigError(f"numerics: {name} = {value!r}, expected a table")
            if name == "impl":
                _check_keys(value, table["impl"], "numerics.impl")
            table[name] = {**table[name], **value}
        else:
            table[name] = value
    return Numerics.from_mapping(table)


def parse_assignment(text: str) -> dict[str, Any]:
    """Parses `act=f32` or `impl.linear=pallas` into a table for `change_numerics`; a bare word is a string."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise ConfigError(f"{text!r}: expected FIELD=VALUE")
    try:
        return tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
        return _parse(f'{key} = "{value}"')


def configs() -> Traversable:
    """The folder `configs/`: inside the package when installed from a wheel, beside it in a source tree."""
    package = resources.files("ds4jax")
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package / ".." / "configs"


def _numerics_of(value: Any, directory: Path) -> Numerics:
    """Numerics of a run file: a name, a path, or a table of changes to a preset."""
    if isinstance(value, str):
        return load_numerics(value, directory)
    if not isinstance(value, Mapping):
        raise ConfigError(f"numerics = {value!r}, expected a preset, a path or a table")
    changes = dict(value)
    preset = changes.pop("preset", "strict")
    if not isinstance(preset, str):
        raise ConfigError(f"numerics: preset = {preset!r}, expected one of {', '.join(PRESETS)} or a path")
    return change_numerics(load_numerics(preset, directory), changes)


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: expected {what}: {reason}") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not a TOML document: {error}") from error


def _check_keys(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{where}: unknown key {key!r}; the nearest known key is {nearest!r}")


def _typed(name: str, value: Any) -> Any:
    """Checks the type of a value of a run file; whole numbers may stand for floats."""
    allowed: tuple[type, ...] = (float,) if name in _FLOATS else (str,) if name in _PLAIN else (int,)
    if name == "speculative":
        allowed = (str, int)
    if name in _FLOATS and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        words = " or ".join(kind.__name__ for kind in allowed)
        raise ConfigError(f"run file: {name} = {value!r}, expected {words}")
    return value
