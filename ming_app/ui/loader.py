"""Loads the engine in a background thread and tells at any time how far it is. No gradio, no text for people.

The page opens at once and asks `state`; chat opens when `state.engine` is there. On ZeroGPU it loads in the calling thread,
before the page opens: `spaces` follows what that thread puts on the GPU, and packs it when the page is launched.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ming_app.errors import MingError, NotReadyError
from ming_app.models.progress import Progress, ProgressCallback
from ming_app.ui.starts import Starts

if TYPE_CHECKING:
    from ming_app.settings import Settings

logger = logging.getLogger(__name__)

ONCE = ("fetch", "convert", "build", "kernels")  # stages of a first start


@dataclass(frozen=True)
class LoadState:
    """Where loading stands: exactly one of still going (both None), `engine` ready, or `error`."""

    engine: Any = None
    """the Engine (or whatever the load function gives)"""
    progress: Progress | None = None
    """last report; None before the first"""
    error: Exception | None = None
    """MingError for what a person can mend; anything else is a bug and was logged"""
    began: float | None = None
    """time.monotonic() of the start"""
    usual: float | None = None
    """seconds that such starts took here before"""
    first: bool = False
    """whether something is fetched, built or compiled, which later starts find done"""
    sleeps: bool = False
    """whether this is a Space, which sleeps when nobody comes"""

    @property
    def busy(self) -> bool:
        return self.engine is None and self.error is None


class EngineLoader:
    """Runs `load(progress)` once per `start()`; `state` may be read from any thread."""

    def __init__(
        self,
        load: Callable[[ProgressCallback], Any],
        starts: Starts | None = None,
        *,
        sleeps: bool = False,
        here: bool = False,
    ):
        """`starts`: how long earlier ones took, and where this one is noted. `here`: `start` loads before it returns."""
        self._load = load
        self._starts, self._sleeps, self._here = starts, sleeps, here
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ready: list[Callable[[Any], None]] = []
        self.state = LoadState()

    def when_ready(self, told: Callable[[Any], None]) -> None:
        """`told(engine)` once the engine is there; at once if it is. Call it before `start`."""
        if self.state.engine is not None:
            told(self.state.engine)
        else:
            self._ready.append(told)

    @classmethod
    def of(cls, engine: Any) -> EngineLoader:
        """A loader that is done already."""
        loader = cls(lambda progress: engine)
        loader.state = LoadState(engine=engine)
        return loader

    @classmethod
    def for_settings(cls, settings: Settings) -> EngineLoader:
        """Loads the real Engine; the heavy imports happen in the thread, so that the page opens first."""

        def load(progress: ProgressCallback) -> Any:
            from ming_app.engine.engine import Engine

            return Engine.load(settings, progress)

        starts = Starts.of(settings)
        return cls(load, starts, sleeps=bool(settings.space), here=settings.zerogpu)

    def start(self) -> None:
        """Begins loading, or begins again after an error; nothing when it is under way or done."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive() or self.state.engine is not None:
                return
            if self._here and threading.current_thread() is not threading.main_thread():
                return
            self.state = LoadState(began=time.monotonic(), usual=self._usual(False), sleeps=self._sleeps)
            if self._here:
                self._run()
                return
            self._thread = threading.Thread(target=self._run, name="engine-loader", daemon=True)
            self._thread.start()

    def ready(self) -> Any:
        """The engine. Raises NotReadyError while there is none."""
        if self.state.engine is None:
            raise NotReadyError(self.state.error is not None)
        return self.state.engine

    def wait(self, timeout: float | None = None) -> LoadState:
        """Blocks until loading ended or `timeout` seconds passed."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self.state

    def close(self) -> None:
        """Frees the engine, if there is one."""
        if self.state.engine is not None:
            self.state.engine.close()

    def _run(self) -> None:
        try:
            engine = self._load(self._report)
        except MingError as error:
            self.state = LoadState(error=error)
        except Exception as error:  # a bug: the page says so in words, the log keeps the traceback
            logger.exception("loading the engine failed")
            self.state = LoadState(error=error)
        else:
            for told in self._ready:
                told(engine)
            if self._starts is not None and self.state.began is not None:
                self._starts.add(time.monotonic() - self.state.began, self.state.first)
            self.state = LoadState(engine=engine)

    def _report(self, progress: Progress) -> None:
        state = replace(self.state, progress=progress)
        if progress.stage in ONCE and not state.first:
            state = replace(state, first=True, usual=self._usual(True))
        self.state = state

    def _usual(self, first: bool) -> float | None:
        return self._starts.usual(first) if self._starts is not None else None
