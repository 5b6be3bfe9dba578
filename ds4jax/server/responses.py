"""OpenAI's responses: what `POST /v1/responses` asks for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from ds4jax.server.answer import Task
from ds4jax.server.errors import ApiError
from ds4jax.server.fields import Fields
from ds4jax.server.grammar import Format, ToolChoice, answer_format, checked_choice, tool_choice
from ds4jax.server.responses_wire import ResponseWire
from ds4jax.server.service import Service

log = logging.getLogger("ds4jax.server")

_REFUSED = {
    "previous_response_id": "responses are not stored; send the whole conversation as input",
    "conversation": "conversations are not stored; send the whole conversation as input",
    "prompt": "prompt templates are not stored",
}
_ROLES = ("user", "assistant", "system", "developer")
# Calls that OpenAI's own servers would have made.
_SKIPPED = ("web_search_call", "file_search_call", "tool_search_call", "image_generation_call", "code_interpreter_call")
_LOGPROBS = "message.output_text.logprobs"


def read_response(service: Service, fields: Fields) -> tuple[Task, ResponseWire]:
    """What a request asks for, and how it is answered. Raises `ApiError` if it cannot be served."""
    model = fields.text("model", required=True)
    assert model is not None
    for name, reason in _REFUSED.items():
        fields.refuse(name, reason)
    fields.refuse("background", "requests are answered at once", unless=[False])
    fields.refuse("truncation", "the input is never cut", unless=["disabled"])
    tools, custom = _tools(fields)
    choice = _tool_choice(fields, tools)
    tools = [] if choice.mode == "none" else tools
    form = _form(fields)
    include = fields.array("include") or []
    top = fields.integer("top_logprobs", 0, 20)
    scores = (top or 0) if _LOGPROBS in include or top else None
    task = service.chat_task(
        fields,
        list(_conversation(fields)),
        tools=tools,
        schema=form.schema,
        most=fields.integer("max_output_tokens", 1),
        stop=(),
        sampling=service.sampling(fields),
        seed=service.seed(fields),
        scored=scores is not None,
        bias=service.bias(fields, calls=bool(tools)),
        matcher=service.grammars.matcher(tools, choice, form),
        single=choice.single,
    )
    reasoning = fields.object("reasoning")
    summary = reasoning is not None and reasoning.has("summary")
    return task, ResponseWire(service.tokenizer, _echo(fields, task, model), custom, summary, scores)


def _tools(fields: Fields) -> tuple[list[dict[str, Any]], set[str]]:
    """Tools in the shape of chat completions, and the names of those that take free text."""
    tools, custom = [], set()
    for tool in fields.objects("tools"):
        function: dict[str, Any] = {}
        kind = tool.any("type")
        if kind in ("function", "custom"):
            function = {"name": tool.text("name", required=True)}
            if (description := tool.text("description")) is not None:
                function["description"] = description
        if kind == "function":
            schema = tool.object("parameters")
            function["parameters"] = {} if schema is None else schema.values
            if tool.flag("strict"):
                function["strict"] = True
        elif kind == "custom":
            custom.add(function["name"])
            function["parameters"] = {
                "type": "object",
                "properties": {"input": {"type": "string"}},
                "required": ["input"],
            }
        else:
            log.warning("tool of type %s is not offered to the model: it would have to run here", kind)
            continue
        tools.append({"type": "function", "function": function})
    return tools, custom


def _tool_choice(fields: Fields, tools: list[dict[str, Any]]) -> ToolChoice:
    """As in chat completions; a custom tool may be named too."""
    value = fields.any("tool_choice")
    if isinstance(value, dict) and value.get("type") == "custom" and isinstance(value.get("name"), str):
        single = fields.flag("parallel_tool_calls") is False
        return checked_choice(ToolChoice("required", value["name"], single), tools)
    return tool_choice(fields, tools)


def _form(fields: Fields) -> Format:
    text = fields.object("text")
    form = None if text is None else text.object("format")
    return Format() if form is None else answer_format(form, "type", form)


def _conversation(fields: Fields) -> Iterator[dict[str, Any]]:
    """The input as messages of chat completions."""
    if (instructions := fields.text("instructions")) is not None:
        yield {"role": "system", "content": instructions}
    given = fields.any("input")
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    if not isinstance(given, list):
        raise fields.wrong("input", "a string or a list")
    turns = _Turns()
    for item in fields.objects("input"):
        turns.add(item)
    yield from turns.finish()


@dataclasses.dataclass
class _Turns:
    """Joins items to turns: what the assistant did in a row is one turn, and its results follow at once."""

    done: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    assistant: dict[str, Any] = dataclasses.field(default_factory=dict)
    called: set[str] = dataclasses.field(default_factory=set)
    waiting: set[str] = dataclasses.field(default_factory=set)
    held: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, item: Fields) -> None:
        """Takes an item of the input."""
        match item.any("type") or "message":
            case "message":
                self._message(item)
            case "reasoning":
                self._assistant(reasoning_content=_reasoning(item))
            case "function_call" | "custom_tool_call" as kind:
                self._call(item, kind == "custom_tool_call")
            case "function_call_output" | "custom_tool_call_output":
                self._output(item)
            case kind if kind not in _SKIPPED:
                raise item.wrong("type", "message, reasoning, or a call of a function or custom tool or its output")

    def finish(self) -> list[dict[str, Any]]:
        """All turns."""
        self._close()
        return [*self.done, *self.held]

    def _message(self, item: Fields) -> None:
        role = item.choice("role", _ROLES)
        if role is None:
            raise item.wrong("role", f"one of {', '.join(_ROLES)}")
        content = item.any("content")
        parts = (
            content if isinstance(content, str) else [_part(part) for part in item.objects("content", required=True)]
        )
        if role == "assistant":
            self._assistant(content=parts if isinstance(parts, str) else "".join(part["text"] for part in parts))
        elif role != "user" and self.waiting:
            self.held.append({"role": role, "content": parts})  # between a call and its output
        else:
            self._close()
            self.done.append({"role": role, "content": parts})

    def _assistant(self, **texts: str) -> None:
        turn = self.assistant or {"role": "assistant", "content": ""}
        for name, text in texts.items():
            turn[name] = turn.get(name, "") + text
        self.assistant = turn

    def _call(self, item: Fields, custom: bool) -> None:
        call, name = item.text("call_id", required=True), item.text("name", required=True)
        given = item.text("input" if custom else "arguments", required=True)
        assert call is not None
        self._assistant()
        function = {"name": name, "arguments": {"input": given} if custom else given}
        self.assistant.setdefault("tool_calls", []).append({"id": call, "type": "function", "function": function})
        self.called.add(call)
        self.waiting.add(call)

    def _output(self, item: Fields) -> None:
        call, output = item.text("call_id", required=True), item.any("output")
        if call not in self.called:
            raise ApiError(
                400, f"{item.path('call_id')} is {call!r}, but the input holds no such call before it", "input"
            )
        if not isinstance(output, str):
            output = [_part(part) for part in item.objects("output", required=True)]
        self._close()
        self.done.append({"role": "tool", "tool_call_id": call, "content": output})
        self.waiting.discard(call)
        if not self.waiting:
            self.done += self.held
            self.held = []

    def _close(self) -> None:
        if self.assistant:
            self.done.append(self.assistant)
            self.assistant = {}


def _part(part: Fields) -> dict[str, Any]:
    kind = part.any("type")
    if kind == "refusal":
        return {"type": "text", "text": part.text("refusal", required=True)}
    if kind not in ("input_text", "output_text", "text"):
        raise part.wrong("type", "input_text or output_text; the model reads text only")
    return {"type": "text", "text": part.text("text", required=True)}


def _reasoning(item: Fields) -> str:
    """The text of a reasoning item: its content, else its summary."""
    for name in ("content", "summary"):
        if texts := [part.text("text", required=True) or "" for part in item.objects(name)]:
            return "".join(texts)
    return ""


def _echo(fields: Fields, task: Task, model: str) -> dict[str, Any]:
    """What a response repeats of its request."""
    reasoning, text = fields.object("reasoning"), fields.object("text")
    single = fields.flag("parallel_tool_calls") is False
    return {
        "model": model,
        "instructions": fields.any("instructions"),
        "max_output_tokens": fields.any("max_output_tokens"),
        "metadata": fields.any("metadata") or {},
        "parallel_tool_calls": not single,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None, **(reasoning.values if reasoning is not None else {})},
        "store": False,
        "temperature": task.sampling.temperature,
        "text": {**(text.values if text is not None else {}), "format": _format_echo(text)},
        "tool_choice": fields.any("tool_choice") or "auto",
        "tools": fields.any("tools") or [],
        "top_p": task.sampling.top_p,
        "truncation": "disabled",
        "user": fields.any("user"),
    }


def _format_echo(text: Fields | None) -> dict[str, Any]:
    form = None if text is None else text.object("format")
    return {"type": "text"} if form is None else dict(form.values)
