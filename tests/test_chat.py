"""Prompts against those of DeepSeek's own script, text and ids, and what a client can get wrong."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import real_metadata

from ds4jax.chat import END_THINK, MARKERS, THINK, Prompt, check_vocabulary, render
from ds4jax.chat_parse import Parser
from ds4jax.errors import CheckpointError, RequestError
from ds4jax.tokenizer import ASSISTANT, USER, Tokenizer

DATA = json.loads((Path(__file__).parent / "data" / "text" / "chat_cases.json").read_text())
CASES = {case["name"]: case for case in DATA["cases"]}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}


@functools.cache
def real() -> Tokenizer:
    return Tokenizer.from_gguf(real_metadata())


def rendered(case: dict[str, Any], **changes: Any) -> Prompt:
    """A case's prompt; the script's own message fields become the arguments that stand for them."""
    messages = [dict(message) for message in case["messages"]]
    schemas = [message.pop("response_format") for message in messages if "response_format" in message]
    for message in messages:
        message["prefix"] = message.pop("wo_eos", message.get("prefix"))
    arguments = {
        "tools": case.get("tools") or (),
        "thinking": case["thinking"],
        "effort": case["reasoning_effort"],
        "profile": case["profile"],
        "keep_reasoning": True if case.get("drop_thinking") is False else None,
        "schema": schemas[0] if schemas else None,
    }
    return render(messages, **arguments | changes)


# Where the prompt differs from the script's on purpose: what is passed, and what the script's prompt would become.
ON_PURPOSE = {
    "tools_removed_later": ({"keep_reasoning": False}, ("", "")),  # what is done by itself: `tools_removed_later_keep`
    "system_trailing_official": ({}, ("final rules", f"final rules{ASSISTANT}{END_THINK}")),
    "args_nonfinite_and_big": ({}, (">Infinity<", ">1e400<")),
}


@pytest.mark.parametrize("name", CASES)
def test_prompt(name: str) -> None:
    case = CASES[name]
    changes, (old, new) = ON_PURPOSE.get(name, ({}, ("", "")))
    prompt, expected = rendered(case, **changes), case["prompt"].replace(old, new) if old else case["prompt"]
    assert prompt.text == expected
    ids = prompt.encode(real())
    assert real().decode(ids) == expected
    if not old:
        assert ids == case["ids"]
    assert prompt.reasoning == (case["thinking"] and expected.endswith((THINK, f"{THINK}First I")))
    assert prompt.complete == expected.endswith("<｜end▁of▁sentence｜>")


def test_script_and_recommendation_differ_where_said() -> None:
    removed, kept = CASES["tools_removed_later"], CASES["tools_removed_later_keep"]
    assert rendered(removed).text == kept["prompt"] != removed["prompt"]


@pytest.mark.parametrize("count", DATA["api_prompt_token_counts"], ids=lambda count: count["id"])
def test_count_equals_that_of_the_hosted_api(count: dict[str, Any]) -> None:
    prompt = render([{"role": "user", "content": count["prompt"]}], thinking=count["thinking"])
    assert len(prompt.encode(real())) == count["api_prompt_tokens"]


def test_text_of_others_never_becomes_a_special_token() -> None:
    everything = "".join(real().special_ids)
    tool = {"type": "function", "function": {"name": everything, "description": everything, "parameters": {}}}
    call = {"id": everything, "function": {"name": everything, "arguments": json.dumps({everything: everything})}}
    answer = {"role": "assistant", "content": everything, "reasoning_content": everything, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": everything, "content": everything}
    messages = [{"role": role, "content": everything} for role in ("system", "latest_reminder", "user")]

    def special(prompt: Prompt) -> list[str]:
        return [real().decode([i]) for i in prompt.encode(real()) if i in real().special_ids.values()]

    hostile = render([*messages, answer, result], tools=[tool], schema={everything: 1})
    harmless = json.loads(json.dumps([[*messages, answer, result], tool]).replace(json.dumps(everything)[1:-1], "x"))
    assert special(hostile) == special(render(harmless[0], tools=[harmless[1]], schema={"x": 1}))
    assert everything in hostile.text


def test_results_stand_in_the_order_of_the_calls() -> None:
    calls = [{"id": str(i), "function": {"name": "f", "arguments": ""}} for i in range(3)]
    results = [{"role": "tool", "tool_call_id": str(i), "content": f"r{i}"} for i in (2, 0)]
    last = {"role": "function", "tool_call_id": "1", "content": "r1"}
    user = {"role": "user", "content": "go on"}
    text = render([user, {"role": "assistant", "tool_calls": calls}, *results, user, last]).text
    places = [text.index(f"<tool_result>r{i}</tool_result>") for i in range(3)]
    assert places == sorted(places)
    assert text.endswith(f"{USER}" + text.rpartition(USER)[2]) and text.rpartition(USER)[2].count("\n\n") == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"x": 1.50, "y":[1,  2e400] }', '"x" string="false">1.50</ "y" string="false">[1,  2e400]</'),
        ('{"x": "\\u00e9\\n\\"", "x": "last"}', '"x" string="true">last</'),
        ("{ }", ""),
        (None, ""),
        ({"x": "é", "y": {"b": [True, None]}}, '"x" string="true">é</ "y" string="false">{"b": [true, null]}</'),
        ('{"x": NaN}', '"arguments" string="true">{"x": NaN}</'),
        ('{"x": 1} x', '"arguments" string="true">{"x": 1} x</'),
        ("[1]", '"arguments" string="true">[1]</'),
        ("[" * 100_000, f'"arguments" string="true">{"[" * 100_000}</'),
        (f'{{"x": {"1" * 5000}}}', f'"x" string="false">{"1" * 5000}</'),
    ],
)
def test_arguments_keep_their_spelling(arguments: Any, expected: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    text = render([{"role": "assistant", "tool_calls": [call]}], thinking=False).text
    (_, *parameters) = text.split("<｜DSML｜parameter name=")
    assert " ".join(parameter.split("｜DSML｜parameter>")[0] for parameter in parameters) == expected


@pytest.mark.parametrize(
    ("case", "reasoning"), [("tool_round_trip_think", True), ("args_types", True), ("args_multiline_string", True)]
)
def test_what_was_parsed_renders_to_the_same_bytes(case: str, reasoning: bool) -> None:
    prompt = CASES[case]["prompt"]
    completion = prompt.partition(f"{ASSISTANT}{THINK}")[2].partition("<｜end▁of▁sentence｜>")[0]
    parser = Parser(CASES[case]["tools"], reasoning=reasoning)
    parser.feed(completion)
    parser.finish("stop")
    message = parser.message
    calls = [{"function": {"name": call.name, "arguments": call.arguments}} for call in message.calls]
    answer = {"role": "assistant", "content": message.content, "reasoning_content": message.reasoning}
    again = render([{"role": "user", "content": "q"}, answer | {"tool_calls": calls}]).text
    assert again.endswith(f"{ASSISTANT}{THINK}{completion}<｜end▁of▁sentence｜>")


def test_vocabulary_without_chat() -> None:
    metadata = real_metadata()
    check_vocabulary(real())
    tokens = [token.replace(THINK, "<thought>") for token in metadata["tokenizer.ggml.tokens"]]
    with pytest.raises(CheckpointError, match="found no <think>; such a model can only continue text"):
        check_vocabulary(Tokenizer.from_gguf(metadata | {"tokenizer.ggml.tokens": tokens}))
    assert len(MARKERS) == 7


USER_MESSAGE = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "messages is empty"),
        (["hello"], r"messages\[0\]: expected an object, found str"),
        ([USER_MESSAGE, {"content": "x"}], r"messages\[1\]\.role = None, expected one of user, assistant"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content: expected text or a list of text parts, found int"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            r"messages\[0\]\.content\[1\]: .* only text",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]: "),
        ([{"role": "tool", "tool_call_id": 1}], r"messages\[0\]\.tool_call_id = 1, expected a string"),
        ([{"role": "assistant", "reasoning_content": []}], r"messages\[0\]\.reasoning_content: expected a string"),
        ([{"role": "assistant", "tool_calls": {}}], r"messages\[0\]\.tool_calls: expected a list, found dict"),
        (
            [{"role": "assistant", "tool_calls": [{"id": [], "function": {"name": "f"}}]}],
            r"tool_calls\[0\]\.id = \[\], expected a string",
        ),
        ([{"role": "assistant", "tool_calls": ["f"]}], r"messages\[0\]\.tool_calls\[0\]: expected"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}],
            r"tool_calls\[0\]\.function\.arguments: expected JSON text of an object, found int",
        ),
        ([USER_MESSAGE | {"task": "dance"}], r"messages\[0\]\.task = 'dance', expected none or one of action"),
    ],
)
def test_bad_messages(messages: list[Any], error: str) -> None:
    with pytest.raises(RequestError, match=error):
        render(messages)


@pytest.mark.parametrize(
    ("tool", "error"),
    [
        ({"type": "web_search"}, r"tools\[0\]: expected .* no other tools exist"),
        ({"type": "custom", "function": FUNCTION}, r"tools\[0\]: expected"),
        ({"function": {"name": ""}}, r"tools\[0\]\.function\.name = '', expected a name"),
        ({"function": {"name": "f", "parameters": []}}, r"tools\[0\]\.function\.parameters: expected a JSON schema"),
    ],
)
def test_bad_tools(tool: Any, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        render([USER_MESSAGE], tools=[tool])


def test_invalid_unicode() -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        render([{"role": "user", "content": "\ud800"}]).encode(real())
