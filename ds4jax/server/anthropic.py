"""Anthropic's messages: `POST /v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

from ds4jax.chat_parse import Call, Event, Reasoning
from ds4jax.server.answer import End, Piece, Task, Usage
from ds4jax.server.errors import ApiError
from ds4jax.server.fields import Fields
from ds4jax.server.grammar import Format, ToolChoice, answer_format, checked_choice
from ds4jax.server.openai import speed
from ds4jax.server.service import MOST_STOPS, Service
from ds4jax.server.wire import event, new_id

log = logging.getLogger("ds4jax.server")

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_REFUSED = {"container": "there are no containers", "mcp_servers": "the server connects to no others"}
_IGNORED_BLOCKS = ("redacted_thinking", "server_tool_use", "web_search_tool_result")


def read_messages(service: Service, fields: Fields, *, counting: bool = False) -> tuple[Task, MessageWire]:
    """What a request asks for, and how it is answered. Raises `ApiError` if it cannot be served.

    counting: only the prompt matters, so that `max_tokens` may be missing.
    """
    model, most = fields.text("model", required=True), fields.integer("max_tokens", 1)
    assert model is not None
    if most is None and not counting:
        raise ApiError(400, "max_tokens is missing, expected a whole number", "max_tokens")
    for name, reason in _REFUSED.items():
        fields.refuse(name, reason)
    tools = list(_tools(fields))
    choice = _tool_choice(fields, tools)
    tools = [] if choice.mode == "none" else tools
    form = _form(fields)
    thinking = fields.object("thinking") if isinstance(fields.any("thinking"), dict) else None
    task = service.chat_task(
        fields,
        [*_system(fields), *_conversation(fields)],
        tools=tools,
        schema=form.schema,
        most=most,
        stop=fields.strings("stop_sequences", MOST_STOPS),
        sampling=service.sampling(fields),
        seed=service.seed(fields),
        bias=service.bias(fields, calls=bool(tools)),
        matcher=service.grammars.matcher(tools, choice, form),
        single=choice.single,
        budget=None if thinking is None else thinking.integer("budget_tokens", 1),
    )
    return task, MessageWire(model, len(task.ids))


def count_tokens(service: Service, fields: Fields) -> dict[str, Any]:
    """Tokens of the prompt that a request leads to."""
    task, _ = read_messages(service, fields, counting=True)
    return {"input_tokens": len(task.ids)}


def _tools(fields: Fields) -> Iterator[dict[str, Any]]:
    """Tools in the shape of OpenAI's API. Those that Anthropic's own servers would run do not exist here."""
    for tool in fields.objects("tools"):
        if tool.any("type") not in (None, "custom"):
            log.warning("tool of type %s is not offered to the model: it would have to run here", tool.any("type"))
            continue
        function: dict[str, Any] = {"name": tool.text("name", required=True)}
        if (description := tool.text("description")) is not None:
            function["description"] = description
        schema = tool.object("input_schema")
        function["parameters"] = {} if schema is None else schema.values
        if tool.flag("strict"):
            function["strict"] = True
        yield {"type": "function", "function": function}


def _tool_choice(fields: Fields, tools: list[dict[str, Any]]) -> ToolChoice:
    choice = fields.object("tool_choice")
    if choice is None:
        return ToolChoice()
    single = bool(choice.flag("disable_parallel_tool_use"))
    match choice.any("type"):
        case "auto":
            return ToolChoice(single=single)
        case "none":
            return ToolChoice("none")
        case "any":
            return checked_choice(ToolChoice("required", single=single), tools)
        case "tool":
            return checked_choice(ToolChoice("required", choice.text("name", required=True), single), tools)
    raise choice.wrong("type", "auto, any, tool or none")


def _form(fields: Fields) -> Format:
    """The form of the answer: `output_config.format`, or `output_format`, its earlier name."""
    config = fields.object("output_config")
    form = (config.object("format") if config is not None else None) or fields.object("output_format")
    return Format() if form is None else answer_format(form, "type", form)


def _system(fields: Fields) -> Iterator[dict[str, Any]]:
    """The system message, without the client's billing header: it changes and would spoil the reuse of the prompt."""
    if fields.has("system"):
        parts = [_text_part(block) for block in _blocks(fields, "system")]
        kept = [part for part in parts if not part["text"].startswith("x-anthropic-")]
        yield {"role": "system", "content": kept}


def _conversation(fields: Fields) -> Iterator[dict[str, Any]]:
    """Messages in the shape of OpenAI's API."""
    messages = list(fields.objects("messages", required=True))
    for message in messages:
        blocks = _blocks(message, "content")
        match message.any("role"):
            case "assistant":
                yield _assistant(blocks, prefix=message is messages[-1])
            case "user":
                yield from _user(blocks)
            case "system":
                yield {"role": "system", "content": [_text_part(block) for block in blocks]}
            case _:
                raise message.wrong("role", "one of user, assistant, system")


def _blocks(fields: Fields, name: str) -> list[Fields]:
    """The blocks of a content; a string is one of text."""
    content = fields.any(name)
    if isinstance(content, str):
        return [Fields({"type": "text", "text": content}, fields.path(f"{name}."))]
    if not isinstance(content, list):
        raise fields.wrong(name, "a string or a list of blocks")
    return list(fields.objects(name))


