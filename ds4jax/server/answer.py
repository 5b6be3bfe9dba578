"""One request on the scheduler's thread: tokens become events, and the answer is steered where it has to be."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from ds4jax.chat_parse import Call, Content, Event, Message, Parser, Reasoning
from ds4jax.decode.sampling import Sampling
from ds4jax.engine_run import Answer
from ds4jax.engine_session import Alternatives, Ask, Progress, Session
from ds4jax.server.errors import ApiError
from ds4jax.server.guide import Matcher, Penalties, Steering
from ds4jax.tokenizer import Tokenizer


class TextReader:
    """A reader of plain text: everything is content."""

    state = "content"
    reasoning_tokens = 0

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._answer, self._stop = Answer(tokenizer, stop, ()), stop

    @property
    def complete(self) -> bool:
        """Whether a stop string was found."""
        return self._answer.finish is not None

    @property
    def stop_sequence(self) -> str | None:
        """That of the stop strings which was found; None where several could be meant."""
        return self._stop[0] if self._found and len(self._stop) == 1 else None

    def feed_ids(self, ids: Sequence[int]) -> list[Event]:
        """Text that may be shown."""
        return self._events(self._answer.extend(ids))

    def finish(self, ended_by: Literal["stop", "length"]) -> list[Event]:
        """The rest."""
        self._found = self.complete
        return self._events(self._answer.end(ended_by))

    @property
    def message(self) -> Message:
        """The whole answer."""
        finish: Any = self._answer.finish
        return Message("", self._answer.text, (), finish)

    def _events(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    _found = False


Reader = Parser | TextReader
"""Turns the tokens of one answer into events."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked for, in terms of tokens.

    ids: the prompt. reader: makes a reader for each of `n` answers. most: most tokens of an answer. scored: whether
    tokens come with their log-probabilities. bias: for all tokens, `[V]`. matcher: makes the grammar of what follows
    the reasoning. single: whether the answer ends with its first tool call.
    reasoning: whether the answer starts inside a reasoning block; it is closed after `budget` tokens, and once where
    the model forgets to.
    """

    ids: list[int]
    reader: Callable[[], Reader]
    most: int
    sampling: Sampling
    seed: int
    n: int = 1
    scored: bool = False
    bias: np.ndarray | None = None
    penalties: Penalties = dataclasses.field(default_factory=Penalties)
    matcher: Callable[[], Matcher] | None = None
    single: bool = False
    reasoning: bool = False
    budget: int | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """A token with its log-probability and what else was probable."""

    token: int
    alternatives: Alternatives
    reasoning: bool


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a burst adds to an answer."""

    choice: int
    events: list[Event]
    scores: list[Score]


@dataclasses.dataclass(frozen=True)
class End:
    """The end of an answer. finish: stop, length or tool_calls."""

    choice: int
    finish: str
    stop_sequence: str | None


@dataclasses.dataclass(frozen=True)
class Usage:
    """Counts of a whole request; the last that is heard of it.

    prompt, cached: tokens of the prompt, and those of them that an earlier request had evaluated.
    completion, reasoning: tokens of the answers, and those of them that are reasoning.
    first_seconds: from the request's arrival to its first token. rate: tokens per second after that.
    """

    prompt: int
    cached: int
    completion: int
    reasoning: int
    drafted: int
    accepted: int
    first_seconds: float
    rate: float


Update = Piece | End | Usage | ApiError


