"""The Exam tab's handlers: what the card is told and what not, hostile actions, files, progress."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from ming_app.exam.desk import Desk
from ming_app.exam.store import Store
from ming_app.settings import Settings
from ming_app.ui.chat import Session
from ming_app.ui.exam import payload
from ming_app.ui.exam.payload import card_words
from ming_app.ui.exam.room import Room
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import Page
from tests.exam.conftest import Clock, mixed, question
from tests.fakes import FakeEngine
from tests.ui.exam_tab import begin, do, names

# -- the card ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["tutor", "exam"])
def test_the_card_never_holds_a_key_before_it_is_revealed(made: Any, mode: str) -> None:
    tab, session = made()
    begin(tab, session, mode)
    room: Room = session.exam
    for index, one in enumerate(mixed()):
        found = do(tab, session, "go", index=index)["card"]
        if found["error"]:  # the next part of an unfolding case: answer, and lock, what is before
            do(tab, session, "choose", "A", index=index - 1)
            do(tab, session, "submit", index=index - 1)
            found = do(tab, session, "go", index=index)["card"]
        assert found["question"]["stem"] == one.stem and found["question"]["revealed"] is None
        assert "explanation" not in json.dumps(found)
        shown = json.dumps(found)
        later = [q.stem for q in mixed()[index + 1 :] if q.type == "A4"]
        assert not any(stem in shown for stem in later)
    assert room.desk.store.rows("SELECT COUNT(*) FROM answers WHERE kind='mock'") == [(0,)]


@pytest.mark.parametrize("mode", ["tutor", "exam"])
def test_no_update_at_all_holds_the_key_before_it_is_revealed(made: Any, mode: str) -> None:
    tab, session = made()
    told = [begin(tab, session, mode)] + [do(tab, session, "go", index=index) for index in range(4)]
    for found in told:
        assert found.get("option", {}).get("choices", []) == [] and not found.get("option", {}).get("value")


def test_a_question_whose_options_are_all_right(made: Any) -> None:
    tab, session = made()
    every = [question(1, "X", "ABCDE"), question(2)]
    session.exam.bank = session.exam.desk.add_bank("every", every).name
    begin(tab, session)
    found = do(tab, session, "submit", "ABCDE")
    assert found["card"]["question"]["revealed"]["correct"] and found["option"]["visible"] is False


def test_a_bank_removed_under_a_sitting(made: Any) -> None:
    tab, session = made()
    begin(tab, session)
    room = session.exam
    do(tab, session, "leave")
    room.desk.remove_bank(room.bank)
    home = names(tab, tab.refresh(session))
    assert home["bank"]["value"] == "clinical-en" and home["unfinished_row"]["visible"] is False


def test_two_windows_share_one_desk(tmp_path: Path) -> None:
    tab = Page(EngineLoader.of(FakeEngine("x")), Settings(data_dir=tmp_path / "new")).exam
    made: list[Room] = []
    threads = [threading.Thread(target=lambda: made.append(tab.room(Session()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(room.desk) for room in made}) == 1 and made[0].desk.store.notice is None


def test_finished_sittings_can_be_opened_again(made: Any) -> None:
    tab, session = made()
    begin(tab, session)
    do(tab, session, "submit", "B")
    name = session.exam.open
    do(tab, session, "finish")
    home = names(tab, tab.back(session))
    assert home["history"]["choices"][0][0].endswith("tests · 1/1") and home["history"]["choices"][0][1] == name
    again = names(tab, tab.go_on(session, name))
    assert again["card"]["finished"] and "1 of 1 answered correctly (14 in the set)" in again["result"]


def test_an_unfolding_case_shows_what_it_told_and_hides_the_rest(made: Any) -> None:
    tab, session = made()
    begin(tab, session)
    first = next(at for at, q in enumerate(mixed()) if q.type == "A4")
    card = do(tab, session, "go", index=first)["card"]
    assert (
        card["question"]["locks"] and card["sheet"][first : first + 3] == "044" and card["question"]["part"] == [1, 3]
    )
    refused = do(tab, session, "go", index=first + 1)["card"]
    assert "unfolds" in refused["error"] and refused["index"] == first
    do(tab, session, "submit", "A")
    card = do(tab, session, "go", index=first + 1)["card"]
    assert card["error"] == "" and card["question"]["told"] == ["Question 20?"]


def test_an_answer_is_revealed_marked_and_counted(made: Any) -> None:
    tab, session = made()
    begin(tab, session)
    card = do(tab, session, "submit", "C", seq=4)["card"]
    assert card["seq"] == 4 and card["sheet"][0] == "3"
    shown = card["question"]["revealed"]
    assert (shown["key"], shown["correct"], shown["shown"]) == ("B", False, "B") and shown["due"]
    do(tab, session, "cause", "misread")
    do(tab, session, "note", "read twice")
    card = do(tab, session, "flag", True)["card"]
    assert (card["question"]["cause"], card["question"]["note"], card["question"]["flagged"]) == (
        "misread",
        "read twice",
        True,
    )
    assert card["flags"] == [0]
    home = do(tab, session, "leave")
    assert home["card"]["open"] is False and "1 mistakes · 1 flagged" in home["counts"]
    assert home["unfinished"]["choices"][0][0].startswith("tests · 1 of 14")


def test_shuffled_letters_are_those_shown(made: Any) -> None:
    tab, session = made()
    begin(tab, session, shuffle=True)
    room = session.exam
    for index in range(4):
        card = do(tab, session, "go", index=index)["card"]
        order = [option["letter"] for option in card["question"]["options"]]
        shown = do(tab, session, "submit", "B")["card"]["question"]["revealed"]
        assert shown["correct"] and shown["shown"] == "ABCDE"[order.index("B")]
    assert len({room.sitting.order(index) for index in range(4)}) > 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "nope",
        '{"do": "rm"}',
        '{"do": "__class__"}',
        '{"do": "go", "index": 99}',
        '{"do": "go", "index": true}',
    ]
    + ['{"do": "go", "index": "1"}', '{"do": "choose", "value": 7}', '{"do": "choose", "value": "ABCDEFGHIJKL"}']
    + [
        '{"do": "choose", "value": "Z"}',
        '{"do": "cause", "value": "bad"}',
        '{"do": "rate", "value": "x"}',
        "x" * 20_000,
        "[" * 9000,
    ],
)
def test_hostile_actions_change_nothing(made: Any, text: str) -> None:
    tab, session = made()
    begin(tab, session)
    before = session.exam.desk.store.export()
    found = names(tab, tab.act(session, SimpleNamespace(value=text)))  # type: ignore[arg-type]
    assert session.exam.desk.store.export() == before and set(found) <= {"card", "changes"}


def test_actions_without_a_sitting(made: Any) -> None:
    tab, session = made()
    assert "no action here" in do(tab, session, "choose", "A")["card"]["error"]


def test_a_mock_ends_with_a_result(made: Any) -> None:
    tab, session = made()
    own = (50, 60, 60, ["A1", "X"], [], True)
    found = names(tab, tab.begin_mock(session, session.exam.bank, "own", False, True, *own))
    card = found["card"]
    assert card["kind"] == "mock" and card["left"] and "Only 4 of 25" in card["notice"] and card["pausable"]
    at = next(i for i, q in enumerate(session.exam.sitting.questions) if q.type == "X")
    do(tab, session, "choose", "AC", index=at)
    assert do(tab, session, "pause", True)["card"]["question"] is None
    do(tab, session, "pause", False)
    done = do(tab, session, "finish")
    assert (
        done["card"]["finished"] and "0.67 of 13 points" in done["result"] and "Below the pass line" in done["result"]
    )
    assert done["result"].count('<tr><td class="er-number">') == 13
    assert done["after_row"]["visible"] and done["card"]["question"]["revealed"]["key"]
    again = names(tab, tab.repeat_wrong(session))
    assert again["card"]["kind"] == "practice" and again["card"]["count"] == 13


def test_choices_that_fit_nothing_are_said(made: Any) -> None:
    tab, session = made()
    found = tab.practise(session, session.exam.bank, "due", "sequential", "tutor", [], [], [], [], [], 0, False, False)
    assert "No question fits" in names(tab, found)["message"]
    gone = names(
        tab, tab.practise(session, "nowhere", "all", "sequential", "tutor", [], [], [], [], [], 0, False, False)
    )
    assert "no bank called" in gone["message"]


def test_the_wrong_book_by_cause(made: Any) -> None:
    tab, session = made()
    begin(tab, session)
    for index, cause in enumerate(("misread", "time", "knowledge")):
        do(tab, session, "submit", "A", index=index)
        do(tab, session, "cause", cause, index=index)
    room = session.exam
    tab.practise(
        session, room.bank, "wrong", "sequential", "tutor", [], [], [], [], ["time", "misread"], 0, False, False
    )
    assert [q.stem for q in room.sitting.questions] == ["Question 0?", "Question 1?"]
    tab.practise(session, room.bank, "all", "sequential", "tutor", [], [], [], [], ["knowledge"], 0, False, False)
    assert [q.stem for q in room.sitting.questions] == ["Question 2?"]


def test_filters_by_tags(made: Any) -> None:
    tab, session = made()
    home = names(tab, tab.refresh(session))
    assert home["bank"]["value"] == session.exam.bank
    labels = [update for update in tab.refresh(session).values() if isinstance(update, dict) and update.get("choices")]
    assert any(("Cardiology (2)", "Cardiology") in update["choices"] for update in labels)
    found = tab.practise(
        session, session.exam.bank, "all", "sequential", "tutor", ["A1"], ["Neurology"], [], [], [], 0, False, False
    )
    assert names(tab, found)["card"]["count"] == 2


def test_statistics_and_words(made: Any) -> None:
    tab, session = made()
    assert "No answer yet" in names(tab, tab.show_statistics(session))["statistics"]
    begin(tab, session)
    do(tab, session, "rate", "sure")
    do(tab, session, "submit", "B")
    found = names(tab, tab.show_statistics(session))
    assert "Answers: 1 · Accuracy: 100%" in found["statistics"] and found["days"]["visible"]
    for lang in ("en", "zh"):
        assert all(json.loads(card_words(lang)).values())


# -- files and progress -----------------------------------------------------------------------------------------------

CSV = "题目,A,B,答案,题型\n<script>alert(1)</script>？,=1+1,乙,B,A1\n坏题？,甲,乙,C,\n"


def test_importing_shows_first_and_keeps_on_demand(made: Any, tmp_path: Path) -> None:
    tab, session = made()
    path = tmp_path / "我的题.csv"
    path.write_text(CSV, encoding="utf-8")
    shown = names(tab, tab.panes.open_file(session, str(path)))
    assert "1 questions can be imported, 1 cannot" in shown["preview"] and "&lt;script&gt;" in shown["preview"]
    assert "<script>" not in shown["preview"] and ["题目", "stem"] in shown["reading"]["columns"]
    assert len(session.exam.desk.shelf.list()) == 5
    report = names(tab, tab.panes.save_report(session))["download"]["value"]
    assert "坏题" in Path(report).read_text(encoding="utf-8-sig")

    def chosen(columns: list[list[str]], **more: str) -> dict[str, Any]:
        said = {"format": "csv", "lang": "", "count_from": "", "columns": columns, **more}
        return names(tab, tab.panes.reread(session, gr.EventData(None, {"value": json.dumps(said)})))

    again = chosen([["题目", "stem"], ["A", "option_b"], ["B", "option_a"], ["答案", "answer"]])
    assert "1 questions" in again["preview"] and session.exam.reading.questions[0].options["A"] == "乙"
    unchanged = chosen([["题目", "colour"]]), chosen([], lang="fr")  # no choice of the page's
    assert all(one == {"message": gr.skip()} for one in unchanged)
    lost = chosen([["题目", "stem"], ["答案", ""]])
    assert "no column for answer" in lost["message"] and ["答案", ""] in lost["reading"]["columns"]
    assert "cannot be read" in chosen([], format="moodle")["message"] or session.exam.reading.questions == ()
    again = chosen([["题目", "stem"], ["答案", "answer"]], lang="en")
    assert session.exam.reading.questions[0].lang == "en"
    done = names(tab, tab.panes.keep_bank(session, "Mine"))
    assert "Imported: Mine, 1 questions" in done["message"] and len(session.exam.desk.shelf.list()) == 6
    again = tmp_path / "Mine.csv"  # another file of that name does not take its place unasked
    again.write_text(CSV, encoding="utf-8")
    assert names(tab, tab.panes.open_file(session, str(again)))["bank_title"] == "Mine (2)"
    saved = names(tab, tab.panes.save_bank(session, session.exam.bank, "csv"))["download"]["value"]
    assert "'=1+1" in Path(saved).read_text(encoding="utf-8-sig")
    removed = names(tab, tab.panes.remove_bank(session, session.exam.bank))
    assert "Removed" in removed["message"]
    assert "stay" in names(tab, tab.panes.remove_bank(session, "clinical-en"))["message"]


def test_a_file_that_is_no_bank_is_refused_in_words(made: Any, tmp_path: Path) -> None:
    tab, session = made()
    session.lang = "zh"
    path = tmp_path / "x.xlsx"
    path.write_bytes(b"PK\x03\x04nothing")
    assert "损坏" in names(tab, tab.panes.open_file(session, str(path)))["message"]


def test_progress_goes_out_and_comes_back(made: Any, tmp_path: Path) -> None:
    tab, session = made()
    begin(tab, session)
    do(tab, session, "submit", "A")
    saved = Path(names(tab, tab.panes.save_progress(session))["download"]["value"]).read_bytes()
    gone = names(tab, tab.panes.delete_progress(session))
    assert "deleted" in gone["message"] and "0 answered before" in gone["counts"] and gone["card"]["open"] is False
    path = tmp_path / "back.json"
    path.write_bytes(saved)
    back = names(tab, tab.panes.load_progress(session, str(path)))
    assert "0 not understood" in back["message"] and "1 answered before" in back["counts"]
    path.write_text("[]")
    assert "cannot be imported" in names(tab, tab.panes.load_progress(session, str(path)))["message"]


def test_in_the_browser_every_action_hands_out_what_it_wrote(made: Any, tmp_path: Path) -> None:
    tab, session = made(progress="browser")
    assert not tab.rooms.on_disk
    kept: dict[str, dict[str, Any]] = {}

    def keep(found: dict[str, Any]) -> None:
        """As static/keep.js does."""
        changes = json.loads(found["changes"])
        for table, rows in changes.get("rows", {}).items():
            at = [changes["columns"][table].index(name) for name in changes["keys"][table]]
            kept.setdefault(table, {}).update({"|".join(str(row[i]) for i in at): row for row in rows})

    keep(begin(tab, session))
    keep(do(tab, session, "submit", "A"))
    keep(do(tab, session, "note", "why"))
    keep(do(tab, session, "go", index=1))
    keep(do(tab, session, "choose", "B"))
    assert not list(tmp_path.glob("progress*"))
    other = Session()
    other.exam = Room(Desk(Store(":memory:", Clock()), session.exam.desk.shelf), bank=session.exam.bank)
    text = json.dumps({"ming_progress": 1, **{table: list(rows.values()) for table, rows in kept.items()}})
    restored = json.loads(names(tab, tab.panes.restore(other, text))["changes"])
    assert restored == {"store": other.exam.desk.store.name}  # the browser has the rows, and learns who keeps them now
    mine, theirs = session.exam.desk.store.export(), other.exam.desk.store.export()
    assert {table: sorted(map(str, mine[table])) for table in kept} == {t: sorted(map(str, theirs[t])) for t in kept}
    assert payload.card(session.exam, "en")["question"]["chosen"] == "B"
    assert "cannot be imported" in names(tab, tab.panes.restore(other, "{}"))["message"]
