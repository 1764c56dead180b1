"""Progress in SQLite: what is kept, what a killed process loses, damaged files, exports; and spaced repetition."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fsrs import Card, Rating, Scheduler

from ming_app.database import StoreError
from ming_app.errors import UsageError
from ming_app.exam import schedule
from ming_app.exam.desk import Choice, Desk
from ming_app.exam.progress_file import read_progress, write_progress
from ming_app.exam.sitting import SittingError
from ming_app.exam.store import SCHEMA, Store
from tests.exam.conftest import Clock, mixed, question

DAY = 86_400.0


def practise(desk: Desk, **how: object) -> str:
    bank = desk.shelf.list()[0].name
    return desk.practise(bank, Choice(**{"shuffle_options": False, **how})).id  # type: ignore[arg-type]


def answer(desk: Desk, name: str, index: int, right: bool = True) -> None:
    sitting = desk.sitting(name)
    key = sitting.questions[index].answer
    desk.choose(name, index, key if right else next(x for x in sitting.questions[index].options if x not in key))
    desk.submit(name, index)


# -- the rule for ratings, and FSRS -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "seconds", "confidence", "wanted"),
    [
        (False, 5, "sure", Rating.Again),
        (True, 20, "", Rating.Good),
        (True, 20, "sure", Rating.Easy),
        (True, 40, "sure", Rating.Good),
        (True, 0, "sure", Rating.Good),
        (True, 20, "unsure", Rating.Hard),
        (True, 20, "guess", Rating.Hard),
        (True, 91, "sure", Rating.Hard),
    ],
)
def test_the_rating_rule(correct: bool, seconds: float, confidence: str, wanted: Rating) -> None:
    assert schedule.rating(correct, seconds, confidence, "A1") == wanted


def test_reviews_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reviews of the package's own basic example, through our functions and through it directly."""
    plain = Scheduler(enable_fuzzing=False)
    monkeypatch.setattr(schedule, "scheduler", lambda retention=0.9: plain)
    at = datetime(2022, 11, 29, 12, 30, 0, 0, UTC)
    card, state = Card(card_id=0, due=at), None
    for given in [Rating.Good] * 6 + [Rating.Again] * 2 + [Rating.Good] * 5:
        card, _ = plain.review_card(card, given, at)
        seen = schedule.review(state, given, at.timestamp())
        state = seen.state
        assert seen.due == card.due.timestamp() and seen.stability == card.stability
        at = card.due
    assert card.stability and card.stability > 10
    later = at + timedelta(days=30)
    assert schedule.recall([seen.state], later.timestamp()) == [plain.get_card_retrievability(card, later)]


def test_retention_has_limits() -> None:
    schedule.scheduler.cache_clear()
    with pytest.raises(UsageError):
        schedule.scheduler(0.2)


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_an_answer_counts_once_and_at_once_in_practice(desk: Desk, clock: Clock) -> None:
    name = practise(desk)
    answer(desk, name, 0)
    answer(desk, name, 1, right=False)
    desk.finish(name)
    desk.finish(name)
    store = desk.store
    assert store.rows("SELECT correct, kind FROM answers ORDER BY id") == [(1, "practice"), (0, "practice")]
    keys = [q.key for q in desk.sitting(name).questions]
    assert store.wrong() == {keys[1]: 1}
    assert store.weakness() == {keys[0]: 1 / 3, keys[1]: 2 / 3}
    assert store.due() == [] and store.rows("SELECT COUNT(*) FROM cards") == [(2,)]
    clock.pass_(DAY)
    assert set(store.due()) == set(keys[:2])


def test_a_question_leaves_the_wrong_book_after_two_right_answers(desk: Desk) -> None:
    bank = desk.shelf.list()[0].name
    for right, inside in ((False, True), (True, True), (True, False), (False, True)):
        answer(desk, practise(desk), 0, right)
        assert (desk.bank(bank).questions[0].key in desk.store.wrong()) == inside
        desk.store.now.pass_(60)  # type: ignore[attr-defined]