class Answering:
    """A job (see `scheduler.Job`): answers a task and publishes updates.

    An answer may be continued after tokens that were put in place of what the model chose; this changes nothing in how
    the following ones are drawn.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, publish: Callable[[Update], None]) -> None:
        self.ids, self.cancelled = task.ids, False
        self._task, self._tokenizer, self._publish = task, tokenizer, publish
        self._arrived, self._first = time.perf_counter(), 0.0
        self._choice, self._reader = -1, task.reader()
        self._cached = 0
        self._counts = {"completion": 0, "reasoning": 0, "drafted": 0, "accepted": 0}

    def turn(self, session: Session) -> bool:
        """Starts, or does a burst."""
        if self._choice < 0:
            self._cached = self._next_choice(session)
        if self._first:  # launching may wait for what is under way, and the first token should be shown at once
            session.launch()
        more = self._receive(session, session.take())
        if more and not session.busy:
            session.launch()
        return more

    def fail(self, error: ApiError) -> None:
        """Passes it on."""
        self._publish(error)

    def _next_choice(self, session: Session) -> int:
        task = self._task
        self._choice += 1
        self._reader = task.reader()
        self._steering = Steering(len(self._tokenizer.token_bytes), task.bias, task.penalties)
        self._tokens: list[int] = []
        self._closed = not task.reasoning
        if self._closed:
            self._constrain()
        return self._begin(session)

    def _begin(self, session: Session) -> int:
        """Goes on after the tokens so far."""
        task, stop_ids = self._task, self._tokenizer.stop_ids
        most = task.most - len(self._tokens)
        if not self._closed:
            if task.matcher is not None:
                stop_ids = (*stop_ids, self._end_of_thought)
            most = most if task.budget is None else min(most, task.budget)
        steered = self._steering.matcher is not None or not task.penalties.neutral
        ask = Ask(
            most=most,
            sampling=task.sampling,
            seed=(task.seed + self._choice) % (1 << 64),
            stop_ids=stop_ids,
            bias=task.bias,
            guide=self._steering if steered else None,
            alternatives=task.scored,
        )
        self._burst: Progress | None = None
        reused = session.begin(task.ids + self._tokens, ask)
        session.launch()
        return reused

    def _constrain(self) -> None:
        if self._task.matcher is not None:
            self._steering.matcher = self._task.matcher()

    @property
    def _end_of_thought(self) -> int:
        return self._tokenizer.special_ids["</think>"]

    def _receive(self, session: Session, progress: Progress) -> bool:
        """Takes what a burst has brought; returns whether more is to come."""
        if progress.tokens and not self._first:
            self._first = time.perf_counter()
        before = self._burst
        self._counts["drafted"] += progress.drafted - (before.drafted if before else 0)
        self._counts["accepted"] += progress.accepted - (before.accepted if before else 0)
        self._burst = progress
        text = progress.tokens[:-1] if progress.stopped else progress.tokens
        events: list[Event] = []
        scores, complete = [], False
        for place, token in enumerate(text):
            if progress.alternatives:
                scores.append(Score(token, progress.alternatives[place], self._reader.state == "reasoning"))
            self._tokens.append(token)
            events += self._reader.feed_ids([token])
            if complete := self._reader.complete or (self._task.single and any(isinstance(e, Call) for e in events)):
                break
        self._closed = self._closed or self._reader.state != "reasoning"
        if complete or not progress.done:
            self._show(events, scores)
            return not complete or self._finish(session, "stop")
        if not self._closed and self._is_to_close(progress):
            self._closed = True
            self._tokens.append(self._end_of_thought)
            events += self._reader.feed_ids([self._end_of_thought])
            self._show(events, scores)
            session.end()
            self._constrain()
            self._begin(session)
            return True
        self._show(events, scores)
        if progress.stopped:
            self._tokens.append(progress.tokens[-1])
        return self._finish(session, "stop" if progress.stopped else "length")

    def _is_to_close(self, progress: Progress) -> bool:
        """Whether the answer has ended within its reasoning, but should go on after it."""
        room = len(self._tokens) + 1 < self._task.most
        if progress.stopped:
            return room and progress.tokens[-1] in (self._end_of_thought, self._tokenizer.eos_id)
        return room and self._task.budget is not None

    def _show(self, events: list[Event], scores: list[Score]) -> None:
        if events or scores:
            self._publish(Piece(self._choice, _joined(events), scores))

    def _finish(self, session: Session, ended_by: Literal["stop", "length"]) -> bool:
        """Ends an answer; returns whether there is another to come."""
        session.end()
        self._show(self._reader.finish(ended_by), [])
        self._counts["completion"] += len(self._tokens)
        self._counts["reasoning"] += self._reader.reasoning_tokens
        self._publish(End(self._choice, self._reader.message.finish_reason, self._reader.stop_sequence))
        if self._choice + 1 < self._task.n:
            self._next_choice(session)
            return True
        now = time.perf_counter()
        rest = self._counts["completion"] - 1
        rate = rest / (now - self._first) if self._first and rest > 0 else 0.0
        first = (self._first or now) - self._arrived
        self._publish(Usage(prompt=len(self.ids), cached=self._cached, first_seconds=first, rate=rate, **self._counts))
        return False


def _joined(events: list[Event]) -> list[Event]:
    """Neighbouring pieces of text made one."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + event.text)
        else:
            joined.append(event)
    return joined
