"""One request on its way: bursts of steps on the device, growing text on the host."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Sequence
from typing import Any

import jax
import numpy as np

from ds4jax.decode.generate import Programs
from ds4jax.decode.state import Request
from ds4jax.tokenizer import Decoder, Tokenizer, overlap


@dataclasses.dataclass(frozen=True)
class Stats:
    """Times and counts of a request; times are those of its whole batch.

    trace_seconds, compile_seconds: preparing the programs; 0 if they were ready.
    prefill_seconds: until the first token. decode_seconds: from there to the end.
    steps: steps that this sequence took part in. drafted, accepted: its drafts by depth, and those that became tokens.
    """

    prompt_tokens: int
    new_tokens: int
    trace_seconds: float
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    steps: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second; 0 if nothing was waited for."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens per step after the first token; 0 if there are no steps."""
        return 1 + sum(self.accepted) / self.steps if self.steps else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first; 0 if there are none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Result:
    """An answer.

    text: without the stop string or stop token that ended it. tokens: all new ids, the one that ended it included.
    finish: "stop" (a stop id or string), "length" (the limit) or "cancelled".
    logprobs: the model's log-probability of each token, float32, if asked for.
    """

    text: str
    tokens: list[int]
    finish: str
    logprobs: np.ndarray | None
    stats: Stats


class Answer:
    """The growing text of one sequence, ended by the first stop id or stop string.

    `finish` is None until the end. Text that may turn out to be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_ids: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.finish: str | None = None
        self._decoder, self._stop, self._stop_ids = Decoder(tokenizer), stop, frozenset(stop_ids)
        self._shown = 0

    def extend(self, ids: Sequence[int]) -> str:
        """Takes further tokens, those after the end excepted; returns the text to show."""
        for token in ids:
            if self.finish:
                break
            self.tokens.append(token)
            if token in self._stop_ids:
                return self.end("stop")
            self._append(self._decoder.feed(token))
        held = 0 if self.finish else max((overlap(self.text, stop) for stop in self._stop), default=0)
        return self._show(len(self.text) - held)

    def end(self, finish: str) -> str:
        """Ends the answer if it has not ended; returns the text not shown yet."""
        if self.finish is None:
            self._append(self._decoder.finish())
            self.finish = self.finish or finish
        return self._show(len(self.text))

    def _append(self, piece: str) -> None:
        before, self.text = len(self.text), self.text + piece
        found = [self.text.find(stop, max(before - len(stop) + 1, 0)) for stop in self._stop]
        places = [place for place in found if place >= 0]
        if places:
            self.text, self.finish = self.text[: min(places)], "stop"

    def _show(self, end: int) -> str:
        start, self._shown = self._shown, max(end, self._shown)
        return self.text[start : self._shown]


class Run:
    """A batch of sequences being continued, the device one burst of steps ahead of the host."""

    def __init__(
        self,
        programs: Programs,
        params: Any,
        request: Request,
        answers: list[Answer],
        preparing: tuple[float, float],
    ) -> None:
        """Starts reading the prompts; `preparing` are seconds for the statistics."""
        self._programs, self._params, self._request = programs, params, request
        self._answers, self._preparing = answers, preparing
        self._began = time.perf_counter()
        self._prefill_seconds = self._decode_seconds = 0.0
        self._state, self._seen = programs.begin(params, request)

    def bursts(self, steps: int) -> Generator[list[str], None, None]:
        """Runs in bursts of `steps` steps; gives the new text of every sequence after each.

        A sequence ended by a stop string is halted; tokens that it got meanwhile are dropped. Closing the generator
        cancels: the burst under way is the last.
        """
        # Launching a burst may wait for the device, whose time would then count as the prompt's.
        jax.block_until_ready(self._seen.length)
        self._prefill_seconds = self._prefill_seconds or time.perf_counter() - self._began
        while any(answer.finish is None for answer in self._answers):
            halt = np.array([answer.finish is not None for answer in self._answers])
            self._state, ahead = self._programs.burst(self._params, self._request, self._state, steps, halt)
            yield self._take()
            self._seen = ahead

    def _take(self) -> list[str]:
        """Waits for the device and hands new tokens to the answers."""
        tokens, length, done = (np.asarray(a) for a in (self._seen.tokens, self._seen.length, self._seen.done))
        now = time.perf_counter() - self._began
        self._decode_seconds = now - self._prefill_seconds
        pieces = []
        for b, answer in enumerate(self._answers):
            text = answer.extend(tokens[b, len(answer.tokens) : length[b]].tolist())
            pieces.append(text + answer.end("length") if done[b] else text)
        return pieces

    def results(self, logprobs: bool) -> list[Result]:
        """The answers, whole or, if the bursts have been cancelled, as far as they have come."""
        lengths, seen = np.asarray(self._request.lengths), self._seen
        scores, steps = np.asarray(seen.logprobs), np.asarray(seen.steps)
        drafted, accepted = np.asarray(seen.drafted), np.asarray(seen.accepted)
        results = []
        for b, answer in enumerate(self._answers):
            answer.end("cancelled")
            assert answer.finish is not None
            count = len(answer.tokens)
            stats = Stats(
                prompt_tokens=int(lengths[b]),
                new_tokens=count,
                trace_seconds=self._preparing[0],
                compile_seconds=self._preparing[1],
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
                steps=int(steps[b]),
                drafted=tuple(drafted[b].tolist()),
                accepted=tuple(accepted[b].tolist()),
            )
            kept = scores[b, :count].copy() if logprobs else None
            results.append(Result(answer.text, answer.tokens, answer.finish, kept, stats))
        return results
