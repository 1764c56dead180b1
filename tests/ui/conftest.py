"""A page with an Exam tab for the tests of its handlers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ming_app.exam.bank import Shelf
from ming_app.exam.desk import Desk
from ming_app.exam.store import Store
from ming_app.settings import Settings
from ming_app.ui.chat import Session
from ming_app.ui.exam.room import Room
from ming_app.ui.exam.tab import ExamTab
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import Page
from tests.exam.conftest import Clock, mixed
from tests.fakes import FakeEngine


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., tuple[ExamTab, Session]]:
    """A tab over a scripted engine and a visitor with a bank of every type of question, on disk or in the browser."""

    def make(engine: Any = None, progress: str = "disk") -> tuple[ExamTab, Session]:
        settings = Settings(data_dir=tmp_path, progress=progress)
        tab = Page(EngineLoader.of(engine or FakeEngine("Because.")), settings).exam
        session = Session()
        clock = Clock()
        on_disk = progress == "disk"
        desk = Desk(
            Store(tmp_path / "progress.sqlite" if on_disk else ":memory:", clock),
            Shelf(tmp_path / "banks" if on_disk else None),
        )
        session.exam = Room(desk, bank=desk.add_bank("tests", mixed()).name)
        return tab, session

    return make
