"""A conversation shown: in a terminal with commands and a prompt, or over pipes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ds4jax.chat_parse import Call, Content, Event, Reasoning
from ds4jax.chat_profile import Thinking, effort_level
from ds4jax.cli_talk import Figures, Talk
from ds4jax.errors import Ds4Error, RequestError

HELP = {
    "/think": "think before answering",
    "/nothink": "answer at once",
    "/effort LEVEL": "how hard to think: low, high, max",
    "/system TEXT": "text before the first turn; without TEXT it is shown, - removes it",
    "/new": "forget the conversation, but not the system text",
    "/retry": "answer the last message again",
    "/save FILE": "write the conversation to a file",
    "/load FILE": "go on with a saved conversation",
    "/stats": "times and counts of the last answer",
    "/help": "this list",
    "/quit": "leave; Ctrl-D does it too",
}
_COMMANDS = [entry.split()[0] for entry in HELP]
_REFRESH_SECONDS = 0.08
# A model's text must not steer the terminal: control characters become visible.
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_VISIBLE |= dict.fromkeys((127, *range(128, 160)), "\N{REPLACEMENT CHARACTER}")


class Commands:
    """What can be typed, apart from where it is typed; `tell` shows a line to the user."""

    def __init__(self, talk: Talk, tell: Callable[[str], None]) -> None:
        self.talk, self._tell = talk, tell

    def take(self, line: str) -> bool:
        """Carries a command out or adds a message; returns whether the model is to answer.

        Raises:
            EOFError: the user wants to leave.
            RequestError: there is no such command, or it cannot be carried out.
        """
        if not line.strip():
            return False
        if not line.startswith("/") or line.startswith("//"):
            self.talk.say(line.removeprefix("/") if line.startswith("//") else line)
            return True
        command, _, rest = line[1:].strip().partition(" ")
        if f"/{command}" not in _COMMANDS:
            raise RequestError(f"no command /{command}; /help lists them, and a message may begin with //")
        return bool(getattr(self, f"_{command}")(rest.strip()))

    def _think(self, rest: str) -> None:
        self._effort(rest or self.talk.thinking.effort or "high")

    def _nothink(self, rest: str) -> None:
        self._effort("none")

    def _effort(self, rest: str) -> None:
        if rest:
            level = effort_level(rest, self.talk.profile)
            self.talk.thinking = Thinking(level is not None, level or self.talk.thinking.effort)
        self._tell(thinking_text(self.talk.thinking))

    def _system(self, rest: str) -> None:
        if rest:
            self.talk.system = "" if rest == "-" else rest
        self._tell(f"system text: {self.talk.system}" if self.talk.system else "no system text")

    def _new(self, rest: str) -> None:
        self.talk.messages.clear()
        self._tell("a new conversation")

    def _retry(self, rest: str) -> bool:
        message = self.talk.take_back()
        if message is None:
            raise RequestError("nothing to answer yet; write a message first")
        self.talk.say(message)
        return True

    def _save(self, rest: str) -> None:
        path = _path(rest, "/save")
        self.talk.save(path)
        self._tell(f"{_turns(self.talk)} saved in {path}")

    def _load(self, rest: str) -> None:
        path = _path(rest, "/load")
        self.talk.load(path)
        self._tell(f"{_turns(self.talk)} loaded from {path}")

    def _stats(self, rest: str) -> None:
        f = self.talk.figures
        rows = [
            f"prompt {f.prompt_tokens} tokens, {f.cached} of them still in the cache; first token after "
            f"{f.first_seconds:.2f} s",
            f"answer {f.tokens} tokens in {f.seconds - f.first_seconds:.2f} s ({f.rate:.1f} tokens/s), {f.finish}",
            f"context {f.prompt_tokens + f.tokens} of {self.talk.context} tokens",
        ]
        if f.drafted:
            rows.append(f"drafts accepted {f.accepted} of {f.drafted} ({f.accepted / f.drafted:.0%})")
        self._tell("\n".join(rows) if f.tokens else "no answer yet")

    def _help(self, rest: str) -> None:
        self._tell("\n".join(f"{command:15} {text}" for command, text in HELP.items()))

    def _quit(self, rest: str) -> None:
        raise EOFError


class Piped:
    """Every line of standard input is a message or a command; answers go to standard output, reasoning is left out."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._commands = Commands(talk, lambda text: print(text, file=sys.stderr))

    def run(self) -> None:
        """Runs to the end of the input. Raises the first error."""
        with contextlib.suppress(EOFError):
            for line in sys.stdin.buffer:
                # What is not UTF-8 becomes lone surrogates, which the tokenizer refuses.
                if self._commands.take(line.decode(errors="surrogateescape").rstrip("\r\n")):
                    for events in self._talk.answer():
                        print(*(e.text for e in events if isinstance(e, Content)), sep="", end="", flush=True)
                    print(flush=True)


