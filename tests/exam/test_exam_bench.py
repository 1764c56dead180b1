"""What the exam benchmark measures: a bank and a store of the sizes it says, made of valid questions and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ming_app.bench import exam
from ming_app.bench.peers import Setup
from ming_app.exam.bank import Shelf
from ming_app.exam.statistics import statistics
from ming_app.settings import Settings


def test_questions_are_kept_and_opened(tmp_path: Path) -> None:
    made = exam.many_questions(400)
    assert len({question.key for question in made}) == 400
    name = Shelf(tmp_path).add("many", made).name
    assert Shelf(tmp_path).open(name).questions == tuple(made)


def test_answers_are_counted() -> None:
    found = statistics(exam.many_answers(3_000, 900))
    assert found.total.total == 3_000 and found.total.right == 2_000 and len(found.subjects) == 30


def test_both_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("QUESTIONS", 200), ("ANSWERS", 300), ("CARDS", 90)):
        monkeypatch.setattr(exam, name, size)
    measure = exam.exam_peer(Setup(Settings(), 8, 8, 8))
    assert 0 < measure("open-bank") < 60 and 0 < measure("statistics") < 60
