"""Timelines that outlive a request: what a new prompt shares with an earlier one is not evaluated again."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.checkpoint_memory import check_device
from ds4jax.decode.constrained import BIAS, build_alternatives, build_biased
from ds4jax.decode.sampling import GREEDY, Sampling
from ds4jax.decode.speculation import Speculation, draft_cost
from ds4jax.decode.state import DecodeState, Generation, Limits
from ds4jax.engine import Engine
from ds4jax.errors import RequestError
from ds4jax.model.cache import Cache, cache_nbytes, commit

READ_STEPS = 2  # steps of a burst that reads a prompt
WRITE_STEPS = 4  # steps of a burst that answers
SNAPSHOTS = 2  # ends of prompts that a session remembers


@runtime_checkable
class Guide(Protocol):
    """Decides before every token what it may be."""

    def bias(self) -> np.ndarray:
        """What is added to the logits of the next token, float32 `[V]`; -inf forbids a token."""

    def accept(self, token: int) -> None:
        """Takes notice of the token that was chosen."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """What is asked of a session besides the prompt.

    sampling, seed: as in `Options`. most: most new tokens. stop_ids: ids that end the answer.
    bias: added to the logits throughout, float32 `[V]`. guide: replaces it by a bias for every single token.
    alternatives: whether to tell, with every token, what else was probable. A guide or alternatives take one burst
        per token and no drafts.
    """

    most: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stop_ids: Sequence[int] = ()
    bias: np.ndarray | None = None
    guide: Guide | None = None
    alternatives: bool = False


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """The model's log-probability of a token, and ids and log-probabilities of the most probable ones, falling."""

    logprob: float
    ids: list[int]
    logprobs: list[float]


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a burst has brought.

    tokens: new ids. alternatives: one entry per token, if asked for. done: there will be no more. stopped: the last
    token is a stop id. steps, drafted, accepted: counts since the prompt was given, drafts of all depths together.
    """

    tokens: list[int]
    alternatives: list[Alternatives]
    done: bool
    stopped: bool
    steps: int
    drafted: int
    accepted: int


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """What is overwritten as a timeline goes on: the rings of a cache, and the streams of the position before."""

    length: int
    rings: list[jax.Array]
    streams: jax.Array


class Sessions:
    """Programs and memory for up to `count` timelines of one context.

    context: most tokens of a prompt and its answer. warm_seconds: tracing and compiling.

    Raises:
        CapacityError: their caches do not fit beside the weights.
    """

    def __init__(self, engine: Engine, count: int, context: int) -> None:
        config, numerics = engine.config, engine.numerics
        limits = Limits(1, context, context, min(engine.chunk, context), context=context)
        drafts = Speculation.of(engine.speculative, draft_cost(numerics)).drafts
        rows = max(limits.chunk, 1 + drafts)
        (device,) = jax.tree.leaves(engine.params)[0].devices()
        check_device(device, 0, count * cache_nbytes(config, numerics, 1, context, rows))
        began = time.perf_counter()
        self.engine, self.context, self.drafts = engine, context, drafts
        self.generate = build_biased(config, numerics, limits, engine.speculative)
        self.no_bias = jnp.zeros(config.vocab_size, jnp.float32)
        self.programs = self.generate.compile(self.params(self.no_bias))
        # What the step leaves written beyond the committed length, and how far the rings reach back, both in rows.
        self.slack = max(self.programs.chunk, rows)
        self.alternatives = build_alternatives(config, numerics)
        start = self.programs.start.__wrapped__
        self.blank = jax.jit(lambda: dataclasses.replace(start(), cache=None))
        self.copy = jax.jit(lambda arrays: jax.tree.map(jnp.copy, arrays))
        self.all = [Session(self) for _ in range(count)]
        self.warm_seconds = time.perf_counter() - began

    def params(self, bias: jax.Array) -> dict[str, Any]:
        """The model's parameters with a bias."""
        return {**self.engine.params, BIAS: bias}


