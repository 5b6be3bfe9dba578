"""Takes an answer apart as it comes: reasoning, content, tool calls.

Whatever the cuts, the events add up to the same message, and nothing that has been handed out is taken back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ds4jax.chat import END_THINK, THINK
from ds4jax.chat_markup import UNDECIDED, Block, Opening, Openings, begins
from ds4jax.chat_tools import functions
from ds4jax.errors import RequestError
from ds4jax.tokenizer import Decoder, Tokenizer, overlap


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """Further reasoning."""

    text: str


@dataclasses.dataclass(frozen=True)
class Content:
    """Further text of the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A whole tool call; `arguments` is the JSON text of an object."""

    index: int
    name: str
    arguments: str


Event = Reasoning | Content | Call


@dataclasses.dataclass(frozen=True)
class Message:
    """An answer, whole. finish_reason: as in OpenAI's API."""

    reasoning: str
    content: str
    calls: tuple[Call, ...]
    finish_reason: Literal["stop", "length", "tool_calls"]


class Parser:
    """Reads one answer, from text or from ids.

    state: where the next token goes: "reasoning", "content", or "calls" within a block of calls.
    complete: whether the answer has ended by itself, at the end of a block of calls or at a stop string.
    stop_sequence: that string. reasoning_tokens: ids that went to the reasoning.
    """

    def __init__(
        self,
        tools: Sequence[Any] = (),
        *,
        reasoning: bool,
        stop: Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """
        Args:
            tools: those of the prompt; without any, nothing is read as a call.
            reasoning: whether the prompt ends within a reasoning block: `Prompt.reasoning`.
            stop: strings that end the answer when they come up in its content; they are not part of it.
            tokenizer: needed for `feed_ids`.
        """
        if isinstance(stop, str) or not all(stop):
            raise RequestError(f"stop = {stop!r}, expected strings that are not empty")
        self._schemas = {function["name"]: _properties(function) for function in functions(tools)}
        self._openings = Openings(self._schemas)
        self._stop = stop
        self._decoder = Decoder(tokenizer) if tokenizer else None
        self._tags = {tokenizer.special_ids.get(tag): tag for tag in (THINK, END_THINK)} if tokenizer else {}
        self._in_reasoning = reasoning
        self._held = ""  # text whose meaning is open
        self._blank = ""  # white space at the beginning of content: dropped if a call follows
        self._at_beginning = True  # of the content, or of what follows a block
        self._unsent = ""  # content that may turn out to begin a stop string
        self._block: Block | None = None
        self._lead = ""  # the block's text before its first call
        self._taken = 0  # calls of the block that have become events
        self._events: list[Event] = []
        self._all: list[Event] = []
        self._natural = True
        self.complete = False
        self.stop_sequence: str | None = None
        self.reasoning_tokens = 0

    @property
    def state(self) -> Literal["reasoning", "content", "calls"]:
        if self._block:
            return "calls"
        return "reasoning" if self._in_reasoning else "content"

    @property
    def message(self) -> Message:
        """What all events so far add up to; with `finish`, the whole answer."""
        calls = tuple(event for event in self._all if isinstance(event, Call))
        return Message(
            "".join(event.text for event in self._all if isinstance(event, Reasoning)),
            "".join(event.text for event in self._all if isinstance(event, Content)),
            calls,
            "length" if not self._natural else "tool_calls" if calls else "stop",
        )

    def feed(self, text: str) -> list[Event]:
        """Takes text, in which `<think>` and `</think>` are read as tags; returns what has become certain."""
        self._take(text, tags=True)
        return self._new_events()

    def feed_ids(self, ids: Iterable[int]) -> list[Event]:
        """Takes tokens, but none that ends an answer; the tokens `<think>` and `</think>` are the tags."""
        assert self._decoder, "the parser was made without a tokenizer"
        for token in ids:
            self.reasoning_tokens += self.state == "reasoning"
            if token in self._tags and self._block is None:
                self._take(self._decoder.finish(), tags=False, final=True)
                self._in_reasoning = self._tags[token] == THINK
            else:
                self._take(self._decoder.feed(token), tags=False)
        return self._new_events()

    def finish(self, ended_by: Literal["stop", "length"]) -> list[Event]:
        """The answer has ended, by a stop token (or as `complete` says) or by a limit; returns what was held back."""
        self._natural = ended_by == "stop"
        self._take(self._decoder.finish() if self._decoder else "", tags=False, final=True)
        if self._block:
            self._block.finish(self._natural)
            self._take_calls()
            if self._natural and not self._block.calls:
                self._content(self._lead + self._block.raw)
        elif not any(isinstance(event, Call) for event in self._all):
            self._send(self._blank)
        self._flush()
        return self._new_events()

    def _new_events(self) -> list[Event]:
        events, self._events = self._events, []
        self._all += events
        return events

    def _take(self, text: str, tags: bool, final: bool = False) -> None:
        if self._block:
            self._block.feed(text)
            text = self._after_block()
        if self._block is None:
            self._held += text
            self._scan(tags, final)

    def _scan(self, tags: bool, final: bool) -> None:
        """Hands out the text held so far, up to what may become a tag or an opening, unless this is the end."""
        text, start, at = self._held, 0, 0
        while (at := text.find("<", at)) >= 0:
            found = [tag for tag in (THINK, END_THINK) if tags and text.startswith(tag, at)]
            if found:
                self._put(text[start:at])
                self._in_reasoning = found == [THINK]
                start = at = at + len(found[0])
                continue
            opening = self._openings.match(text, at, certain=not self._in_reasoning)
            if isinstance(opening, Opening):
                lead = at - 2 if text.endswith(_SEPARATOR, start, at) else at
                self._put(text[start:lead])
                self._in_reasoning = False
                self._lead, self._taken, self._block = text[lead : opening.start], 0, Block(opening, self._schemas)
                self._block.feed(text[opening.start :])
                text, start, at = self._after_block(), 0, 0
                continue
            undecided = opening is UNDECIDED or tags and any(begins(text, at, tag) for tag in (THINK, END_THINK))
            if undecided and not final:
                break
            at += 1
        end = at if at >= 0 else len(text)
        if self._schemas and not final:  # newlines before an opening belong to it
            ends = text.endswith(_SEPARATOR, start, end), at < 0 and text.endswith("\n", start, end)
            end -= 2 if ends[0] else int(ends[1])
        self._put(text[start:end])
        self._held = text[end:]

    def _after_block(self) -> str:
        """Makes events of the block's new calls; the text after the block, empty if it has not ended."""
        assert self._block
        self._take_calls()
        block = self._block
        if block.rest is None:
            return ""
        self._block = None
        if block.calls:
            self.complete = self.complete or block.closed
        else:
            self._content(self._lead + block.raw)
        return block.rest

    def _take_calls(self) -> None:
        assert self._block
        for name, arguments in self._block.calls[self._taken :]:
            self._flush()
            self._blank, self._at_beginning = "", True
            index = sum(isinstance(event, Call) for event in (*self._all, *self._events))
            self._emit(Call(index, name, arguments))
        self._taken = len(self._block.calls)

    def _put(self, text: str) -> None:
        if self._in_reasoning:
            self._emit(Reasoning(text))
        else:
            self._content(text)

    def _content(self, text: str) -> None:
        if self._schemas and self._at_beginning:
            self._blank += text
            if not self._blank.strip():
                return
            text, self._blank, self._at_beginning = self._blank, "", False
        self._send(text)

    def _send(self, text: str) -> None:
        """Content, up to a stop string or what may begin one."""
        self._unsent += text
        places = [(place, stop) for stop in self._stop if (place := self._unsent.find(stop)) >= 0]
        if places:
            place, stop = min(places, key=lambda found: found[0])
            self._emit(Content(self._unsent[:place]))
            self.stop_sequence, self.complete = self.stop_sequence or stop, True
        kept = max((overlap(self._unsent, stop) for stop in self._stop), default=0)
        self._flush(kept)

    def _flush(self, kept: int = 0) -> None:
        """Hands out content but for its last characters."""
        end = len(self._unsent) - kept
        self._emit(Content(self._unsent[:end]))
        self._unsent = self._unsent[end:]

    def _emit(self, event: Event) -> None:
        """Adds an event, joined with the last one if that is of its kind; after a stop string nothing counts."""
        if self.stop_sequence is not None or not isinstance(event, Call) and not event.text:
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, Reasoning | Content) and not isinstance(event, Call) and type(last) is type(event):
            self._events[-1] = dataclasses.replace(last, text=last.text + event.text)
        else:
            self._events.append(event)


_SEPARATOR = "\n\n"


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Schemas of a function's parameters, by name."""
    properties = (function.get("parameters") or {}).get("properties")
    return properties if isinstance(properties, Mapping) else {}