def test_choices(desk: Desk, clock: Clock) -> None:
    bank = desk.bank(desk.shelf.list()[0].name)
    first = practise(desk)
    answer(desk, first, 0, right=False)
    answer(desk, first, 2)
    desk.flag(first, 3, True)
    keys = [q.key for q in bank.questions]

    def stems(**how: object) -> list[str]:
        return [q.stem for q in desk.chosen(bank, Choice(**how))]  # type: ignore[arg-type]

    everything = [q.stem for q in bank.questions]
    assert stems() == everything
    assert stems(only="wrong") == [everything[0]] and stems(only="flagged") == [everything[3]]
    assert stems(only="new") == [s for i, s in enumerate(everything) if i not in (0, 2)]
    assert stems(only="due") == []
    clock.pass_(30 * DAY)
    assert set(stems(only="due")) == {everything[0], everything[2]}
    assert stems(tags={"subject": ["Cardiology"]}) == [everything[0], everything[2]]
    assert stems(tags={"type": ["A4", "TF"]}) == [q.stem for q in bank.questions if q.type in ("A4", "TF")]
    assert stems(order="weakness")[0] == everything[0] and stems(order="weakness")[-1] == everything[2]
    mixed_up = stems(order="shuffled")
    assert sorted(mixed_up) == sorted(everything)
    place = mixed_up.index("Question 20?")
    assert mixed_up[place : place + 3] == ["Question 20?", "Question 21?", "Question 22?"]
    assert len(desk.practise(bank.name, Choice(count=2)).questions) == 2
    assert len(desk.practise(bank.name, Choice(count=5)).questions) == 6  # the case of two is not cut
    with pytest.raises(UsageError, match="Widen"):
        desk.practise(bank.name, Choice(tags={"subject": ["Botany"]}))
    assert len(keys) == len(set(keys))


def test_exam_mode_counts_at_the_end_a_mock_its_empty_answers_too(desk: Desk) -> None:
    bank = desk.shelf.list()[0].name
    run = desk.practise(bank, Choice(mode="exam"))
    desk.choose(run.id, 0, run.questions[0].answer)
    assert desk.store.rows("SELECT COUNT(*) FROM answers") == [(0,)]
    desk.finish(run.id)
    assert desk.store.rows("SELECT COUNT(*) FROM answers") == [(1,)]
    from ming_app.exam.sitting import Blueprint, Part

    mock, _ = desk.mock(bank, Blueprint("four", {}, 20, (Part(4, "A1"),)))
    desk.choose(mock.id, 1, mock.questions[1].answer)
    desk.finish(mock.id)
    assert desk.store.rows("SELECT COUNT(*), SUM(correct) FROM answers WHERE kind='mock'") == [(len(mock.questions), 1)]


def test_a_sitting_goes_on_after_a_restart(desk: Desk, clock: Clock, tmp_path: Path) -> None:
    from ming_app.exam.sitting import Blueprint, Part

    mock, _ = desk.mock(desk.shelf.list()[0].name, Blueprint("four", {}, 20, (Part(4, "A1"),)))
    clock.pass_(30)
    desk.choose(mock.id, 2, "B")
    desk.strike(mock.id, 2, "A")
    desk.rate(mock.id, 2, "guess")
    desk.flag(mock.id, 2, True)
    desk.go(mock.id, 3)
    left = mock.remaining(clock())
    desk.store.close()
    again = Desk(Store(tmp_path / "progress.sqlite", clock), desk.shelf)
    assert [s.id for s in again.unfinished()] == [mock.id]
    assert again.sitting(mock.id) == mock and again.sitting(mock.id) is not mock
    assert again.sitting(mock.id).remaining(clock()) == left
    again.store.close()
    clock.pass_(100_000)  # the server was down past the deadline
    late = Desk(Store(tmp_path / "progress.sqlite", clock), desk.shelf)
    assert late.unfinished() == []
    ended = late.sitting(mock.id)
    assert (ended.ending, ended.finished) == ("time", mock.deadline) and ended.response(2).chosen == ("B",)
    assert late.store.rows("SELECT COUNT(*) FROM answers") == [(len(mock.questions),)]
    with pytest.raises(SittingError):
        late.choose(mock.id, 0, "A")
    late.store.close()


def test_a_sitting_whose_bank_is_gone_says_so(desk: Desk, tmp_path: Path, clock: Clock) -> None:
    name = practise(desk)
    bank = desk.shelf.list()[0].name
    desk.shelf.add("tests", mixed()[1:])
    desk.store.close()
    again = Desk(Store(tmp_path / "progress.sqlite", clock), desk.shelf)
    with pytest.raises(StoreError, match="Import the bank again"):
        again.sitting(name)
    desk.shelf.remove(bank)
    assert again.unfinished() == []
    again.store.close()


