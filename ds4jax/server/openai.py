"""OpenAI's chat completions: `POST /v1/chat/completions`."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from ds4jax.chat_parse import Call, Content, Reasoning
from ds4jax.server.answer import End, Piece, Task, Usage
from ds4jax.server.errors import ApiError
from ds4jax.server.fields import Fields
from ds4jax.server.grammar import Format, answer_format, tool_choice
from ds4jax.server.service import MOST_CHOICES, MOST_STOPS, Service
from ds4jax.server.wire import FINGERPRINT, data, new_id, scored

_REFUSED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "the model writes text only",
    "web_search_options": "the server has no web search",
}


def read_chat(service: Service, fields: Fields) -> tuple[Task, ChatWire]:
    """What a chat request asks for, and how it is answered. Raises `ApiError` for a request that cannot be served."""
    model = fields.text("model", required=True)
    assert model is not None
    for name, reason in _REFUSED.items():
        fields.refuse(name, reason)
    fields.refuse("modalities", "the model writes text only", unless=[["text"]])
    messages = _messages(fields)
    tools = fields.array("tools") or []
    choice = tool_choice(fields, tools)
    tools = [] if choice.mode == "none" else tools
    form = response_format(fields)
    top = fields.integer("top_logprobs", 0, 20)
    wants_scores = bool(fields.flag("logprobs"))
    if top is not None and not wants_scores:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    limits = [fields.integer("max_tokens", 1), fields.integer("max_completion_tokens", 1)]
    stream = bool(fields.flag("stream"))
    options = fields.object("stream_options")
    if options is not None and not stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    n = fields.integer("n", 1, MOST_CHOICES) or 1
    task = service.chat_task(
        fields,
        messages,
        tools=tools,
        schema=form.schema,
        most=min((limit for limit in limits if limit is not None), default=None),
        stop=fields.strings("stop", MOST_STOPS),
        sampling=service.sampling(fields),
        seed=service.seed(fields),
        n=n,
        scored=wants_scores,
        bias=service.bias(fields, calls=bool(tools)),
        penalties=service.penalties(fields),
        matcher=service.grammars.matcher(tools, choice, form),
        single=choice.single,
    )
    usage = stream and options is not None and bool(options.flag("include_usage"))
    return task, ChatWire(service, model, n, usage, (top or 0) if wants_scores else None)


def _messages(fields: Fields) -> list[Any]:
    """The conversation; vLLM's name for going on with its last message becomes DeepSeek's."""
    messages = fields.array("messages", required=True) or []
    if fields.flag("continue_final_message") and messages and isinstance(messages[-1], dict):
        return [*messages[:-1], {**messages[-1], "prefix": True}]
    return messages


def response_format(fields: Fields) -> Format:
    """The form of the answer that chat completions ask for by `response_format`."""
    form = fields.object("response_format")
    if form is None:
        return Format()
    schema = form.object("json_schema", required=form.any("type") == "json_schema")
    return answer_format(form, "type", schema)


@dataclasses.dataclass
class _Choice:
    """What has come of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    scores: dict[str, list[dict[str, Any]]] = dataclasses.field(
        default_factory=lambda: {"content": [], "reasoning_content": []}
    )
    finish: str | None = None


class ChatWire:
    """Chat completions and their chunks (see `wire.Wire`).

    top: how many of the most probable tokens are told with every token; None: no scores at all.
    """

    def __init__(self, service: Service, model: str, n: int, usage: bool, top: int | None) -> None:
        self._tokenizer, self._top, self._wants_usage = service.tokenizer, top, usage
        self._choices = [_Choice() for _ in range(n)]
        self._head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": model}
        self._usage: dict[str, Any] = {}

    def begin(self) -> list[str]:
        """The first chunk of every choice names the role."""
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self._choices))]

    def piece(self, piece: Piece) -> list[str]:
        """Chunks of an update; scores go with the first of them."""
        choice = self._choices[piece.choice]
        deltas = [self._take(choice, event) for event in piece.events]
        scores = self._take_scores(choice, piece)
        if scores is not None and not deltas:
            deltas = [{"content": ""}]
        return [self._chunk(piece.choice, delta, scores if i == 0 else None) for i, delta in enumerate(deltas)]

    def end(self, end: End) -> list[str]:
        """The last chunk of a choice."""
        self._choices[end.choice].finish = end.finish
        return [self._chunk(end.choice, {}, finish=end.finish)]

    def usage(self, usage: Usage) -> list[str]:
        """The usage, if wanted, and the end of the stream."""
        self._usage = {"usage": openai_usage(usage), "ds4jax": speed(usage)}
        last = {**self._head, "object": "chat.completion.chunk", "system_fingerprint": FINGERPRINT, "choices": []}
        return [*([data(last | self._usage)] if self._wants_usage else []), "data: [DONE]\n\n"]

    def error(self, error: ApiError) -> list[str]:
        """A failure in mid-stream."""
        return [data(error.openai())]

    def keep_alive(self) -> str:
        """A comment."""
        return ": keep-alive\n\n"

    def whole(self) -> dict[str, Any]:
        """The completion."""
        choices = []
        for i, choice in enumerate(self._choices):
            message: dict[str, Any] = {"role": "assistant", "content": choice.content}
            if choice.reasoning:
                message["reasoning_content"] = choice.reasoning
            if choice.calls:
                message |= {"content": choice.content or None, "tool_calls": choice.calls}
            scores = None if self._top is None else choice.scores
            choices.append({"index": i, "message": message, "logprobs": scores, "finish_reason": choice.finish})
        shape = {"object": "chat.completion", "system_fingerprint": FINGERPRINT, "choices": choices}
        return {**self._head, **shape, **self._usage}

    def _take(self, choice: _Choice, event: Reasoning | Content | Call) -> dict[str, Any]:
        """Collects an event; returns its delta."""
        if isinstance(event, Reasoning):
            choice.reasoning += event.text
            return {"reasoning_content": event.text}
        if isinstance(event, Content):
            choice.content += event.text
            return {"content": event.text}
        function = {"name": event.name, "arguments": event.arguments}
        call = {"id": new_id("call_"), "type": "function", "function": function}
        choice.calls.append(call)
        return {"tool_calls": [{"index": event.index, **call}]}

    def _take_scores(self, choice: _Choice, piece: Piece) -> dict[str, Any] | None:
        if self._top is None or not piece.scores:
            return None
        fresh: dict[str, list[dict[str, Any]]] = {"content": [], "reasoning_content": []}
        for score in piece.scores:
            fresh["reasoning_content" if score.reasoning else "content"].append(
                scored(self._tokenizer, score, self._top)
            )
        for name, entries in fresh.items():
            choice.scores[name] += entries
        return fresh

    def _chunk(
        self, index: int, delta: dict[str, Any], scores: dict[str, Any] | None = None, finish: str | None = None
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish}
        shape = {"object": "chat.completion.chunk", "system_fingerprint": FINGERPRINT, "choices": [choice]}
        return data({**self._head, **shape})


def openai_usage(usage: Usage) -> dict[str, Any]:
    """Counts in the shape of OpenAI's API, with DeepSeek's names for the cache beside them."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
        "prompt_cache_hit_tokens": usage.cached,
        "prompt_cache_miss_tokens": usage.prompt - usage.cached,
    }


def speed(usage: Usage) -> dict[str, Any]:
    """What this server adds: how fast it was."""
    return {
        "tokens_per_second": round(usage.rate, 2),
        "time_to_first_token_s": round(usage.first_seconds, 4),
        "drafted": usage.drafted,
        "accepted": usage.accepted,
    }
