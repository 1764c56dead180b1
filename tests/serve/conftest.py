"""A real server on a free port: page and API over the tiny model, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from ming_app.engine.engine import Engine
from ming_app.engine.types import Outcome
from ming_app.serve.app import build_app
from ming_app.serve.server import Server, configured
from ming_app.settings import Settings
from ming_app.ui.loader import EngineLoader
from tests.engine.tiny_engine import tiny_engine


@dataclass
class Served:
    """A running server. `outcomes`: how requests to its engine ended."""

    url: str
    engine: Any
    server: Server
    thread: threading.Thread
    outcomes: list[Outcome] = field(default_factory=list)

    def client(self, key: str = "not needed", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60, **options})

    def until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came to that"
            time.sleep(0.005)


def run_server(loader: EngineLoader, settings: Settings) -> Served:
    """Starts it; ends with `stop`."""
    app = build_app(loader, settings)
    config = configured(app, settings)
    server = Server(config, loader, settings)
    socket = config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    served = Served(f"http://127.0.0.1:{socket.getsockname()[1]}", loader.state.engine, server, thread)
    served.until(lambda: server.started)
    return served


def stop(served: Served) -> None:
    served.server.should_exit = True
    served.thread.join(20)


def settings(folder: Path, **changes: Any) -> Settings:
    """Of a server for tests: any free port, nothing outside `folder`."""
    given: dict[str, Any] = {"port": 0, "cache_dir": folder / "cache", "data_dir": folder / "data", "drain_seconds": 5}
    return Settings(**{**given, **changes})


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """`serve(pause=, slots=, max_waiting=, per_visitor=, **settings)`."""
    ends: list[Callable[[], Any]] = []

    def start(
        *, pause: float = 0.0, slots: int = 8, max_waiting: int = 0, per_visitor: int = 0, **changes: Any
    ) -> Served:
        made = tiny_engine(
            tmp_path / f"model{len(ends)}", pause=pause, slots=slots, max_waiting=max_waiting, per_visitor=per_visitor
        )
        engine: Engine = made.__enter__()
        ends.append(lambda: made.__exit__(None, None, None))
        served = run_server(EngineLoader.of(engine), settings(tmp_path, **changes))
        counted = engine._batcher.on_end
        engine.on_end(lambda outcome: (served.outcomes.append(outcome), counted(outcome))[1])
        ends.append(lambda: stop(served))
        return served

    yield start
    for end in reversed(ends):
        end()


@pytest.fixture(scope="module")
def serve_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for many requests that change nothing."""
    folder = tmp_path_factory.mktemp("served")
    with tiny_engine(folder) as engine:
        served = run_server(EngineLoader.of(engine), settings(folder))
        yield served
        stop(served)
