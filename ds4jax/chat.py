"""A conversation as the prompt that DeepSeek-V4 was trained on.

Messages and tools are mappings in the shape of OpenAI's chat API. The layout is that of `encoding/encoding_dsv4.py` in
DeepSeek's checkpoint. A prompt is a list of spans, and only those that the renderer wrote may become special tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds4jax.chat_profile import Effort, Profile, effort_prefix
from ds4jax.chat_tools import DSML, calls_block, to_json, tools_block
from ds4jax.errors import CheckpointError, RequestError
from ds4jax.tokenizer import ASSISTANT, BOS, EOS, USER, Span, Tokenizer

THINK = "<think>"
END_THINK = "</think>"
MARKERS = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML)
"""Added tokens without which there is no chat."""

_REMINDER = "<｜latest_reminder｜>"
_RESULT_ROLES = ("tool", "function")
_ROLES = ("user", "assistant", "system", "developer", *_RESULT_ROLES, "latest_reminder")
# DeepSeek's internal tasks, by the role of the message that asks for one.
_TASKS: dict[str, tuple[str, ...]] = {
    "user": ("action", "query", "authority", "domain", "read_url"),
    "assistant": ("title",),
}
_SCHEMA = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A rendered conversation."""

    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The whole prompt, special tokens written out."""
        return "".join(span.text for span in self.spans)

    @property
    def reasoning(self) -> bool:
        """Whether the model goes on inside a reasoning block."""
        tags = (span.text for span in reversed(self.spans) if span.trusted and span.text in (THINK, END_THINK))
        return next(tags, END_THINK) == THINK

    @property
    def complete(self) -> bool:
        """Whether the conversation ends with an answer, so that there is nothing to generate."""
        return self.spans[-1] == Span(EOS, trusted=True)

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Ids, BOS included. Raises `RequestError` for text that is not valid Unicode."""
        return tokenizer.encode_spans(self.spans)


def check_vocabulary(tokenizer: Tokenizer) -> None:
    """Raises `CheckpointError` if the vocabulary lacks a token that conversations are written with."""
    if missing := [marker for marker in MARKERS if marker not in tokenizer.special_ids]:
        raise CheckpointError(
            f"tokenizer.ggml.tokens: expected the special tokens of a chat model, found no {', '.join(missing)}; "
            "such a model can only continue text"
        )


