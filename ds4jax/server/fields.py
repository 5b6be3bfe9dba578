"""Reading the fields of a request's body, with errors that say what was expected."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds4jax.server.errors import ApiError

Number = int | float
MOST_DEPTH = 100  # of lists and objects within one another
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_body(body: bytes) -> Fields:
    """The fields of a JSON object.

    Raises:
        ApiError: 400, the body is not UTF-8, not JSON or not an object, is nested too deeply, or holds half of a
            surrogate pair.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
        if _SURROGATE.search(body):  # halves that found each other are characters now
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 text: invalid byte at offset {error.start}") from error
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body holds half of a surrogate pair, which is no character") from error
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {_kind(value)}, expected a JSON object")
    level: list[Any] = [value]
    for _ in range(MOST_DEPTH):
        parts = (one.values() if isinstance(one, dict) else one for one in level)
        level = [part for part in itertools.chain.from_iterable(parts) if isinstance(part, dict | list)]
    if level:
        raise ApiError(400, f"the body is nested too deeply, expected at most {MOST_DEPTH} levels")
    return Fields(value)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


class Fields:
    """An object of a body. Reading a field that is absent or null gives None; one of another type raises `ApiError`."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values, self._where = values, where

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def wrong(self, name: str, expected: str) -> ApiError:
        """The error for a field that is missing or not what it should be."""
        found = self.values.get(name)
        shown = f"{found!r}" if isinstance(found, bool | int | float) or _is_short(found) else _kind(found)
        shown = shown if name in self.values else "missing"
        return ApiError(400, f"{self.path(name)} is {shown}, expected {expected}", param=self.path(name))

    def path(self, name: str) -> str:
        """The field's full name."""
        return f"{self._where}{name}"

    def any(self, name: str) -> Any:
        """The field, whatever its type."""
        return self.values.get(name)

    def text(self, name: str, *, required: bool = False) -> str | None:
        """A string."""
        return self._typed(name, str, "a string", required)

    def flag(self, name: str) -> bool | None:
        """True or false."""
        return self._typed(name, bool, "true or false", False)

    def object(self, name: str, *, required: bool = False) -> Fields | None:
        """An object."""
        value = self._typed(name, dict, "an object", required)
        return None if value is None else Fields(value, f"{self.path(name)}.")

    def array(self, name: str, *, required: bool = False) -> list[Any] | None:
        """A list."""
        return self._typed(name, list, "a list", required)

    def objects(self, name: str, *, required: bool = False) -> Iterator[Fields]:
        """The entries of a list of objects."""
        for i, value in enumerate(self.array(name, required=required) or []):
            if not isinstance(value, dict):
                raise ApiError(400, f"{self.path(name)}[{i}] is {_kind(value)}, expected an object", self.path(name))
            yield Fields(value, f"{self.path(name)}[{i}].")

    def integer(self, name: str, least: int | None = None, most: int | None = None) -> int | None:
        """A whole number within bounds."""
        value = self.values.get(name)
        if value is None:
            return None
        whole = isinstance(value, float) and value.is_integer()
        number = int(value) if whole else value
        if isinstance(number, bool) or not isinstance(number, int):
            raise self.wrong(name, "a whole number")
        return int(self._within(name, number, least, most))

    def number(self, name: str, least: Number, most: Number = math.inf, *, above: bool = False) -> float | None:
        """A number within bounds; the least is not allowed itself if `above`."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        if above and value <= least:
            raise self.wrong(name, f"above {least:g}")
        return float(self._within(name, value, least, most))

    def choice(self, name: str, options: Sequence[str]) -> str | None:
        """One of several words."""
        value = self.values.get(name)
        if value is not None and value not in options:
            raise self.wrong(name, f"one of {', '.join(options)}")
        return value

    def strings(self, name: str, most: int) -> list[str]:
        """A list of strings that are not empty, or a single one; empty if absent."""
        value = self.values.get(name)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
            raise self.wrong(name, "a string or a list of strings, none of them empty")
        if len(found) > most:
            raise ApiError(400, f"{self.path(name)} has {len(found)} entries, expected at most {most}", self.path(name))
        return found

    def refuse(self, name: str, reason: str, *, unless: Sequence[Any] = ()) -> None:
        """Refuses a field that cannot be honoured, unless it asks for what happens anyway."""
        if self.has(name) and self.values[name] not in unless:
            raise ApiError(400, f"{self.path(name)} is not supported: {reason}", param=self.path(name))

    def _typed(self, name: str, kind: type, words: str, required: bool) -> Any:
        value = self.values.get(name)
        if value is None and not required:
            return None
        if not isinstance(value, kind):
            raise self.wrong(name, words)
        return value

    def _within(self, name: str, value: Number, least: Number | None, most: Number | None) -> Number:
        low, high = least is None or value >= least, most is None or value <= most
        if not (low and high):
            bounds = [f"at least {least:g}"] if least is not None else []
            bounds += [f"at most {most:g}"] if most is not None and most != math.inf else []
            raise self.wrong(name, " and ".join(bounds))
        return value


def _is_short(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 60


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return "null" if value is None else kinds.get(type(value), "a number")
