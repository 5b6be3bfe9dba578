"""Grammars of answers: JSON, JSON by a schema, and tool calls in the model's markup, for llguidance."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import llguidance
import numpy as np

from ds4jax.chat_tools import DSML, functions
from ds4jax.errors import RequestError
from ds4jax.server.errors import ApiError
from ds4jax.server.fields import Fields
from ds4jax.tokenizer import Tokenizer

# Free white space would let a model write nothing else for ever; this is how it writes JSON.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TEXT = r"TEXT: /(.|\n)*/"
_VALUE = r"VALUE: /(.|\n)*<\//"  # a string argument with the beginning of the tag that ends it
_OPENING = r"OPENING: /(.|\n)*</"
_KEY = r'KEY: /[^"<>\n]+/'


@dataclasses.dataclass(frozen=True)
class Format:
    """Form of an answer. json: it is a JSON value. schema: the one that the client gave."""

    json: bool = False
    schema: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class ToolChoice:
    """Whether tools are called. name: the only one that may be. single: at most one call."""

    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None
    single: bool = False


def tool_choice(fields: Fields, tools: Sequence[Any]) -> ToolChoice:
    """`tool_choice` and `parallel_tool_calls` of OpenAI's APIs, nested or flat, checked against the tools."""
    single = fields.flag("parallel_tool_calls") is False
    value = fields.any("tool_choice")
    if value is None or value in ("auto", "none", "required"):
        return checked_choice(ToolChoice(value or "auto", None, single), tools)
    if isinstance(value, Mapping) and value.get("type") == "function":
        named = value.get("function", value)
        name = named.get("name") if isinstance(named, Mapping) else None
        if isinstance(name, str):
            return checked_choice(ToolChoice("required", name, single), tools)
    raise ApiError(400, 'tool_choice is expected to be "auto", "none", "required" or a function', "tool_choice")


def checked_choice(choice: ToolChoice, tools: Sequence[Any]) -> ToolChoice:
    """Raises `ApiError` if the choice needs a tool that there is not."""
    if choice.mode == "required" and not tools:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", "tool_choice")
    try:
        names = [function["name"] for function in functions(tools)]
    except RequestError as error:
        raise ApiError(400, str(error), "tools") from error
    if choice.name is not None and choice.name not in names:
        raise ApiError(400, f"tool_choice: no tool {choice.name!r}, expected one of {', '.join(names)}", "tool_choice")
    return choice


def answer_format(fields: Fields, kind: str, schema: Fields | None) -> Format:
    """The form that the field `kind` names; `schema` holds the field `schema`."""
    match fields.choice(kind, ("text", "json_object", "json_schema")):
        case "json_object":
            return Format(json=True)
        case "json_schema" if schema is not None:
            inner = schema.object("schema", required=True)
            assert inner is not None
            return Format(json=True, schema=inner.values)
    return Format()


