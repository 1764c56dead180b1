"""Loads the engine in a background thread and tells at any time how far it is. No gradio, no text for people.

The page opens at once and asks `state`; chat opens when `state.engine` is there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ming_app.errors import MingError
from ming_app.models.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from ming_app.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadState:
    """Where loading stands: exactly one of still going (both None), `engine` ready, or `error`."""

    engine: Any = None
    """the Engine (or whatever the load function gives)"""
    progress: Progress | None = None
    """last report; None before the first"""
    error: Exception | None = None
    """MingError for what a person can mend; anything else is a bug and was logged"""

    @property
    def busy(self) -> bool:
        return self.engine is None and self.error is None


class EngineLoader:
    """Runs `load(progress)` once per `start()`; `state` may be read from any thread."""

    def __init__(self, load: Callable[[ProgressCallback], Any]):
        self._load = load
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

        return cls(load)

    def start(self) -> None:
        """Begins loading, or begins again after an error; nothing when it is under way or done."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive() or self.state.engine is not None:
                return
            self.state = LoadState()
            self._thread = threading.Thread(target=self._run, name="engine-loader", daemon=True)
            self._thread.start()

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
            self.state = LoadState(engine=engine)

    def _report(self, progress: Progress) -> None:
        self.state = replace(self.state, progress=progress)
