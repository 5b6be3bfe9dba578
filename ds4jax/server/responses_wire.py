"""OpenAI's responses: objects and events."""

from __future__ import annotations

import json
import time
from typing import Any

from ds4jax.chat_parse import Call, Content, Event, Reasoning
from ds4jax.server.answer import End, Piece, Usage
from ds4jax.server.errors import ApiError
from ds4jax.server.openai import speed
from ds4jax.server.wire import event, new_id, scored
from ds4jax.tokenizer import Tokenizer


class ResponseWire:
    """A response and its events (see `wire.Wire`).

    echo: fields of the request that are repeated. custom: names of tools that take free text. summary: whether
    reasoning goes to summaries. top: as for `ChatWire`.
    """

    def __init__(
        self, tokenizer: Tokenizer, echo: dict[str, Any], custom: set[str], summary: bool, top: int | None
    ) -> None:
        self._tokenizer, self._custom, self._summary, self._top = tokenizer, custom, summary, top
        self._number = -1
        self._items: list[dict[str, Any]] = []
        self._open: type[Event] | None = None
        self._scores: list[dict[str, Any]] = []
        self._response: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **echo,
        }

    def begin(self) -> list[str]:
        """The response without output."""
        return [self._event(f"response.{name}", response=self._response) for name in ("created", "in_progress")]

    def piece(self, piece: Piece) -> list[str]:
        """Further output."""
        if self._top is not None:
            self._scores += [scored(self._tokenizer, score, self._top) for score in piece.scores if not score.reasoning]
        return [frame for one in piece.events for frame in self._take(one)]

    def end(self, end: End) -> list[str]:
        """The end of the last item."""
        self._response["status"] = "incomplete" if end.finish == "length" else "completed"
        if end.finish == "length":
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        return self._close()

    def usage(self, usage: Usage) -> list[str]:
        """The whole response."""
        self._response |= {
            "output": self._items,
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                "total_tokens": usage.prompt + usage.completion,
            },
            "ds4jax": speed(usage),
        }
        return [self._event(f"response.{self._response['status']}", response=self._response)]

    def error(self, error: ApiError) -> list[str]:
        """A failure in mid-stream."""
        reason = {"code": error.code or "server_error", "message": error.message}
        self._response |= {"status": "failed", "error": reason}
        return [self._event("response.failed", response=self._response)]

    def keep_alive(self) -> str:
        """A comment."""
        return ": keep-alive\n\n"

    def whole(self) -> dict[str, Any]:
        """The response."""
        return self._response

    def _take(self, one: Event) -> list[str]:
        if isinstance(one, Call):
            return [*self._close(), *self._call(one)]
        frames = [] if self._open is type(one) else [*self._close(), *self._start(one)]
        part = self._parts()[-1]
        part["text"] += one.text
        extra: dict[str, Any] = {}
        if isinstance(one, Content):
            extra = {"logprobs": self._scores}
            part["logprobs"], self._scores = [*part["logprobs"], *self._scores], []
        return [*frames, self._part_event("delta", delta=one.text, **extra)]

    def _start(self, one: Reasoning | Content) -> list[str]:
        """Opens the item that the text belongs to, and its only part."""
        self._open = type(one)
        if isinstance(one, Content):
            message = {"id": new_id("msg_"), "type": "message", "status": "in_progress", "role": "assistant"}
            self._items.append({**message, "content": []})
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            self._items.append({"id": new_id("rs_"), "type": "reasoning", "summary": [], "encrypted_content": None})
            part = {"type": "summary_text" if self._summary else "reasoning_text", "text": ""}
            if not self._summary:
                self._items[-1]["content"] = []
        added = self._item_event("added", self._items[-1])
        self._parts().append(part)
        return [added, self._event(f"{self._part_name()}.added", **self._place(), part=part)]

    def _close(self) -> list[str]:
        """Closes the open item, if there is one."""
        if self._open is None:
            return []
        item, part = self._items[-1], self._parts()[-1]
        logprobs = {"logprobs": part["logprobs"]} if self._open is Content else {}
        frames = [
            self._part_event("done", text=part["text"], **logprobs),
            self._event(f"{self._part_name()}.done", **self._place(), part=part),
        ]
        if "status" in item:
            item["status"] = self._response["status"] if self._response["status"] == "incomplete" else "completed"
        self._open = None
        return [*frames, self._item_event("done", item)]

    def _call(self, call: Call) -> list[str]:
        if call.name in self._custom:
            kind, field, text = "custom_tool_call", "input", _free_text(call.arguments)
            names = "response.custom_tool_call_input"
            item: dict[str, Any] = {"id": new_id("ctc_")}
        else:
            kind, field, text = "function_call", "arguments", call.arguments
            names = "response.function_call_arguments"
            item = {"id": new_id("fc_")}
        item |= {"type": kind, "status": "in_progress", "call_id": new_id("call_"), "name": call.name, field: ""}
        self._items.append(item)
        added = self._item_event("added", item)
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        item |= {field: text, "status": "completed"}
        name = {"name": call.name} if kind == "function_call" else {}
        return [
            added,
            self._event(f"{names}.delta", **place, delta=text),
            self._event(f"{names}.done", **place, **{field: text}, **name),
            self._item_event("done", item),
        ]

    def _parts(self) -> list[dict[str, Any]]:
        """The parts of the open item."""
        item = self._items[-1]
        parts: list[dict[str, Any]] = item["summary" if self._open is Reasoning and self._summary else "content"]
        return parts

    def _part_name(self) -> str:
        summary = self._open is Reasoning and self._summary
        return "response.reasoning_summary_part" if summary else "response.content_part"

    def _part_event(self, stage: str, **fields: Any) -> str:
        """An event about the text of the open part."""
        name = "output_text" if self._open is Content else "reasoning_text"
        if self._open is Reasoning and self._summary:
            name = "reasoning_summary_text"
        return self._event(f"response.{name}.{stage}", **self._place(), **fields)

    def _place(self) -> dict[str, Any]:
        index = "summary_index" if self._open is Reasoning and self._summary else "content_index"
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, index: 0}

    def _item_event(self, stage: str, item: dict[str, Any]) -> str:
        return self._event(f"response.output_item.{stage}", output_index=len(self._items) - 1, item=item)

    def _event(self, name: str, /, **fields: Any) -> str:
        self._number += 1
        return event({"type": name, "sequence_number": self._number, **fields})


def _free_text(arguments: str) -> str:
    """The text for a tool that takes nothing else."""
    value = json.loads(arguments).get("input", arguments)
    return value if isinstance(value, str) else arguments
