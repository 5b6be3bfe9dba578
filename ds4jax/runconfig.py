"""What one run needs, as a TOML file that command line flags can override; and the numerics presets of `configs/`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ds4jax.config import Numerics
from ds4jax.errors import ConfigError

PRESETS = ("strict", "perf")
"""Numerics presets that ship with the package."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A complete run.

    In a run file, `[sampling]`, `[limits]` and `[server]` are tables and numerics a name, a path or a table.

    model, mtp: GGUF files; no model means the demonstration model that ships with the package.
    numerics: see `Numerics`; in a file `"strict"`, `"perf"`, the path of a numerics file, or a table of fields that
        replace those of its `preset`.
    prompt, prompt_file: the text to continue, or the file that holds it.
    special: whether special tokens written out in the text become single tokens.
    temperature, top_k, top_p, min_p, seed: sampling; temperature 0 is greedy; if not given, `generate` is greedy
        and a chat has 1.
    context: most tokens, prompt and answer together, that the cache holds; as many as the request needs if not given.
    max_new_tokens: most tokens to generate; if not given, 256, and in a chat as many as the context holds.
    stop, stop_ids: strings and token ids that end the answer; ids replace the model's own.
    chunk: prompt tokens per call of the model; the engine's choice if not given.
    speculative: "off", tokens to draft in every step, or "auto": as many as are worth their time.
    draft_tokens: file of the ids of the tokens that drafts may be, one a line; all if not given.
    host, port, api_key, cors, sessions, queue, prompt_profile, think, effort: the table `[server]`, see
        `server.run.Settings`; what is not given is as it stands there.
    """

    model: Path | None = None
    mtp: Path | None = None
    numerics: Numerics = dataclasses.field(default_factory=lambda: load_numerics("strict"))
    prompt: str | None = None
    prompt_file: Path | None = None
    special: bool = False
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    context: int | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None
    chunk: int | None = None
    speculative: str | int = "off"
    draft_tokens: Path | None = None
    host: str | None = None
    port: int | None = None
    api_key: str | None = None
    cors: tuple[str, ...] | None = None
    sessions: int | None = None
    queue: int | None = None
    prompt_profile: str | None = None
    think: bool | None = None
    effort: str | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt_file is not None:
            raise ConfigError("prompt and prompt_file are both given; remove one")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed = {self.seed}, expected 0 to 2^64 - 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens = {self.max_new_tokens}, expected at least 0")
        if not all(self.stop):
            raise ConfigError(f"stop = {list(self.stop)}, expected strings that are not empty")
        if not all(0 <= token < 1 << 31 for token in self.stop_ids or ()):
            raise ConfigError(f"stop_ids = {list(self.stop_ids or ())}, expected token ids")

    @staticmethod
    def from_toml(text: str, directory: Path) -> RunConfig:
        """Parses a run file; relative paths in it start at `directory`.

        A numerics file, such as a copy of `configs/strict.toml`, counts as a run with these numerics. Raises
        `ConfigError` for a document that is not TOML, an unknown key (saying what may be meant) or a value of the wrong
        type.
        """
        table = _parse(text)
        if table.keys() & _NUMERICS and not table.keys() & _TOP:
            return RunConfig(numerics=Numerics.from_mapping(table))
        _check_keys(table, _TOP, "", {"[numerics]": _NUMERICS} | {f"[{name}]": keys for name, keys in _TABLES.items()})
        values = {name: value for name, value in table.items() if name in _PLAIN}
        for name, keys in _TABLES.items():
            section = table.get(name, {})
            if not isinstance(section, Mapping):
                raise ConfigError(f"{name} = {section!r}, expected a table [{name}]")
            others = {f"[{other}]": known for other, known in _TABLES.items() if other != name}
            _check_keys(section, keys, f"[{name}]: ", others | {"the top level": _TOP})
            values |= section
        values = {name: _typed(name, value) for name, value in values.items()}
        for name in _PATHS & set(values):
            values[name] = directory / values[name]
        if "numerics" in table:
            values["numerics"] = _numerics_of(table["numerics"], directory)
        return RunConfig(**values)

    @staticmethod
    def read(name_or_path: str) -> RunConfig:
        """The run that a run file describes, or the default run with numerics given by a preset's name or a file.

        Raises `ConfigError` as `from_toml` does, naming the file.
        """
        if name_or_path in PRESETS:
            return RunConfig(numerics=load_numerics(name_or_path))
        path = Path(name_or_path)
        text = read_text(path, f"a run file or one of {', '.join(PRESETS)}")
        with _naming(path):
            return RunConfig.from_toml(text, path.parent)

    def override(self, **changes: Any) -> RunConfig:
        """A copy with every field replaced whose new value is not None; a new prompt replaces both kinds of prompt."""
        given = {name: value for name, value in changes.items() if value is not None}
        if given.keys() & {"prompt", "prompt_file"}:
            given = {"prompt": None, "prompt_file": None} | given
        return dataclasses.replace(self, **given)

    def prompt_text(self) -> str | None:
        """The prompt or the text of its file, or None if neither is given."""
        return self.prompt if self.prompt_file is None else read_text(self.prompt_file, "a text file")


_PATHS = {"model", "mtp", "prompt_file", "draft_tokens"}
_PLAIN = {"prompt", "special", *_PATHS, "speculative"}
_TABLES = {
    "sampling": {"temperature", "top_k", "top_p", "min_p", "seed"},
    "limits": {"context", "max_new_tokens", "stop", "stop_ids", "chunk"},
    "server": {"host", "port", "api_key", "cors", "sessions", "queue", "prompt_profile", "think", "effort"},
}
_TOP = {*_PLAIN, *_TABLES, "numerics"}
_NUMERICS = {field.name for field in dataclasses.fields(Numerics)}
_TYPES: dict[str, type] = {
    **dict.fromkeys(("prompt", *_PATHS, "host", "api_key", "prompt_profile", "effort"), str),
    **dict.fromkeys(("temperature", "top_p", "min_p"), float),
    "special": bool,
    "think": bool,
}
_LISTS: dict[str, type] = {"stop": str, "stop_ids": int, "cors": str}


def load_numerics(name_or_path: str | Path, directory: Path = Path()) -> Numerics:
    """Numerics from a preset's name or from a TOML file that names every field; its path starts at `directory`.

    Raises `ConfigError` if there is no such preset or file, or for an unknown or missing key.
    """
    if name_or_path in PRESETS:
        return Numerics.from_toml((configs() / f"{name_or_path}.toml").read_text())
    path = directory / name_or_path
    text = read_text(path, f"a numerics file or one of {', '.join(PRESETS)}")
    with _naming(path):
        return Numerics.from_toml(text)


def change_numerics(numerics: Numerics, changes: Mapping[str, Any]) -> Numerics:
    """A copy with some fields changed; `impl` and `xla` are tables whose entries replace those of the same name.

    Raises `ConfigError` for an unknown field or operation, or a value that is not allowed.
    """
    table = {field.name: getattr(numerics, field.name) for field in dataclasses.fields(Numerics)}
    table |= {"impl": dict(numerics.impl), "xla": dict(numerics.xla)}
    _check_keys(changes, table, "numerics: ")
    for name, value in changes.items():
        if name in ("impl", "xla"):
            if not isinstance(value, Mapping):
                raise ConfigError(f"numerics: {name} = {value!r}, expected a table")
            if name == "impl":
                _check_keys(value, table["impl"], "numerics.impl: ")
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
        with _naming(f"{text!r}, expected FIELD=VALUE"):
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


def read_text(path: Path, what: str) -> str:
    """The UTF-8 text of a file; ConfigError if it cannot be read, saying what it should be."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: expected {what}: {reason}") from error


