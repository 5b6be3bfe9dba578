"""`ds4jax serve`: settings, and a process that serves."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import SETTINGS
from typer.testing import CliRunner

from ds4jax import cli
from ds4jax.chat_profile import Thinking
from ds4jax.decode.sampling import Sampling
from ds4jax.errors import ConfigError, RequestError
from ds4jax.runconfig import RunConfig
from ds4jax.server.run import Settings, open_socket, settings_of

RUN_FILE = """
model = "V4-0731-Q2.gguf"
sampling = {temperature = 0.5, top_p = 0.9}

[server]
host = "::1"
port = 9000
api_key = "k"
cors = ["https://a.example"]
sessions = 2
queue = 5
think = true
effort = "max"
"""


def test_a_run_file_says_how_to_serve(tmp_path):
    found = settings_of(RunConfig.from_toml(RUN_FILE, tmp_path), {})
    assert found == Settings(
        name="V4-0731-Q2",
        profile="0731",
        host="::1",
        port=9000,
        key="k",
        cors=("https://a.example",),
        sessions=2,
        queue=5,
        sampling=Sampling(0.5, 0, 0.9, 0.0),
        thinking=Thinking(True, "max"),
    )


def test_what_is_not_said(tmp_path):
    demo, model = (settings_of(run, {}) for run in (RunConfig(), RunConfig(model=tmp_path / "m.gguf")))
    assert (demo.name, demo.host, demo.port, demo.key, demo.cors) == ("stories", "127.0.0.1", 8000, None, ())
    assert demo.sampling == Sampling(1.0, 0, 1.0, 0.0)
    assert demo.thinking.on is False and model.thinking == Thinking(True, "high")
    assert settings_of(RunConfig(effort="none", model=tmp_path / "m.gguf"), {}).thinking.on is False
    assert settings_of(RunConfig(prompt_profile="0731"), {}).profile == "0731"
    for wrong, kind in ((RunConfig(effort="heroic"), RequestError), (RunConfig(prompt_profile="x"), ConfigError)):
        with pytest.raises(kind):
            settings_of(wrong, {})


def test_a_process_serves_until_it_is_told_to_stop(sessions: Any) -> None:
    command = [sys.executable, "-c", "from ds4jax.cli import app; app()", "serve", "--port", "0", "--sessions", "1"]
    # It finds the programs of `sessions` compiled.
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parent.parent / ".jax_cache")}
    context = ["--context", str(sessions.context)]
    with subprocess.Popen([*command, *context], stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.fullmatch(r"ds4jax: stories at (http://127\.0\.0\.1:\d+)\n", line)
            assert found, line
            with httpx.Client(base_url=found[1], timeout=60) as client:
                body = {"model": "any", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
                answer = client.post("/v1/chat/completions", json=body).json()
                assert answer["usage"]["completion_tokens"] == 2 and answer["ds4jax"]["tokens_per_second"] > 0
                page = client.get("/")
                assert page.headers["content-type"].startswith("text/html") and "<!doctype html>" in page.text
                assert "default-src 'none'" in page.headers["content-security-policy"]
                files = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
                assert len(files) == 3 and all(client.get(name).status_code == 200 for name in files)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == ""


def test_what_is_wrong_is_said_before_anything_is_loaded() -> None:
    failed = CliRunner().invoke(cli.app, ["serve", "--host", "0.0.0.0"])
    assert failed.exit_code == 2 and "give an API key with --api-key" in failed.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host": "0.0.0.0"}, "give an API key with --api-key"),
        ({"host": "example.org"}, "give an API key with --api-key"),
        ({"key": ""}, "the API key is empty"),
        ({"key": "ü"}, "the API key is empty or holds characters"),
        ({"sessions": 0}, "sessions = 0, expected at least 1"),
        ({"port": 65536}, "port = 65536, expected 0 to 65535"),
        ({"cors": ("*", "site.example")}, "cors = 'site.example', expected * or https://SITE"),
        ({"cors": ("https://site.example/",)}, "cors = 'https://site.example/', expected"),
        ({"cors": ("https://Site.example",)}, "cors = 'https://Site.example', expected"),
    ],
)
def test_settings_that_are_refused(change, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        dataclasses.replace(SETTINGS, **change).check()


def test_an_address_that_is_taken():
    with open_socket(SETTINGS) as first:
        first.listen()
        taken = dataclasses.replace(SETTINGS, port=first.getsockname()[1])
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {taken.port}: Address already in use"):
            open_socket(taken)


@pytest.mark.parametrize(
    "change",
    [
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "key": "x"},
        {"cors": ("*", "https://site.example", "http://localhost:3000", "app://notes", "http://[::1]:80")},
    ],
)
def test_settings_that_are_accepted(change):
    assert isinstance(dataclasses.replace(SETTINGS, **change).check(), Settings)