class Session:
    """One timeline on the device: `begin`, then `launch` and `take` in turn until done, then `end`, and so on.

    ids: tokens that the cache holds, valid between `end` and `begin`.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._snapshots: collections.deque[_Snapshot] = collections.deque(maxlen=SNAPSHOTS)
        self.reset()

    def reset(self) -> None:
        """Forgets everything, the memory on the device included."""
        self.ids: list[int] = []
        self._state: DecodeState | None = None
        self._snapshots.clear()
        self._ahead: collections.deque[tuple[Generation, Any]] = collections.deque()

    def shared(self, ids: Sequence[int]) -> int:
        """Tokens of a prompt that need not be evaluated."""
        return self._resume(ids)[0]

    def begin(self, ids: Sequence[int], ask: Ask) -> int:
        """Starts to answer a prompt, without waiting; returns how many of its tokens need not be evaluated.

        Raises:
            RequestError: the prompt leaves no room in the context, or an option is out of range.
        """
        host = self._sessions
        if not 0 < len(ids) < host.context:
            raise RequestError(f"prompt of {len(ids)} tokens, expected 1 to {host.context - 1}; shorten it")
        most = min(ask.most, host.context - len(ids))
        request = host.generate.prepare(
            np.asarray(ids, np.int32),
            sampling=ask.sampling,
            key=ask.seed,
            max_new_tokens=most,
            stop_ids=ask.stop_ids,
        )
        start, snapshot = self._resume(ids)
        old, fresh = self._state, host.blank()
        cache, streams = (host.programs.start().cache if old is None else old.cache), fresh.streams
        if old is not None and start:
            # After rolling back, the streams before the first row are unknown; one row of the MTP block is then a
            # little off, which may cost a draft but no token.
            streams = old.streams
        if snapshot is not None:
            rings, streams = host.copy((snapshot.rings, snapshot.streams))
            cache = _with_rings(cache, rings)
        self._state = dataclasses.replace(
            fresh, cache=commit(cache, jnp.asarray(np.array([start], np.int32))), streams=streams
        )
        while self._snapshots and self._snapshots[-1].length > start:
            self._snapshots.pop()
        self._prompt, self._ask, self._most = list(ids), ask, most
        self._request, self._unread, self._known = request, len(ids) - start, 0
        self._params = host.params(host.no_bias if ask.bias is None else jnp.asarray(ask.bias))
        self._tokens: list[int] = []
        self._single = ask.guide is not None or ask.alternatives
        return start

    @property
    def busy(self) -> bool:
        """Whether a burst was launched that has not been taken."""
        return bool(self._ahead)

    def launch(self) -> None:
        """Has the device do a little more, without waiting for it; nothing if the host has to decide first."""
        if self._single and self._ahead:
            return
        assert self._state is not None
        host, nobody = self._sessions, jnp.asarray(np.zeros(1, bool))
        request, state = self._request, self._state
        chunk, reading = host.programs.chunk, self._unread > 0
        if self._single and self._unread <= chunk * READ_STEPS:
            if self._ask.guide is not None:
                self._params = host.params(jnp.asarray(self._ask.guide.bias()))
            # A limit of one token more leaves no room for drafts, and ends the burst after it.
            limit = min(len(self._tokens) + 1, self._most)
            request = dataclasses.replace(request, limit=jnp.asarray(np.array([limit], np.int32)))
            state = dataclasses.replace(state, done=jnp.asarray(np.zeros(1, bool)))
        if reading:
            steps = min(READ_STEPS, -(-self._unread // chunk))
            self._unread -= steps * chunk
            state, seen = host.programs.read(self._params, request, state, jnp.int32(steps), nobody)
        else:
            state, seen = host.programs.burst(self._params, request, state, 1 if self._single else WRITE_STEPS, nobody)
        if reading and self._unread <= 0:
            rings, streams = host.copy((_rings(state.cache), state.streams))
            self._snapshots.append(_Snapshot(len(self._prompt), rings, streams))
        others = None
        if self._ask.alternatives and self._unread <= 0:
            others = host.alternatives(self._params, state.streams, state.next)
        self._state = state
        self._ahead.append((seen, others))

    def take(self) -> Progress:
        """Waits for the oldest burst launched and not taken yet."""
        seen, others = self._ahead.popleft()
        length, done, stopped = int(seen.length[0]), bool(seen.done[0]), bool(seen.stopped[0])
        new = np.asarray(seen.tokens[0])[len(self._tokens) : length].tolist()
        self._tokens += new
        if self._ask.guide is not None:
            for token in new:
                self._ask.guide.accept(token)
        told = []
        if others is not None and new:
            logprob, ids, logprobs = (np.asarray(a).tolist() for a in others)
            told = [Alternatives(logprob, ids, logprobs)]
        drafted, accepted = (int(np.asarray(a).sum()) for a in (seen.drafted, seen.accepted))
        done = stopped or (done and len(self._tokens) >= self._most)
        return Progress(new, told, done, stopped, int(seen.steps[0]), drafted, accepted)

    def end(self) -> None:
        """Ends the answer, finished or not; the timeline stays."""
        if self._state is None:
            return
        self._ahead.clear()
        length, tokens = int(self._state.cache.length[0]), np.asarray(self._state.tokens[0])
        self.ids = (self._prompt + tokens[: max(length - len(self._prompt), 0)].tolist())[:length]

    def _resume(self, ids: Sequence[int]) -> tuple[int, _Snapshot | None]:
        """The position to go on from, and the snapshot to go back to first, if one is better than the present."""
        host = self._sessions
        # The last token of a prompt is always evaluated: what follows it is wanted.
        common = min(_common(self.ids, ids), len(ids) - 1)
        if self._state is None:
            return 0, None
        best: tuple[int, _Snapshot | None] = (0, None)
        # Drafts may have overwritten what lies that far behind the committed length.
        if common >= len(self.ids) - (host.slack - host.drafts):
            best = (common, None)
        for snapshot in self._snapshots:
            start = min(common, snapshot.length)
            if start > best[0] and start >= snapshot.length - host.slack:
                best = (start, snapshot)
        return best


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _rings(cache: Cache) -> list[jax.Array]:
    """What later positions overwrite; finished compressed rows stay."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(cache) if _is_ring(path)]


def _with_rings(cache: Cache, rings: list[jax.Array]) -> Cache:
    leaves, tree = jax.tree_util.tree_flatten_with_path(cache)
    stored = iter(rings)
    return jax.tree.unflatten(tree, [next(stored) if _is_ring(path) else leaf for path, leaf in leaves])


def _is_ring(path: Any) -> bool:
    return path[-1].name not in ("rows", "length")
