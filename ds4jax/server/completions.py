"""OpenAI's older completions: `POST /v1/completions`, plain text that goes on."""

from __future__ import annotations

import time
from typing import Any

from ds4jax.chat_parse import Content
from ds4jax.errors import RequestError
from ds4jax.server.answer import End, Piece, Task, TextReader, Usage
from ds4jax.server.errors import ApiError
from ds4jax.server.fields import Fields
from ds4jax.server.openai import openai_usage, speed
from ds4jax.server.service import MOST_CHOICES, MOST_STOPS, Service
from ds4jax.server.wire import FINGERPRINT, data, finite, new_id, text_of

NEW_TOKENS = 16  # OpenAI's default
_FILL = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


def read_completion(service: Service, fields: Fields) -> tuple[Task, CompletionWire]:
    """What a completion request asks for, and how it is answered. Raises `ApiError` if it cannot be served."""
    model = fields.text("model", required=True)
    assert model is not None
    fields.refuse("echo", "the prompt is not repeated", unless=[False])
    fields.refuse("best_of", "use n", unless=[1, fields.any("n")])
    top = fields.integer("logprobs", 0, 20)
    ids = _prompt(service, fields)
    service.check_length(ids, "prompt")
    stream = bool(fields.flag("stream"))
    options = fields.object("stream_options")
    if options is not None and not stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    stop = fields.strings("stop", MOST_STOPS)
    n = fields.integer("n", 1, MOST_CHOICES) or 1
    task = Task(
        ids=ids,
        reader=lambda: TextReader(service.tokenizer, stop),
        most=service.room(ids, fields.integer("max_tokens", 1) or NEW_TOKENS),
        sampling=service.sampling(fields),
        seed=service.seed(fields),
        n=n,
        scored=top is not None,
        bias=service.bias(fields, calls=True),
        penalties=service.penalties(fields),
    )
    usage = stream and options is not None and bool(options.flag("include_usage"))
    return task, CompletionWire(service, model, n, usage, top)


def _prompt(service: Service, fields: Fields) -> list[int]:
    """Ids of the prompt: text after BOS, or ids taken as they are."""
    prompt, tokenizer = fields.any("prompt"), service.tokenizer
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        if min(prompt) < 0 or max(prompt) >= tokenizer.vocab_size:
            raise ApiError(400, f"prompt: expected ids from 0 to {tokenizer.vocab_size - 1}", "prompt")
        return prompt
    if not isinstance(prompt, str):
        raise fields.wrong("prompt", "one text or one list of token ids")
    special = bool(fields.flag("parse_special"))
    try:
        if (suffix := fields.text("suffix")) is not None:
            begin, hole, end = (tokenizer.special_ids[mark] for mark in _FILL)
            before, after = tokenizer.encode(prompt, special), tokenizer.encode(suffix, special)
            return [tokenizer.bos_id, begin, *before, hole, *after, end]
        return service.engine.encode(prompt, special)
    except RequestError as error:
        raise ApiError(400, f"prompt: {error}", "prompt") from error


class CompletionWire:
    """Text completions and their chunks (see `wire.Wire`). top: as for `ChatWire`."""

    def __init__(self, service: Service, model: str, n: int, usage: bool, top: int | None) -> None:
        self._tokenizer, self._top, self._wants_usage = service.tokenizer, top, usage
        self._texts, self._finish = [""] * n, [""] * n
        self._scores = [_blank() for _ in range(n)]
        self._offsets = [0] * n
        self._head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._usage: dict[str, Any] = {}

    def begin(self) -> list[str]:
        """Nothing."""
        return []

    def piece(self, piece: Piece) -> list[str]:
        """One chunk."""
        text = "".join(event.text for event in piece.events if isinstance(event, Content))
        self._texts[piece.choice] += text
        return [self._chunk(piece.choice, text, self._take_scores(piece), None)]

    def end(self, end: End) -> list[str]:
        """The last chunk of a choice."""
        self._finish[end.choice] = end.finish
        return [self._chunk(end.choice, "", None, end.finish)]

    def usage(self, usage: Usage) -> list[str]:
        """The usage, if wanted, and the end of the stream."""
        self._usage = {"usage": openai_usage(usage), "ds4jax": speed(usage)}
        last = [data({**self._head, "choices": [], **self._usage})] if self._wants_usage else []
        return [*last, "data: [DONE]\n\n"]

    def error(self, error: ApiError) -> list[str]:
        """A failure in mid-stream."""
        return [data(error.openai())]

    def keep_alive(self) -> str:
        """A comment."""
        return ": keep-alive\n\n"

    def whole(self) -> dict[str, Any]:
        """The completion."""
        choices = [
            {
                "index": i,
                "text": text,
                "logprobs": None if self._top is None else self._scores[i],
                "finish_reason": self._finish[i],
            }
            for i, text in enumerate(self._texts)
        ]
        return {**self._head, "choices": choices, **self._usage}

    def _take_scores(self, piece: Piece) -> dict[str, list[Any]] | None:
        if self._top is None or not piece.scores:
            return None
        fresh = _blank()
        for score in piece.scores:
            text, others = text_of(self._tokenizer, score.token), score.alternatives
            fresh["tokens"].append(text)
            fresh["token_logprobs"].append(finite(others.logprob))
            best = zip(others.ids[: self._top], others.logprobs[: self._top], strict=True)
            fresh["top_logprobs"].append({text_of(self._tokenizer, token): finite(p) for token, p in best})
            fresh["text_offset"].append(self._offsets[piece.choice])
            self._offsets[piece.choice] += len(text)
        for name, values in fresh.items():
            self._scores[piece.choice][name] += values
        return fresh

    def _chunk(self, index: int, text: str, scores: dict[str, Any] | None, finish: str | None) -> str:
        choice = {"index": index, "text": text, "logprobs": scores, "finish_reason": finish}
        return data({**self._head, "choices": [choice]})


def _blank() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
