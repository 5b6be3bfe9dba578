"""Grammars of answers: what they let through is what the parser reads and the schema allows, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from ds4jax.chat_parse import Parser
from ds4jax.chat_tools import DSML
from ds4jax.engine import open_demo
from ds4jax.server.errors import ApiError
from ds4jax.server.grammar import Format, Grammars, ToolChoice
from ds4jax.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_gguf(open_demo().metadata)
REQUIRED = ToolChoice("required")
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F"]},
        "places": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
        "when": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
    },
    "required": ["city"],
    "$defs": {"place": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}},
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER)


def tool(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [tool("weather", WEATHER), tool("now", {"type": "object", "properties": {}}), tool("anything", {})]


def call(name: str, *parameters: tuple[str, str, bool]) -> str:
    """A call as the model writes it."""
    lines = [
        f'<{DSML}parameter name="{key}" string="{"true" if text else "false"}">{value}</{DSML}parameter>'
        for key, value, text in parameters
    ]
    return "\n".join([f'<{DSML}invoke name="{name}">', "\n".join(lines), f"</{DSML}invoke>"])


def block(*calls: str) -> str:
    return "\n".join([f"\n\n<{DSML}tool_calls>", *calls, f"</{DSML}tool_calls>"])


def follow(matcher: Any, text: str) -> str:
    """Forces the tokens of a text through a grammar; returns what it would not let through."""
    ids = TOKENIZER.encode(text, parse_special=True)
    for place, token in enumerate(ids):
        if not matcher.allowed()[token]:
            return TOKENIZER.decode(ids[place:])
        matcher.accept(token)
    return ""


def may_end(matcher: Any) -> bool:
    return bool(matcher.allowed()[TOKENIZER.eos_id])


def read(text: str, tools: Any = TOOLS) -> list[tuple[str, Any]]:
    """Calls that the parser finds in an answer."""
    parser = Parser(tools, reasoning=False, tokenizer=TOKENIZER)
    parser.feed_ids(TOKENIZER.encode(text, parse_special=True))
    parser.finish("stop")
    return [(found.name, json.loads(found.arguments)) for found in parser.message.calls]


@pytest.mark.parametrize(
    ("calls", "arguments"),
    [
        ([call("now")], [{}]),
        ([call("weather", ("city", "Köln </b> 1 < 2\n\n", True))], [{"city": "Köln </b> 1 < 2\n\n"}]),
        (
            [call("weather", ("city", "", True), ("days", "14", False), ("unit", "F", True))],
            [{"city": "", "days": 14, "unit": "F"}],
        ),
        (
            [call("weather", ("city", "a", True), ("places", '[{"id": 1}, {"id": -2}]', False))],
            [{"city": "a", "places": [{"id": 1}, {"id": -2}]}],
        ),
        ([call("weather", ("city", "a", True), ("when", "null", False))], [{"city": "a", "when": None}]),
        ([call("weather", ("city", "a", True), ("when", "now", True))], [{"city": "a", "when": "now"}]),
        (
            [call("anything", ("k", "v", True), ("x", '{"y": [1.5, true]}', False))],
            [{"k": "v", "x": {"y": [1.5, True]}}],
        ),
        ([call("now"), call("now")], [{}, {}]),
    ],
)
def test_calls_that_follow_their_schemas(grammars, calls, arguments):
    text = block(*calls)
    matcher = grammars.matcher(TOOLS, REQUIRED, Format())()
    assert follow(matcher, text) == "" and may_end(matcher)
    assert [given for _, given in read(text)] == arguments


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Once", "Once"),
        (block(call("never")), "never"),
        (block(call("weather")), f"</{DSML}"),
        (block(call("weather", ("town", "x", True))), "town"),
        (block(call("weather", ("city", "3", False))), "false"),
        (block(call("weather", ("city", "x", True), ("days", "15", False))), "5<"),
        (block(call("weather", ("city", "x", True), ("unit", "K", True))), "K<"),
        (block(call("weather", ("days", "1", False), ("city", "x", True))), "days"),
        (block(call("weather", ("city", "x", True), ("places", '[{"id": 1}, {"id": 1}, {"id": 1}]', False))), ", {"),
        (block(call("now")) + " ", " "),
    ],
)
def test_what_follows_no_schema_is_stopped_where_it_goes_wrong(grammars, text, rest):
    left = follow(grammars.matcher(TOOLS, REQUIRED, Format())(), text)
    assert left and text.endswith(left) and rest in left[: len(rest) + 3]


def test_the_choice_of_tools(grammars):
    named = grammars.matcher(TOOLS, ToolChoice("required", "now"), Format())
    assert follow(named(), block(call("now"))) == ""
    assert follow(named(), block(call("weather", ("city", "x", True)))).startswith("we")
    single = grammars.matcher(TOOLS, ToolChoice("required", single=True), Format())
    assert follow(single(), block(call("now"))) == "" and follow(single(), block(call("now"), call("now")))
    assert grammars.matcher(TOOLS, ToolChoice(), Format()) is None  # free text and free calls


def test_strict_tools_leave_text_free_and_hold_calls_to_their_schemas(grammars):
    strict = [tool("weather", WEATHER, strict=True)]
    make = grammars.matcher(strict, ToolChoice(), Format())
    for text in ("", "Once <b>upon</b> a time\n\n", "x" + block(call("weather", ("city", "x", True)))):
        matcher = make()
        assert follow(matcher, text) == "" and may_end(matcher)
    assert follow(make(), "Once" + block(call("weather", ("town", "x", True)))).startswith("town")


def test_json_or_calls(grammars):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    make = grammars.matcher(TOOLS, ToolChoice(), Format(json=True, schema=schema))
    for text in ('{"a": true}', block(call("now"))):
        matcher = make()
        assert follow(matcher, text) == "" and may_end(matcher)
    assert follow(make(), "Once") == "Once"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"enum": [1, "x", None]}}, "required": ["a"]},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        {"anyOf": [{"type": "integer", "minimum": -3, "maximum": 40}, {"const": {"k": "v"}}]},
        {"type": "string", "pattern": "^[a-c]{2,4}$"},
        {
            "type": "object",
            "properties": {"n": {"$ref": "#/$defs/node"}},
            "required": ["n"],
            "additionalProperties": False,
            "$defs": {"node": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"]}},
        },
    ],
)
def test_whatever_is_drawn_through_a_grammar_fits_its_schema(grammars, schema):
    make = grammars.matcher([], ToolChoice(), Format(json=True, schema=schema))
    for seed in range(5):
        rng, matcher, ids = np.random.default_rng(seed), make(), []
        while len(ids) < 200:
            ids.append(int(rng.choice(np.flatnonzero(matcher.allowed()))))
            if ids[-1] == TOKENIZER.eos_id:
                break
            matcher.accept(ids[-1])
        if ids[-1] == TOKENIZER.eos_id:
            jsonschema.validate(json.loads(TOKENIZER.decode(ids[:-1])), schema)
    assert any(ids)


@pytest.mark.parametrize(
    ("tools", "form", "param"),
    [
        ([], Format(json=True, schema={"type": "no"}), "response_format"),
        ([], Format(json=True, schema={"$ref": "#/nowhere"}), "response_format"),
        ([], Format(json=True, schema={"type": "string", "pattern": "("}), "response_format"),
        ([tool("f", {"properties": {"a": {"type": "no"}}})], Format(), "tools"),
        ([tool("f", {"properties": [1]})], Format(), "tools"),
        ([tool("f", {"properties": {"a": {"enum": None}}})], Format(), "tools"),
        ([tool("f", {"properties": {"a": {"type": 5}}})], Format(), "tools"),
    ],
)
def test_schemas_that_cannot_be_enforced(grammars, tools, form, param):
    with pytest.raises(ApiError) as refused:
        grammars.matcher(tools, REQUIRED if tools else ToolChoice(), form)
    assert refused.value.status == 400 and refused.value.param == param and "\n" not in refused.value.message
