"""What all endpoints share: the model, its scheduler, and the defaults of requests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ds4jax.chat import END_THINK, Prompt, render
from ds4jax.chat_parse import Parser
from ds4jax.chat_profile import Profile, Thinking, thinking_of
from ds4jax.chat_tools import DSML
from ds4jax.decode.sampling import Sampling
from ds4jax.engine import Engine
from ds4jax.engine_session import Sessions
from ds4jax.errors import RequestError
from ds4jax.server.answer import Answering, Task, Update, Usage
from ds4jax.server.errors import ApiError
from ds4jax.server.fields import Fields
from ds4jax.server.grammar import Grammars
from ds4jax.server.guide import Penalties, fixed_bias
from ds4jax.server.metrics import Metrics
from ds4jax.server.scheduler import Scheduler

log = logging.getLogger("ds4jax.server")

MOST_CHOICES = 16
MOST_STOPS = 16
_EFFORT_FIELDS = ("reasoning_effort", "reasoning", "output_config", "chat_template_kwargs")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What holds for a request that does not say otherwise."""

    name: str
    profile: Profile
    thinking: Thinking
    sampling: Sampling


class Running:
    """A request that was handed to the scheduler."""

    def __init__(self, task: Task, service: Service) -> None:
        """Raises `ApiError` if the line is full."""
        self._service, self._loop = service, asyncio.get_running_loop()
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        self._answering = Answering(task, service.tokenizer, self._publish)
        service.scheduler.submit(self._answering)

    def cancel(self) -> None:
        """Ends it; the burst under way is the last."""
        self._answering.cancelled = True

    async def updates(self, silence: float) -> AsyncIterator[Update | None]:
        """What comes, `Usage` or an error last; None after so many seconds of silence. Cancels when it is left."""
        try:
            while True:
                update: Update | None = None
                with contextlib.suppress(TimeoutError):
                    update = await asyncio.wait_for(self._updates.get(), silence)
                if isinstance(update, Usage):
                    self._service.metrics.answered(update)
                yield update
                if isinstance(update, Usage | ApiError):
                    return
        finally:
            self.cancel()

    def _publish(self, update: Update) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._updates.put_nowait, update)


class Service:
    """A loaded model at work."""

    def __init__(self, engine: Engine, sessions: Sessions, defaults: Defaults, queue: int) -> None:
        self.engine, self.tokenizer, self.defaults = engine, engine.tokenizer, defaults
        self.context = sessions.context
        self.grammars = Grammars(engine.tokenizer)
        self.scheduler = Scheduler(sessions, queue)
        self.metrics = Metrics(self.scheduler)

    def close(self) -> None:
        """Ends running requests with an error."""
        self.scheduler.close()

    def chat_task(
        self,
        request: Fields,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        schema: Mapping[str, Any] | None = None,
        most: int | None,
        stop: Sequence[str],
        **settings: Any,
    ) -> Task:
        """The task of continuing a conversation; `settings` are further fields of `Task`.

        Raises:
            ApiError: the conversation is malformed or too long.
        """
        profile = self.defaults.profile
        place = "messages" if request.has("messages") else "input"
        try:
            thinking = thinking_of(request.values, self.defaults.thinking, profile)
        except RequestError as error:
            raise ApiError(400, str(error), next(filter(request.has, _EFFORT_FIELDS), "thinking")) from error
        try:
            prompt = render(
                messages, tools=tools, thinking=thinking.on, effort=thinking.effort, profile=profile, schema=schema
            )
            ids = prompt.encode(self.tokenizer)
        except RequestError as error:
            raise ApiError(400, str(error), "tools" if str(error).startswith("tools") else place) from error
        if prompt.complete:
            raise ApiError(400, "the last message is a complete answer; add a user message", place)
        self.check_length(ids, place)
        return Task(
            ids=ids,
            reader=lambda: self.parser(prompt, tools, stop),
            most=self.room(ids, most),
            reasoning=prompt.reasoning,
            **settings,
        )

    def parser(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]], stop: Sequence[str]) -> Parser:
        """Reads an answer to a prompt."""
        return Parser(tools, reasoning=prompt.reasoning, stop=stop, tokenizer=self.tokenizer)

    def room(self, ids: Sequence[int], most: int | None) -> int:
        """Most tokens of an answer."""
        left = self.context - len(ids)
        return left if most is None else min(most, left)

    def check_length(self, ids: Sequence[int], param: str) -> None:
        """Raises `ApiError` if a prompt leaves no room for an answer."""
        if len(ids) >= self.context:
            raise ApiError(
                400,
                f"prompt is too long: {len(ids)} tokens, but prompt and answer together may have {self.context}",
                param,
                "context_length_exceeded",
            )

    def sampling(self, request: Fields) -> Sampling:
        """How tokens are drawn, from the fields that all APIs share."""
        default = self.defaults.sampling
        top_k = request.integer("top_k", -1)
        temperature, top_p = request.number("temperature", 0, 2), request.number("top_p", 0, 1, above=True)
        min_p = request.number("min_p", 0, 1)
        return Sampling(
            default.temperature if temperature is None else temperature,
            default.top_k if top_k is None else max(top_k, 0),
            default.top_p if top_p is None else top_p,
            default.min_p if min_p is None else min_p,
        )

    def seed(self, request: Fields) -> int:
        """The request's seed, or a fresh one."""
        seed = request.integer("seed")
        return secrets.randbits(64) if seed is None else seed % (1 << 64)

    def penalties(self, request: Fields) -> Penalties:
        """Penalties of the fields of OpenAI's APIs."""
        return Penalties(
            request.number("presence_penalty", -2, 2) or 0.0, request.number("frequency_penalty", -2, 2) or 0.0
        )

    def bias(self, request: Fields, *, calls: bool) -> Any:
        """The bias of all tokens: `logit_bias`, and no markup of calls if there are no tools."""
        biases = {}
        if (wanted := request.object("logit_bias")) is not None:
            for name in wanted.values:
                if not name.isascii() or not name.isdigit() or int(name) >= self.tokenizer.vocab_size:
                    most = self.tokenizer.vocab_size - 1
                    raise ApiError(400, f"logit_bias: {name[:40]!r} is no token id from 0 to {most}", "logit_bias")
                biases[int(name)] = wanted.number(name, -100, 100) or 0.0
        banned = [] if calls else [self.tokenizer.special_ids[DSML]]
        return fixed_bias(self.tokenizer.vocab_size, biases, banned)

    @property
    def end_of_thought(self) -> int:
        """The token that ends a reasoning block."""
        return self.tokenizer.special_ids[END_THINK]
