"""The Exam tab's handlers: what the card is told and what not, hostile actions, the model's help, files, progress."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from ming_app.engine.types import Finish, Timings
from ming_app.errors import MingError
from ming_app.exam.bank import Shelf
from ming_app.exam.desk import Desk
from ming_app.exam.store import Store
from ming_app.settings import Settings
from ming_app.ui import chat
from ming_app.ui.chat import Session
from ming_app.ui.exam import payload, tutor
from ming_app.ui.exam.payload import card_words
from ming_app.ui.exam.room import Room
from ming_app.ui.exam.tab import ExamTab
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import Page
from tests.exam.conftest import Clock, mixed, question
from tests.fakes import FakeEngine, long_text


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


def names(tab: ExamTab, updates: dict) -> dict[str, Any]:
    """Updates by the name of the component's attribute."""
    known = {id(c): name for part in (tab, tab.help, tab.panes) for name, c in vars(part).items() if hasattr(c, "_id")}
    return {known.get(id(component), "?"): update for component, update in updates.items()}


def do(tab: ExamTab, session: Session, action: str, value: Any = None, **more: Any) -> dict[str, Any]:
    event = SimpleNamespace(value=json.dumps({"do": action, "value": value, **more}))
    return names(tab, tab.act(session, event))  # type: ignore[arg-type]


def begin(tab: ExamTab, session: Session, mode: str = "tutor", shuffle: bool = False) -> dict[str, Any]:
    bank = session.exam.bank
    found = tab.practise(session, bank, "all", "sequential", mode, [], [], [], [], [], 0, shuffle, False)
    return names(tab, found)


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


# -- the model --------------------------------------------------------------------------------------------------------


def ask(tab: ExamTab, session: Session, kind: str, option: str | None = None) -> list[dict[str, Any]]:
    return [names(tab, updates) for updates in tab.help.ask(kind)(session, option)]


def test_help_waits_for_the_answer(made: Any) -> None:
    engine = FakeEngine("It is the heart.")
    tab, session = made(engine)
    begin(tab, session)
    assert "would give the key away" in ask(tab, session, "explain")[0]["note"]
    assert "would give the key away" in names(tab, next(tab.help.let_model_answer(session)))["note"]
    assert not engine.calls
    do(tab, session, "submit", "A")
    steps = ask(tab, session, "why_not", "A")
    asked = engine.calls[0][0][0].content
    assert "b of 0" in asked and "\u201ca of 0\u201d" in asked and engine.open_streams == 0
    assert steps[-1]["text"]["value"] == "It is the heart." and steps[-1]["panel"]["key"]
    assert steps[-1]["stop"]["visible"] is False
    assert len(session.explorer.exhibits) == 1  # its experts can be looked at


def test_an_explanation_that_ends_on_another_letter_is_contradicted(made: Any) -> None:
    for said, told in (("Because. Answer: D", True), ("Because.\n\n答案：B", False), ("Because.", False)):
        tab, session = made(FakeEngine(said))
        begin(tab, session)
        do(tab, session, "submit", "B")
        note = ask(tab, session, "explain")[-1]["note"]
        assert ("differs from the bank&#x27;s answer B" in note) == told


def test_a_mock_exam_gets_no_help(made: Any) -> None:
    tab, session = made()
    begin(tab, session, "exam")
    for kind in tutor.KINDS:
        assert "does not help during a mock" in ask(tab, session, kind)[0]["note"]


def test_a_hint_names_no_option(made: Any) -> None:
    engine = FakeEngine("Think of b of 0 and choose option B. Answer: B. Look at the murmur.")
    tab, session = made(engine)
    begin(tab, session)
    steps = ask(tab, session, "hint")
    asked = engine.calls[0][0][0].content
    assert "b of 0" not in asked and "Question 0?" in asked
    for step in steps[:-1]:
        assert "b of 0" not in step["text"]["value"] and "option B" not in step["text"]["value"]
    last = steps[-2]["text"]["value"]
    assert "Look at the murmur." in last and "Answer: B" not in last and tutor.BLOT in last


def test_the_model_answers_beside_the_student_and_the_key_stands(made: Any) -> None:
    engine = FakeEngine("x")
    engine.score = lambda prefix, letters, changes=(): [-1.0 if letter == " D" else -3.0 for letter in letters]  # type: ignore[method-assign]
    tab, session = made(engine)
    begin(tab, session)
    do(tab, session, "submit", "B")
    *_, last = tab.help.let_model_answer(session)
    found = names(tab, last)
    assert "The model chose D" in found["note"] and "differs from the bank&#x27;s answer B" in found["note"]
    shown = found["card"]["question"]["revealed"]
    assert shown["model"]["choice"] == "D" and shown["key"] == "B" and shown["correct"]


