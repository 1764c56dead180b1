"""`RemoteEngine`: engine replicas with the face of one Engine, for the page and the API.

A conversation keeps to one replica, whose memory holds it (`session_id`, which the router hashes); where that is gone or
full, another takes over. A request whose replica goes before a word was said is asked again elsewhere; after that it ends with
BusyError "lost". Reading closely (inspection.py) needs the model in the same process and is refused with UsageError.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from ming_app.engine.types import (
    EngineInfo,
    Event,
    Finish,
    Intervention,
    Message,
    Outcome,
    SamplingParams,
    Start,
    Timings,
    Token,
)
from ming_app.errors import BusyError, MingError, UsageError
from ming_app.models.progress import ProgressCallback
from ming_app.molora.trace import RouterTrace
from ming_app.scale.replica import Failure

POLL = 0.05  # seconds between two looks at whether a request was cancelled; each event is one too
TRIES = 3  # replicas that are asked before a request counts as lost
CLOSE_SECONDS = 2.0  # that readers have to hear of it
FULL_SECONDS = 20.0  # after which to try again where every replica is full
MOVED = (RayError, RayServeException)
"""what a handle raises when a replica, or all of them, cannot go on"""


@dataclass
class _Asked:
    """One request under way, as seen from here."""

    visitor: str
    arrived: float = field(default_factory=time.monotonic)
    start: Start | None = None
    began: float = 0.0
    first: float = 0.0
    latest: float = 0.0
    tokens: list[Token] = field(default_factory=list)
    reason: str = "error"

    @property
    def new(self) -> int:
        return sum(len(token.tokens) for token in self.tokens)

    def take(self, event: Event) -> None:
        now = time.monotonic()
        match event:
            case Start():
                self.start, self.began = event, now
            case Token():
                self.first = self.first or now
                self.latest = now
                self.tokens.append(event)
            case Finish():
                self.reason = event.reason

    def cut(self, reason: str) -> Finish:
        """The last event of a request that was given up, with what had come by then."""
        spent = self.latest - self.first
        rate = (self.new - 1) / spent if spent > 0 else 0.0
        since = self.arrived
        timings = Timings(
            max(self.began - since, 0.0), max(self.first - since, 0.0), time.monotonic() - since, max(rate, 0.0)
        )
        return Finish(reason, self.start.prompt_tokens if self.start else 0, self.new, timings, self._trace())

    def outcome(self) -> Outcome:
        now, start = time.monotonic(), self.start
        return Outcome(
            self.reason,
            start.prompt_tokens if start else 0,
            start.reused_tokens if start else 0,
            self.new,
            (self.began or now) - self.arrived,
            self.first - self.arrived if self.first else 0.0,
            now - self.arrived,
        )

    def _trace(self) -> RouterTrace | None:
        read = None if self.start is None else self.start.trace
        if read is None:
            return None
        rows = [
            (one.experts, one.weights) for one in self.tokens if one.experts is not None and one.weights is not None
        ]
        return replace(
            read,
            experts=np.concatenate([read.experts, *(experts for experts, _ in rows)]),
            weights=np.concatenate([read.weights, *(weights for _, weights in rows)]),
            tokens=(*read.tokens, *(token for one in self.tokens for token in one.tokens)),
        )


class RemoteEngine:
    """`handle`: of the deployment of EngineReplicas. `per_visitor`: unfinished requests of one visitor, 0 for any number."""

    adapter = None  # a folder of another machine

    def __init__(self, handle: Any, per_visitor: int = 0):
        self._handle, self._per_visitor = handle, per_visitor
        self._lock = threading.Condition()
        self._asked: list[_Asked] = []
        self._told: Callable[[Outcome], None] = lambda outcome: None
        self._closed = self.draining = False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="cluster", daemon=True).start()
        self.info, self.tokenizer = handle.describe.remote().result()
        self._base = _base(self.info)  # whose tokenizer it is

    @classmethod
    def connect(cls, handle: Any, per_visitor: int = 0, progress: ProgressCallback | None = None) -> RemoteEngine:
        """Waits for the first replica. Raises BusyError when none can be started."""
        try:
            return cls(handle, per_visitor)
        except MOVED:
            raise BusyError.lost() from None

    # -- answers -------------------------------------------------------------------------------------------------

    def stream(
        self, messages: Sequence[Message], params: SamplingParams, cancel: threading.Event | None = None
    ) -> Iterator[Event]:
        """As `Engine.stream`. Events come in the order and form of the replica; a request that is cancelled ends here at once,
        with what has come, and there within two tokens."""
        asked = _Asked(params.visitor)
        self._enter(asked)
        try:
            for event in self._events(asked, list(messages), params, cancel or threading.Event()):
                asked.take(event)
                yield event
        except GeneratorExit:
            asked.reason = "cancelled"
            raise
        except MingError as error:  # one that could not be asked is none that ended
            asked.reason = error.kind if isinstance(error, BusyError) else ""
            raise
        finally:
            with self._lock:
                self._asked = [one for one in self._asked if one is not asked]
                self._lock.notify_all()
            if asked.reason:
                self._told(asked.outcome())

    def _events(
        self, asked: _Asked, messages: list[Message], params: SamplingParams, cancel: threading.Event
    ) -> Iterator[Event]:
        session = conversation(messages, params.visitor)
        for attempt in range(TRIES):
            try:
                yield from self._once(asked, session, messages, params, cancel)
                return
            except BackPressureError:
                raise BusyError.full(self.load_now()[1], FULL_SECONDS) from None
            except BusyError as error:
                if error.kind != "closing":
                    raise
            except MOVED:
                pass
            if asked.start is not None or self._closed or attempt == TRIES - 1:
                raise BusyError.lost()
            time.sleep(POLL)

    def _once(
        self, asked: _Asked, session: str, messages: list[Message], params: SamplingParams, cancel: threading.Event
    ) -> Iterator[Event]:
        arrived: queue.SimpleQueue[list[Any] | BaseException] = queue.SimpleQueue()
        reading = asyncio.run_coroutine_threadsafe(self._read(session, messages, params, arrived), self._loop)
        over = False
        try:
            while True:
                try:
                    items = arrived.get(timeout=POLL)
                except queue.Empty:
                    items = []
                if isinstance(items, BaseException):
                    raise items
                over = bool(items) and isinstance(items[-1], Finish | Failure)
                for item in items:
                    if cancel.is_set():
                        break
                    if isinstance(item, EngineInfo):
                        self._heard(item)
                    elif isinstance(item, Failure):
                        raise item.error()
                    else:
                        yield item
                        if isinstance(item, Finish):
                            return
                if cancel.is_set() or self._closed:
                    yield asked.cut("cancelled" if cancel.is_set() else "closing")
                    return
        finally:
            if not over:
                reading.cancel()

    async def _read(
        self,
        session: str,
        messages: list[Message],
        params: SamplingParams,
        arrived: queue.SimpleQueue[list[Any] | BaseException],
    ) -> None:
        response = self._handle.options(stream=True, session_id=session).stream.remote(messages, params)
        try:
            async for items in response:
                arrived.put(items)
            arrived.put(RuntimeError("the replica ended without a Finish event"))  # only read if none came
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            arrived.put(error)

    def _enter(self, asked: _Asked) -> None:
        """Raises BusyError."""
        with self._lock:
            kind = ""
            if self.draining or self._closed:
                kind = "closing"
            elif self._per_visitor and asked.visitor:
                unfinished = Counter(one.visitor for one in self._asked)[asked.visitor]
                kind = "visitor" if unfinished >= self._per_visitor else ""
            if not kind:
                self._asked.append(asked)
                return
        self._told(Outcome(kind))
        raise BusyError.closing() if kind == "closing" else BusyError.visitor(self._per_visitor, FULL_SECONDS)

    def _heard(self, info: EngineInfo) -> None:
        """The replica that answers says what it serves: after an update not what was served before."""
        if _base(info) != self._base:
            described, tokenizer = self._handle.describe.remote().result()
            # else one answered that is still to be updated, and the next answer asks again
            if _base(described) == _base(info):
                self.tokenizer, self._base = tokenizer, _base(info)
        self.info = info

    # -- the rest of the Engine's face ---------------------------------------------------------------------------

    def score(
        self,
        prefix: Sequence[Message] | Sequence[int],
        continuations: Sequence[str],
        interventions: Sequence[Intervention] = (),
    ) -> list[float]:
        """As `Engine.score`; asked again elsewhere where a replica goes. Raises BusyError "lost" when none is left."""
        session = hashlib.sha256(repr(list(prefix)).encode("utf-8", "replace")).hexdigest()
        handle = self._handle.options(session_id=session)
        for _ in range(TRIES):
            try:
                found = handle.score.remote(list(prefix), list(continuations), tuple(interventions)).result()
            except BackPressureError:
                raise BusyError.full(self.load_now()[1], FULL_SECONDS) from None
            except MOVED:
                time.sleep(POLL)
                continue
            if not isinstance(found, Failure):
                return found
            error = found.error()
            # an engine that is exchanged sends away who waits
            if not isinstance(error, BusyError) or error.kind != "closing":
                raise error
            time.sleep(POLL)
        raise BusyError.lost()

    def load_now(self) -> tuple[int, int]:
        """(requests that run, requests that wait or whose prompt is being read), of those that passed here."""
        with self._lock:
            running = sum(one.start is not None for one in self._asked)
            return running, len(self._asked) - running

    def expected_wait(self) -> float:
        """Seconds until the turn of a request that comes now: a guess, the replicas' queues are theirs."""
        return FULL_SECONDS

    def on_end(self, told: Callable[[Outcome], None]) -> None:
        """As `Engine.on_end`, for the requests that pass here."""
        self._told = told

    def drain(self, seconds: float) -> bool:
        """No new requests; those under way have so many seconds. Whether all of them ended."""
        with self._lock:
            self.draining = True
            return self._lock.wait_for(lambda: not self._asked, seconds)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text on its own."""
        return len(self.tokenizer.encode_text(text))

    @property
    def backend(self) -> NoReturn:
        """What reading closely asks for first."""
        raise _far()

    def turn(self) -> NoReturn:
        """As `backend`."""
        raise _far()

    def close(self) -> None:
        """Ends what runs; the replicas stay."""
        with self._lock:
            self._closed = True
            self._lock.wait_for(lambda: not self._asked, CLOSE_SECONDS)
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop)

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=CLOSE_SECONDS)
        self._loop.stop()


def conversation(messages: Sequence[Message], visitor: str) -> str:
    """Names a conversation by who leads it and how it begins; a digest, as routers may log it."""
    begin: list[str] = [visitor]
    for message in messages:
        begin += [message.role, message.content]
        if message.role == "user":
            break
    return hashlib.sha256(repr(begin).encode("utf-8", "replace")).hexdigest()


def _far() -> UsageError:
    return UsageError(
        "The model runs on other machines; reading an answer closely needs it here. Start the page by itself on one machine for that.",
        "模型运行在其他机器上；逐词细读需要本机模型。请在单机上启动页面后使用。",
    )


def _base(info: EngineInfo) -> str:
    """The fingerprint of the base alone."""
    return info.fingerprint.partition("+")[0]
