"""Chat completions and completions through the `openai` library, against a running server of a real model."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from serving import CALLED, CALLS

STORY = [{"role": "user", "content": "Tell me a story."}]
# The only argument's only value: the grammar leaves the model nothing to choose.
OPEN_GATE = {
    "type": "function",
    "function": {
        "name": "open_gate",
        "description": "Opens the gate.",
        "parameters": {"type": "object", "properties": {"side": {"enum": ["west"]}}, "required": ["side"]},
    },
}
ANIMAL = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "wolf"]}, "legs": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["animal", "legs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: Any, messages: Any = STORY, **options: Any) -> Any:
    options = {"max_tokens": 8, "seed": 1, **options}
    return client.chat.completions.create(model="any", messages=messages, **options)


def test_a_stream_adds_up_to_the_completion(client):
    whole = chat(client)
    message, usage = whole.choices[0].message, whole.usage
    assert whole.model == "any" and whole.choices[0].finish_reason == "length"
    assert message.role == "assistant" and len(message.content) > 8
    assert usage.completion_tokens == 8 and usage.total_tokens == usage.prompt_tokens + 8
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant" and "".join(delta.content or "" for delta in deltas) == message.content
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[-2].choices[0].finish_reason == "length"
    last = chunks[-1]
    assert not last.choices and last.usage.completion_tokens == 8
    assert last.usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    assert last.ds4jax["tokens_per_second"] > 0 and last.ds4jax["time_to_first_token_s"] > 0
    assert not any(chunk.usage for chunk in chunks[:-1])
    assert len(list(chat(client, stream=True))) == len(chunks) - 1


def test_seeds_and_choices(client):
    several = chat(client, n=2, temperature=1.5)
    first, second = (choice.message.content for choice in several.choices)
    assert first != second
    assert chat(client, temperature=1.5).choices[0].message.content == first
    assert chat(client, temperature=1.5, seed=2).choices[0].message.content == second
    greedy = [chat(client, temperature=0, seed=seed).choices[0].message.content for seed in (3, 4)]
    assert greedy[0] == greedy[1]
    assert several.usage.completion_tokens == 16


def test_reasoning_in_its_own_field(client):
    thought = chat(client, reasoning_effort="high").choices[0].message
    assert thought.reasoning_content and not thought.content
    chunks = chat(client, extra_body={"thinking": {"type": "enabled"}}, stream=True)
    deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == thought.reasoning_content


def test_a_conversation_goes_on_from_the_cache(client):
    first = chat(client, max_tokens=6)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    second = chat(client, [*STORY, said, {"role": "user", "content": "And then?"}])
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_stop(client):
    text = chat(client, max_tokens=12).choices[0].message.content
    stop = text[8:11]
    stopped = chat(client, max_tokens=12, stop=[stop, "\x00"]).choices[0]
    assert stopped.message.content == text[: text.index(stop)] and stopped.finish_reason == "stop"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(client, max_tokens=12, stop=stop, stream=True)]
    assert "".join(pieces) == stopped.message.content


def test_logprobs(client):
    plain = chat(client, max_tokens=4).choices[0].message.content
    scored = chat(client, max_tokens=4, logprobs=True, top_logprobs=3).choices[0]
    entries = scored.logprobs.content
    assert scored.message.content == plain == "".join(entry.token for entry in entries) and len(entries) == 4
    for entry in entries:
        assert entry.logprob <= 0 and bytes(entry.bytes).decode() == entry.token and len(entry.top_logprobs) == 3
        best = [other.logprob for other in entry.top_logprobs]
        assert best == sorted(best, reverse=True) and entry.logprob <= best[0]
    chunks = [chunk.choices[0] for chunk in chat(client, max_tokens=4, logprobs=True, top_logprobs=3, stream=True)]
    assert [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content] == entries


def test_bias_and_penalties(client):
    only = client.post("/../tokenize", body={"text": " king"}, cast_to=object)["tokens"]
    assert len(only) == 1
    biased = chat(client, temperature=0, max_tokens=3, logit_bias={str(only[0]): 100})
    assert biased.choices[0].message.content == " king" * 3
    varied = chat(client, temperature=0, max_tokens=3, logit_bias={str(only[0]): 100}, frequency_penalty=2)
    assert varied.choices[0].message.content == " king" * 3  # 2 per occurrence is no match for 100
    rare = chat(client, temperature=0, max_tokens=6, logit_bias={str(only[0]): 1}, frequency_penalty=2)
    assert rare.choices[0].message.content.count(" king") < 6


def test_text_and_several_calls(server, client, monkeypatch):
    server.dictate(monkeypatch, CALLS)
    chunks = [chunk.choices[0] for chunk in chat(client, tools=[OPEN_GATE], max_tokens=200, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Two gates."
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [json.loads(call.function.arguments) for call in calls] == CALLED
    assert [call.index for call in calls] == [0, 1] and chunks[-1].finish_reason == "tool_calls"


def test_tools_round_trip(client):
    named = {"type": "function", "function": {"name": "open_gate"}}
    options: dict[str, Any] = {"tools": [OPEN_GATE], "tool_choice": named, "max_tokens": 120}
    # The demonstration model never ends its reasoning by itself; here a bias makes it.
    end = client.post("/../tokenize", body={"text": "</think>", "parse_special": True}, cast_to=object)["tokens"][0]
    whole = chat(client, **options, logit_bias={str(end): 100}, reasoning_effort="high").choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    assert call.function.name == "open_gate" and json.loads(call.function.arguments) == {"side": "west"}
    answered = [*STORY, whole.message, {"role": "tool", "tool_call_id": call.id, "content": "It is open."}]
    after = chat(client, answered, tools=[OPEN_GATE])
    assert after.choices[0].finish_reason == "length" and after.choices[0].message.content


def test_no_tools_where_none_are_wanted(client):
    with_tools = chat(client, tools=[OPEN_GATE], tool_choice="none")
    assert with_tools.usage.prompt_tokens == chat(client).usage.prompt_tokens
    dsml = client.post("/../tokenize", body={"text": "｜DSML｜", "parse_special": True}, cast_to=object)["tokens"][0]
    # Whatever else is asked for, the mark of calls stays forbidden.
    assert "DSML" not in chat(client, logit_bias={str(dsml): 100}).choices[0].message.content


def test_structured_output(client):
    schema = {"type": "json_schema", "json_schema": {"name": "animal", "schema": ANIMAL, "strict": True}}
    for options in ({}, {"temperature": 2, "seed": 9}):
        text = chat(client, response_format=schema, max_tokens=60, **options).choices[0].message.content
        found = json.loads(text)
        assert found["animal"] in ("fox", "wolf") and 1 <= found["legs"] <= 9 and len(found) == 2
    begun = chat(client, response_format={"type": "json_object"}, max_tokens=12).choices[0].message.content
    assert begun.startswith("{")


def test_completions(client):
    options: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(prompt="Once upon a time", logprobs=2, **options)
    text, scores = whole.choices[0].text, whole.choices[0].logprobs
    assert "".join(scores.tokens) == text and len(scores.token_logprobs) == 8 and whole.usage.completion_tokens == 8
    assert all(len(best) == 2 for best in scores.top_logprobs) and scores.text_offset[1] == len(scores.tokens[0])
    chunks = list(client.completions.create(prompt="Once upon a time", stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    ids = client.post("/../tokenize", body={"text": "Once upon a time", "add_bos": True}, cast_to=object)["tokens"]
    assert client.completions.create(prompt=ids, **options).choices[0].text == text
    stopped = client.completions.create(prompt=ids, stop=text[5:8], **options).choices[0]
    assert stopped.text == text[:5] and stopped.finish_reason == "stop"
    filled = client.completions.create(prompt="Once", suffix="the end", **options)
    assert filled.usage.prompt_tokens > 4


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "stories" and model.context_length == 1024
    assert client.models.retrieve("stories").id == "stories"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages"),
        ({"messages": [*STORY, {"role": "assistant", "content": "Once."}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 99}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"cat": 1}}, "logit_bias"),
        ({"presence_penalty": 9}, "presence_penalty"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [OPEN_GATE], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
            "response_format",
        ),
        ({"reasoning_effort": "heroic"}, "reasoning_effort"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **options)
    assert refused.value.type == "invalid_request_error" and refused.value.param == param
    assert len(refused.value.body["message"]) > 20


def test_a_prompt_beyond_the_context(client):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, [{"role": "user", "content": "once " * 1200}])
    assert refused.value.code == "context_length_exceeded" and "1024" in refused.value.body["message"]
