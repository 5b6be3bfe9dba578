"""Responses through the `openai` library, against a running server of a real model."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pydantic
import pytest
from serving import CALLED, CALLS

from ds4jax.server.fields import Fields
from ds4jax.server.responses import read_response

OPEN_GATE = {
    "type": "function",
    "name": "open_gate",
    "description": "Opens the gate.",
    "parameters": {"type": "object", "properties": {"side": {"enum": ["west"]}}, "required": ["side"]},
    "strict": False,
}
NOTE = {"type": "custom", "name": "note", "description": "Writes something down."}
TOOLS = [OPEN_GATE, NOTE]


class Animal(pydantic.BaseModel):
    kind: Literal["fox", "wolf"]
    tame: bool


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def request(given: Any = "Tell me a story.", **options: Any) -> dict[str, Any]:
    extra = {"seed": 1, **options.pop("extra_body", {})}
    return {"model": "any", "input": given, "max_output_tokens": 8, "extra_body": extra, **options}


def ask(client: Any, given: Any = "Tell me a story.", **options: Any) -> Any:
    return client.responses.create(**request(given, **options))


def streamed(client: Any, given: Any = "Tell me a story.", **options: Any) -> tuple[Any, list[Any]]:
    """The response of the stream's last event, and all events."""
    events = list(client.responses.create(**request(given, **options), stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events[-1].response, events


def shown(response: Any) -> list[dict[str, Any]]:
    """The output without what differs from response to response."""
    return [item.model_dump(exclude={"id", "call_id"}) for item in response.output]


def prompt(server: Any, given: Any, **options: Any) -> list[int]:
    """The prompt that a request leads to, found without the model."""
    return list(read_response(server.service, Fields({"model": "any", "input": given, **options}))[0].ids)


def count(server: Any, given: Any, **options: Any) -> int:
    return len(prompt(server, given, **options))


def test_a_stream_adds_up_to_the_response(client):
    whole = ask(client)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.model == "any" and len(whole.output_text) > 8 and whole.usage.output_tokens == 8
    joined, events = streamed(client)
    assert shown(joined) == shown(whole) and joined.status == "incomplete"
    assert joined.usage.input_tokens_details.cached_tokens == whole.usage.input_tokens - 1
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    kinds = [event.type.removeprefix("response.") for event in events if not event.type.endswith("delta")]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.done"),
        *("content_part.done", "output_item.done", "incomplete"),
    ]
    # The library's own way of putting a stream together.
    with client.responses.stream(**request()) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(texts) == whole.output_text


def test_ends_by_itself(client):
    # A bias makes the model end its answer.
    eos = client.post("/../tokenize", body={"text": "<｜end▁of▁sentence｜>", "parse_special": True}, cast_to=object)
    ended, events = streamed(client, extra_body={"logit_bias": {str(eos["tokens"][0]): 100}})
    assert ended.status == "completed" and events[-1].type == "response.completed" and ended.output_text == ""


@pytest.mark.parametrize("summary", [None, "auto"])
def test_reasoning_is_an_item(server, client, summary):
    whole, events = streamed(client, reasoning={"effort": "high", **({"summary": summary} if summary else {})})
    (item,) = whole.output
    texts = item.summary if summary else item.content
    assert item.type == "reasoning" and len(texts[0].text) > 8 and not (item.content if summary else item.summary)
    assert whole.usage.output_tokens_details.reasoning_tokens == 8
    name = "response.reasoning_summary_text.delta" if summary else "response.reasoning_text.delta"
    assert "".join(event.delta for event in events if event.type == name) == texts[0].text
    # Sent back, it takes its place in the conversation that goes on with tools.
    history = [{"role": "user", "content": "Hi"}, item.model_dump(), {"role": "assistant", "content": "Ho"}]
    following = [*history, {"role": "user", "content": "Go on."}]
    options = {"reasoning": {"effort": "high"}, "tools": [OPEN_GATE]}
    assert count(server, following, **options) > count(server, [following[0], *following[2:]], **options)


def test_tools_round_trip(server, client):
    choice = {"type": "function", "name": "open_gate"}
    whole, events = streamed(client, tools=TOOLS, tool_choice=choice, max_output_tokens=120)
    (call,) = whole.output
    assert whole.status == "completed" and call.type == "function_call" and call.name == "open_gate"
    assert json.loads(call.arguments) == {"side": "west"} and call.id.startswith("fc_") and call.call_id != call.id
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [event.item for event in done] == [call]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "It is open."}
    question = {"role": "user", "content": "Tell me a story."}
    after = ask(client, [question, call, output], tools=TOOLS)
    assert after.status == "incomplete" and after.output_text
    # What stands between a call and its output follows them.
    rule, call = {"role": "developer", "content": "Be brief."}, call.model_dump()
    between = prompt(server, [question, call, rule, output], tools=TOOLS)
    assert between == prompt(server, [question, call, output, rule], tools=TOOLS)


