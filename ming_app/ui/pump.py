"""Runs Engine.stream in a thread of its own, so that decoding goes on while the page sends what it has.

The reader gets events, or None when nothing came for a while: a page handler can then show that time passes, and can be
closed at any moment. `close` stops the model within two tokens and waits until the engine is free again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextvars import copy_context
from typing import Any, Protocol

from ming_app.engine.types import EngineInfo, Event, Finish, Message, SamplingParams

CLOSE_TIMEOUT = 30.0  # seconds; reading a long prompt on a slow machine must still end


class Streams(Protocol):
    """The part of the Engine that the page needs."""

    info: EngineInfo

    def expected_wait(self) -> float:
        """Seconds until the turn of a request that comes now."""

    def load_now(self) -> tuple[int, int]:
        """(requests that run, requests that wait)."""

    def stream(self, messages: Sequence[Message], params: SamplingParams, cancel: threading.Event | None = None) -> Any:
        """Iterator of Start, Tokens, Finish; closing it frees the model."""


class Pump:
    """One request. `cancel` may be set from any thread: the engine then finishes by itself with reason "cancelled"."""

    def __init__(self, engine: Streams, messages: Sequence[Message], params: SamplingParams, cancel: threading.Event):
        self.cancel = cancel
        self._engine, self._messages, self._params = engine, list(messages), params
        self._queue: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._closing = False
        context = copy_context()  # Gradio's: whose request it is, which ZeroGPU asks
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="engine-stream", daemon=True)
        self._thread.start()

    def events(self, patience: float) -> Iterator[Event | None]:
        """Events up to Finish; None each time `patience` seconds pass without one. Raises what the engine raised."""
        while True:
            try:
                item = self._queue.get(timeout=patience)
            except queue.Empty:
                yield None
                continue
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Finish):
                return

    def close(self) -> None:
        """Ends the request, whatever state it is in."""
        self._closing = True
        self.cancel.set()
        self._thread.join(CLOSE_TIMEOUT)

    def _run(self) -> None:
        try:
            stream = self._engine.stream(self._messages, self._params, self.cancel)
            try:
                for event in stream:
                    self._queue.put(event)
                    if self._closing:
                        break
                else:
                    self._queue.put(RuntimeError("the engine ended without a Finish event"))  # only read if none came
            finally:
                stream.close()
        except Exception as error:  # handed to the reader, who decides what to show
            self._queue.put(error)
