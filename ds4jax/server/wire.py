"""From updates to responses: one object collects an answer and says, piece by piece, what a stream sends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ds4jax.server.answer import End, Piece, Score, Usage
from ds4jax.server.errors import ApiError
from ds4jax.server.service import Running
from ds4jax.tokenizer import Tokenizer

KEEP_ALIVE = 5.0  # seconds
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks

FINGERPRINT = f"ds4jax-{metadata.version('ds4jax')}"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@runtime_checkable
class Wire(Protocol):
    """An answer in the shape of an API.

    Each method returns the frames that a stream sends then; `whole` is the response without a stream, once `usage` was
    called.
    """

    def begin(self) -> list[str]: ...

    def piece(self, piece: Piece) -> list[str]: ...

    def end(self, end: End) -> list[str]: ...

    def usage(self, usage: Usage) -> list[str]: ...

    def error(self, error: ApiError) -> list[str]: ...

    def keep_alive(self) -> str: ...

    def whole(self) -> dict[str, Any]: ...


async def respond(request: Request, running: Running, wire: Wire, stream: bool) -> Response:
    """Answers with a stream of events or with one object. Raises `ApiError` if the answer fails before it began."""
    if stream:
        return StreamingResponse(_frames(running, wire), media_type="text/event-stream", headers=_HEADERS)
    gone = asyncio.ensure_future(_gone(request))
    answer = asyncio.ensure_future(_whole(running, wire))
    await asyncio.wait([gone, answer], return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not answer.done():
        running.cancel()
        answer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answer
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(answer.result())


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(running: Running, wire: Wire) -> dict[str, Any]:
    wire.begin()
    async for update in running.updates(KEEP_ALIVE):
        if isinstance(update, ApiError):
            raise update
        if update is not None:
            frames(wire, update)
    return wire.whole()


async def _frames(running: Running, wire: Wire) -> AsyncIterator[str]:
    try:
        for frame in wire.begin():
            yield frame
        async for update in running.updates(KEEP_ALIVE):
            for frame in [wire.keep_alive()] if update is None else frames(wire, update):
                yield frame
    finally:
        running.cancel()


def frames(wire: Wire, update: Piece | End | Usage | ApiError) -> list[str]:
    """What a stream sends for an update."""
    if isinstance(update, Piece):
        return wire.piece(update)
    if isinstance(update, End):
        return wire.end(update)
    return wire.usage(update) if isinstance(update, Usage) else wire.error(update)


def data(value: Any) -> str:
    """A frame without a name."""
    return f"data: {to_json(value)}\n\n"


def event(value: dict[str, Any]) -> str:
    """A frame named by the value's type."""
    return f"event: {value['type']}\ndata: {to_json(value)}\n\n"


def to_json(value: Any) -> str:
    """Compact JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def new_id(prefix: str) -> str:
    """An identifier that nobody can guess."""
    return prefix + secrets.token_hex(16)


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, U+FFFD for what is not a whole character."""
    return tokenizer.token_bytes[token].decode(errors="replace")


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


def scored(tokenizer: Tokenizer, score: Score, top: int) -> dict[str, Any]:
    """A token's log-probabilities in the shape of OpenAI's chat API."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = list(tokenizer.token_bytes[token])
        return {"token": text_of(tokenizer, token), "logprob": finite(logprob), "bytes": raw}

    others = zip(score.alternatives.ids[:top], score.alternatives.logprobs[:top], strict=True)
    return entry(score.token, score.alternatives.logprob) | {"top_logprobs": [entry(t, p) for t, p in others]}
