"""Messages through the `anthropic` library, against a running server of a real model."""

from __future__ import annotations

import json
from typing import Any, Literal

import anthropic
import pydantic
import pytest
from serving import CALLED, CALLS

STORY = [{"role": "user", "content": "Tell me a story."}]
# The only argument's only value: the grammar leaves the model nothing to choose.
OPEN_GATE = {
    "name": "open_gate",
    "description": "Opens the gate.",
    "input_schema": {"type": "object", "properties": {"side": {"enum": ["west"]}}, "required": ["side"]},
}


class Animal(pydantic.BaseModel):
    kind: Literal["fox", "wolf"]
    tame: bool


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def request(messages: Any = STORY, **options: Any) -> dict[str, Any]:
    extra = {"seed": 1, **options.pop("extra_body", {})}
    return {"model": "claude-any", "max_tokens": 8, "messages": messages, "extra_body": extra, **options}


def ask(client: Any, messages: Any = STORY, **options: Any) -> Any:
    return client.messages.create(**request(messages, **options))


def streamed(client: Any, messages: Any = STORY, **options: Any) -> Any:
    """The message that the library puts together from the stream, and the stream's events."""
    with client.messages.stream(**request(messages, **options)) as stream:
        events = list(stream)
        return stream.get_final_message(), events


def shown(message: Any) -> list[dict[str, Any]]:
    """The content without what differs from answer to answer."""
    return [block.model_dump(exclude={"signature", "id"}) for block in message.content]


def test_a_stream_adds_up_to_the_message(client):
    whole = ask(client)
    (block,) = whole.content
    assert whole.role == "assistant" and whole.model == "claude-any" and whole.stop_reason == "max_tokens"
    assert block.type == "text" and len(block.text) > 8 and whole.usage.output_tokens == 8
    joined, events = streamed(client)
    assert shown(joined) == shown(whole) and joined.stop_reason == "max_tokens"
    assert joined.usage.output_tokens == 8
    assert next(event for event in events if event.type == "message_delta").ds4jax["tokens_per_second"] > 0
    kinds = [event.type for event in events if event.type not in ("text", "content_block_delta")]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]


def test_usage_tells_the_cached_from_the_fresh(client):
    messages = [{"role": "user", "content": "Of whom shall this story be?"}]
    count = client.messages.count_tokens(model="claude-any", messages=messages).input_tokens
    first, second = ask(client, messages).usage, ask(client, messages).usage
    assert first.input_tokens + first.cache_read_input_tokens == count
    assert (second.input_tokens, second.cache_read_input_tokens) == (1, count - 1)


def test_thinking_ends_at_its_budget_and_comes_back(client):
    options = {"thinking": {"type": "enabled", "budget_tokens": 5}, "max_tokens": 12}
    whole = ask(client, **options)
    thought, said = whole.content
    assert (thought.type, said.type) == ("thinking", "text") and thought.thinking and said.text and thought.signature
    joined, events = streamed(client, **options)
    assert shown(joined) == shown(whole) and joined.content[0].signature
    assert "signature_delta" in [event.delta.type for event in events if event.type == "content_block_delta"]
    # With tools, reasoning stays in the conversation, so the prompt is the longer for it.
    history = [*STORY, {"role": "assistant", "content": whole.content}, {"role": "user", "content": "Go on."}]
    blunt = [*STORY, {"role": "assistant", "content": [said]}, {"role": "user", "content": "Go on."}]
    thinking = {"type": "adaptive"}
    counts = [
        client.messages.count_tokens(model="x", messages=m, tools=[OPEN_GATE], thinking=thinking).input_tokens
        for m in (history, blunt)
    ]
    assert counts[0] > counts[1]