def render(
    messages: Sequence[Any],
    *,
    tools: Sequence[Any] = (),
    thinking: bool = True,
    effort: Effort | None = None,
    profile: Profile = "preview",
    keep_reasoning: bool | None = None,
    schema: Mapping[str, Any] | None = None,
) -> Prompt:
    """The prompt that asks for the next answer, or goes on with a last assistant message that says `prefix: true`.

    Args:
        messages: roles user, assistant, system (developer is another name for it), tool (function) and latest_reminder.
            A developer message that carries its own `tools` is a user turn, as in DeepSeek's search agent. Content is
            text, a list of text parts, or None. Of assistant messages, `reasoning_content` (`reasoning`), `tool_calls`,
            and of the last one `prefix` count too. Other keys play no role.
        tools: `{"type": "function", "function": {...}}` each.
        thinking, effort, profile: see `chat_profile`.
        keep_reasoning: whether reasoning before the last user turn stays; None: if there are tools, now or in earlier
            calls.
        schema: JSON schema that the answer shall follow.

    Raises:
        RequestError: the conversation is empty or a message is malformed; the text names it, as in `messages[2]`.
    """
    read = [_Message.read(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if not read:
        raise RequestError("messages is empty, expected at least one")
    if keep_reasoning is None:
        keep_reasoning = bool(tools) or any(message.calls or message.tools for message in read)
    head = effort_prefix(effort, profile) if thinking else ""
    return Prompt(
        (
            Span(BOS, trusted=True),
            Span(head, trusted=True),
            *_system(read[:1], tools, schema),
            *_turns(read[1:] if read[0].kind == "system" else read, thinking, keep_reasoning),
        )
    )


@dataclasses.dataclass(frozen=True)
class _Message:
    """A message after its checks. kind: user, assistant, system or latest_reminder; results count as user."""

    where: str
    kind: str
    text: str
    is_result: bool
    call_id: str | None
    reasoning: str
    calls: Sequence[Any]
    tools: Sequence[Any]
    prefix: bool
    task: str | None

    @staticmethod
    def read(message: Any, where: str) -> _Message:
        if not isinstance(message, Mapping):
            raise RequestError(f"{where}: expected an object, found {type(message).__name__}")
        role, calls, tools = (message.get(key) for key in ("role", "tool_calls", "tools"))
        if role not in _ROLES:
            raise RequestError(f"{where}.role = {role!r}, expected one of {', '.join(_ROLES)}")
        call_id, reasoning = message.get("tool_call_id"), message.get("reasoning_content", message.get("reasoning"))
        if call_id is not None and not isinstance(call_id, str):
            raise RequestError(f"{where}.tool_call_id = {call_id!r}, expected a string")
        if reasoning is not None and not isinstance(reasoning, str):
            raise RequestError(f"{where}.reasoning_content: expected a string, found {type(reasoning).__name__}")
        if calls is not None and not isinstance(calls, list | tuple):
            raise RequestError(f"{where}.tool_calls: expected a list, found {type(calls).__name__}")
        task = message.get("task")
        if task is not None and task not in _TASKS.get(role, ()):
            raise RequestError(f"{where}.task = {task!r}, expected none or one of {', '.join(_TASKS.get(role, ()))}")
        is_result = role in _RESULT_ROLES
        searching = role == "developer" and bool(tools)
        return _Message(
            where,
            kind="user" if is_result or searching else "system" if role == "developer" else role,
            text=_text(message.get("content"), f"{where}.content", is_result),
            is_result=is_result,
            call_id=call_id,
            reasoning=reasoning or "",
            calls=calls or () if role == "assistant" else (),
            tools=tools or () if searching else (),
            prefix=message.get("prefix") is True,
            task=task,
        )


def _text(content: Any, where: str, is_result: bool) -> str:
    """Content as one text; of results, parts that are not text are named in their place."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise RequestError(f"{where}: expected text or a list of text parts, found {type(content).__name__}")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif is_result and isinstance(kind, str) and kind != "text":
            texts.append(f"[Unsupported {kind}]")
        else:
            raise RequestError(f'{where}[{i}]: expected {{"type": "text", "text": ...}}; this model reads only text')
    return "\n\n".join(texts)


def _system(first: Sequence[_Message], tools: Sequence[Any], schema: Mapping[str, Any] | None) -> Iterator[Span]:
    """What stands before the first turn: system text, tools, and the format of the answer."""
    yield from (Span(message.text, trusted=False) for message in first if message.kind == "system")
    if tools:
        yield Span("\n\n", trusted=True)
        yield from tools_block(tools, "tools")
    if schema is not None:
        yield Span(_SCHEMA, trusted=True)
        yield Span(to_json(schema), trusted=False)


def _turns(messages: Sequence[_Message], thinking: bool, keep_reasoning: bool) -> Iterator[Span]:
    """All turns, and the beginning of the answer asked for."""
    turns = [
        list(run)
        for kind, group in itertools.groupby(messages, key=lambda message: message.kind)
        for run in ([group] if kind == "user" else ([message] for message in group))
    ]
    last_user = max((i for i, turn in enumerate(turns) if turn[0].kind == "user"), default=-1)
    opening = Span(ASSISTANT, trusted=True), Span(THINK if thinking else END_THINK, trusted=True)
    calls: Sequence[Any] = ()
    task: str | None = None
    for i, turn in enumerate(turns):
        message = turn[-1]
        if message.kind == "user":
            yield from _user(turn, calls)
        elif message.kind == "assistant":
            reasons = thinking and (keep_reasoning or i > last_user)
            yield from _assistant(message, reasons, task is not None, message.prefix and i == len(turns) - 1)
            calls = message.calls
        else:
            if message.kind == "latest_reminder":
                yield Span(_REMINDER, trusted=True)
            yield Span(message.text, trusted=False)
        task = message.task
        if task is not None:
            yield from opening if task == "action" else ()
            yield Span(f"<｜{task}｜>", trusted=True)
    if task is None and not (turns and turns[-1][0].kind == "assistant"):
        yield from opening


def _user(turn: Sequence[_Message], calls: Sequence[Any]) -> Iterator[Span]:
    """User messages and results that follow one another; results come in the order of the calls."""
    order = {call.get("id"): n for n, call in enumerate(calls)}
    results = iter(sorted((m for m in turn if m.is_result), key=lambda result: order.get(result.call_id, 0)))
    yield Span(USER, trusted=True)
    for n, message in enumerate(turn):
        if n:
            yield Span("\n\n", trusted=True)
        if message.is_result:
            yield Span("<tool_result>", trusted=True)
            yield Span(next(results).text, trusted=False)
            yield Span("</tool_result>", trusted=True)
        else:
            yield Span(message.text, trusted=False)
        if message.tools:
            yield Span("\n\n", trusted=True)
            yield from tools_block(message.tools, f"{message.where}.tools")


def _assistant(message: _Message, reasons: bool, for_task: bool, unfinished: bool) -> Iterator[Span]:
    """An answer, from its opening mark on; the answer to a task has neither mark nor reasoning."""
    if not for_task:
        yield Span(ASSISTANT, trusted=True)
        if reasons:
            yield Span(THINK, trusted=True)
            yield Span(message.reasoning, trusted=False)
        if not (reasons and unfinished and not message.text and not message.calls):
            yield Span(END_THINK, trusted=True)
    yield Span(message.text, trusted=False)
    if message.calls:
        yield from calls_block(message.calls, f"{message.where}.tool_calls")
    if not unfinished:
        yield Span(EOS, trusted=True)