class Grammars:
    """Makes matchers for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._size = tokenizer.vocab_size
        self._vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)))
        self._mark = f"<[{tokenizer.special_ids[DSML]}]>"

    def matcher(self, tools: Sequence[Any], choice: ToolChoice, form: Format) -> Callable[[], GrammarMatcher] | None:
        """Makes a matcher for the answer after its reasoning; None if anything goes.

        Raises:
            ApiError: a schema is not one, or uses what cannot be enforced.
        """
        declared = [function for function in functions(tools) if choice.name in (None, function["name"])]
        strict = any(function.get("strict") for function in declared)
        if choice.mode == "required":
            grammar = self._calls(declared, choice.single, "calls")
        elif form.json and declared:
            grammar = self._calls(declared, choice.single, "value | calls") + f"\nvalue: {_json(form.schema or {})}"
        elif form.json:
            grammar = f"start: {_json(form.schema or {'type': 'object'})}"
        elif strict:
            grammar = self._calls(declared, choice.single, "TEXT | OPENING block") + f"\n{_TEXT}\n{_OPENING}"
        else:
            return None
        if problem := GrammarMatcher(self._vocabulary, grammar, self._size).problem:
            place = "tools" if declared else "response_format"
            raise ApiError(400, f"{place}: this schema cannot be enforced: {problem}", place)
        return lambda: GrammarMatcher(self._vocabulary, grammar, self._size)

    def _calls(self, declared: Sequence[Mapping[str, Any]], single: bool, start: str) -> str:
        """Rules of a block of calls."""
        # The lexer takes the longest piece that may stand somewhere, so a line break belongs to the bracket after it.
        rules = {f"tool{i}": function for i, function in enumerate(declared)}
        more = "" if single else r' ("\n<" invoke)*'
        lines = [
            f"start: {start}",
            r'calls: "\n\n<" block',
            f'block: {self._mark} "tool_calls>\\n<" invoke{more} "\\n</" {self._mark} "tool_calls>"',
            f"invoke: {' | '.join(rules)}",
            _VALUE,
            _KEY,
        ]
        for name, function in rules.items():
            lines += self._invoke(name, function)
        return "\n".join(lines)

    def _invoke(self, rule: str, function: Mapping[str, Any]) -> Iterator[str]:
        """Rules of a call: known parameters in the schema's order, those not required may be left out."""
        schema = function.get("parameters") or {}
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise ApiError(400, f"tools: the parameters of {function['name']} are no schema of an object", "tools")
        parts = []
        for i, (name, value) in enumerate(properties.items()):
            parts.append(f'{rule}p{i} "\\n"' if name in required else f'({rule}p{i} "\\n")?')
            yield from self._parameter(f"{rule}p{i}", name, value, schema)
        if not properties and schema.get("additionalProperties", not schema):
            yield from self._parameter(f"{rule}any", None, {}, schema)
            parts.append(f'({rule}any "\\n")*')
        body = " ".join(parts)
        if not any(name in required for name in properties):
            body = f'("\\n" | {body})' if parts else r'"\n"'
        head = json.dumps(f'invoke name="{function["name"]}">\n', ensure_ascii=False)
        yield f'{rule}: {self._mark} {head} {body} "</" {self._mark} "invoke>"'

    def _parameter(self, rule: str, name: str | None, value: Any, root: Mapping[str, Any]) -> Iterator[str]:
        """Rules of a parameter: strings as they are, everything else as JSON."""
        value = _resolved(value, root)
        forms = []
        words = value.get("enum", [value["const"]] if "const" in value else [])
        kinds = value.get("type", ["string", "other"])
        if not isinstance(words, list) or not isinstance(kinds, str | list):
            raise ApiError(400, f"tools: the parameter {name!r} has no valid schema: look at enum and type", "tools")
        if words:
            forms += [f'"true\\">" {json.dumps(f"{word}</", ensure_ascii=False)}' for word in words if _is_text(word)]
            words = [word for word in words if not _is_text(word)]
            other: Mapping[str, Any] | None = {"enum": words} if words else None
        else:
            kinds = [kinds] if isinstance(kinds, str) else list(kinds)
            mixed = any(word in value for word in ("anyOf", "oneOf", "allOf"))
            if "string" in kinds or mixed:
                forms.append(r'"true\">" VALUE')
            rest = [kind for kind in kinds if kind != "string"]
            other = {**value, **({} if "other" in rest else {"type": rest})} if rest or mixed else None
        if other is not None:
            definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
            yield f"{rule}json: {_json({**definitions, **other})}"
            forms.append(f'"false\\">" {rule}json "</"')
        key = "KEY" if name is None else json.dumps(name, ensure_ascii=False)
        head = f'"<" {self._mark} "parameter name=\\"" {key} "\\" string=\\""'
        yield f'{rule}: {head} ({" | ".join(forms)}) {self._mark} "parameter>"'


class GrammarMatcher:
    """See `guide.Matcher`."""

    def __init__(self, vocabulary: llguidance.LLTokenizer, grammar: str, size: int) -> None:
        self._matcher, self._size = llguidance.LLMatcher(vocabulary, grammar), size

    @property
    def problem(self) -> str:
        """What is wrong with the grammar, in one line; empty if nothing."""
        lines = self._matcher.get_error().splitlines()
        return " ".join(itertools.takewhile(lambda line: " | " not in line, lines))[:300]

    def allowed(self) -> np.ndarray:
        """Which tokens may come next; the end of the answer where the grammar is satisfied."""
        mask = self._matcher.compute_bitmask()
        if self.problem:
            raise ApiError(400, f"the grammar of this request is too complex: {self.problem}")
        return np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[: self._size].astype(bool)

    def accept(self, token: int) -> None:
        """Goes on by a token that was allowed."""
        self._matcher.consume_token(token)


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        self.tokens = tokenizer.token_bytes
        self.special_token_ids = list(tokenizer.special_ids.values())

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _LAYOUT})}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _resolved(value: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema, or the definition that it refers to."""
    reference = value.get("$ref") if isinstance(value, Mapping) else None
    if isinstance(reference, str) and reference.startswith("#/"):
        value = root
        for part in reference[2:].split("/"):
            value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}