@contextlib.contextmanager
def _naming(source: object) -> Iterator[None]:
    """Puts the source of a configuration before what is wrong with it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not a TOML document: {error}") from error


def _check_keys(
    table: Mapping[str, Any], known: Collection[str], where: str, others: Mapping[str, Collection[str]] = {}
) -> None:
    """Refuses keys that are not known; `others` are the keys of other places, by the place's name."""
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}unknown key {key!r}; {_advice(key, known, others)}")


def _advice(key: str, known: Collection[str], others: Mapping[str, Collection[str]]) -> str:
    """What somebody who wrote an unknown key may have meant."""
    for place, keys in others.items():
        if key in keys:
            return f"it belongs in {place}"
    if nearest := difflib.get_close_matches(key, known, n=1):
        return f"the nearest known key is {nearest[0]!r}"
    for place, keys in others.items():
        if nearest := difflib.get_close_matches(key, keys, n=1):
            return f"the nearest known key is {nearest[0]!r} in {place}"
    return f"known keys are {', '.join(sorted(known))}"


def _typed(name: str, value: Any) -> Any:
    """Checks the type of a value of a run file; whole numbers may stand for floats."""
    if name in _LISTS:
        entry = _LISTS[name]
        if type(value) is not list or not all(type(one) is entry for one in value):
            raise ConfigError(f"{name} = {value!r}, expected a list of {entry.__name__}")
        return tuple(value)
    if name == "speculative":
        if type(value) not in (str, int):
            raise ConfigError(f'speculative = {value!r}, expected "off", "auto" or a number')
        return value
    expected = _TYPES.get(name, int)
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ConfigError(f"{name} = {value!r}, expected {expected.__name__}")
    return value
