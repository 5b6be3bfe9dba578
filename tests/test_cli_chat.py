"""`ds4jax chat`: conversations without a terminal, commands, what is drawn, and a real terminal for Ctrl-C."""

import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pexpect.fdpexpect import fdspawn
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from ds4jax import cli_talk, engine
from ds4jax.chat import render
from ds4jax.chat_parse import Content, Reasoning
from ds4jax.chat_profile import Thinking
from ds4jax.cli_talk import Figures, Talk
from ds4jax.cli_terminal import HELP, Commands, Piped, Terminal, prompt_session
from ds4jax.decode.sampling import GREEDY
from ds4jax.engine import Engine
from ds4jax.engine_session import Ask, Progress, Sessions
from ds4jax.errors import CheckpointError, RequestError
from ds4jax.tokenizer import EOS

MODEL = Path(__file__).parent / "data" / "oracle" / "tiny-f32.gguf"
RUN = [sys.executable, "-c", "from ds4jax.cli import app; app()", "chat"]


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return engine.load(MODEL, numerics="perf", context=256, chunk=16)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tiny: Engine) -> SimpleNamespace:
    """Replaces the model's timeline by one that gives the answers of a list, three tokens a burst."""
    seen = SimpleNamespace(answers=[], prompts=[], asks=[], ended=0)
    tokenizer = tiny.tokenizer

    class Session:
        def begin(self, ids: Sequence[int], ask: Ask) -> int:
            if len(ids) > 200:
                raise RequestError("prompt of many tokens")
            seen.prompts.append(tokenizer.decode(ids))
            seen.asks.append(ask)
            self.left = tokenizer.encode(seen.answers.pop(0), parse_special=True)
            self.given = 0
            return 2

        def launch(self) -> None:
            pass

        def take(self) -> Progress:
            new, self.left = self.left[:3], self.left[3:]
            self.given += len(new)
            stopped = tokenizer.eos_id in new
            return Progress(new, [], not self.left or stopped, stopped, self.given, 2 * self.given, self.given)

        def end(self) -> None:
            seen.ended += 1

    monkeypatch.setattr(
        cli_talk, "Sessions", lambda engine, count, context: SimpleNamespace(all=[Session()], warm_seconds=0.0)
    )
    return seen


def talk(engine: Engine, **options: Any) -> Talk:
    defaults = {"profile": "preview", "thinking": Thinking(), "sampling": GREEDY, "seed": 7, "max_new_tokens": None}
    return Talk(engine, **defaults | options)


def test_answers_join_the_conversation(tiny: Engine, script: SimpleNamespace) -> None:
    script.answers = [f"hm, let me see</think>Good day!{EOS}", f"</think>Bye{EOS}"]
    one = talk(tiny, system="Be kind.")
    one.say("hello")
    events = list(itertools.chain.from_iterable(one.answer()))
    assert "".join(e.text for e in events if isinstance(e, Reasoning)) == "hm, let me see"
    assert "".join(e.text for e in events if isinstance(e, Content)) == "Good day!"
    first = {"role": "assistant", "content": "Good day!", "reasoning_content": "hm, let me see"}
    assert one.messages == [{"role": "user", "content": "hello"}, first]
    f = one.figures
    assert (f.cached, f.finish, f.accepted, f.drafted) == (2, "stop", f.tokens, 2 * f.tokens)
    assert 0 < f.first_seconds <= f.seconds and f.rate > 0
    one.say("so long")
    list(one.answer())
    system = [{"role": "system", "content": "Be kind."}]
    assert script.prompts == [render([*system, *one.messages[:n]]).text for n in (1, 3)]
    assert [ask.seed for ask in script.asks] == [8, 9]
    dsml = tiny.tokenizer.special_ids["｜DSML｜"]
    assert [i for i, bias in enumerate(script.asks[0].bias) if bias] == [dsml] and script.ended == 2


def test_reasoning_that_ends_without_an_answer_is_closed(tiny: Engine, script: SimpleNamespace) -> None:
    script.answers = [f"thought{EOS}", f"answer{EOS}"]
    one = talk(tiny, max_new_tokens=50)
    one.say("hello")
    list(one.answer())
    assert script.prompts[1] == script.prompts[0] + "thought</think>"
    assert one.messages[-1] == {"role": "assistant", "content": "answer", "reasoning_content": "thought"}
    spent = len(tiny.tokenizer.encode("thought")) + 1
    assert [ask.most for ask in script.asks] == [50, 50 - spent]
    assert one.figures.cached == 2 and one.figures.finish == "stop"


def test_an_answer_that_is_stopped_stays(tiny: Engine, script: SimpleNamespace) -> None:
    script.answers = ["</think>one two three four five six", "no end"]
    one = talk(tiny)
    one.say("count")
    answer = one.answer()
    next(answer)
    next(answer)
    answer.close()
    assert "one two three".startswith(one.messages[-1]["content"]) and one.messages[-1]["content"]
    assert one.figures.finish == "stopped" and script.ended == 1
    one.thinking = Thinking(on=False)
    one.say("go on")
    list(one.answer())
    assert one.figures.finish == "length"
    assert one.take_back() == "go on" and one.take_back() == "count" and one.take_back() is None


