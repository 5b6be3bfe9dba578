"""What may go wrong between a server and its clients: no fault stops it, holds its sessions, or shows its insides."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serving import KEY, SETTINGS, Serving, eventually

from ds4jax.engine_session import Session
from ds4jax.server import wire
from ds4jax.server.errors import ApiError
from ds4jax.server.scheduler import Scheduler

POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize"]
STORY = [{"role": "user", "content": "Tell me a story."}]
LONG = {"model": "any", "messages": STORY, "max_tokens": 900, "seed": 1}


def answered(server: Any) -> float:
    """Tokens of all completed answers, as the server counts them."""
    text = server.http.get("/metrics").text
    return float(re.search(r'ds4jax_tokens_total\{kind="answer"\} (\S+)', text)[1])  # type: ignore[index]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b'{"model": "any"', "not JSON: Expecting ',' delimiter at line 1 column 16"),
        (b'{"model": "\xff"}', "not UTF-8 text: invalid byte at offset 11"),
        (b'["model"]', "a list, expected a JSON object"),
        (b'{"temperature": NaN}', "NaN is no JSON value"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"model": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"messages": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"{}", "is missing, expected a string"),
    ],
)
def test_bodies_that_are_no_request(server, path, body, words):
    response = server.http.post(path, content=body)
    error = response.json()
    assert response.status_code == 400 and words in error["error"]["message"]
    assert error["error"]["type"] == "invalid_request_error"
    assert set(error["error"]) == ({"type", "message"} if "messages" in path else {"type", "message", "param", "code"})
    assert not re.search(r"Traceback|\.py|/usr|/home|/tmp", response.text)


@pytest.mark.parametrize("path, field", [("/v1/completions", "prompt"), ("/v1/responses", "input")])
def test_a_field_that_is_missing_is_called_so(server, path, field):
    error = server.error(path, 400, model="any")
    assert error["param"] == field and error["message"].startswith(f"{field} is missing, expected ")


def test_whole_surrogate_pairs_are_characters(server):
    response = server.http.post("/tokenize", content=b'{"text": "\\ud83d\\ude00"}')
    assert server.post("/detokenize", tokens=response.json()["tokens"]).json() == {"text": "😀"}


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_too_large(server, declared):
    most = SETTINGS.most_bytes
    body = json.dumps({"model": "any", "messages": [{"role": "user", "content": "x" * most}]}).encode()
    pieces = body if declared else iter([body[: most // 2], body[most // 2 :]])
    response = server.http.post("/v1/messages", content=pieces)
    assert response.status_code == 413 and response.json()["error"]["type"] == "request_too_large"


def test_no_such_endpoint_and_no_such_method(server):
    for response, status in ((server.http.get("/v1/engines"), 404), (server.http.get("/v1/completions"), 405)):
        assert response.status_code == status and response.json()["error"]["message"]
        assert response.headers["x-content-type-options"] == "nosniff"
    assert server.http.get("/static/../run.py").status_code == 404


def test_browsers_ask_whether_the_page_has_changed(server):
    assert server.http.get("/").headers["cache-control"] == "no-cache"
    file = server.http.get("/static/app.js")
    again = server.http.get("/static/app.js", headers={"If-None-Match": file.headers["etag"]})
    assert (file.status_code, again.status_code, again.content) == (200, 304, b"")
    assert file.headers["cache-control"] == again.headers["cache-control"] == "no-cache"


def test_health_and_models_and_metrics(server):
    assert server.http.get("/health").json()["status"] == "ok"
    text = server.http.get("/metrics").text
    assert 'ds4jax_requests_total{endpoint="/health",status="200"}' in text and "ds4jax_requests_waiting 0.0" in text


def test_the_prompt_of_a_conversation_can_be_looked_at(server):
    found = server.post("/apply-template", messages=STORY).json()
    assert found["prompt"].endswith("<｜User｜>Tell me a story.<｜Assistant｜></think>")
    assert server.post("/detokenize", tokens=found["tokens"]).json()["text"] == found["prompt"]
    forged = server.post("/tokenize", text="<｜User｜>").json()["tokens"]
    assert len(forged) > 1 == len(server.post("/tokenize", text="<｜User｜>", parse_special=True).json()["tokens"])
    assert server.error("/detokenize", 400, tokens=[-1])["param"] == "tokens"


def test_many_clients_at_once(server):
    async def one(client: httpx.AsyncClient, i: int) -> str:
        content = f"Tell me story {i}." if i % 2 else "Tell me a story."
        body = {"model": "any", "max_tokens": 3, "seed": 1, "messages": [{"role": "user", "content": content}]}
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    async def all_of_them() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            return await asyncio.gather(*(one(client, i) for i in range(64)))

    texts = asyncio.run(all_of_them())
    assert all(texts) and len({text for i, text in enumerate(texts) if i % 2 == 0}) == 1
    assert eventually(server.idle)


def test_first_come_first_served_in_turns(server, sessions):
    class Work:
        """Three turns of nothing."""

        ids: Sequence[int] = (1, 2)
        cancelled = False

        def __init__(self, name: str) -> None:
            self.name = name

        def turn(self, session: Session) -> bool:
            turns.append(self.name)
            return turns.count(self.name) < 3

        def fail(self, error: ApiError) -> None:
            turns.append(f"{self.name} failed")

    assert eventually(server.idle)
    turns: list[str] = []
    scheduler = Scheduler(sessions, queue=9)
    # Nobody starts before all have come.
    with scheduler._change:
        for name in "abcde":
            scheduler.submit(Work(name))
    assert eventually(lambda: len(turns) == 15)
    assert "".join(turns) == "ababab" + "cdcdcd" + "eee"
    scheduler.close()


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_stops_the_answer(server, stream):
    before = answered(server)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(httpx.ReadTimeout))
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=1))
        asked = client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": stream})
        next(stack.enter_context(asked).iter_lines())
    assert eventually(server.idle)
    assert answered(server) == before  # an answer that was cancelled is not counted


def test_who_goes_away_while_waiting_is_not_served(server):
    before = answered(server)
    with contextlib.ExitStack() as stack:
        for _ in range(4):  # sessions are for two
            client = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
            stack.enter_context(client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}))
        assert eventually(lambda: server.service.scheduler.waiting == 2)
    assert eventually(server.idle) and answered(server) == before


def test_a_slow_reader_holds_nobody_up(server):
    body = json.dumps({**LONG, "max_tokens": 40, "logprobs": True, "top_logprobs": 20, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        slow.sendall(head + body)
        assert server.post("/v1/chat/completions", **{**LONG, "max_tokens": 4}).status_code == 200
        assert eventually(server.idle)  # the slow one's answer is complete, though nobody has read it
        text = b""
        while b"[DONE]" not in text:
            text += slow.recv(1 << 16)
    assert text.count(b'"finish_reason":"length"') == 1


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"POST /tokenize HTTP/1.1\r\n"]
)
def test_no_http_at_all(server, garbage):
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
        raw.sendall(garbage)
        raw.shutdown(socket.SHUT_WR)
        assert b"Traceback" not in raw.recv(1 << 16)
    assert server.http.get("/health").status_code == 200


def test_a_long_prompt_keeps_the_connection_alive(server, monkeypatch):
    monkeypatch.setattr(wire, "KEEP_ALIVE", 0.01)
    request = {"model": "any", "max_tokens": 1, "messages": [{"role": "user", "content": "once more " * 40}]}
    with server.http.stream("POST", "/v1/chat/completions", json={**request, "stream": True}) as response:
        lines = list(response.iter_lines())
    assert ": keep-alive" in lines and lines[-2] == "data: [DONE]"
    request["messages"] = [{"role": "user", "content": "twice more " * 40}]
    assert "ping" in [name for name, _ in server.events("/v1/messages", **request)]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_fault_of_the_server_is_told_without_details(server, monkeypatch, path):
    body = {"model": "any", "messages": STORY, "input": "Hi", "max_tokens": 4, "max_output_tokens": 4}

    def said(seed: int) -> list[str]:
        return re.findall(r'"(?:text|content)":"([^"]*)"', server.post(path, **body, seed=seed).text)

    before = said(2)

    def fail(session: Session) -> None:
        raise OSError("/secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "take", fail)
        error = server.error(path, 500, **body)
        last = server.events(path, **body)[-1]
    text = json.dumps([error, last])
    assert "secret" not in text and "its log says why" in text
    assert last[0] == {"/v1/messages": "error", "/v1/responses": "response.failed"}.get(path)
    with ThreadPoolExecutor() as pool:  # and both sessions are as good as new
        assert list(pool.map(said, [2, 2])) == [before] * 2 and before


def test_a_web_page_of_another_site_is_refused(server):
    own = {"Origin": server.url}
    assert server.http.post("/tokenize", json={"text": "x"}, headers=own).status_code == 200
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example:80"}):
        response = server.http.post("/tokenize", json={"text": "x"}, headers=headers)
        assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
    assert "access-control-allow-origin" not in server.http.get("/health", headers=own).headers


@pytest.fixture(scope="module")
def guarded(server: Any, sessions: Any) -> Any:
    """Another server with a key and a short line, for the same sessions while the first one has nothing to do."""
    assert eventually(server.idle)
    friend = "https://friend.example"
    with Serving(sessions, dataclasses.replace(SETTINGS, key=KEY, cors=(friend,), queue=1)) as serving:
        yield serving


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}])
def test_a_key_opens(guarded, headers):
    assert guarded.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {KEY}x"}, {"x-api-key": ""}, {"x-api-key": "ü"}])
def test_without_the_key_nothing_opens_but_page_and_health(guarded, headers):
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    for path in ("/v1/models", "/metrics"):
        response = guarded.http.get(path, headers=raw)
        assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
    assert guarded.http.post("/v1/messages", headers=raw).json()["type"] == "error"
    assert guarded.http.get("/health", headers=raw).status_code == 200


def test_a_friendly_site_may_ask(guarded):
    friend = {"Origin": "https://friend.example"}
    preflight = guarded.http.options("/v1/models", headers={**friend, "Access-Control-Request-Method": "GET"})
    assert preflight.headers["access-control-allow-origin"] == friend["Origin"]
    foreign = {"Origin": "https://evil.example", "x-api-key": KEY}
    assert "access-control-allow-origin" not in guarded.http.get("/v1/models", headers=foreign).headers


def test_a_full_line_turns_away_and_a_server_that_stops_says_so(sessions, server):
    assert eventually(server.idle)
    ends: list[Any] = []

    def read(serving: Serving) -> None:
        with contextlib.suppress(httpx.HTTPError):
            ends.append(serving.events("/v1/chat/completions", **LONG)[-1][1])

    with Serving(sessions, dataclasses.replace(SETTINGS, queue=1)) as serving:
        readers = [threading.Thread(target=read, args=(serving,)) for _ in range(3)]
        for reader in readers:
            reader.start()
        assert eventually(lambda: (serving.service.scheduler.active, serving.service.scheduler.waiting) == (2, 1))
        assert serving.error("/v1/chat/completions", 429, **LONG)["type"] == "rate_limit_error"
    for reader in readers:
        reader.join()
    assert [end["error"]["type"] for end in ends] == ["server_error"] * 3
