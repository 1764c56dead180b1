"""Counters for Prometheus: how requests ended, tokens, times, who waits. Numbers only: no text, no name, no address."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ming_app.engine.types import Outcome

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 900)


class Metrics:
    """Register `ended` with the engine; `load` gives (running, waiting)."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, load: Callable[[], tuple[int, int]]):
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "ming_requests", "Requests to the model by how they ended", ["reason"], registry=registry
        )
        self._tokens = Counter(
            "ming_tokens", "Tokens read anew, found in memory, and written", ["kind"], registry=registry
        )
        self._waited = Histogram(
            "ming_wait_seconds", "From the request to its turn", buckets=SECONDS, registry=registry
        )
        self._first = Histogram(
            "ming_first_token_seconds", "From the request to its first token", buckets=SECONDS, registry=registry
        )
        self._total = Histogram(
            "ming_request_seconds", "From the request to its end", buckets=SECONDS, registry=registry
        )
        for at, name in enumerate(("running", "waiting")):
            gauge = Gauge(f"ming_{name}", f"Requests to the model that are {name}", registry=registry)
            gauge.set_function(partial(_one, load, at))

    def ended(self, outcome: Outcome) -> None:
        """Counts one request. Called from the thread that drives the model."""
        self._requests.labels(outcome.reason).inc()
        if not outcome.total_seconds:  # refused
            return
        self._tokens.labels("prompt").inc(outcome.prompt_tokens - outcome.reused_tokens)
        self._tokens.labels("reused").inc(outcome.reused_tokens)
        self._tokens.labels("new").inc(outcome.new_tokens)
        self._waited.observe(outcome.waited_seconds)
        self._total.observe(outcome.total_seconds)
        if outcome.new_tokens:
            self._first.observe(outcome.first_token_seconds)

    def text(self) -> bytes:
        """All of them, in Prometheus' text form."""
        return generate_latest(self._registry)


def _one(load: Callable[[], tuple[int, int]], at: int) -> float:
    return load()[at]