def test_vocabulary_without_chat(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(tiny.tokenizer.special_ids, "<think>")
    with pytest.raises(CheckpointError, match="found no <think>"):
        talk(tiny)


def test_saved_and_loaded(tiny: Engine, script: SimpleNamespace, tmp_path: Path) -> None:
    script.answers = [f"</think>é{EOS}"]
    one, other = talk(tiny, system="s"), talk(tiny)
    one.say("hello")
    list(one.answer())
    one.save(tmp_path / "a.json")
    other.load(tmp_path / "a.json")
    assert (other.system, other.messages) == (one.system, one.messages)
    one.messages, one.system = [], ""
    one.save(tmp_path / "b.json")
    other.load(tmp_path / "b.json")
    assert (other.system, other.messages) == ("", [])
    for text, error in (
        ("{", "expected a conversation that /save wrote"),
        ("[" * 100_000, "expected a conversation"),
        ('{"messages": []}', "expected a conversation"),
        (json.dumps({"format": "ds4jax chat 1", "messages": [{"role": "x"}]}), r"messages\[0\]\.role = 'x'"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(RequestError, match=error):
            other.load(tmp_path / "bad.json")
    with pytest.raises(RequestError, match="cannot read: No such file"):
        other.load(tmp_path / "none.json")
    with pytest.raises(RequestError, match="cannot write"):
        other.save(tmp_path / "no" / "where.json")


def test_commands(tiny: Engine, script: SimpleNamespace, tmp_path: Path) -> None:
    told: list[str] = []
    one = talk(tiny)
    commands = Commands(one, told.append)

    def tell(line: str) -> str:
        told.clear()
        assert commands.take(line) is False
        return "\n".join(told)

    assert tell("/nothink") == "no thinking" and not one.thinking.on
    assert tell("/think") == "thinking, high effort" and one.thinking.on
    assert tell("/effort ultra") == "thinking, max effort"
    assert tell("/effort none") == "no thinking"
    assert tell("/effort") == "no thinking"
    assert tell("/system") == "no system text"
    assert tell("/system Be brief.") == "system text: Be brief." and one.system == "Be brief."
    assert tell("/system -") == "no system text" and one.system == ""
    assert tell("/stats") == "no answer yet"
    assert tell("") == tell("  ") == ""
    assert all(command in tell("/help") for command in HELP)
    assert {entry.split()[0].replace("/", "_") for entry in HELP} <= set(dir(commands))
    for line, error in (
        ("/retry", "nothing to answer yet"),
        ("/save", "expected a file name; write /save FILE"),
        ("/dance now", "no command /dance; /help lists them"),
        ("/take", "no command /take"),
        ("/effort hard", "reasoning effort 'hard'"),
    ):
        with pytest.raises(RequestError, match=error):
            commands.take(line)
    assert commands.take("//etc is a folder") and one.messages[-1]["content"] == "/etc is a folder"
    one.figures = Figures(10, 4, 5, 1.0, 3.0, 4, 8, 6, "stop")
    assert re.search(
        r"prompt 10 tokens, 4 .*\nanswer 5 .*2\.0 tokens/s.*\n.*15 of 256.*\n.*6 of 8 \(75%\)", tell("/stats")
    )
    assert tell(f"/save {tmp_path / 'c'}") == f"1 turn saved in {tmp_path / 'c'}"
    assert tell("/new") and one.messages == []
    assert tell(f"/load {tmp_path / 'c'}") == f"1 turn loaded from {tmp_path / 'c'}"
    assert commands.take("/retry") and len(one.messages) == 1
    with pytest.raises(EOFError):
        commands.take("/quit")


def terminal(one: Talk, keys: str, width: int = 40) -> str:
    """What a terminal shows while these keys are typed."""
    shown = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False, legacy_windows=False)
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        Terminal(one, "a model", shown, prompt_session(InMemoryHistory())).run()
    return shown.file.getvalue()


def rows(shown: str) -> list[str]:
    """Rows in their order, without colours and cursor movements; those of the redrawn region come up repeatedly."""
    return [row.strip() for row in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).splitlines()]


def test_terminal(tiny: Engine, script: SimpleNamespace) -> None:
    story = "one two three four five six seven eight nine ten eleven\ntwelve \x1b[31mred\x07"
    script.answers = [f"thinking hard</think>{story}{EOS}", "</think>second", "</think>third"]
    one = talk(tiny)
    shown = terminal(one, "hello\x1b\rworld\r/nope\rmore\x03again\r/stats\r" + "x" * 300 + "\r\x04")
    seen = rows(shown)
    assert one.messages[0]["content"] == "hello\nworld"
    assert "a model; thinking, high effort. /help lists the commands." in " ".join(seen)
    assert "\x1b[2mthinking hard\x1b[0m" in shown  # dimmed
    assert "one two three four five six seven eight" in seen and "nine ten eleven" in seen
    assert "twelve ␛[31mred␇" in seen and "\x1b[31mred" not in shown
    assert any(re.fullmatch(r"\d+ tokens · [\d.]+ tokens/s", row) for row in seen)
    assert any("Ctrl-C stops" in row for row in seen)
    assert "no command /nope" in shown
    assert "/quit or Ctrl-D leaves" in shown and one.messages[2]["content"] == "again"
    assert "cut off: the limit" in " ".join(seen)
    assert "prompt of many tokens" in shown and len(one.messages) == 4


def test_interrupt_stops_the_answer_only(
    tiny: Engine, script: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.answers = ["</think>" + "word " * 300]
    one = talk(tiny)
    answer = one.answer

    def interrupted() -> Iterator[Any]:
        for n, events in enumerate(answer()):
            if n == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield events

    monkeypatch.setattr(one, "answer", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert "stopped" in terminal(one, "go\r/quit\r")
    assert one.messages[-1]["content"].startswith("word") and len(one.messages[-1]["content"]) < 100
    assert signal.getsignal(signal.SIGINT) is before


def test_pipes(tiny: Engine, script: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    script.answers = [f"hidden</think>Good day!{EOS}", "</think>x"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("héllo\r\n\n/effort low\n//x\n/quit\nno".encode())))
    one = talk(tiny)
    Piped(one).run()
    assert capfd.readouterr() == ("Good day!\nx\n", "thinking, high effort\n")
    assert [message["content"] for message in one.messages[::2]] == ["héllo", "/x"]
    for line, error in ((b"/nope", "no command"), (b"caf\xe9", "not valid Unicode")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line)))
        with pytest.raises(RequestError, match=error):
            Piped(one).run()


def test_a_real_model_goes_on_where_it_was(sessions: Sessions) -> None:
    one = talk(sessions.engine, thinking=Thinking(on=False), max_new_tokens=8)
    one.say("Once upon a time")
    list(one.answer())
    first = one.figures
    assert first.cached == 0 and 0 < first.tokens <= 8
    one.say("And then?")
    list(one.answer())
    assert one.figures.cached >= first.prompt_tokens
    assert one.figures.prompt_tokens > first.prompt_tokens


@pytest.fixture
def environment(tmp_path: Path, sessions: Sessions) -> dict[str, str]:
    """Of a process that finds the programs of `sessions` compiled."""
    return {
        **os.environ,
        "TERM": "xterm-256color",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parent.parent / ".jax_cache"),
    }


