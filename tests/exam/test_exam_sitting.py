"""The rules of a sitting: feedback, locking, clock, time, and what a mock exam is made of. And grading."""

from __future__ import annotations

import pytest

from ming_app.exam.bank import option_order
from ming_app.exam.grade import grade
from ming_app.exam.sitting import PRESETS, Blueprint, Part, Response, Sitting, SittingError, draw
from tests.exam.conftest import Clock, group, mixed, question


def sitting(clock: Clock, mode: str = "exam", **more: object) -> Sitting:
    values = {"id": "ab" * 8, "kind": "practice", "bank": "b", "title": "t", "started": clock(), "shown": clock()}
    return Sitting(mode=mode, questions=mixed(), **{**values, **more})  # type: ignore[arg-type]


# -- grading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["A1", "A2", "TF"])
def test_single_answers(kind: str) -> None:
    one = question(1, kind, "B")
    assert grade(one, ["B"]) == grade(one, ("B",), partial=True)
    assert (grade(one, "B").correct, grade(one, "B").score) == (True, 1)
    for wrong in ("A", "", "AB"):
        assert (grade(one, wrong, partial=True).correct, grade(one, wrong).score) == (False, 0)


def test_groups_are_graded_one_by_one() -> None:
    for kind in ("A3", "A4", "B1"):
        assert [grade(q, q.answer).score for q in group(kind, 1, 3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("chosen", "strict", "partial"),
    [("ACD", 1, 1), ("AC", 0, 2 / 3), ("D", 0, 1 / 3), ("ACDE", 0, 0), ("AB", 0, 0), ("", 0, 0), ("B", 0, 0)],
)
def test_several_answers_all_or_nothing_and_in_part(chosen: str, strict: float, partial: float) -> None:
    several = question(1, "X", "ACD")
    assert grade(several, chosen).score == strict
    given = grade(several, chosen, partial=True)
    assert given.score == pytest.approx(partial) and given.correct == (chosen == "ACD")


# -- answering --------------------------------------------------------------------------------------------------------


def test_tutor_mode_reveals_after_submitting_exam_mode_at_the_end(clock: Clock) -> None:
    tutor, exam = sitting(clock, "tutor"), sitting(clock, "exam")
    for run in (tutor, exam):
        run.choose(0, "B", clock())
    with pytest.raises(SittingError, match="Choose an option"):
        tutor.submit(1, clock())
    assert tutor.submit(0, clock()).correct and tutor.revealed(0) and not tutor.revealed(1)
    assert not exam.revealed(0)
    exam.choose(0, "C", clock())
    assert exam.response(0).chosen == ("C",)
    with pytest.raises(SittingError, match="final"):
        tutor.choose(0, "C", clock())
    exam.finish(clock())
    assert exam.revealed(0) and exam.revealed(5)
    with pytest.raises(SittingError, match="handed in"):
        exam.choose(1, "A", clock())


def test_answers_must_fit_the_question(clock: Clock) -> None:
    run = sitting(clock)
    for letters in ("F", "AB"):
        with pytest.raises(SittingError, match="not an answer"):
            run.choose(0, letters, clock())
    several = next(at for at, q in enumerate(run.questions) if q.type == "X")
    run.choose(several, "CA", clock())
    assert run.response(several).chosen == ("A", "C")
    run.choose(several, "", clock())
    assert run.response(several).chosen == ()
    with pytest.raises(SittingError, match="Confidence"):
        run.rate(0, "certain", clock())
    run.strike(0, "AZ", clock())
    assert run.response(0).struck == ("A",)
    with pytest.raises(SittingError, match="questions 1 to"):
        run.go(99, clock())


@pytest.mark.parametrize("mode", ["tutor", "exam"])
def test_an_unfolding_case_locks_before_its_next_part_shows(clock: Clock, mode: str) -> None:
    run = sitting(clock, mode)
    first = next(at for at, q in enumerate(run.questions) if q.type == "A4")
    assert [run.hidden(first + i) for i in range(3)] == [False, True, True]
    run.go(first, clock())
    with pytest.raises(SittingError, match="unfolds"):
        run.go(first + 1, clock())  # not answered
    with pytest.raises(SittingError, match="not open"):
        run.choose(first + 1, "A", clock())
    run.choose(first, "A", clock())
    if mode == "tutor":
        with pytest.raises(SittingError, match="unfolds"):
            run.go(first + 1, clock())  # not submitted
        run.submit(first, clock())
    with pytest.raises(SittingError, match="unfolds"):
        run.go(first + 2, clock())  # no skipping
    run.go(first + 1, clock())
    assert [run.hidden(first + i) for i in range(3)] == [False, False, True]
    with pytest.raises(SittingError, match="final"):
        run.choose(first, "B", clock())
    run.go(0, clock())  # elsewhere and back is free
    run.go(first + 1, clock())
    assert not any(run.hidden(at) for at in range(len(run.questions)) if run.questions[at].type == "A3")
    run.finish(clock())
    assert not any(run.hidden(at) for at in range(len(run.questions)))


def test_shared_options_share_their_order(clock: Clock) -> None:
    run = sitting(clock, seed=7)
    places = [at for at, q in enumerate(run.questions) if q.type == "B1"]
    assert len({run.order(at) for at in places}) == 1
    assert len({option_order(q, 7) for q in (question(i) for i in range(30))}) > 10
    assert option_order(question(1), None) == tuple("ABCDE")
    for fixed in (
        question(1, "TF", "A"),
        question(1, options={"A": "a", "B": "b", "C": "以上都对"}),
        question(1, explanation="B项错误"),
        question(1, explanation="Option C is wrong"),
    ):
        assert {option_order(fixed, seed) for seed in range(9)} == {tuple(fixed.options)}


# -- time -------------------------------------------------------------------------------------------------------------


def test_time_is_counted_at_the_question_in_view(clock: Clock) -> None:
    run = sitting(clock, "tutor")
    clock.pass_(30)
    run.choose(0, "A", clock())
    clock.pass_(10)
    run.go(2, clock())
    clock.pass_(5)
    run.go(0, clock())
    clock.pass_(2)
    run.submit(0, clock())
    clock.pass_(100)  # reading the explanation is not answering
    run.go(1, clock())
    clock.pass_(100_000)  # went for lunch
    run.finish(clock())
    assert (run.response(0).seconds, run.response(2).seconds, run.response(1).seconds) == (42, 5, 600)


def test_the_deadline_is_the_servers(clock: Clock) -> None:
    run = sitting(clock, deadline=clock() + 60)
    run.choose(0, "A", clock())
    clock.pass_(59)
    assert run.remaining(clock()) == 1
    run.choose(1, "A", clock())
    clock.pass_(1)
    with pytest.raises(SittingError, match="time is over"):
        run.choose(2, "A", clock())
    assert (run.finished, run.ending) == (clock(), "time") and run.response(2) == Response()
    late = sitting(clock, deadline=clock() - 100)
    late.finish(clock())  # handed in long after: it ended at its deadline all the same
    assert (late.finished, late.ending) == (clock() - 100, "time")


def test_pausing_stands_the_clock_still_where_it_is_allowed(clock: Clock) -> None:
    strict = sitting(clock, deadline=clock() + 60)
    with pytest.raises(SittingError, match="cannot be paused"):
        strict.pause(clock())
    run = sitting(clock, deadline=clock() + 60, pausable=True)
    clock.pass_(20)
    run.pause(clock())
    clock.pass_(5000)
    assert run.remaining(clock()) == 40 and not run.tick(clock())
    for act in (lambda: run.choose(0, "A", clock()), lambda: run.go(1, clock()), lambda: run.pause(clock())):
        with pytest.raises(SittingError, match="paused"):
            act()
    run.resume(clock())
    run.resume(clock())
    assert run.remaining(clock()) == 40 and run.response(0).seconds == 20
    clock.pass_(40)
    assert run.tick(clock())


# -- mock exams -------------------------------------------------------------------------------------------------------


def test_a_blueprint_is_drawn_with_groups_whole() -> None:
    pool = [question(i, "A1") for i in range(50)] + [q for i in range(10) for q in group("A3", 100 + 10 * i, 3)]
    drawn = draw(pool, Blueprint("t", {}, 30, (Part(10, "A1"), Part(9, "A3"))), seed=1)
    assert [q.type for q in drawn.questions] == ["A1"] * 10 + ["A3"] * 9 and drawn.minutes == 30 and not drawn.short
    assert [q.group_id for q in drawn.questions[10:]] == [g for q in drawn.questions[10::3] for g in [q.group_id] * 3]
    other = draw(pool, Blueprint("t", {}, 30, (Part(10, "A1"), Part(9, "A3"))), seed=2)
    assert other.questions != drawn.questions


def test_what_a_bank_lacks_is_filled_and_said() -> None:
    pool = [question(i, "A1") for i in range(30)] + [question(100 + i, "X", "AB") for i in range(5)]
    drawn = draw(pool, Blueprint("t", {}, 40, (Part(10, "A1"), Part(10, "B1"))), seed=1)
    assert len(drawn.questions) == 20 and drawn.short == ((Part(10, "B1"), 0),) and drawn.minutes == 40
    assert all(q.type == "A1" for q in drawn.questions)
    small = draw(pool[:10], Blueprint("t", {}, 40, (Part(20),)), seed=1)
    assert len(small.questions) == 10 and small.minutes == 20


def test_parts_by_subject() -> None:
    pool = mixed()
    drawn = draw(pool, Blueprint("t", {}, 4, (Part(2, "A1", "Cardiology"), Part(1, subject="Neurology"))), seed=3)
    assert [q.tags["subject"] for q in drawn.questions] == ["Cardiology", "Cardiology", "Neurology"]


def test_presets_are_whole() -> None:
    assert len({preset.name for preset in PRESETS}) == len(PRESETS)
    for preset in PRESETS:
        assert set(preset.titles) == {"zh", "en"} and preset.size and preset.minutes
    full = next(preset for preset in PRESETS if preset.name == "physician-full")
    assert full.size == 600
