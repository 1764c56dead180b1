"""`EngineReplica`: one Engine in a process of its own, called through a Ray Serve handle. Imports no ray.

Nothing is raised across processes: a refusal travels as a `Failure`, so that no log of the cluster holds anybody's words and
the caller gets the MingError that the engine raised. A new user configuration (another adapter, say) loads beside the old
engine, which ends its answers before it is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ming_app import errors
from ming_app.engine.engine import Engine
from ming_app.engine.prompt import ChatTokenizer
from ming_app.engine.types import EngineInfo, Event, Finish, Intervention, Message, Outcome, SamplingParams
from ming_app.errors import BusyError, MingError, UsageError
from ming_app.serve.answers import events
from ming_app.settings import Settings

logger = logging.getLogger(__name__)

FAILURES = 3  # requests in a row that end with an error, after which the engine counts as broken
STALLED_SECONDS = 120.0  # without an event while something runs, after which it does too
RETIRED_POLL = 0.2


@dataclass(frozen=True)
class Failure:
    """An exception as plain values: the name of a class of `ming_app.errors` and its attributes; else the kind of a bug."""

    name: str
    values: dict[str, Any]

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """A bug is logged by kind and place, without its words."""
        if isinstance(error, MingError):
            return cls(type(error).__name__, dict(vars(error)))
        place = "".join(traceback.format_tb(error.__traceback__))
        logger.error("a request failed: %s\n%s", type(error).__name__, place)
        return cls("", {"kind": type(error).__name__})

    def error(self) -> Exception:
        """What the caller raises."""
        kind = getattr(errors, self.name, None) if self.name else None
        if kind is None:
            return RuntimeError(f"{self.values.get('kind', self.name)} in an engine replica")
        error: Exception = kind.__new__(kind, self.values["en"])
        vars(error).update(self.values)
        return error


class EngineReplica:
    """`overrides`: settings by name. The engine is loaded by `reconfigure`, which Serve calls first and again whenever the user
    configuration changes. `load` is for tests."""

    def __init__(self, overrides: dict[str, Any], load: Callable[[Settings], Engine] = Engine.load):
        self._overrides, self._load = overrides, load
        self._settings: Settings | None = None
        self._engine: Engine | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._using: Counter[Engine] = Counter()
        self._failures = 0
        self._heard = time.monotonic()
        self._outcomes: list[Outcome] = []

    async def reconfigure(self, changes: dict[str, Any]) -> None:
        """Settings in place of the first ones. Raises MingError, and leaves the engine as it is."""
        settings = replica_settings({**self._overrides, **changes})
        if self._engine is not None and settings == self._settings:
            return
        engine = await asyncio.to_thread(self._load, settings)
        engine.on_end(self._ended)
        old, self._engine, self._settings, self._failures = self._engine, engine, settings, 0
        if old is not None:
            task = asyncio.create_task(self._retire(old, settings.drain_seconds))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def stream(
        self, messages: Sequence[Message], params: SamplingParams
    ) -> AsyncIterator[list[EngineInfo | Event | Failure]]:
        """The engine's info, then events as they come, in lists of what had come; the last item is a Finish or a Failure. A
        caller that cancels frees the model within two tokens."""
        with self._in_use() as engine:
            async with contextlib.aclosing(self._answer(engine, messages, params)) as answer:
                async for items in answer:
                    yield items

    async def _answer(
        self, engine: Engine, messages: Sequence[Message], params: SamplingParams
    ) -> AsyncGenerator[list[EngineInfo | Event | Failure]]:
        yield [engine.info]
        arrived: asyncio.Queue[Event | Failure] = asyncio.Queue()

        async def read() -> None:
            try:
                async with contextlib.aclosing(events(engine, messages, params)) as stream:  # type: ignore[type-var]
                    async for event in stream:
                        self._heard = time.monotonic()
                        arrived.put_nowait(event)
            except Exception as error:
                arrived.put_nowait(Failure.of(error))

        reading = asyncio.create_task(read())
        try:
            over = False
            while not over:
                items: list[EngineInfo | Event | Failure] = [await arrived.get()]
                while not arrived.empty():
                    items.append(arrived.get_nowait())
                over = isinstance(items[-1], Finish | Failure)
                yield items
        finally:
            reading.cancel()

    async def score(
        self,
        prefix: Sequence[Message] | Sequence[int],
        continuations: Sequence[str],
        interventions: Sequence[Intervention] = (),
    ) -> list[float] | Failure:
        """As `Engine.score`."""
        with self._in_use() as engine:
            try:
                return await asyncio.to_thread(engine.score, prefix, continuations, interventions)
            except Exception as error:
                return Failure.of(BusyError.closing() if engine.closing.is_set() else error)
            finally:
                self._heard = time.monotonic()

    async def describe(self) -> tuple[EngineInfo, ChatTokenizer]:
        """What is served, and its tokenizer."""
        engine = self._ready()
        return engine.info, engine.tokenizer

    async def look(self) -> dict[str, Any]:
        """This replica: process, what it serves, requests that run and wait, how the latest ended; for operators and tests."""
        engine = self._ready()
        running, waiting = engine.load_now()
        return {
            "pid": os.getpid(),
            "fingerprint": engine.info.fingerprint,
            "running": running,
            "waiting": waiting,
            "outcomes": self._outcomes,
        }

    async def check_health(self) -> None:
        """Raises when the engine is broken: Serve then stops this replica and starts another."""
        if self._engine is None:
            return  # not loaded yet; loading has its own errors
        if self._failures >= FAILURES:
            raise RuntimeError(f"the last {self._failures} requests ended with an error")
        running, _ = self._engine.load_now()
        if not running:
            self._heard = time.monotonic()
        elif time.monotonic() - self._heard > STALLED_SECONDS:
            raise RuntimeError(f"no event for {STALLED_SECONDS:.0f} seconds")

    def __del__(self) -> None:
        """Serve calls this once the answers have ended."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[Engine]:
        """The engine for one request, from before it is submitted: an engine that is in use is not closed."""
        engine = self._ready()
        self._using[engine] += 1
        try:
            yield engine
        finally:
            self._using[engine] -= 1
            if not self._using[engine]:
                del self._using[engine]  # it holds no engine that is gone

    async def _retire(self, engine: Engine, seconds: float) -> None:
        """Lets the old engine end its answers, those that wait included, and closes it. Who still waits then is sent away with
        a BusyError, which the caller takes elsewhere."""
        end = time.monotonic() + seconds
        while self._using[engine] and time.monotonic() < end:
            await asyncio.sleep(RETIRED_POLL)
        await asyncio.to_thread(engine.drain, 0)
        await asyncio.to_thread(engine.close)

    def _ready(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the engine is not loaded")
        return self._engine

    def _ended(self, outcome: Outcome) -> None:
        self._failures = self._failures + 1 if outcome.reason == "error" else 0
        self._outcomes = [*self._outcomes[-99:], outcome]


def replica_settings(overrides: dict[str, Any]) -> Settings:
    """Settings of one replica: what one visitor may have is counted where all of their requests pass. Raises UsageError."""
    return cluster_settings(overrides).with_(per_visitor=0)


def cluster_settings(overrides: dict[str, Any]) -> Settings:
    """Settings by name, from a configuration file; the rest from the machine's environment. Raises UsageError."""
    kinds = {entry.name: str(entry.type) for entry in fields(Settings)}
    for name, value in overrides.items():
        if name not in kinds or not isinstance(value, int if kinds[name] == "int" else str):
            raise UsageError(
                f"{name!r} is not a setting, or not of the right kind. There are: {', '.join(kinds)}.",
                f"{name!r} 不是可用的设置，或类型不符。可用设置：{'、'.join(kinds)}。",
            )
    return Settings.load({k: Path(v).expanduser() if kinds[k] == "Path" else v for k, v in overrides.items()})
