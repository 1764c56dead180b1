"""What earlier starts took: kept apart by kind, read as anybody's file, told in the loading notice."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from ming_app.models.progress import Progress
from ming_app.settings import Settings
from ming_app.ui import render
from ming_app.ui.loader import EngineLoader, LoadState
from ming_app.ui.starts import DAY, KEPT, KINDS, Starts
from tests.fakes import FakeEngine


def test_the_middle_of_the_last_few_is_told(tmp_path: Path) -> None:
    starts = Starts(tmp_path / "deep" / "starts.json", "a model")
    assert starts.usual(True) is None and starts.usual(False) is None
    for seconds in (900.0, 30.0, 10.0, 12.0, 11.0, 500.0):
        starts.add(seconds, False)
    starts.add(75.0, True)
    assert (starts.usual(False), starts.usual(True)) == (12.0, 75.0)
    assert Starts(tmp_path / "deep" / "starts.json", "another").usual(False) is None
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["starts.json"]


def test_the_file_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "starts.json"
    for n in range(KINDS + 20):
        for _ in range(KEPT + 2):
            Starts(path, f"model {n}").add(n + 1.0, False)
    kept = json.loads(path.read_text())
    assert len(kept) == KINDS and all(len(times) == KEPT for times in kept.values())
    assert Starts(path, f"model {KINDS + 19}").usual(False) == KINDS + 20


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 60_000,
        "[1]",
        '{"m again": 7}',
        '{"m again": ["7", true, null, {}]}',
        '{"m again": [NaN, Infinity, -3, 0, 1e9]}',
        '{"m again": [' + "1," * 60_000 + "1]}",
    ],
)
def test_a_hostile_file_tells_nothing_and_stops_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "starts.json"
    path.write_text(text)
    starts = Starts(path, "m")
    assert starts.usual(False) is None
    starts.add(5.0, False)
    assert starts.usual(False) == 5.0 < DAY


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    starts = Starts(tmp_path / "file" / "starts.json", "m")
    starts.add(5.0, False)
    assert starts.usual(False) is None


def test_a_start_is_noted_and_the_next_one_knows(tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path, space="someone/something")
    shown: list[str] = []

    def load(progress: Any) -> FakeEngine:
        if not shown:
            progress(Progress("build", 1, 2, "steps"))
        shown.append(render.loading("en", loader.state))
        return FakeEngine()

    for known in (True, False, False):  # the first builds, the second is the first of its kind, the third knows
        loader = EngineLoader(load, Starts.of(settings), sleeps=True)
        loader.start()
        assert loader.wait(5).engine is not None
        assert Starts.of(settings).usual(known) is not None
    assert "earlier" not in shown[0] and "earlier" not in shown[1] and "earlier starts took about" in shown[2]
    assert all("Space sleeps" in one and "Started" in one for one in shown)
    assert "earlier" not in render.loading("en", LoadState(began=0.0))
    first = LoadState(began=0.0, usual=200.0, first=True)
    assert "earlier first start took about 3 min" in render.loading("en", first)
    assert "首次启动约需 3 分钟" in render.loading("zh", first)


def test_a_start_that_failed_is_not_noted(tmp_path: Path) -> None:
    starts = Starts(tmp_path / "starts.json", "m")
    loader = EngineLoader(lambda progress: 1 // 0, starts)
    loader.start()
    assert loader.wait(5).error is not None and starts.usual(False) is None


def test_on_zerogpu_it_loads_in_the_calling_thread_before_the_page(tmp_path: Path) -> None:
    where: list[threading.Thread] = []

    def load(progress: Any) -> FakeEngine:
        where.append(threading.current_thread())
        if len(where) == 1:
            raise ValueError
        return FakeEngine()

    loader = EngineLoader(load, here=True)
    loader.start()
    assert loader.state.error is not None
    again = threading.Thread(target=loader.start)  # "Try again" on the page: no thread but the main one can
    again.start()
    again.join()
    assert len(where) == 1 and loader.state.error is not None
    loader.start()
    assert loader.state.engine is not None and where == [threading.main_thread()] * 2