def test_marks(desk: Desk) -> None:
    store = desk.store
    store.set_mark("k" * 16, "b", note="x" * 5000, cause="misread")
    store.set_mark("k" * 16, "b", flagged=True)
    mark = store.mark("k" * 16)
    assert (len(mark.note), mark.cause, mark.flagged) == (2000, "misread", True)
    with pytest.raises(StoreError, match="cause"):
        store.set_mark("k" * 16, "b", cause="bad luck")
    assert store.mark("none").note == ""


def test_what_could_not_be_kept_is_not_believed(desk: Desk) -> None:
    name = practise(desk)
    desk.choose(name, 0, "A")
    desk.store._db.close()
    for act in (lambda: desk.choose(name, 0, "B"), lambda: desk.choose(name, 1, "B"), lambda: desk.submit(name, 0)):
        with pytest.raises(StoreError, match="could not be kept"):
            act()
    assert desk._open[name].response(0).chosen == ("A",) and not desk._open[name].response(0).final
    assert not desk._open[name].response(1).chosen


# -- files ------------------------------------------------------------------------------------------------------------


def filled(desk: Desk) -> Store:
    name = practise(desk)
    answer(desk, name, 0)
    answer(desk, name, 1, right=False)
    desk.store.set_mark(desk.sitting(name).questions[1].key, "b", note="看清题目", cause="misread")
    return desk.store


def test_a_damaged_file_is_set_aside_and_the_backup_takes_its_place(desk: Desk, tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "progress.sqlite"
    filled(desk).close()
    Store(path, clock).close()  # opening makes the day's backup
    assert (tmp_path / "progress.backup.sqlite").is_file()
    path.write_bytes(b"SQLite format 3\0" + bytes(5000))
    for ending in ("-wal", "-shm"):
        (tmp_path / f"progress.sqlite{ending}").unlink(missing_ok=True)
    again = Store(path, clock)
    assert again.notice is not None and "set aside" in again.notice.en and "备份" in again.notice.zh
    assert again.rows("SELECT COUNT(*) FROM answers") == [(2,)]
    assert len(list(tmp_path.glob("progress.damaged-*"))) == 1
    again.close()


def test_damage_without_a_backup_begins_empty_and_says_so(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "progress.sqlite"
    path.write_text("this is no database, and long enough to be read as one " * 100)
    store = Store(path, clock)
    assert store.notice is not None and "no backup" in store.notice.en
    assert store.rows("SELECT COUNT(*) FROM answers") == [(0,)]
    store.close()


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "progress.sqlite"
    Store(path).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version={len(SCHEMA.migrations) + 1}")
    db.commit()
    db.close()
    with pytest.raises(StoreError, match="newer version"):
        Store(path)
    assert path.is_file() and not list(tmp_path.glob("*.damaged-*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="MING_DATA_DIR"):
        Store(tmp_path / "file" / "progress.sqlite")


def test_export_and_import(desk: Desk, clock: Clock) -> None:
    data = write_progress(filled(desk))
    fresh = Store(":memory:", clock)
    restored = read_progress(fresh, data)
    assert restored.refused == 0 and restored.added > 5
    assert json.loads(write_progress(fresh)) == json.loads(data)
    assert read_progress(fresh, data).added == 0
    fresh.wipe()
    assert all(not fresh.rows(f"SELECT * FROM {name}") for name in ("answers", "cards", "marks", "sittings", "tally"))


def test_wiping_leaves_nothing_on_the_disk(desk: Desk, tmp_path: Path, clock: Clock) -> None:
    filled(desk).close()
    store = Store(tmp_path / "progress.sqlite", clock)
    store.wipe()
    store.close()
    left = b"".join(path.read_bytes() for path in tmp_path.glob("progress*"))
    assert "看清题目".encode() not in left and not (tmp_path / "progress.backup.sqlite").exists()


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"nope", b'{"ming_progress":"1"}', b"[" * 100_000])
def test_foreign_files_are_refused(data: bytes) -> None:
    with pytest.raises(StoreError, match="cannot be imported"):
        read_progress(Store(":memory:"), data)
    with pytest.raises(StoreError, match="newer"):
        read_progress(Store(":memory:"), b'{"ming_progress": 99}')


def test_hostile_rows_are_counted_not_kept(desk: Desk) -> None:
    values = json.loads(write_progress(filled(desk)))
    at = {name: values["columns"]["answers"].index(name) for name in ("key", "at", "chosen", "subject", "correct")}
    good = values["answers"][0]
    for name, bad in (
        ("key", "../../etc"),
        ("at", 1e300),
        ("at", True),
        ("chosen", "<b>"),
        ("subject", "x" * 999),
        ("subject", "a\x1b[31m"),
        ("correct", 7),
        ("correct", "1"),
    ):
        row = list(good)
        row[at[name]] = bad
        values["answers"].append(row)
    values["answers"] += [None, [1, 2], {}]
    values["cards"].append(["0" * 16, "b", '{"card_id": "x"}', 0, 0])
    fresh = Store(":memory:")
    restored = read_progress(fresh, json.dumps(values).encode())
    assert restored.refused == 12 and fresh.rows("SELECT COUNT(*) FROM answers") == [(2,)]
    values["answers"] = "many"
    with pytest.raises(StoreError, match="answers is damaged"):
        read_progress(fresh, json.dumps(values).encode())


def test_two_stores_share_a_file(tmp_path: Path, clock: Clock) -> None:
    """Two windows of the app on one machine."""
    first, second = Store(tmp_path / "p.sqlite", clock), Store(tmp_path / "p.sqlite", clock)
    for number in range(20):
        (first, second)[number % 2].set_mark(question(number).key, "b", flagged=True)
    assert len(first.flagged()) == len(second.flagged()) == 20
    first.close()
    second.close()


def test_a_busy_file_is_not_taken_for_a_damaged_one(desk: Desk, tmp_path: Path, clock: Clock, monkeypatch) -> None:
    filled(desk).close()
    path = tmp_path / "progress.sqlite"
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.1}))
    other = connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="cannot be kept"):
        Store(path, clock)
    other.close()
    assert not list(tmp_path.glob("*.damaged-*"))
    again = Store(path, clock)
    assert again.rows("SELECT COUNT(*) FROM answers") == [(2,)]
    again.close()


