"""The model's help in the Exam tab: hints, explanations, its own answer, the way to the chat."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from ming_app.engine.types import Finish, Timings
from ming_app.errors import MingError
from ming_app.ui import chat
from ming_app.ui.chat import Session
from ming_app.ui.exam import tutor
from ming_app.ui.exam.tab import ExamTab
from tests.exam.conftest import mixed
from tests.fakes import FakeEngine, long_text
from tests.ui.exam_tab import begin, do, names


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
