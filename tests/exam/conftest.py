"""Questions and a clock for the exam tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from ming_app.exam.bank import Bank, Shelf
from ming_app.exam.desk import Desk
from ming_app.exam.question import Question, make_question
from ming_app.exam.store import Store

BANK = "tests"


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, at: float = 1_800_000_000.0):
        self.at = at

    def __call__(self) -> float:
        return self.at

    def pass_(self, seconds: float) -> None:
        self.at += seconds


def question(number: int, kind: str = "A1", answer: str = "B", **more: object) -> Question:
    options = {"A": "True", "B": "False"} if kind == "TF" else {x: f"{x.lower()} of {number}" for x in "ABCDE"}
    fields = {"id": f"q{number}", "lang": "en", "type": kind, "stem": f"Question {number}?", "answer": answer}
    return make_question({**fields, "options": options, **more})


def group(kind: str, first: int, size: int, **more: object) -> list[Question]:
    """A group of one kind: a case, or shared options."""
    shared: dict[str, object] = {"group_id": f"g{first}"}
    if kind == "B1":
        shared["options"] = {x: f"{x.lower()} of group {first}" for x in "ABCDE"}
    else:
        shared["shared_stem"] = f"Case {first}."
    return [question(first + i, kind, "ABCDE"[i % 5], **shared, **more) for i in range(size)]


def mixed() -> list[Question]:
    """Every type: 4 A1 of two subjects, an A3, an A4 and a B1 group, an X, a TF."""
    subjects = ("Cardiology", "Neurology")
    found = [question(i, tags={"subject": subjects[i % 2], "difficulty": "easy"}) for i in range(4)]
    found += group("A3", 10, 2) + group("A4", 20, 3) + group("B1", 30, 3)
    return [*found, question(40, "X", "ACD"), question(50, "TF", "A")]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(tmp_path: Path, clock: Clock) -> Desk:
    """A desk with one bank of every type, on disk."""
    shelf = Shelf(tmp_path / "banks", tmp_path / "none")
    bank = shelf.add(BANK, mixed())
    made = Desk(Store(tmp_path / "progress.sqlite", clock), shelf)
    made._banks[BANK] = Bank(BANK, bank.titles, bank.questions)
    return made