def _assistant(blocks: list[Fields], prefix: bool) -> dict[str, Any]:
    """An assistant's turn; the last message of a request is the beginning of the answer."""
    texts, reasoning, calls = [], [], []
    for block in blocks:
        match block.any("type"):
            case "text":
                texts.append(block.text("text", required=True))
            case "thinking":
                reasoning.append(block.text("thinking", required=True))
            case "tool_use":
                given = block.object("input", required=True)
                assert given is not None
                function = {"name": block.text("name", required=True), "arguments": given.values}
                calls.append({"id": block.text("id"), "type": "function", "function": function})
            case kind if kind not in _IGNORED_BLOCKS:
                raise block.wrong("type", "text, thinking or tool_use")
    turn: dict[str, Any] = {"role": "assistant", "content": "".join(text or "" for text in texts), "prefix": prefix}
    if reasoning:
        turn["reasoning_content"] = "".join(text or "" for text in reasoning)
    return turn | ({"tool_calls": calls} if calls else {})


def _user(blocks: list[Fields]) -> Iterator[dict[str, Any]]:
    """A user's turn: the results of tools first, as the model knows them."""
    texts = []
    for block in blocks:
        match block.any("type"):
            case "text":
                texts.append(_text_part(block))
            case "tool_result":
                content = block.any("content")
                yield {"role": "tool", "tool_call_id": block.text("tool_use_id", required=True), "content": content}
            case "image" | "document":
                raise ApiError(400, f"{block.path('type')} is {block.any('type')!r}, but the model reads text only")
            case _:
                raise block.wrong("type", "text or tool_result")
    if texts:
        yield {"role": "user", "content": texts}


def _text_part(block: Fields) -> dict[str, Any]:
    if block.any("type") != "text":
        raise block.wrong("type", "text")
    return {"type": "text", "text": block.text("text", required=True)}


class MessageWire:
    """Messages and their events (see `wire.Wire`)."""

    def __init__(self, model: str, prompt: int) -> None:
        self._blocks: list[dict[str, Any]] = []
        self._open: str | None = None
        self._message: dict[str, Any] = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _counts(prompt, 0, 0),
        }

    def begin(self) -> list[str]:
        """The message without content."""
        return [event({"type": "message_start", "message": self._message})]

    def piece(self, piece: Piece) -> list[str]:
        """Further content."""
        return [frame for one in piece.events for frame in self._take(one)]

    def end(self, end: End) -> list[str]:
        """The end of the last block; a message without content gets one."""
        frames = [] if self._blocks else self._start({"type": "text", "text": ""})
        reason = "stop_sequence" if end.stop_sequence is not None else _STOP_REASONS[end.finish]
        self._message |= {"stop_reason": reason, "stop_sequence": end.stop_sequence}
        return [*frames, *self._stop()]

    def usage(self, usage: Usage) -> list[str]:
        """The reason of the end, and the counts."""
        self._message["usage"] = _counts(usage.prompt - usage.cached, usage.cached, usage.completion)
        self._message["ds4jax"] = speed(usage)
        delta = {name: self._message[name] for name in ("stop_reason", "stop_sequence")}
        last = {"type": "message_delta", "delta": delta, "usage": self._message["usage"], "ds4jax": speed(usage)}
        return [event(last), event({"type": "message_stop"})]

    def error(self, error: ApiError) -> list[str]:
        """A failure in mid-stream."""
        return [event(error.anthropic())]

    def keep_alive(self) -> str:
        """An event of its own."""
        return event({"type": "ping"})

    def whole(self) -> dict[str, Any]:
        """The message."""
        return {**self._message, "content": self._blocks}

    def _take(self, one: Event) -> list[str]:
        if isinstance(one, Call):
            arguments = json.loads(one.arguments)
            block = {"type": "tool_use", "id": new_id("toolu_"), "name": one.name, "input": arguments}
            frames = self._start(block | {"input": {}}, block)
            return [*frames, self._delta({"type": "input_json_delta", "partial_json": one.arguments}), *self._stop()]
        kind = "thinking" if isinstance(one, Reasoning) else "text"
        frames = []
        if self._open != kind:
            frames = self._start({"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})})
        self._blocks[-1][kind] += one.text
        return [*frames, self._delta({"type": f"{kind}_delta", kind: one.text})]

    def _start(self, block: dict[str, Any], whole: dict[str, Any] | None = None) -> list[str]:
        """Opens a block, which will become `whole`."""
        frames = self._stop()
        self._blocks.append(dict(block) if whole is None else whole)
        self._open = block["type"]
        return [
            *frames,
            event({"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}),
        ]

    def _stop(self) -> list[str]:
        """Closes the open block, if there is one."""
        if self._open is None:
            return []
        frames = []
        if self._open == "thinking":
            signature = new_id("ds4jax-")
            self._blocks[-1]["signature"] = signature
            frames.append(self._delta({"type": "signature_delta", "signature": signature}))
        self._open = None
        return [*frames, event({"type": "content_block_stop", "index": len(self._blocks) - 1})]

    def _delta(self, delta: dict[str, Any]) -> str:
        return event({"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta})


def _counts(fresh: int, cached: int, output: int) -> dict[str, int]:
    return {
        "input_tokens": fresh,
        "output_tokens": output,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
    }
