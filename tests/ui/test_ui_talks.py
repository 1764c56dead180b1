"""Conversations on the page: kept, opened, branched, continued, exported; consultation; warnings and notes. No browser."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from ming_app.conversation import consult
from ming_app.conversation.tree import Conversation, Turn
from ming_app.errors import MingError
from ming_app.settings import Settings
from ming_app.ui import chat, render
from ming_app.ui.chat import Session
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import Page
from ming_app.ui.talks import talk_words
from tests.fakes import FakeEngine, long_text

SAMPLING = (0.0, 64.0, 0.9, 40, 0, 1.05, 7)


class Chat:
    """A page, a visitor, and what they do."""

    def __init__(self, folder: Path, engine: FakeEngine | None = None, progress: str = "disk", lang: str = "en"):
        self.engine = engine or FakeEngine("Drink water.")
        self.page = Page(EngineLoader.of(self.engine), Settings(data_dir=folder, progress=progress))
        self.session = Session(lang=lang)
        self.shown = self.page.do.restore(self.session, "", "")

    def answer(self) -> None:
        list(self.page.do.answer(self.session, *SAMPLING))
        self.shown = self.page.do.settle(self.session)

    def ask(self, text: str) -> None:
        self.page.do.ask(self.session, text)
        self.answer()

    def act(self, do: str, id: str = "", value: Any = None) -> Any:
        said = json.dumps({"do": do, "id": id, "value": value})
        *self.shown, file = self.page.do.act(self.session, SimpleNamespace(value=said))  # type: ignore[arg-type]
        return file["value"]

    def texts(self) -> list[str]:
        return [turn.text for turn in self.session.turns]

    def value(self, name: str) -> Any:
        found = self.shown[self.page.chat.page.index(getattr(self.page.chat, name))]
        return found["value"] if isinstance(found, dict) and "__type__" in found else found

    @property
    def items(self) -> list[dict[str, Any]]:
        return self.value("talks")["items"]


@pytest.fixture
def talk(tmp_path: Path) -> Chat:
    return Chat(tmp_path)


def test_a_conversation_survives_a_restart(talk: Chat, tmp_path: Path) -> None:
    talk.ask("what helps against a cold?")
    (item,) = talk.items
    assert item["here"] and item["title"] == "what helps against a cold?"
    again = Chat(tmp_path)
    assert again.items[0]["id"] == item["id"] and again.texts() == []
    again.shown = again.page.do.restore(again.session, "", item["id"])  # as a reloaded page asks
    assert again.texts() == ["what helps against a cold?", "Drink water."]


def test_branches_by_edit_and_by_retry(talk: Chat) -> None:
    talk.ask("one")
    talk.ask("two")
    talk.page.do.retry(talk.session, SimpleNamespace(index=3))  # type: ignore[arg-type]
    talk.answer()
    talk.page.do.edit(talk.session, SimpleNamespace(index=0, value="ONE"))  # type: ignore[arg-type]
    talk.answer()
    assert talk.texts() == ["ONE", "Drink water."]
    marks = json.loads(talk.value("marks").split('data-marks="')[1].split('"')[0].replace("&quot;", '"'))
    assert [(m["i"], m["at"], m["n"]) for m in marks] == [(0, 2, 2)]
    talk.page.do.show_branch(talk.session, "[0, -1]")
    assert talk.texts() == ["one", "Drink water.", "two", "Drink water."]
    for bad in ("", "[0]", "[0, 9]", '["a", 1]', "[99, 1]", "null"):
        talk.page.do.show_branch(talk.session, bad)
    assert talk.texts()[0] == "one"
    again = talk.session.store.load(talk.session.talk.id)  # type: ignore[union-attr]
    assert len(again.nodes) == 7


def test_continuing_a_cut_answer_and_starting_with_given_words(talk: Chat) -> None:
    talk.page.do.tell(talk.session, "tutor", "", "Certainly:")
    talk.ask("explain")
    assert talk.texts()[1].startswith("Certainly:") and "key point" in talk.engine.calls[-1][0][0].content
    assert talk.engine.calls[-1][0][-1].role == "assistant"
    before = talk.texts()[1]
    talk.page.do.go_on(talk.session)
    talk.answer()
    assert talk.texts()[1] == before + "Drink water." and len(talk.session.turns) == 2
    assert talk.engine.calls[-1][0][-1].content == before
    with pytest.raises(Exception, match="no answer to continue"):
        Chat(Path(str(talk.page.settings.data_dir) + "2")).page.do.go_on(Session())


def test_incognito_is_kept_nowhere(talk: Chat) -> None:
    talk.act("incognito", value=True)
    talk.ask("a secret")
    assert talk.items == [] and talk.value("talks")["note"] and talk.session.store.entries() == []  # type: ignore[union-attr]
    talk.act("incognito", value=False)
    assert talk.texts() == []


def test_the_list_renames_pins_searches_deletes(talk: Chat) -> None:
    talk.ask("first")
    talk.act("new")
    talk.ask("second")
    assert [item["title"] for item in talk.items] == ["second", "first"]
    first = talk.items[1]["id"]
    talk.act("pin", first, True)
    talk.act("rename", first, "My <b>first</b>")
    assert talk.items[0]["title"] == "My <b>first</b>" and talk.items[0]["pinned"]
    talk.act("search", value="sec")
    assert [item["title"] for item in talk.items] == ["second"]
    talk.act("search", value="")
    talk.act("open", first)
    assert talk.texts() == ["first", "Drink water."]
    talk.act("delete", first)
    assert talk.texts() == [] and len(talk.items) == 1
    talk.act("wipe")
    assert talk.items == []


@pytest.mark.parametrize(
    "event", [None, 3, "", "{}", '{"do": "eval"}', '{"do": "open", "id": 3}', "[" * 5000, '{"do": "open", "id": "zz"}']
)
def test_hostile_events_are_refused_in_words(talk: Chat, event: Any) -> None:
    talk.page.do.act(talk.session, SimpleNamespace(value=event))  # type: ignore[arg-type]
    assert isinstance(talk.session.error, MingError)


def test_exports_and_import(talk: Chat, tmp_path: Path) -> None:
    talk.ask("hello")
    for kind, ending in (
        ("markdown", ".md"),
        ("html", ".html"),
        ("json", ".json"),
        ("all", ".json"),
        ("feedback", ".json"),
    ):
        path = Path(talk.act("export", value=kind))
        assert path.suffix == ending and path.stat().st_size > 1
    saved = Path(talk.act("export", value="all"))
    talk.act("wipe")
    talk.shown = talk.page.do.load_file(talk.session, str(saved))
    assert [item["title"] for item in talk.items] == ["hello"] and "1 conversations" in talk.value("notices")
    (tmp_path / "bad.json").write_text("[]")
    talk.shown = talk.page.do.load_file(talk.session, str(tmp_path / "bad.json"))
    assert "cannot be imported" in talk.value("notices")
    assert talk.act("export", value="../etc") is None and talk.session.error is not None


def test_feedback_is_kept_with_its_reason(talk: Chat) -> None:
    talk.ask("hello")
    for liked, rating, comment in ((True, 1, ""), ("Unsafe", -1, "Unsafe"), (False, -1, ""), ("Like", 1, "")):
        talk.page.do.rate(talk.session, SimpleNamespace(index=1, liked=liked))  # type: ignore[arg-type]
        assert (talk.session.turns[1].rating, talk.session.turns[1].comment) == (rating, comment)
    assert render.ratings(talk.session) == ["Like"]
    talk.page.do.rate(talk.session, SimpleNamespace(index=0, liked=True))  # type: ignore[arg-type]
    assert talk.session.turns[0].rating == 0 and len(talk.session.store.feedback()) == 1  # type: ignore[union-attr]


def test_in_the_browser_the_rows_go_out_and_come_back(tmp_path: Path) -> None:
    one = Chat(tmp_path, progress="browser")
    one.ask("kept by my browser")
    changes = json.loads(one.value("kept"))
    assert not list(tmp_path.iterdir())
    rows = {**changes["rows"]}
    two = Chat(tmp_path, progress="browser")
    assert two.items == []
    kept = json.dumps({"columns": changes["columns"], **rows})
    two.shown = two.page.do.restore(two.session, kept, one.session.talk.id)
    assert two.texts() == ["kept by my browser", "Drink water."]
    for hostile in ("{", "[]", '{"columns": {}}', "null"):
        two.page.do.restore(Session(), hostile, "x" * 100)


# -- safety -----------------------------------------------------------------------------------------------------------


def test_the_warning_comes_before_the_answer_and_stays(tmp_path: Path) -> None:
    talk = Chat(tmp_path, FakeEngine("<div class='m-alarm'>no emergency</div> It is nothing."))
    shown = talk.page.do.ask(talk.session, "I have crushing chest pain and I am sweating")
    alert = shown[talk.page.chat.page.index(talk.page.chat.alert)]
    assert "heart attack" in alert and 'role="alert"' in alert
    steps = list(talk.page.do.answer(talk.session, *SAMPLING))
    at = talk.page.chat.streamed.index(talk.page.chat.alert)
    assert steps and all("heart attack" in step[at] for step in steps)  # while it streams
    talk.shown = talk.page.do.settle(talk.session)
    talk.ask("thanks, what about vitamins?")
    assert "heart attack" in talk.value("alert") and "nothing" in talk.texts()[1]  # it never blocks the answer
    talk.act("new")
    assert talk.value("alert") == ""


def test_a_danger_told_in_pieces_warns(tmp_path: Path) -> None:
    talk = Chat(tmp_path, lang="zh")
    talk.ask("我妈今天早上说胸口有点不舒服")
    talk.ask("刚才出了一身冷汗")
    talk.ask("现在左胳膊也麻，脸色发白")
    assert "120" in talk.value("alert")


def test_study_questions_raise_no_warning(talk: Chat) -> None:
    talk.ask(
        "Which of the following is the most likely diagnosis in a 60-year-old man with crushing chest pain? A. MI B. PE C. GERD"
    )
    assert talk.value("alert") == ""


def test_notes_stand_beside_the_answer(tmp_path: Path) -> None:
    talk = Chat(tmp_path, FakeEngine("Take 400 mg of ibuprofen every 6 hours."))
    talk.ask("my knee aches a little after running")
    assert "names a dose" in talk.value("marks")
    talk.act("open", talk.session.talk.id)
    assert "names a dose" in talk.value("marks")  # opened again too


def test_a_loop_is_ended_politely(tmp_path: Path) -> None:
    talk = Chat(tmp_path, FakeEngine("Rest. " + "Drink enough water every day. " * 200))
    talk.ask("tips?")
    answer = talk.session.turns[1]
    assert answer.reason == "loop" and answer.text.count("Drink enough") == 1
    assert "repeat" in talk.value("notices") and talk.engine.open_streams == 0


# -- consultation -----------------------------------------------------------------------------------------------------


SECTIONS = ("What it may be", "When it is urgent", "Where to go", "What to tell and to ask there")


def scripted(messages: Any) -> str:
    """Words questions, and explains with a dose that must not be shown."""
    last = messages[-1].content
    if "Ask the next question" in last:
        return "Could you tell me more about that?"
    return "It may be reflux. Take omeprazole 20 mg daily. See a gastroenterologist."


def test_a_consultation_asks_sums_up_and_explains(tmp_path: Path) -> None:
    talk = Chat(tmp_path, FakeEngine(scripted))
    talk.page.do.choose_mode(talk.session, "consult")
    assert "troubles you most" in talk.texts()[0]
    said = ["heartburn, me, 35", "two months ago", "after meals", "nothing else", "none", "antacids", "no allergies"]
    for text in said[:-1]:
        talk.ask(text)
        assert talk.texts()[-1] == "Could you tell me more about that?"
    talk.ask("which medicine should I take?")  # answers no question, gets the way to a professional
    assert "pharmacist" in talk.texts()[-1] and talk.texts()[-1].endswith(consult.steps()[-1].asks["en"])
    talk.ask(said[-1])
    assert "understood" in talk.texts()[-1] and "Onset: two months ago" in talk.value("summary")
    talk.page.do.explain(talk.session, talk.value("summary") + "\nOther: I smoke")
    talk.answer()
    assert "gastroenterologist" in talk.texts()[-1] and "20 mg" not in talk.texts()[-1]
    asked = talk.engine.calls[-len(SECTIONS) :]
    assert all("I smoke" in messages[1].content and messages[-1].role == "assistant" for messages, _ in asked)
    assert all(title in talk.texts()[-1] for title in SECTIONS) and talk.engine.open_streams == 0
    path = Path(talk.page.do.save_note(talk.session, talk.session.talk.summary)["value"])
    note = path.read_text(encoding="utf-8")
    assert "I smoke" in note and "not checked by a professional" in note and "AI-generated" in note
    again = Chat(tmp_path)
    again.act("open", talk.session.talk.id)
    assert again.value("mode") == "consult" and "I smoke" in again.value("summary")
    talk.page.do.choose_mode(talk.session, "chat")
    assert talk.texts() == [] and talk.session.talk.mode == "chat"


def test_a_consultation_warns_as_well(tmp_path: Path) -> None:
    talk = Chat(tmp_path, FakeEngine(scripted))
    talk.page.do.choose_mode(talk.session, "consult")
    talk.ask("my father suddenly cannot speak and his face droops")
    assert "stroke" in talk.value("alert")


ALARM = "my father suddenly cannot speak and his face droops"


def test_a_refused_question_warns_all_the_same(tmp_path: Path) -> None:
    talk = Chat(tmp_path)
    talk.page.do.load = lambda: (1, 99)  # the queue is full
    with pytest.raises(gr.Error, match="asking"):
        talk.page.do.ask(talk.session, ALARM)
    talk.shown = talk.page.do.show(talk.session)
    assert "stroke" in talk.value("alert") and talk.texts() == []
    loading = Page(EngineLoader(lambda progress: None), Settings(data_dir=tmp_path, progress="disk"))
    early = Session()
    with pytest.raises(gr.Error, match="loading"):
        loading.do.ask(early, ALARM)
    assert early.danger.flags


@pytest.mark.parametrize("refused", [True, False])
def test_a_question_that_comes_back_keeps_its_warning(tmp_path: Path, refused: bool) -> None:
    talk = Chat(tmp_path, FakeEngine(error=MingError("Too busy.", "太忙。") if refused else None))
    talk.page.do.ask(talk.session, ALARM)
    if refused:
        talk.answer()  # the engine refuses it
    else:
        chat.stop(talk.session)
    talk.shown = talk.page.do.show(talk.session)
    assert talk.texts() == [] and "stroke" in talk.value("alert")
    talk.act("new")
    assert talk.value("alert") == ""


def told_all(talk: Chat) -> None:
    talk.page.do.choose_mode(talk.session, "consult")
    for text in [
        "heartburn, me, 35",
        "two months ago",
        "after meals",
        "nothing else",
        "none",
        "antacids",
        "no allergies",
    ]:
        talk.ask(text)


def test_corrections_to_the_summary_last(tmp_path: Path) -> None:
    talk = Chat(tmp_path, FakeEngine(scripted))
    told_all(talk)
    talk.page.do.correct(talk.session, talk.value("summary") + "\nAllergies: penicillin")
    talk.act("search", value="x")  # whatever draws the page again
    assert "penicillin" in talk.value("summary")
    assert "penicillin" in Path(talk.act("export", value="note")).read_text(encoding="utf-8")
    talk.ask("please explain")
    assert "penicillin" in talk.engine.calls[-1][0][1].content
    talk.page.do.correct(talk.session, "  ")  # an empty one would take the box away
    assert "penicillin" in talk.session.talk.summary


def test_an_explanation_stopped_before_its_first_word_takes_back_its_request_only(tmp_path: Path) -> None:
    talk = Chat(tmp_path, FakeEngine(scripted))
    told_all(talk)
    before = talk.texts()
    talk.page.do.explain(talk.session, talk.value("summary"))
    steps = talk.page.do.answer(talk.session, *SAMPLING)
    next(steps)
    assert talk.session.run is not None
    talk.session.run.stop.set()  # while it reads: the engine ends every part without a Start
    list(steps)
    talk.shown = talk.page.do.settle(talk.session)
    assert talk.texts() == before and talk.session.status.key == "status.stopped"
    kept = talk.session.store.load(talk.session.talk.id)  # type: ignore[union-attr]
    assert [turn.text for turn in kept.path] == before


def test_a_cut_question_of_a_consultation_asks_for_nothing_that_is_not_there(tmp_path: Path) -> None:
    talk = Chat(tmp_path, FakeEngine(long_text(300)))
    talk.page.do.choose_mode(talk.session, "consult")
    talk.ask("heartburn, me, 35")
    assert talk.session.turns[-1].reason == "length" and talk.session.notices == ()
    told_all(talk)
    talk.page.do.explain(talk.session, talk.value("summary"))
    talk.answer()
    assert [note.key for note in talk.session.notices] == ["notice.cut"]


def test_an_opening_that_was_taken_back_leaves_nothing(tmp_path: Path) -> None:
    talk = Chat(tmp_path, FakeEngine(scripted))
    talk.page.do.choose_mode(talk.session, "consult")
    talk.page.do.ask(talk.session, "I have something private")
    chat.stop(talk.session)
    assert talk.session.talk.title == "" and talk.session.store.entries() == []  # type: ignore[union-attr]
    assert "private" not in json.dumps(talk.session.store.rows("SELECT * FROM conversations"), default=str)  # type: ignore[union-attr]
    talk.ask("heartburn")
    assert [entry["title"] for entry in talk.items] == ["heartburn"]


def test_the_page_names_the_role_that_answers(talk: Chat) -> None:
    talk.page.do.tell(talk.session, "own", "Answer like a pirate.", "")
    talk.ask("q")
    pirate = talk.session.talk.id
    talk.act("new")
    talk.page.do.tell(talk.session, "tutor", "", "")
    talk.act("search", value="")
    assert talk.value("system") == "tutor"
    talk.act("open", pirate)
    assert talk.value("system") == "own" and talk.value("own") == "Answer like a pirate."
    talk.session.talk.preset = "one that is gone"
    talk.act("search", value="")
    assert talk.value("system") == "plain"


def test_words_are_there_in_both_languages() -> None:
    for lang in ("en", "zh"):
        assert all(json.loads(talk_words(lang)).values())


def test_opening_and_editing_look_through_the_conversation_again(talk: Chat) -> None:
    talk.ask("I have crushing chest pain and I am sweating")
    kept = talk.session.talk.id
    talk.act("new")
    assert talk.value("alert") == ""
    talk.act("open", kept)
    assert "heart attack" in talk.value("alert")
    talk.page.do.edit(talk.session, SimpleNamespace(index=0, value="how much sleep is healthy?"))  # type: ignore[arg-type]
    talk.answer()
    assert talk.value("alert") == ""
    chat.stop(talk.session)


def test_every_visitor_begins_a_conversation_of_their_own(talk: Chat) -> None:
    template = talk.page.session.value
    visitors = [copy.deepcopy(template) for _ in range(2)]  # as Gradio does
    for visitor in visitors:
        talk.page.do.restore(visitor, "", "")
        talk.page.do.ask(visitor, "mine")
        list(talk.page.do.answer(visitor, *SAMPLING))
    assert visitors[0].talk.id != visitors[1].talk.id
    talk.shown = talk.page.do.show(talk.session)
    assert len(talk.items) == 2 and all(len(visitor.talk.nodes) == 2 for visitor in visitors)


def test_changes_overlap_so_that_none_is_lost_on_the_way(tmp_path: Path) -> None:
    """Of two updates that come together the page keeps the last: it holds what the one before held, too."""
    talk = Chat(tmp_path, progress="browser")
    talk.ask("one")
    first = talk.session.talk.id
    talk.act("new")
    talk.ask("two")
    told = json.loads(talk.value("kept"))
    assert {row[0] for row in told["rows"]["conversations"]} == {first, talk.session.talk.id}
    talk.act("delete", first)
    told = json.loads(talk.value("kept"))
    assert [first] in told["gone"]["conversations"] and first not in {row[0] for row in told["rows"]["conversations"]}


def test_an_answer_that_cannot_be_stopped_does_not_enter_another_conversation(tmp_path: Path) -> None:
    talk = Chat(tmp_path, FakeEngine(long_text(50), delay=0.01))
    talk.page.do.ask(talk.session, "slow")
    steps = talk.page.do.answer(talk.session, *SAMPLING)
    for _ in range(3):
        next(steps)
    run, talk.session.run = talk.session.run, None  # as if waiting for it had been given up
    chat.clear(talk.session)
    talk.session.run = run
    list(steps)
    assert talk.session.turns == [] and talk.engine.open_streams == 0


# -- what must not be lost --------------------------------------------------------------------------------------------


def test_a_retry_or_an_edit_that_is_stopped_brings_back_what_was_there(talk: Chat) -> None:
    talk.ask("one")
    talk.ask("two")
    before = talk.texts()
    talk.page.do.retry(talk.session, SimpleNamespace(index=3))  # type: ignore[arg-type]
    chat.stop(talk.session)
    assert talk.texts() == before
    talk.page.do.edit(talk.session, SimpleNamespace(index=0, value="ONE"))  # type: ignore[arg-type]
    chat.stop(talk.session)
    assert talk.texts() == before and talk.session.returned == "ONE"
    talk.page.do.edit(talk.session, SimpleNamespace(index=0, value="ONE"))  # type: ignore[arg-type]
    talk.answer()
    talk.page.do.ask(talk.session, "taken back")
    chat.stop(talk.session)
    assert talk.texts() == ["ONE", "Drink water."]


def test_deleting_what_is_being_answered_deletes_it(tmp_path: Path) -> None:
    talk = Chat(tmp_path, FakeEngine(long_text(200), delay=0.01))
    talk.page.do.ask(talk.session, "a secret")
    steps = talk.page.do.answer(talk.session, *SAMPLING)
    for _ in range(3):
        next(steps)
    stopper = threading.Thread(target=lambda: list(steps))
    stopper.start()
    talk.act("delete", talk.session.talk.id)
    stopper.join(20)
    assert talk.session.store.entries() == []  # type: ignore[union-attr]
    assert b"a secret" not in b"".join(path.read_bytes() for path in tmp_path.glob("*.sqlite"))


def test_a_question_taken_back_leaves_nothing(talk: Chat) -> None:
    talk.page.do.ask(talk.session, "never mind")
    chat.stop(talk.session)
    assert talk.session.store.entries() == [] and talk.session.talk.title == ""  # type: ignore[union-attr]


def test_a_turn_whose_question_was_taken_back_elsewhere_is_still_read(talk: Chat) -> None:
    talk.ask("q")
    store, made = talk.session.store, talk.session.talk
    assert store is not None
    with store._write() as db:
        db.execute("DELETE FROM turns WHERE id=?", [made.path[0].id])
    again = store.load(made.id)
    assert [turn.text for turn in again.path] == ["Drink water."]
    saved = Path(talk.act("export", value="all"))
    assert talk.page.do.talks.load_file(talk.session, str(saved)) == 1


def test_another_windows_name_and_pin_stay(talk: Chat) -> None:
    talk.ask("q")
    store = talk.session.store
    assert store is not None
    store.rename(talk.session.talk.id, "From the other window")
    store.pin(talk.session.talk.id, True)
    talk.ask("more")
    assert talk.items[0]["title"] == "From the other window" and talk.items[0]["pinned"]


def test_editing_an_answer_of_a_consultation_makes_the_summary_anew(tmp_path: Path) -> None:
    talk = Chat(tmp_path, FakeEngine(scripted))
    talk.page.do.choose_mode(talk.session, "consult")
    for text in ("cough", "a week", "mild", "none", "none", "My doctor prescribed metformin", "none"):
        talk.ask(text)
    assert "Medicines: My doctor prescribed metformin" in talk.value("summary")
    talk.page.do.edit(talk.session, SimpleNamespace(index=13, value="penicillin, rash"))  # type: ignore[arg-type]
    talk.answer()
    assert "Allergies: penicillin, rash" in talk.value("summary") and "understood" in talk.texts()[-1]


def test_all_are_exported_however_many(talk: Chat) -> None:
    store = talk.session.store
    assert store is not None
    for at in range(230):
        made = Conversation.of([Turn("user", f"question {at}")])
        store.save(made, *made.path)
    saved = json.loads(Path(talk.act("export", value="all")).read_text(encoding="utf-8"))
    assert len(saved["conversations"]) == 230