def test_progress_follows_the_question_into_another_bank(desk: Desk) -> None:
    answer(desk, practise(desk), 0, right=False)
    other = desk.add_bank("the same again", mixed())
    assert [q.stem for q in desk.chosen(other, Choice(only="wrong"))] == ["Question 0?"]


def test_time_away_does_not_count(desk: Desk, clock: Clock) -> None:
    name = practise(desk)
    clock.pass_(20)
    desk.leave(name)
    clock.pass_(5000)
    desk.come_back(name)
    clock.pass_(10)
    answer(desk, name, 0)
    assert desk.sitting(name).response(0).seconds == 30


def test_questions_never_reached_are_not_repeated(desk: Desk, clock: Clock) -> None:
    from ming_app.exam.sitting import PRESETS

    mock, _ = desk.mock(desk.shelf.list()[0].name, PRESETS[0])
    desk.choose(mock.id, 0, "A")
    clock.pass_(100_000)
    desk.sitting(mock.id)
    assert desk.store.rows("SELECT COUNT(*) FROM answers") == [(len(mock.questions),)]
    assert desk.store.rows("SELECT COUNT(*) FROM cards") == [(1,)] and len(desk.store.weakness()) == 1


def test_a_removed_bank_takes_its_open_sittings_along(desk: Desk) -> None:
    practise(desk)
    desk.remove_bank(desk.shelf.list()[0].name)
    assert desk.unfinished() == []


def test_cards_that_would_fail_later_are_refused() -> None:
    good = schedule.review(None, Rating.Good, 1_800_000_000).state
    assert schedule.readable(good)
    for change in (
        {"card_id": float("inf")},
        {"due": "2026-01-01T00:00:00"},
        {"state": 2, "stability": None},
        {"state": 99},
    ):
        assert not schedule.readable(json.dumps({**json.loads(good), **change}))


def test_imported_progress_is_handed_to_the_browser(desk: Desk, clock: Clock) -> None:
    data = write_progress(filled(desk))
    fresh = Store(":memory:", clock)
    read_progress(fresh, data)
    assert len(fresh.take_changes()["rows"]["answers"]) == 2 and fresh.take_changes() == {"store": fresh.name}