def test_tools_round_trip(client):
    options: dict[str, Any] = {"tools": [OPEN_GATE], "tool_choice": {"type": "any"}, "max_tokens": 120}
    joined, events = streamed(client, **options)
    (block,) = joined.content
    assert joined.stop_reason == "tool_use" and block.type == "tool_use" and block.id.startswith("toolu_")
    assert block.name == "open_gate" and block.input == {"side": "west"}
    pieces = [e.delta.partial_json for e in events if e.type == "content_block_delta"]
    assert json.loads("".join(pieces)) == block.input
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "It is open."}]}
    said = {"type": "text", "text": "And now?"}
    answered = [*STORY, {"role": "assistant", "content": joined.content}, {"role": "user", "content": [said, result]}]
    after = ask(client, answered, tools=[OPEN_GATE])
    assert after.stop_reason == "max_tokens" and after.content[0].text


def test_text_and_several_calls(server, client, monkeypatch):
    server.dictate(monkeypatch, CALLS)
    whole = ask(client, tools=[OPEN_GATE], max_tokens=200)
    text, *calls = whole.content
    assert text.text == "Two gates." and [call.input for call in calls] == CALLED and whole.stop_reason == "tool_use"


def test_structured_output(client):
    parsed = client.messages.parse(**request(max_tokens=60), output_format=Animal).parsed_output
    assert isinstance(parsed, Animal)


def test_stop_sequences(client):
    text = ask(client, max_tokens=12).content[0].text
    stop = text[8:11]
    whole = ask(client, max_tokens=12, stop_sequences=["\x00", stop])
    assert whole.content[0].text == text[: text.index(stop)]
    assert (whole.stop_reason, whole.stop_sequence) == ("stop_sequence", stop)
    joined, _ = streamed(client, max_tokens=12, stop_sequences=[stop])
    assert shown(joined) == shown(whole) and joined.stop_sequence == stop
    # A message is never without content.
    empty = ask(client, stop_sequences=[text[0]])
    assert shown(empty)[0]["text"] == "" and empty.stop_sequence == text[0]


def test_an_answer_goes_on_from_its_beginning(client):
    whole = ask(client, max_tokens=8).content[0].text
    begun = [*STORY, {"role": "assistant", "content": whole[:10]}]
    assert ask(client, begun, max_tokens=4).content[0].text


def test_what_clients_send_along_does_not_reach_the_model(client):
    def count(**options: Any) -> int:
        return int(client.messages.count_tokens(model="any", messages=STORY, **options).input_tokens)

    billing = {"type": "text", "text": "x-anthropic-billing-header: cch=1"}
    rule = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    assert count(system=[billing, rule]) == count(system="Be brief.") > count()
    assert count(tools=[{"type": "web_search_20250305", "name": "web_search"}]) == count()
    assert count(tools=[OPEN_GATE], tool_choice={"type": "none"}) == count() < count(tools=[OPEN_GATE])
    assert client.models.list().data[0].id == "stories"


def test_later_system_messages(client):
    def count(*messages: Any) -> int:
        return int(client.messages.count_tokens(model="any", messages=[*STORY, *messages]).input_tokens)

    blocks = [{"type": "text", "text": "Be brief."}]
    assert count({"role": "system", "content": blocks}) == count({"role": "system", "content": "Be brief."}) > count()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing, expected a string or a list of blocks"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing, expected one of user"),
        ({"extra_body": {"system": 5}}, "system is 5, expected a string or a list of blocks"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is 'tool', expected one of user"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "reads text only"),
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"extra_body": {"temperature": -1}}, "temperature is -1, expected at least 0"),
        ({"tools": [OPEN_GATE], "tool_choice": {"type": "tool", "name": "no"}}, "no tool 'no', expected one of open_"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"thinking": {"type": "perhaps"}}, "expected enabled, disabled or adaptive"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens is 0"),
        ({"output_config": {"effort": "heroic"}}, "reasoning effort 'heroic', expected one of"),
        ({"extra_body": {"mcp_servers": [{}]}}, "mcp_servers is not supported"),
        ({"messages": [{"role": "user", "content": "once " * 1200}]}, "prompt is too long"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(client, options, words):
    with pytest.raises(anthropic.BadRequestError) as refused:
        ask(client, **options)
    body = refused.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert words in body["error"]["message"]
