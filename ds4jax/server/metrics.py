"""Figures for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from ds4jax.server.answer import Usage
    from ds4jax.server.scheduler import Scheduler

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("ds4jax_requests", "HTTP requests.", ["endpoint", "status"], registry=registry)
        self._tokens = Counter("ds4jax_tokens", "Tokens of completed requests.", ["kind"], registry=registry)
        self._first = Histogram(
            "ds4jax_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        waiting = Gauge("ds4jax_requests_waiting", "Requests that wait for a session.", registry=registry)
        waiting.set_function(lambda: scheduler.waiting)
        active = Gauge("ds4jax_requests_active", "Requests that have a session.", registry=registry)
        active.set_function(lambda: scheduler.active)

    def answered(self, usage: Usage) -> None:
        """Counts a completed request."""
        counts = {
            "prompt": usage.prompt - usage.cached,
            "cached": usage.cached,
            "answer": usage.completion,
            "drafted": usage.drafted,
            "accepted": usage.accepted,
        }
        for kind, count in counts.items():
            self._tokens.labels(kind).inc(count)
        self._first.observe(usage.first_seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