def test_the_model_sits_the_same_exam(made: Any) -> None:
    engine = FakeEngine(" ACD")
    engine.score = lambda prefix, letters, changes=(): [-1.0 if letter == " B" else -3.0 for letter in letters]  # type: ignore[method-assign]
    tab, session = made(engine)
    begin(tab, session, "exam")
    do(tab, session, "choose", "B", index=0)
    do(tab, session, "choose", "C", index=1)
    refused = names(tab, next(tab.help.sit_beside(session)))
    assert "does not help" in refused["note"]
    do(tab, session, "finish")
    steps = [names(tab, updates) for updates in tab.help.sit_beside(session)]
    assert "question 1 of 14" in steps[0]["note"] and len(steps) == 15
    right = sum(q.answer == ("B",) or q.type == "X" for q in mixed())
    assert f"The model: {right} of 14 right. You: 1 of 14. Both right 1, only you 0" in steps[-1]["note"]
    assert steps[-1]["card"]["question"]["revealed"]["model"]["choice"] == "B"
    assert len(list(tab.help.sit_beside(session))) == 1  # nothing is asked twice


def test_base_and_adapted_model_are_compared(made: Any) -> None:
    engine = FakeEngine("Reasons.")
    engine.score = lambda prefix, letters, changes=(): [float(len(changes) - i) for i in range(len(letters))]  # type: ignore[method-assign]
    tab, session = made(engine)
    begin(tab, session)
    do(tab, session, "submit", "A")
    steps = [names(tab, updates) for updates in tab.help.compare_models(session)]
    assert "Reasons." in steps[-1]["case"] and steps[-1]["print"]["visible"]
    saved = names(tab, tab.help.save_case(session))["download"]["value"]
    assert "Reasons." in Path(saved).read_text(encoding="utf-8")
    moved = do(tab, session, "go", index=1)
    assert moved["case"] == ""


def test_going_on_in_the_chat(made: Any) -> None:
    tab, session = made()
    begin(tab, session)
    assert not tab.help.continue_in_chat(session) and "give the key away" in tab.help.help_error(session)
    do(tab, session, "submit", "A")
    assert tab.help.continue_in_chat(session) and "b of 0" in (session.returned or "")
    ask(tab, session, "explain")
    assert tab.help.continue_in_chat(session)
    assert [turn.role for turn in session.turns] == ["user", "assistant"] and session.turns[1].text == "Because."
    assert session.checks == {session.turns[1].id: ()} and session.talk.preset == session.preset
    room = session.exam
    chat.clear(session)
    assert session.exam is room and session.exam.open  # a new chat does not end the practice


def test_stopping_help_frees_the_engine(made: Any) -> None:
    engine = FakeEngine(long_text(500), delay=0.01)
    tab, session = made(engine)
    begin(tab, session)
    do(tab, session, "submit", "A")
    steps = tab.help.ask("explain")(session, None)
    next(steps)
    threading.Timer(0.3, tab.help.stop_help, [session]).start()
    assert len(list(steps)) < 200 and engine.open_streams == 0


class Silent(FakeEngine):
    """Reads until it is stopped: no Start ever comes."""

    def stream(self, messages: Any, params: Any, cancel: Any = None) -> Any:
        assert cancel.wait(20)
        yield Finish("cancelled", 9, 0, Timings(0, 0, 0, 0), None)


@pytest.mark.parametrize("how", ["stopped", "refused"])
def test_help_that_never_began_ends_in_words(made: Any, how: str) -> None:
    tab, session = made(Silent() if how == "stopped" else FakeEngine(error=MingError("Too busy.", "太忙。")))
    begin(tab, session)
    do(tab, session, "submit", "A")
    steps = tab.help.ask("explain")(session, None)
    next(steps)
    threading.Timer(0.2, tab.help.stop_help, [session]).start()
    last = names(tab, list(steps)[-1])
    assert last["stop"]["visible"] is False
    assert ("Too busy." in last["note"]) == (how == "refused")


def test_the_stop_button_goes_with_its_question(made: Any) -> None:
    tab, session = made(FakeEngine(long_text(100)))
    begin(tab, session)
    steps = tab.help.ask("hint")(session, None)
    names(tab, next(steps))
    shown = do(tab, session, "submit", "A")
    assert shown["stop"]["visible"] is False
    assert list(steps) == []  # what comes then belongs to the question as it was


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("…\n\n答案：C", "C"),
        ("Answer: D", "D"),
        ("The correct answer is (B).", "B"),
        ("综上，故选A。", "A"),
        ("正确答案应为E", "E"),
        ("The correct answer is a beta blocker.", ""),
        ("答案：C。选项E与本病不符。", "C"),
        ("Because.", ""),
    ],
)
def test_the_letter_an_explanation_ends_on(said: str, letter: str) -> None:
    assert tutor.final_letter(said) == letter


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
