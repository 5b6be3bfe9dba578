"""The endpoints, and what holds for all of them: size of bodies, keys, origins, shape of errors."""

from __future__ import annotations

import dataclasses
import hmac
import logging
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds4jax.errors import RequestError
from ds4jax.server.answer import Task
from ds4jax.server.anthropic import count_tokens, read_messages
from ds4jax.server.completions import read_completion
from ds4jax.server.errors import ApiError, internal
from ds4jax.server.fields import Fields, parse_body
from ds4jax.server.openai import read_chat
from ds4jax.server.responses import read_response
from ds4jax.server.service import Running, Service
from ds4jax.server.wire import Wire, respond

log = logging.getLogger("ds4jax.server")

Read = Callable[[Service, Fields], tuple[Task, Wire]]

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Browsers ask whether a file has changed; else a new version's page would run with the old one's scripts.
_FRESH = {"Cache-Control": "no-cache"}
_PAGE_HEADERS = {"Content-Security-Policy": _PAGE_POLICY, "Referrer-Policy": "no-referrer", **_FRESH}
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may use the server. key: what a client must send, if anything. origins: web sites that may. most: bytes of a
    body."""

    key: str | None = None
    origins: tuple[str, ...] = ()
    most: int = 64 << 20


def build_app(service: Service, access: Access) -> Starlette:
    """The application."""

    def answers(read: Read) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            body = await request.body()

            def parsed() -> tuple[Task, Wire, bool]:
                fields = parse_body(body)
                stream = bool(fields.flag("stream"))
                return *read(service, fields), stream

            # Rendering and splitting a long prompt takes a while, in which others want to be served.
            task, wire, stream = await run_in_threadpool(parsed)
            return await respond(request, Running(task, service), wire, stream)

        return endpoint

    def computes(compute: Callable[[Service, Fields], dict[str, Any]]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            body = await request.body()
            return JSONResponse(await run_in_threadpool(lambda: compute(service, parse_body(body))))

        return endpoint

    async def model(request: Request) -> Response:
        if request.path_params["name"] != service.defaults.name:
            raise ApiError(404, f"no such model; there is {service.defaults.name}", "model", "model_not_found")
        return JSONResponse(_model(service))

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def health(request: Request) -> Response:
        scheduler = service.scheduler
        return JSONResponse({"status": "ok", "active": scheduler.active, "waiting": scheduler.waiting})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    files = Path(str(resources.files("ds4jax.server") / "static"))

    async def page(request: Request) -> Response:
        return Response((files / "index.html").read_bytes(), media_type="text/html", headers=_PAGE_HEADERS)

    routes = [
        Route("/", page),
        Mount("/static", PageFiles(directory=files, check_dir=False)),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", answers(read_chat), methods=["POST"]),
        Route("/v1/completions", answers(read_completion), methods=["POST"]),
        Route("/v1/responses", answers(read_response), methods=["POST"]),
        Route("/v1/messages", answers(read_messages), methods=["POST"]),
        Route("/v1/messages/count_tokens", computes(count_tokens), methods=["POST"]),
        Route("/tokenize", computes(_tokenize), methods=["POST"]),
        Route("/detokenize", computes(_detokenize), methods=["POST"]),
        Route("/apply-template", computes(_apply_template), methods=["POST"]),
    ]
    middleware = [Middleware(Guard, service=service, access=access)]
    if access.origins:
        allowed = Middleware(CORSMiddleware, allow_origins=access.origins, allow_methods=("*",), allow_headers=("*",))
        middleware.insert(0, allowed)
    handlers = {ApiError: _on_api_error, HTTPException: _on_http_error, ClientDisconnect: _on_disconnect}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)  # type: ignore[arg-type]


class PageFiles(StaticFiles):
    """The files of the chat page."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """A file, or that the browser's copy is good."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(_FRESH)
        return response


