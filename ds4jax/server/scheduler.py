"""The thread that owns the device: requests wait in line, and those that have a session take turns burst by burst."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ds4jax.engine_session import Session, Sessions
from ds4jax.server.errors import ApiError, internal

log = logging.getLogger("ds4jax.server")


@runtime_checkable
class Job(Protocol):
    """Work for one session, done in turns on the scheduler's thread.

    ids: the prompt, by which a session is chosen. cancelled: nobody waits for it any more.
    """

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def cancelled(self) -> bool: ...

    def turn(self, session: Session) -> bool:
        """Does about one burst; returns whether more is to come."""

    def fail(self, error: ApiError) -> None:
        """Is told that it will not be completed."""


class Scheduler:
    """First come, first served by up to as many jobs at once as there are sessions.

    A job goes on with the idle session that shares most with its prompt, if that is at least half of either; otherwise
    it gets the session idle longest. After `close`, waiting and running jobs fail.
    """

    def __init__(self, sessions: Sessions, queue: int) -> None:
        self._most = queue
        self._waiting: collections.deque[Job] = collections.deque()
        self._idle = list(sessions.all)  # the one idle longest first
        self._active: dict[Job, Session] = {}
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ds4jax-device", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait for a session."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Jobs that have a session."""
        return len(self._active)

    def submit(self, job: Job) -> None:
        """Puts a job at the end of the line.

        Raises:
            ApiError: 429, the line is full; 503, the server is closing.
        """
        with self._change:
            if self._closing:
                raise ApiError(503, "the server is shutting down")
            # Whoever has gone away does not keep others out.
            self._waiting = collections.deque(waiting for waiting in self._waiting if not waiting.cancelled)
            if len(self._waiting) >= self._most + len(self._idle):
                raise ApiError(429, f"{self._most} requests are waiting already; try again later")
            self._waiting.append(job)
            self._change.notify()

    def close(self) -> None:
        """Ends the thread after the bursts under way."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            with self._change:
                self._change.wait_for(lambda: self._closing or self._waiting or self._active)
            self._admit()
            for job, session in list(self._active.items()):
                self._turn(job, session)
        for session in self._active.values():
            session.end()
        for job in [*self._active, *self._waiting]:
            job.fail(ApiError(503, "the server is shutting down"))

    def _admit(self) -> None:
        while self._idle and (job := self._next()) is not None:
            if not job.cancelled:
                session = _choose(self._idle, job.ids)
                self._idle.remove(session)
                self._active[job] = session

    def _next(self) -> Job | None:
        with self._change:
            return self._waiting.popleft() if self._waiting else None

    def _turn(self, job: Job, session: Session) -> None:
        more = False
        try:
            more = not job.cancelled and job.turn(session)
            if not more:
                session.end()
        except ApiError as error:
            session.end()
            job.fail(error)
        except Exception:
            log.exception("a request failed")
            session.reset()  # its state is unknown now
            job.fail(internal())
        if not more:
            del self._active[job]
            self._idle.append(session)


def _choose(idle: Sequence[Session], ids: Sequence[int]) -> Session:
    """The session for a prompt, of those that are idle, the one idle longest first."""
    shared = {session: session.shared(ids) for session in idle}
    best = max(idle, key=shared.__getitem__)
    worthwhile = shared[best] and 2 * shared[best] >= min(len(ids), len(best.ids))
    return best if worthwhile else idle[0]