def test_a_real_process_over_pipes(environment: dict[str, str], sessions: Sessions) -> None:
    flags = ["--context", str(sessions.context), "-n", "4"]
    text = "Once upon a time\n/stats\n"
    done = subprocess.run([*RUN, *flags], input=text, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert re.search(r"prompt \d+ tokens, 0 of them .*\nanswer [1-4] tokens", done.stderr)


@contextlib.contextmanager
def in_a_terminal(flags: list[str], environment: dict[str, str]) -> Iterator[tuple[fdspawn, subprocess.Popen[bytes]]]:
    """A process with a terminal of its own. pexpect would fork to make one, which JAX's threads may not survive."""
    ours, its = os.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    become_its_terminal = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    command = [RUN[0], "-c", f"{become_its_terminal}; {RUN[2]}", *RUN[3:], *flags]
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True)
    os.close(its)
    with process, fdspawn(ours, encoding="utf-8", timeout=60) as screen:
        try:
            yield screen, process
        finally:
            process.kill()


def test_a_real_terminal(environment: dict[str, str], tmp_path: Path, sessions: Sessions) -> None:
    """Ctrl-C ends the answer at once and leaves the program, its conversation and its history alone."""
    flags = ["--context", str(sessions.context), "-t", "0", "--think"]
    with in_a_terminal(flags, environment) as (screen, process):
        screen.expect("/help lists the commands.*›")
        screen.send("Once upon a time\r")
        screen.expect("Ctrl-C stops")
        screen.send("/nothink\r")  # typed while the model answers: unseen until the next prompt
        screen.expect("Ctrl-C stops")
        screen.send("\x03")
        screen.expect("· stopped.*no thinking.*›")
        screen.send("\x1b[A\x1b[A")
        screen.expect("Once upon a time")
        screen.send("\r")
        screen.expect("Ctrl-C stops")
        screen.send("\x03")
        screen.expect("· stopped.*›")
        screen.send("/stats\r")
        screen.expect("still in the cache.*stopped.*›")
        screen.send("\x04")
        assert process.wait(30) == 0
    history = tmp_path / "state" / "ds4jax" / "chat_history"
    assert "+Once upon a time" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