class Guard:
    """Lets through who may use the server, bounds bodies, counts, and keeps faults from being shown."""

    def __init__(self, app: ASGIApp, service: Service, access: Access) -> None:
        self._app, self._service, self._access = app, service, access
        self._paths = {"/", "/health", "/metrics", "/tokenize", "/detokenize", "/apply-template", "/v1/models"}
        self._paths |= {f"/v1/{name}" for name in ("chat/completions", "completions", "responses")}
        self._paths |= {"/v1/messages", "/v1/messages/count_tokens"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request, status, read = Request(scope), 0, 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._access.most:
                raise self._too_large()
            return message

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            self._check(request)
            await self._app(scope, bounded, watched)
        except ApiError as error:
            await _error(request, error)(scope, receive, watched)
        except Exception:
            log.exception("%s failed", request.url.path)
            if not status:
                await _error(request, internal())(scope, receive, watched)
        finally:
            path = request.url.path if request.url.path in self._paths else "other"
            self._service.metrics.requests.labels(path, str(status)).inc()

    def _check(self, request: Request) -> None:
        """Raises `ApiError` for a request that may not be served."""
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._access.most:
            raise self._too_large()
        key, origin = self._access.key, request.headers.get("origin")
        host = request.headers.get("host", "")
        if key is None:
            # Without a key the server serves this machine alone: not a page of some web site in a browser here, even
            # if the site's name has been made to point here.
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if name not in _LOOPBACK:
                raise ApiError(403, f"without an API key only {', '.join(_LOOPBACK)} are served, not {name[:80]!r}")
            if origin is not None and origin.partition("://")[2] != host and not self._is_friend(origin):
                raise ApiError(403, "requests from other web sites are refused; start the server with --cors to allow")
        elif not _is_open(request.url.path) and request.method != "OPTIONS":
            bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
            given = bearer.strip(), request.headers.get("x-api-key", "")
            if not any(hmac.compare_digest(one.encode(), key.encode()) for one in given):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _is_friend(self, origin: str) -> bool:
        return origin in self._access.origins or "*" in self._access.origins

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._access.most} bytes", code="request_too_large")


def _is_open(path: str) -> bool:
    return path in ("/", "/health") or path.startswith("/static/")


def _error(request: Request, error: ApiError) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    headers |= {"Retry-After": "1"} if error.status == 429 else {}
    return JSONResponse(error.shaped(request.url.path), error.status, headers)


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return _error(request, error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    words = {404: "no such endpoint", 405: f"{request.method} is not supported here"}
    wrapped = ApiError(error.status_code, words.get(error.status_code, error.detail))
    response = _error(request, wrapped)
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


def _model(service: Service) -> dict[str, Any]:
    name, context = service.defaults.name, service.context
    about = {"id": name, "object": "model", "created": 0, "owned_by": "ds4jax", "type": "model", "display_name": name}
    return {**about, "context_length": context, "max_completion_tokens": context - 1}


def _tokenize(service: Service, fields: Fields) -> dict[str, Any]:
    """`POST /tokenize`: ids and pieces of a text."""
    text, special = fields.text("text", required=True), bool(fields.flag("parse_special"))
    assert text is not None
    try:
        ids = service.tokenizer.encode(text, special)
    except RequestError as error:
        raise ApiError(400, str(error), "text") from error
    if fields.flag("add_bos"):
        ids = [service.tokenizer.bos_id, *ids]
    pieces = [service.tokenizer.token_bytes[token].decode(errors="replace") for token in ids]
    return {"tokens": ids, "pieces": pieces, "count": len(ids)}


def _detokenize(service: Service, fields: Fields) -> dict[str, Any]:
    """`POST /detokenize`: the text of ids."""
    ids, size = fields.array("tokens", required=True) or [], service.tokenizer.vocab_size
    if not all(type(token) is int and 0 <= token < size for token in ids):
        raise ApiError(400, f"tokens: expected ids from 0 to {size - 1}", "tokens")
    return {"text": service.tokenizer.decode(ids)}


def _apply_template(service: Service, fields: Fields) -> dict[str, Any]:
    """`POST /apply-template`: the prompt that a chat request leads to."""
    task, _ = read_chat(service, Fields({"model": service.defaults.name, **fields.values}))
    return {"prompt": service.tokenizer.decode(task.ids), "tokens": task.ids}
