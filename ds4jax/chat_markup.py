"""Reads the markup of tool calls as it comes: where a block of calls opens, and the calls in it.

Models leave tags out and misspell them, so more is understood than DeepSeek's own parser accepts. What could as well be
a quotation is an opening only if the first call is of a declared tool.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping
from typing import Any

from ds4jax.chat_tools import DSML, from_json, to_json

Schemas = Mapping[str, Mapping[str, Any]]
"""Properties of the parameters of every declared tool, by the tool's name."""

# What stands before a tag's name: the right mark, one that lost its first bar, ASCII bars, nothing.
_DIALECTS = (DSML, DSML[1:], "|DSML|", "")
_BLOCKS = ("tool_calls", "function_calls")  # the second is that of DeepSeek-V3.2
_LONGEST_OPENING = 1024  # characters of an opening, or of a tag with its attributes
_LONGEST_TAG = 40  # characters that name a tag, more than any has
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_ATTRIBUTE = re.compile(r'([\w-]+)\s*=\s*"([^"]*)"')
_REST_OF_TAG = re.compile(r'((?:[^">]|"[^"]*")*)>')
_INVOKE_NAME = re.compile(r'\s+name\s*=\s*"([^"]*)"\s*')
_INVOKE_NAME_BEGUN = re.compile(r'(?:\s+(?:n|na|nam|name\s*(?:=\s*(?:"([^"]*))?)?)?)?')
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class Undecided(enum.Enum):
    """An answer that needs more text."""

    UNDECIDED = enum.auto()


UNDECIDED = Undecided.UNDECIDED


@dataclasses.dataclass(frozen=True)
class Opening:
    """Where a block of calls begins: its dialect, whether a tag wraps it, and the place of its first call."""

    dialect: str
    wrapped: bool
    start: int


class Openings:
    """Finds the openings of a request's tools."""

    def __init__(self, schemas: Schemas) -> None:
        self._names = tuple(schemas)
        tags = [(dialect, f"{block}>") for dialect in _DIALECTS for block in _BLOCKS]
        tags += [(dialect, "invoke") for dialect in _DIALECTS if dialect]
        self._heads = [(f"<{dialect}{tag}", dialect, tag) for dialect, tag in tags] if schemas else []

    def match(self, text: str, at: int, certain: bool) -> Opening | Undecided | None:
        """The opening at a place of the text, `UNDECIDED` if more text could make it one, or None.

        certain: whether the right mark alone suffices, as it does in content but not in reasoning.
        """
        undecided = False
        for head, dialect, tag in self._heads:
            end = at + len(head)
            if text.startswith(head, at):
                if tag == "invoke":
                    return self._first_call(text, at, end, Opening(dialect, False, at))
                if certain and dialect == DSML and tag == f"{_BLOCKS[0]}>":
                    return Opening(dialect, True, end)
                start = end + len(text[end:]) - len(text[end:].lstrip())
                invoke = f"<{dialect}invoke"
                if text.startswith(invoke, start):
                    return self._first_call(text, at, start + len(invoke), Opening(dialect, True, end))
                return UNDECIDED if begins(text, start, invoke) and len(text) - at < _LONGEST_OPENING else None
            undecided |= begins(text, at, head)
        return UNDECIDED if undecided else None

    def _first_call(self, text: str, at: int, end: int, opening: Opening) -> Opening | Undecided | None:
        """The opening if its first call, whose name is to come at `end`, is of a declared tool."""
        if name := _INVOKE_NAME.match(text, end):
            if name[1] in self._names:
                return opening if text.startswith(">", name.end()) else UNDECIDED if name.end() == len(text) else None
        elif begun := _INVOKE_NAME_BEGUN.fullmatch(text, end):
            possible = any(declared.startswith(begun[1] or "") for declared in self._names)
            return UNDECIDED if possible and len(text) - at < _LONGEST_OPENING else None
        return None


def begins(text: str, at: int, expected: str) -> bool:
    """Whether the text, from a place to its end, is a beginning of `expected`."""
    return len(text) - at < len(expected) and expected.startswith(text[at:])


@dataclasses.dataclass
class _Invoke:
    """A call being read.

    body: where the text after its tag, or after its last parameter, begins.
    arguments, values: by the parameter's name, its value as JSON text and as it was written.
    """

    name: str
    body: int
    arguments: dict[str, str] = dataclasses.field(default_factory=dict)
    values: dict[str, str] = dataclasses.field(default_factory=dict)


