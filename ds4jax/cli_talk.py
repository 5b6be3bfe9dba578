"""A conversation with a loaded model, without a terminal: what was said, and the answer as it comes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.chat import END_THINK, check_vocabulary, render
from ds4jax.chat_parse import Event, Message, Parser
from ds4jax.chat_profile import Profile, Thinking
from ds4jax.chat_tools import DSML
from ds4jax.decode.sampling import Sampling
from ds4jax.engine import Engine
from ds4jax.engine_session import Ask, Sessions
from ds4jax.errors import RequestError

CONTEXT = 32768
"""Most tokens of a conversation, unless the user or the model says otherwise."""

_FORMAT = "ds4jax chat 1"


@dataclasses.dataclass
class Figures:
    """Counts and times of one answer. cached: tokens of the prompt that earlier turns had left in the cache."""

    prompt_tokens: int = 0
    cached: int = 0
    tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    finish: str = ""

    @property
    def rate(self) -> float:
        """Tokens per second after the first; 0 if there are none."""
        elapsed = self.seconds - self.first_seconds
        return (self.tokens - 1) / elapsed if self.tokens > 1 and elapsed else 0.0


class Talk:
    """A conversation.

    system: text before the first turn; empty for none. messages: the turns so far, as in OpenAI's API.
    thinking: of the answers to come. figures: of the last answer.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        profile: Profile,
        thinking: Thinking,
        sampling: Sampling,
        seed: int,
        max_new_tokens: int | None,
        system: str = "",
    ) -> None:
        """Compiles.

        Raises:
            CheckpointError: the vocabulary has no chat.
            CapacityError: the cache does not fit.
        """
        check_vocabulary(engine.tokenizer)
        self.tokenizer, self.profile, self.thinking, self.system = engine.tokenizer, profile, thinking, system
        context = engine.context or min(CONTEXT, engine.config.max_position_embeddings)
        sessions = Sessions(engine, 1, context)
        (self._session,) = sessions.all
        self.context, self.compile_seconds = context, sessions.warm_seconds
        self.messages: list[dict[str, Any]] = []
        self.figures = Figures()
        self._sampling, self._seed, self._most = sampling, seed, max_new_tokens or context
        self._answers = 0
        # Without tools in the prompt, nothing good can come of a call.
        self._bias = np.zeros(engine.config.vocab_size, np.float32)
        self._bias[self.tokenizer.special_ids[DSML]] = -np.inf

    def say(self, text: str) -> None:
        """Adds a message of the user."""
        self.messages.append({"role": "user", "content": text})

    def take_back(self) -> str | None:
        """Removes the last message of the user and what followed it; returns it, or None if there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def answer(self) -> Generator[list[Event], None, None]:
        """Answers: gives what is new after every burst of steps, also if that is nothing.

        However it ends, the answer joins the conversation; closing the generator stops it. Raises `RequestError` if the
        conversation leaves no room in the context.
        """
        prompt = render(self._all(), thinking=self.thinking.on, effort=self.thinking.effort, profile=self.profile)
        ids = prompt.encode(self.tokenizer)
        parser = Parser(reasoning=prompt.reasoning, tokenizer=self.tokenizer)
        self.figures = Figures(prompt_tokens=len(ids))
        self._began, ended = time.perf_counter(), "stopped"
        self._answers += 1
        try:
            while True:
                new, stopped = yield from self._continue(ids, parser)
                if not (stopped and parser.state == "reasoning"):
                    break
                # The model would end its turn without an answer; where its reasoning is closed instead, it gives one.
                ids = [*ids, *new, self.tokenizer.special_ids[END_THINK]]
                yield parser.feed_ids(ids[-1:])
            last = parser.finish("stop" if stopped else "length")
            ended = "stop" if stopped else "length"
            yield last
        finally:
            if ended == "stopped":
                parser.finish("length")
            self.figures.finish = ended
            self.messages.append(_as_message(parser.message))

    def _continue(self, ids: list[int], parser: Parser) -> Generator[list[Event], None, tuple[list[int], bool]]:
        """Runs until the answer ends; returns its tokens and whether a stop token ended it."""
        session, figures, new = self._session, self.figures, []
        ask = Ask(
            most=self._most - figures.tokens,
            sampling=self._sampling,
            seed=(self._seed + self._answers) % (1 << 64),
            stop_ids=self.tokenizer.stop_ids,
            bias=self._bias,
        )
        steps, drafted, accepted = figures.steps, figures.drafted, figures.accepted
        shared = session.begin(ids, ask)
        if not figures.tokens:
            figures.cached = shared
        try:
            session.launch()
            while True:
                session.launch()  # the device works while the host reads
                progress = session.take()
                figures.seconds = time.perf_counter() - self._began
                if progress.tokens and not figures.tokens:
                    figures.first_seconds = figures.seconds
                figures.tokens += len(progress.tokens)
                figures.steps, figures.drafted = steps + progress.steps, drafted + progress.drafted
                figures.accepted = accepted + progress.accepted
                new += progress.tokens[: len(progress.tokens) - progress.stopped]
                yield parser.feed_ids(progress.tokens[: len(progress.tokens) - progress.stopped])
                if progress.done:
                    return new, progress.stopped
        finally:
            session.end()

    def save(self, path: Path) -> None:
        """Writes the conversation to a file. Raises `RequestError` if that fails."""
        text = json.dumps({"format": _FORMAT, "messages": self._all()}, ensure_ascii=False, indent=1)
        try:
            path.write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{path}: cannot write: {error.strerror}") from error

    def load(self, path: Path) -> None:
        """Replaces the conversation by a saved one. Raises `RequestError` if the file is none."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"{path}: cannot read: {error.strerror}") from error
        except (ValueError, RecursionError):
            saved = None
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT or not isinstance(saved.get("messages"), list):
            raise RequestError(f"{path}: expected a conversation that /save wrote")
        messages = saved["messages"]
        if messages:
            render(messages)  # raises what is wrong with them
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        self.system, self.messages = system, messages[1:] if system else messages

    def _all(self) -> list[dict[str, Any]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]


def _as_message(answer: Message) -> dict[str, Any]:
    reasoning = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
    return {"role": "assistant", "content": answer.content, **reasoning}
