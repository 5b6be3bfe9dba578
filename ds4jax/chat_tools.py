"""Tools as DeepSeek-V4 reads and writes them: the block that declares them, calls and results in DSML markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds4jax.errors import RequestError
from ds4jax.tokenizer import Span

DSML = "｜DSML｜"

_DECLARATION = f"""\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_DECLARATION_END = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
)


def functions(tools: Sequence[Any], where: str = "tools") -> list[Mapping[str, Any]]:
    """The functions that tools in OpenAI's wire shape declare. Raises `RequestError` for anything else."""
    found = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise RequestError(
                f'{where}[{i}]: expected {{"type": "function", "function": {{...}}}}; no other tools exist'
            )
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not name:
            raise RequestError(f"{where}[{i}].function.name = {name!r}, expected a name")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise RequestError(f"{where}[{i}].function.parameters: expected a JSON schema, an object")
        found.append(function)
    return found


def tools_block(tools: Sequence[Any], where: str = "tools") -> Iterator[Span]:
    """The part of the system text that declares tools; schemas keep the client's keys and their order."""
    yield Span(_DECLARATION, trusted=True)
    yield Span("\n".join(map(to_json, functions(tools, where))), trusted=False)
    yield Span(_DECLARATION_END, trusted=True)


def calls_block(calls: Sequence[Any], where: str) -> Iterator[Span]:
    """Calls as the model writes them. `where` names the message in errors."""
    yield Span(f"\n\n<{DSML}tool_calls>", trusted=True)
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str):
            raise RequestError(f'{where}[{i}]: expected {{"function": {{"name": ..., "arguments": ...}}}}')
        if not isinstance(call.get("id"), str | None):
            raise RequestError(f"{where}[{i}].id = {call['id']!r}, expected a string")
        yield from _invoke(name, _members(function.get("arguments"), f"{where}[{i}].function.arguments"))
    yield Span(f"\n</{DSML}tool_calls>", trusted=True)


def _invoke(name: str, members: Mapping[str, tuple[bool, str]]) -> Iterator[Span]:
    yield Span(f'\n<{DSML}invoke name="', trusted=True)
    yield Span(name, trusted=False)
    yield Span('">', trusted=True)
    for key, (is_string, text) in members.items():
        yield Span(f'\n<{DSML}parameter name="', trusted=True)
        yield Span(key, trusted=False)
        yield Span(f'" string="{"true" if is_string else "false"}">', trusted=True)
        yield Span(text, trusted=False)
        yield Span(f"</{DSML}parameter>", trusted=True)
    yield Span(f"{'' if members else chr(10)}\n</{DSML}invoke>", trusted=True)


def _members(arguments: Any, where: str) -> dict[str, tuple[bool, str]]:
    """Arguments by key: whether the value is a string, and its text; other values are spelled as the client did."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, Mapping):
        return {
            str(key): (True, value) if isinstance(value, str) else (False, to_json(value))
            for key, value in arguments.items()
        }
    if not isinstance(arguments, str):
        raise RequestError(f"{where}: expected JSON text of an object, found {type(arguments).__name__}")
    try:
        return {key: (True, value) if isinstance(value, str) else (False, raw) for key, value, raw in _scan(arguments)}
    except ValueError:
        return {"arguments": (True, arguments)}


def to_json(value: Any) -> str:
    """JSON as it stands in prompts: a space after comma and colon, nothing escaped that need not be."""
    return json.dumps(value, ensure_ascii=False)


def from_json(text: str) -> Any:
    """A JSON value whose numbers all read 0: what matters is the shape. Raises `ValueError` if it is not JSON."""
    value, end = _value(text, 0)
    if _skip(text, end) < len(text):
        raise ValueError(f"text after the value at character {end}")
    return value


def _scan(text: str) -> Iterator[tuple[str, Any, str]]:
    """Key, value and spelled-out value of every member of a JSON object."""
    if not isinstance(from_json(text), dict):
        raise ValueError("not an object")
    at = _skip(text, 0) + 1
    while text[at := _skip(text, at)] != "}":
        key, at = _value(text, at)
        start = _skip(text, _skip(text, at) + 1)  # the colon
        value, at = _value(text, start)
        yield key, value, text[start:at]
        at = _skip(text, at)
        at += text[at] == ","


def _value(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that starts at a character, and where it ends."""
    try:
        return _DECODER.raw_decode(text, _skip(text, at))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_SPACE = re.compile(r"[ \t\n\r]*")
# Python refuses to read integers of thousands of digits; nobody needs their value.
_DECODER = json.JSONDecoder(parse_int=lambda _: 0, parse_float=lambda _: 0, parse_constant=_refuse)