class Terminal:
    """A prompt, the answers as they come, and a line about their progress."""

    def __init__(
        self,
        talk: Talk,
        about: str,
        console: Console | None = None,
        session: PromptSession[str] | None = None,
    ) -> None:
        self._talk, self._about = talk, about
        self._console = console or Console(highlight=False)
        self._session = session or prompt_session(_history())
        self._commands = Commands(talk, self._tell)

    def run(self) -> None:
        """Runs until the user leaves."""
        self._tell(f"{self._about}; {thinking_text(self._talk.thinking)}. /help lists the commands.")
        while True:
            try:
                line = self._session.prompt("› ", prompt_continuation="  ", bottom_toolbar=self._toolbar)
                if self._commands.take(line):
                    self._answer()
            except KeyboardInterrupt:
                self._tell("/quit or Ctrl-D leaves")
            except EOFError:
                return
            except Ds4Error as error:
                self._console.print(Text(str(error), style="red"))

    def _tell(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    def _toolbar(self) -> str:
        f = self._talk.figures
        used = f.prompt_tokens + f.tokens
        return f" {thinking_text(self._talk.thinking)} · {used} of {self._talk.context} tokens · Alt-Enter: new line "

    def _answer(self) -> None:
        """Shows an answer. Ctrl-C stops it."""
        answer, view = self._talk.answer(), _View(self._console)
        try:
            with _interrupts() as interrupted, _unseen_keys(), contextlib.closing(answer), view:
                for events in answer:
                    view.show(events, self._talk.figures)
                    if interrupted():
                        break
        except RequestError:
            self._talk.take_back()
            raise
        figures = self._talk.figures
        ends = {"stop": "", "length": " · cut off: the limit of tokens is reached", "stopped": " · stopped"}
        self._tell(f"{figures.tokens} tokens · {figures.rate:.1f} tokens/s{ends[figures.finish]}")


class _View:
    """An answer on its way: whole lines above, the line being written and the progress in a region that is redrawn."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._rows: list[Text] = []  # finished, to be printed
        self._line, self._kind, self._drawn = "", "", 0.0

    def __enter__(self) -> _View:
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._end_line()
        self._live.update("", refresh=True)
        self._print_rows()
        self._live.__exit__(None, None, None)

    def show(self, events: list[Event], figures: Figures) -> None:
        """Adds what is new."""
        for event in events:
            assert not isinstance(event, Call), "there are no calls without tools"
            kind = "dim" if isinstance(event, Reasoning) else ""
            if kind != self._kind:
                self._end_line()
                self._kind = kind
            self._add(event.text.translate(_VISIBLE))
        if self._rows or time.monotonic() > self._drawn + _REFRESH_SECONDS:
            self._drawn = time.monotonic()
            status = Text(_progress(figures), style="dim cyan")
            self._live.update(Group(self._text(self._line), status), refresh=True)
            self._print_rows()

    def _add(self, text: str) -> None:
        *whole, self._line = (self._line + text).split("\n")
        self._rows += map(self._text, whole)
        # What fills the width is final; the region stays small, so that it can be redrawn.
        *full, last = self._text(self._line).wrap(self._console, self._console.width) or [Text()]
        self._rows += full
        self._line = last.plain if full else self._line

    def _print_rows(self) -> None:
        if self._rows:
            self._console.print(*self._rows, sep="\n")
        self._rows.clear()

    def _end_line(self) -> None:
        if self._line:
            self._rows.append(self._text(self._line))
        self._line = ""

    def _text(self, line: str) -> Text:
        return Text(line, style=self._kind)


def thinking_text(thinking: Thinking) -> str:
    """How the next answer is made."""
    return f"thinking, {thinking.effort} effort" if thinking.on else "no thinking"


def prompt_session(history: History) -> PromptSession[str]:
    """An editor in which Enter sends and Alt-Enter begins a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=history,
        key_bindings=keys,
        multiline=True,
        completer=WordCompleter(_COMMANDS, sentence=True),
        complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
    )


def _history() -> History:
    """Messages of earlier chats, kept for the user alone."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ds4jax"
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = state / "chat_history"
    path.touch(mode=0o600)
    return FileHistory(path)


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Meanwhile Ctrl-C is only noted: an exception in the midst of a step would leave it half done."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _unseen_keys() -> Iterator[None]:
    """Meanwhile typed keys are not shown, and wait as they are for the next prompt; Ctrl-C stays Ctrl-C."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    quiet[3] |= termios.NOFLSH  # Ctrl-C would throw away what has been typed
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _progress(figures: Figures) -> str:
    if not figures.tokens:
        return f"reading {figures.prompt_tokens - figures.cached} tokens"
    return f"{figures.tokens} tokens · {figures.rate:.1f} tokens/s · Ctrl-C stops"


def _path(text: str, command: str) -> Path:
    if not text:
        raise RequestError(f"{command}: expected a file name; write {command} FILE")
    return Path(text).expanduser()


def _turns(talk: Talk) -> str:
    count = sum(message["role"] == "user" for message in talk.messages)
    return f"{count} {'turn' if count == 1 else 'turns'}"
