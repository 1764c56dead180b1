"""Loading in the background: progress, success, errors, another try."""

from __future__ import annotations

import threading
from typing import Any

from ming_app.errors import FetchError
from ming_app.models.progress import Progress
from ming_app.ui.loader import EngineLoader
from tests.fakes import FakeEngine


def test_progress_then_engine() -> None:
    reported, go = threading.Event(), threading.Event()

    def load(progress: Any) -> FakeEngine:
        progress(Progress("load", 1, 2, "steps"))
        reported.set()
        go.wait(5)
        return FakeEngine()

    loader = EngineLoader(load)
    assert loader.state.busy
    loader.start()
    loader.start()  # a second start while it runs changes nothing
    assert reported.wait(5) and loader.state.progress is not None and loader.state.busy
    go.set()
    state = loader.wait(5)
    assert state.engine is not None and not state.busy
    loader.close()
    assert state.engine.closed


def test_error_and_another_try() -> None:
    results: list[Any] = [FetchError("No network.", "没有网络。"), ValueError("bug"), FakeEngine()]

    def load(progress: Any) -> Any:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    loader = EngineLoader(load)
    for kind in (FetchError, ValueError):
        loader.start()
        assert isinstance(loader.wait(5).error, kind)
    loader.start()
    assert loader.wait(5).engine is not None and loader.state.error is None
