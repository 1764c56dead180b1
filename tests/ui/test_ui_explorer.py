"""The explorer's handlers over a tiny real engine: what is on the shelf, every view, close looks, changed experts, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import plotly.graph_objects as go
import pytest

from ming_app.engine.engine import Engine
from ming_app.engine.types import SamplingParams
from ming_app.molora.trace import RouterTrace, Segment, TraceToken
from ming_app.router.report import report_views
from ming_app.settings import Settings
from ming_app.ui import chat
from ming_app.ui.answer import answer
from ming_app.ui.chat import Session
from ming_app.ui.explorer import VIEWS, Explorer, answers_html, heading_html, table_html
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import Page
from tests.tiny import make_engine

EXAM = "Which one?\nA. flu\nB. gout"


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return make_engine(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tab(engine: Engine):
    return Page(EngineLoader.of(engine), Settings()).explorer


@pytest.fixture
def session(engine: Engine) -> Session:
    """A visitor who asked two questions."""
    made = Session()
    for question in ("What is gout?", EXAM):
        chat.ask(made, question)
        for _ in answer(engine, made, SamplingParams(10, temperature=0)):
            pass
    return made


def shown(tab, updates: list) -> dict:
    """Outputs by the name of their attribute."""
    names = {id(component): name for name, component in vars(tab).items() if hasattr(component, "_id")}
    return {names[id(c)]: update for c, update in zip(tab.everything, updates, strict=True)}


def test_answers_are_on_the_shelf_newest_first(tab, session: Session) -> None:
    found = shown(tab, tab.refresh(session))
    titles = [title for title, _ in found["source"]["choices"]]
    assert titles[0].startswith("Which one? A. flu B. gout") and titles[1].startswith("What is gout?")
    assert found["source"]["value"] == found["source"]["choices"][0][1]
    assert len(found["other"]["choices"]) == 1 and found["panel"]["layers"] == 2 and found["last"]["value"] == 1
    assert "Load of the experts" in found["heading"] and isinstance(found["plot"]["value"], go.Figure)
    opened = tab.show_answer(session, 0)
    assert opened[0].selected == "experts" and session.explorer.current.title == "What is gout?"
    session.turns[3].exhibit = ""  # an answer from the list of conversations
    gone = tab.show_answer(session, 1)
    assert "is not here" in gone[-1] and session.explorer.current.title == "What is gout?"
    chat.clear(session)
    assert session.explorer.current is None
    assert "Nothing to look at yet" in shown(tab, tab.refresh(session))["heading"]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_view_after_a_close_look(tab, session: Session, lang: str) -> None:
    session.lang = lang
    session.explorer.view = "contribution"
    before = shown(tab, tab.refresh(session))
    assert before["plot"]["value"] is None and ("深入测量" in before["heading"] or "Look closely" in before["heading"])
    assert not before["panel"]["c"]
    tab.look_closely(session)
    assert session.explorer.payload()["c"] and session.explorer.payload()["h"]
    other = session.explorer.exhibits[1].key
    for view in VIEWS:
        grouping, heading, plot, detail = tab.redraw(session, view, None, True, other)
        assert "<h3>" in heading and "<table" in detail or "<p>" in detail, view
        assert (plot["value"] is None) == (view == "vocabulary"), view
        assert grouping["visible"] == (view == "groups")
    kinds = [kind for _, kind in tab.redraw(session, "groups", "class", False, None)[0]["choices"]]
    assert {"role", "class", "part"} <= set(kinds)


def test_the_panel_leads_the_views(tab, session: Session) -> None:
    tab.redraw(session, "together", None, False, None)
    heading = tab.follow(session, SimpleNamespace(value='{"layer": 1, "projection": 2}'))[1]
    assert "layer 1, down" in heading


def test_changes_are_listed_checked_and_act(tab, session: Session) -> None:
    listed, notice = tab.add_change(session, "ban", 1, 0, 1, ["gate", "up", "down"], [])
    assert listed["value"] == ["ban:1"] and notice == ""
    listed, _ = tab.add_change(session, "off", 0, 1, 1, ["down"], ["ban:1"])
    assert listed["value"] == ["ban:1", "off@1-1/down"]
    _, notice = tab.add_change(session, "ban", 9, 0, 1, ["gate"], [])
    assert "from 0 to 3" in notice
    *_, last = tab.answer_again(session, ["ban:1"])
    assert "xv-pair" in last[0] and len(session.explorer.exhibits) == 4
    changed = session.explorer.exhibits[0]
    assert changed.trace.config["interventions"] == ["ban:1"] and not (changed.trace.experts == 1).any()
    assert session.explorer.other == changed.key and "[ban:1]" in last[2]["choices"][0][0]
    heading, plot, detail, notice = tab.read_again(session, ["off@0-1"])
    assert "Options of the question: A " in heading and "→" in heading and notice == ""
    assert isinstance(plot["value"], go.Figure) and "divergence (nats)" in detail
    assert "Add a change first" in tab.read_again(session, [])[-1]


def test_records_are_opened_and_bad_ones_explained(tab, session: Session, tmp_path: Path) -> None:
    path = session.trace.save(tmp_path / "kept.npz")
    found = shown(tab, tab.open(session, str(path)))
    assert found["source"]["choices"][0][0].startswith("kept.npz") and session.explorer.current.messages is None
    *_, last = tab.answer_again(session, ["ban:1"])
    assert "came from a file" in last[-1]
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    assert "damaged" in tab.open(session, str(bad))[-1] and session.explorer.current.title == "kept.npz"


def test_the_example_opens_without_a_model() -> None:
    tab, visitor = (
        Page(EngineLoader(lambda progress: pytest.fail("not needed")), Settings()).explorer,
        Session(lang="zh"),
    )
    found = shown(tab, tab.open_example(visitor))
    assert found["source"]["choices"][0][0].startswith("示例") and found["panel"]["c"]
    tab.open_example(visitor)
    assert len(visitor.explorer.exhibits) == 1
    assert "模型仍在加载" in tab.look_closely(visitor)[-1]


def test_the_table_is_saved(tab, session: Session) -> None:
    path = Path(tab._saver("csv")(session)["value"])
    assert path.name == "ming-moe-load.csv" and path.read_text(encoding="utf-8").startswith("\ufefflayer,matrix,expert")
    assert Path(tab._saver("npz")(session)["value"]).suffix == ".npz"


def test_answers_side_by_side_are_escaped_and_marked() -> None:
    html = answers_html("same <b>", "same <i>", "en")
    assert "same &lt;<mark>b</mark>&gt;" in html and "same &lt;<mark>i</mark>&gt;" in html
    assert "<mark>&lt;</mark>x" in answers_html("a<x", "a&x", "en") and "<mark>&amp;</mark>x" in answers_html(
        "a<x", "a&x", "en"
    )
    assert "<mark>" not in answers_html("same", "same", "en")


@pytest.mark.parametrize(
    ("tokens", "layers", "experts", "k", "answers"),
    [(1, 1, 1, 1, 0), (1, 1, 1, 1, 1), (3, 1, 64, 64, 2), (4, 12, 2, 1, 4), (30, 3, 8, 3, 10)],
)
def test_any_valid_record_can_be_looked_at(tokens: int, layers: int, experts: int, k: int, answers: int) -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((tokens, layers, 3, experts)), -1)[..., :k].astype(np.uint8)
    rows = tuple(
        TraceToken(i % 7, "<b>" if i % 2 else "", "answer" if i >= tokens - answers else "prompt", i // 2)
        for i in range(tokens)
    )
    segments = tuple(Segment(i, "<i>", {"stream": f"<a href=x>{i}"}) for i in range(min(tokens, 3)))
    trace = RouterTrace(ids, np.full(ids.shape, 1 / k, np.float16), rows, experts, segments=segments)
    explorer = Explorer(layer=99, projection=2)
    explorer.add("x", trace)
    other = explorer.add("y", trace)
    explorer.other = explorer.exhibits[1].key
    for explorer.view in VIEWS:
        for explorer.grouping in ("stream", "nonsense"):
            view = explorer.show("en", np.zeros((layers, 3, experts, experts), np.float32))
            html = heading_html(view, explorer.missing("en")) + table_html(view, "en")
            assert "<b>" not in html and "<a href" not in html
            if view and view.figure:
                assert "<a href" not in go.Figure(view.figure).to_json()
    assert explorer.current is other and report_views(trace, "zh")


def test_what_cannot_be_drawn_is_refused(tab, session: Session, tmp_path: Path) -> None:
    large = np.broadcast_to(np.arange(2, dtype=np.uint8), (9000, 28, 3, 2))
    tokens = tuple(TraceToken(1, "x", "prompt", i) for i in range(9000))
    path = RouterTrace(large, np.full(large.shape, 0.5, np.float16), tokens, 64).save(tmp_path / "large.npz")
    assert "too large for the page" in tab.open(session, str(path))[-1]
    nonsense = replace(session.trace, config={"interventions": ["ban:" + "9" * 5000]})
    session.explorer.chosen = session.explorer.add("nonsense", nonsense).key
    assert "not an intervention" in tab.look_closely(session)[-1]
    session.explorer.chosen = session.explorer.add("odd", replace(session.trace, config={"interventions": 5})).key
    assert tab.look_closely(session)[-1] == ""
    foreign = replace(session.trace, tokens=tuple(replace(token, text="y") for token in session.trace.tokens))
    session.explorer.chosen = session.explorer.add("foreign", foreign).key
    assert "another tokenizer" in tab.look_closely(session)[-1]
    before = tab.redraw(session, "groups", "language", True, None)
    assert before[0]["value"] in [kind for _, kind in before[0]["choices"]]  # it has no languages
    tab.follow(session, SimpleNamespace(value="[1e999"))
    chat.clear(session)
    with pytest.raises(gr.Error, match="no routing record"):
        tab._saver("csv")(session)