class Block:
    """An open block of calls.

    calls: names and arguments, as JSON text, of the calls read so far; an invoke that cannot be one is left out.
    rest: what follows the block, once it has ended, else None. closed: whether its closing tag ended it.
    """

    def __init__(self, opening: Opening, schemas: Schemas) -> None:
        self.calls: list[tuple[str, str]] = []
        self.rest: str | None = None
        self.closed = False
        self._wrapped, self._schemas = opening.wrapped, schemas
        mark, blocks = re.escape(opening.dialect), "|".join(_BLOCKS)
        self._tags = re.compile(
            rf"<{mark}(?P<open>invoke|parameter)(?=[\s>])|</{mark}(?P<close>invoke|parameter|{blocks})>"
        )
        self._followers = [f"<{opening.dialect}invoke ", *(f"</{opening.dialect}{block}>" for block in _BLOCKS)]
        self._text = ""
        self._scanned = 0  # no tag of interest begins before
        self._done = 0  # where the last call ended
        self._invoke: _Invoke | None = None
        self._parameter: tuple[dict[str, str], int] | None = None  # attributes, and where the value begins

    @property
    def raw(self) -> str:
        """The text of the block."""
        return self._text.removesuffix(self.rest or "")

    def feed(self, text: str) -> None:
        """Takes further text; `calls` and `rest` tell what has come of it."""
        self._text += text
        while self.rest is None and self._advance():
            pass

    def finish(self, natural: bool) -> None:
        """The text ends within the block; if naturally, a call counts whose parameters are all closed."""
        invoke = self._invoke
        if natural and invoke and invoke.values and not self._parameter and not self._text[invoke.body :].strip():
            self._end_invoke(len(self._text))
        self.rest = ""

    def _advance(self) -> bool:
        """Reads one more tag; False if that needs more text or the block has ended."""
        if not self._wrapped and self.calls and self._invoke is None and not self._goes_on():
            return False
        tag = self._tags.search(self._text, self._scanned)
        if tag is None:
            self._scanned = max(self._scanned, len(self._text) - _LONGEST_TAG)
            return False
        opened, closed = tag["open"], tag["close"]
        self._scanned = tag.end()
        if self._parameter:
            if opened == "parameter":
                return True  # part of the value
            self._end_parameter(tag.start(), tag.end() if closed == "parameter" else None)
        if opened:
            attributes = _REST_OF_TAG.match(self._text, tag.end(), tag.end() + _LONGEST_OPENING)
            if attributes:
                self._scanned = attributes.end()
                self._begin(opened, dict(_ATTRIBUTE.findall(attributes[1])), tag.start(), attributes.end())
            elif len(self._text) < tag.end() + _LONGEST_OPENING:
                self._scanned = tag.start()
                return False
        elif closed != "parameter":
            self._end_invoke(tag.start())
            self._done = tag.end()
            if closed != "invoke":
                self.closed, self.rest = True, self._text[tag.end() :]
        return True

    def _goes_on(self) -> bool:
        """Whether a tag follows the last call of a block that no tag wraps; if none can follow, the block ends."""
        rest = self._text[self._done :]
        start = len(self._text) - len(rest.lstrip())
        if self._tags.match(self._text, start):
            return True
        if not any(begins(self._text, start, follower) for follower in self._followers):
            self.rest = rest
        return False

    def _begin(self, tag: str, attributes: dict[str, str], start: int, end: int) -> None:
        if tag == "parameter":
            if self._invoke:
                self._parameter = attributes, end
            return
        self._end_invoke(start)
        name = attributes.get("name", "")
        if name in self._schemas or _NAME.fullmatch(name):
            self._invoke = _Invoke(name, end)

    def _end_parameter(self, start: int, end: int | None) -> None:
        """The value ends at `start`, and its closing tag at `end`; without one, the last newline is not the value's."""
        assert self._invoke and self._parameter
        (attributes, begin), self._parameter = self._parameter, None
        value = self._text[begin:start] if end else self._text[begin:start].removesuffix("\n")
        self._invoke.body = end or start
        if key := attributes.get("name"):
            schema = self._schemas.get(self._invoke.name, {}).get(key)
            self._invoke.arguments[key] = _argument(value, attributes.get("string"), schema)
            self._invoke.values[key] = value

    def _end_invoke(self, end: int) -> None:
        invoke, self._invoke = self._invoke, None
        if invoke is None:
            return
        properties = self._schemas.get(invoke.name, {})
        arguments = "{" + ", ".join(f"{to_json(key)}: {value}" for key, value in invoke.arguments.items()) + "}"
        if not invoke.values:  # the arguments may be written as JSON
            body = self._text[invoke.body : end].strip()
            arguments = body if _keys(body) is not None else arguments
        elif len(invoke.values) == 1:  # they may be wrapped in a parameter that no schema has
            ((key, value),) = invoke.values.items()
            if key in ("arguments", "input") and key not in properties:
                keys = _keys(value)
                arguments = arguments if keys is None or keys - set(properties) else value.strip()
        self.calls.append((invoke.name, arguments))


def _argument(value: str, is_string: str | None, schema: Any) -> str:
    """A parameter's value as JSON text; JSON is spelled as the model did."""
    if is_string not in ("true", "false"):
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        is_string = "true" if kind == "string" else "false"
    if is_string == "true":
        return to_json(value)
    try:
        from_json(value)
    except ValueError:
        return _PYTHON.get(value.strip(), to_json(value))
    return value


def _keys(text: str) -> set[str] | None:
    """Keys of a JSON object, or None if the text is not one."""
    try:
        value = from_json(text)
    except ValueError:
        return None
    return set(value) if isinstance(value, dict) else None
