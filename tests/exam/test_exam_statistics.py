"""Statistics over all answers, the result of one sitting, and their speed."""

from __future__ import annotations

import pytest

from ming_app.exam.desk import Desk
from ming_app.exam.sitting import Response, Sitting
from ming_app.exam.statistics import result, statistics
from ming_app.exam.store import Store
from tests.exam.conftest import Clock, mixed
from tests.exam.test_exam_store import answer, practise

DAY = 86_400.0


def test_an_empty_store_has_statistics() -> None:
    found = statistics(Store(":memory:"))
    assert (found.total.total, found.days, found.streak, found.recall, found.retention) == (0, (), 0, None, None)
    assert found.total.interval == (0.0, 1.0)


def test_days_subjects_streak_and_retention(desk: Desk, clock: Clock) -> None:
    for day in range(3):
        name = practise(desk)
        answer(desk, name, 0, right=day > 0)
        answer(desk, name, 1)
        clock.pass_(DAY)
    found = statistics(desk.store)
    assert [(day.right, day.total) for day in found.days] == [(1, 2), (2, 2), (2, 2)]
    assert {share.name: (share.right, share.total) for share in found.subjects} == {
        "Cardiology": (2, 3),
        "Neurology": (3, 3),
    }
    assert [(share.name, share.total) for share in found.difficulties] == [("easy", 6)]
    assert found.streak == 3  # nothing today yet
    assert found.retention == 1.0 and found.cards == 2 and 0.5 < (found.recall or 0) <= 1
    clock.pass_(DAY)
    assert statistics(desk.store).streak == 0
    assert sum(found.forecast) <= 2


def test_days_follow_the_readers_clock(clock: Clock) -> None:
    store = Store(":memory:", clock)
    clock.at = 20_000 * DAY + 20 * 3600  # eight in the evening in London is tomorrow in Beijing
    store.put_tables(
        {"answers": [["a" * 16, "b", clock(), "A", 1, 1.0, 5.0, "", "practice", "s1", "A1", "zh", "", "", 0]]}
    )
    dates = [statistics(store, offset).days[0].name for offset in (0.0, 8 * 3600.0)]
    assert dates == ["2024-10-04", "2024-10-05"]


def test_the_result_of_a_sitting(clock: Clock) -> None:
    questions = mixed()
    run = Sitting("ab" * 8, "mock", "exam", "b", "t", questions, clock(), partial=True, pass_share=0.3)
    run.responses = {
        0: Response(("B",), 10, "sure"),
        1: Response(("A",), 20, "sure"),
        2: Response(("B",), 30, "guess"),
        len(questions) - 2: Response(("A", "C"), 5, ""),
    }
    run.finish(clock())
    found = result(run)
    assert found.total == len(questions) and found.right == 2 and found.unanswered == len(questions) - 4
    assert found.score == pytest.approx(2 + 2 / 3) and not found.passed
    assert [(s.name, s.right, s.total) for s in found.confidence] == [("sure", 1, 2), ("guess", 1, 1)]
    assert {s.name: s.total for s in found.types}["A1"] == 4 and found.seconds == 65
    assert 0 not in found.wrong and 1 in found.wrong
    run.pass_share = (2 + 2 / 3) / len(questions)
    assert result(run).passed