def test_only_one_call_where_no_more_are_wanted(server, client, monkeypatch):
    server.dictate(monkeypatch, CALLS)
    whole = ask(client, tools=TOOLS, max_output_tokens=200, parallel_tool_calls=False)
    text, call = whole.output
    assert whole.output_text == text.content[0].text == "Two gates." and whole.status == "completed"
    assert json.loads(call.arguments) == CALLED[0]


def test_a_tool_that_takes_free_text(server, client, monkeypatch):
    given = 'Line 1\n"Line" </2>'
    parameter = f'<｜DSML｜parameter name="input" string="true">{given}</｜DSML｜parameter>'
    invoke = f'<｜DSML｜invoke name="note">\n{parameter}\n</｜DSML｜invoke>'
    server.dictate(monkeypatch, f"\n\n<｜DSML｜tool_calls>\n{invoke}\n</｜DSML｜tool_calls>")
    forced = {"type": "custom", "name": "note"}
    whole, events = streamed(client, tools=TOOLS, tool_choice=forced, max_output_tokens=200)
    (call,) = whole.output
    assert (call.type, call.name, call.input, whole.status) == ("custom_tool_call", "note", given, "completed")
    assert [event.item for event in events if event.type == "response.output_item.done"] == [call]
    output = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "Noted."}
    history = [{"role": "user", "content": "Tell me a story."}, call.model_dump(), output]
    text = server.service.tokenizer.decode(prompt(server, history, tools=TOOLS))
    assert f"{parameter}\n</｜DSML｜invoke>" in text and "<tool_result>Noted.</tool_result>" in text


def test_structured_output(client):
    parsed = client.responses.parse(**request(max_output_tokens=60), text_format=Animal)
    assert isinstance(parsed.output_parsed, Animal) and parsed.status == "completed"


def test_logprobs(client):
    whole = ask(client, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=4)
    part = whole.output[0].content[0]
    assert "".join(entry.token for entry in part.logprobs) == part.text and len(part.logprobs) == 4
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in part.logprobs)


def test_instructions_and_items_become_the_conversation(server):
    system = {"role": "system", "content": "Be brief."}
    user = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}
    assert count(server, [system, user]) == count(server, "Hello", instructions="Be brief.") > count(server, "Hello")
    codex = {"store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "x", "stream": True}
    here = [{"type": "local_shell"}, {"type": "web_search", "external_web_access": True}, {"type": "namespace"}]
    assert count(server, "Hello", tools=[*here, OPEN_GATE], **codex) == count(server, "Hello", tools=[OPEN_GATE])
    assert count(server, "Hello", tools=here, tool_choice="auto") == count(server, "Hello")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "alien"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"reasoning": {"effort": "heroic"}}, "reasoning"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 30}, "top_logprobs"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{**request(), **options})
    assert refused.value.param == param and len(refused.value.body["message"]) > 20


def test_a_prompt_beyond_the_context(client):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "once " * 1200)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
