"""From a loaded model to a listening server."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn
from starlette.concurrency import run_in_threadpool

from ds4jax.chat import check_vocabulary
from ds4jax.chat_profile import Profile, Thinking, check_profile, detect_profile, effort_level
from ds4jax.decode.sampling import Sampling
from ds4jax.engine import DEMO, Engine
from ds4jax.engine_session import Sessions
from ds4jax.errors import ConfigError
from ds4jax.runconfig import RunConfig
from ds4jax.server.app import Access, build_app
from ds4jax.server.service import Defaults, Service

log = logging.getLogger("ds4jax.server")

CONTEXT = 32768  # where none is asked for
_ORIGIN = r"\*|[a-z][a-z0-9+.-]*://[^/\sA-Z]+"  # as browsers send it


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is served.

    name: the model's name in replies. profile: of its prompts. host, port: where to listen; port 0 takes a free one.
    key: what clients must send. cors: web sites that may use the server. sessions: requests that run at once, each with
    a cache of its own. queue: requests that may wait beyond these. sampling, thinking: what holds where a request says
    nothing. most_bytes: largest body.
    """

    name: str
    profile: Profile
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    cors: tuple[str, ...] = ()
    sessions: int = 4
    queue: int = 256
    sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling(temperature=1.0))
    thinking: Thinking = dataclasses.field(default_factory=Thinking)
    most_bytes: int = 64 << 20

    def check(self) -> Settings:
        """Itself.

        Raises:
            ConfigError: a value is out of range or no origin, or the address is open to others and there is no key.
        """
        if self.key is None and not _is_loopback(self.host):
            raise ConfigError(
                f"host {self.host} is open to other machines; give an API key with --api-key, or leave it out"
            )
        if self.key is not None and not (self.key and self.key.isascii() and self.key.isprintable()):
            raise ConfigError("the API key is empty or holds characters that a header cannot; choose another")
        for name, least in (("sessions", 1), ("queue", 0), ("most_bytes", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}, expected at least {least}")
        for origin in self.cors:
            if not re.fullmatch(_ORIGIN, origin):
                raise ConfigError(f"cors = {origin!r}, expected * or https://SITE, in small letters, without a path")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port = {self.port}, expected 0 to {(1 << 16) - 1}")
        return self


def settings_of(run: RunConfig, metadata: Mapping[str, Any]) -> Settings:
    """The settings of a run whose model has this GGUF metadata.

    Raises:
        ConfigError: see `Settings.check`; or the profile is unknown.
        RequestError: a sampling setting or the effort is none.
    """
    sampling = Sampling(1.0 if run.temperature is None else run.temperature, run.top_k, run.top_p, run.min_p)
    sampling.broadcast(1)
    file = "" if run.model is None else run.model.name
    profile = detect_profile(metadata, file) if run.prompt_profile is None else check_profile(run.prompt_profile)
    level = effort_level(run.effort or "high", profile)
    # The demonstration model has never seen reasoning; it would not find its end.
    think = run.think if run.think is not None else run.model is not None
    given = {name: getattr(run, name) for name in ("host", "port", "cors", "sessions", "queue")}
    return Settings(
        name=DEMO.removesuffix(".gguf") if run.model is None else run.model.stem,
        profile=profile,
        key=run.api_key,
        sampling=sampling,
        thinking=Thinking(think and level is not None, level),
        **{name: value for name, value in given.items() if value is not None},
    ).check()


def build_service(engine: Engine, settings: Settings) -> Service:
    """Prepares programs and memory, which takes as long as compiling does.

    Raises:
        CheckpointError: the vocabulary is not that of a chat model.
        CapacityError: the caches do not fit.
    """
    check_vocabulary(engine.tokenizer)
    context = engine.context or min(CONTEXT, engine.config.max_position_embeddings)
    sessions = Sessions(engine, settings.sessions, context)
    defaults = Defaults(settings.name, settings.profile, settings.thinking, settings.sampling)
    return Service(engine, sessions, defaults, settings.queue)


def open_socket(settings: Settings) -> socket.socket:
    """The address of the server, taken but not listening yet, so that nobody waits there while the model loads.

    Raises:
        ConfigError: the address is taken or is none of this machine's.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {settings.host} port {settings.port}: {reason}; choose another") from error
    return listener


def build_server(service: Service, settings: Settings) -> Server:
    """The server, not listening yet."""
    access = Access(settings.key, settings.cors, settings.most_bytes)
    config = uvicorn.Config(
        build_app(service, access),
        host=settings.host,
        port=settings.port,
        http="h11",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=5,
    )
    return Server(config, service)


class Server(uvicorn.Server):
    """Says where it listens as soon as it does; when it stops, running requests end with an error, at once."""

    announce: Callable[[str], None] | None = None

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list | None = None) -> None:
        """Stops."""
        await run_in_threadpool(self._service.close)
        await super().shutdown(sockets)

    async def startup(self, sockets: list | None = None) -> None:
        """Starts to listen."""
        await super().startup(sockets)
        if self.started and self.announce is not None:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
