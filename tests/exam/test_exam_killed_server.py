"""A 600-question mock with 20 candidates at once; the server is killed in the middle and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ming_app.exam.bank import Shelf
from ming_app.exam.desk import Desk
from ming_app.exam.sitting import Response
from ming_app.exam.store import Store
from tests.conftest import ROOT
from tests.exam.candidates import CANDIDATES
from tests.exam.conftest import Clock, group, question


def server(folder: Path, count: int, kill_after: int = 0) -> list[list[str]]:
    """The lines that a server printed; killed without warning after so many answers."""
    command = [sys.executable, str(ROOT / "tests" / "exam" / "candidates.py"), str(folder), str(count)]
    lines: list[list[str]] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.endswith("\n"):
                break  # cut off by the kill
            lines.append(line.split())
            if kill_after and sum(words[0] == "answer" for words in lines) == kill_after:
                process.send_signal(signal.SIGKILL)
    return lines


def test_no_answer_is_lost_and_no_clock_is_cheated(tmp_path: Path) -> None:
    pool = [question(i, ("A1", "A2")[i % 2]) for i in range(500)]
    pool += [q for i in range(60) for q in group("A3", 1000 + 10 * i, 3)]
    pool += [q for i in range(40) for q in group("A4", 2000 + 10 * i, 3)]
    pool += [q for i in range(60) for q in group("B1", 3000 + 10 * i, 4)]
    shelf = Shelf(tmp_path / "banks", tmp_path / "none")
    shelf.add("big", pool)
    began = time.time()

    first = server(tmp_path, 40, kill_after=300)
    second = server(tmp_path, 20)
    assert second[0] == ["resumed", str(CANDIDATES)] and second[-1] == ["done"]

    deadlines = {words[1]: float(words[2]) for words in first if words[0] == "began"}
    sizes = {int(words[3]) for words in first if words[0] == "began"}
    assert len(deadlines) == CANDIDATES and sizes == {600}
    assert all(began + 600 * 60 <= deadline <= time.time() + 600 * 60 for deadline in deadlines.values())
    accepted = {(words[1], int(words[2])): words[3] for words in [*first, *second] if words[0] == "answer"}
    assert len({name for name, _ in accepted}) == CANDIDATES and len(accepted) > 300

    clock = Clock(max(deadlines.values()) + 3600)  # an hour after the last exam was over
    desk = Desk(Store(tmp_path / "progress.sqlite", clock), shelf)
    assert desk.store.notice is None
    for name, deadline in deadlines.items():
        sitting = desk.sitting(name)
        assert (sitting.deadline, sitting.finished, sitting.ending) == (deadline, deadline, "time")
        mine = {place: letter for (who, place), letter in accepted.items() if who == name}
        kept = {place: "".join(r.chosen) for place, r in sitting.responses.items() if r != Response() and r.chosen}
        assert mine.items() <= kept.items()
        assert len(kept) - len(mine) <= 1  # kept, and killed before it could be said
    counted = desk.store.rows("SELECT COUNT(*), COUNT(DISTINCT sitting || key) FROM answers")
    assert counted == [(600 * CANDIDATES, 600 * CANDIDATES)]
    desk.store.close()
