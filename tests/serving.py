"""A real server on a port of its own, for tests with real clients."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from ds4jax.chat_profile import Thinking
from ds4jax.decode.sampling import Sampling
from ds4jax.engine_session import Sessions
from ds4jax.server.guide import Matcher
from ds4jax.server.run import Settings, build_server
from ds4jax.server.service import Defaults, Service
from ds4jax.tokenizer import Tokenizer

KEY = "k3y"
CALLS = """Two gates.

<｜DSML｜tool_calls>
<｜DSML｜invoke name="open_gate">
<｜DSML｜parameter name="side" string="true">west</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="open_gate">
<｜DSML｜parameter name="side" string="true">a "b" </c></｜DSML｜parameter>
<｜DSML｜parameter name="wide" string="false">[1, true]</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""
CALLED = [{"side": "west"}, {"side": 'a "b" </c>', "wide": [1, True]}]
SETTINGS = Settings("stories", "preview", port=0, queue=64, most_bytes=1 << 20)


class Script:
    """A grammar (see `guide.Matcher`) that leaves the model one text, which another grammar must allow as well."""

    def __init__(self, tokenizer: Tokenizer, text: str, within: Matcher | None) -> None:
        self._ids = [*tokenizer.encode(text, parse_special=True), tokenizer.eos_id]
        self._size, self._within = tokenizer.vocab_size, within

    def allowed(self) -> np.ndarray:
        assert self._within is None or self._within.allowed()[self._ids[0]]
        mask = np.zeros(self._size, bool)
        mask[self._ids[0]] = True
        return mask

    def accept(self, token: int) -> None:
        assert token == self._ids.pop(0)
        if self._within is not None:
            self._within.accept(token)


class Serving:
    """Runs a server in a thread while the `with` block lasts."""

    def __init__(self, sessions: Sessions, settings: Settings = SETTINGS) -> None:
        defaults = Defaults(settings.name, settings.profile, Thinking(on=False), Sampling(temperature=1.0))
        self.service = Service(sessions.engine, sessions, defaults, settings.queue)
        self._server = build_server(self.service, settings)
        self._server.announce = self._listening
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._server.run)

    def _listening(self, address: str) -> None:
        self.url = address
        self._ready.set()

    def __enter__(self) -> Serving:
        self._thread.start()
        assert self._ready.wait(30)
        self.http = httpx.Client(base_url=self.url, timeout=60)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.http.close()

    def post(self, path: str, **body: Any) -> httpx.Response:
        """A request with a JSON body."""
        return self.http.post(path, json=body)

    def error(self, path: str, status: int, **body: Any) -> dict[str, Any]:
        """The error that a request gets."""
        response = self.post(path, **body)
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        return error

    def events(self, path: str, **body: Any) -> list[tuple[str | None, Any]]:
        """Name and data of every event of a stream."""
        found: list[tuple[str | None, Any]] = []
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            name = None
            for line in response.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    text = line.removeprefix("data: ")
                    found.append((name, text if text == "[DONE]" else json.loads(text)))
                    name = None
        return found

    def dictate(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        """Has the model write this text after its reasoning, through the grammar of each request."""
        grammars, tokenizer = self.service.grammars, self.service.tokenizer
        matcher = grammars.matcher

        def scripted(*request: Any) -> Callable[[], Script]:
            within = matcher(*request)
            return lambda: Script(tokenizer, text, None if within is None else within())

        monkeypatch.setattr(grammars, "matcher", scripted)

    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return self.service.scheduler.active == 0 and self.service.scheduler.waiting == 0


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()
