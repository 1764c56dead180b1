"""Handlers and layout of the page: refusals, settings, languages, saved records. Not launched."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from ming_app.errors import FetchError
from ming_app.molora.trace import RouterTrace
from ming_app.settings import Settings
from ming_app.ui import chat
from ming_app.ui.chat import Session
from ming_app.ui.handlers import sampling_params
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import PROMPTS, Page, load_prompts
from tests.fakes import FakeEngine

SAMPLING = (0.0, 64.0, 0.9, 40, 0, 1.05, 7)


@pytest.fixture
def page() -> Page:
    return Page(EngineLoader.of(FakeEngine("ok <b>")), Settings())


def run(page: Page, session: Session, *sampling: Any) -> list[Any]:
    return list(page.do.answer(session, *(sampling or SAMPLING)))


def test_ask_shows_the_question_and_empties_the_box(page: Page) -> None:
    session = Session()
    shown = page.do.ask(session, "why?")
    assert shown[0]["value"] == [{"role": "user", "content": "why?"}] and shown[4]["value"] == ""
    assert shown[5]["visible"] is False and shown[6]["visible"] is True  # send, stop
    steps = run(page, session)
    assert steps[-1][0][-1]["role"] == "assistant" and "<b>" not in steps[-1][0][-1]["content"]
    settled = page.do.settle(session)
    assert settled[5]["visible"] is True and settled[6]["visible"] is False
    assert run(page, session) == []  # nothing waits: a second event is a no-op


def test_settings_reach_the_engine(page: Page) -> None:
    session = Session()
    page.do.ask(session, "q")
    run(page, session)
    params = page.do.loader.state.engine.calls[-1][1]
    assert (params.temperature, params.max_new_tokens, params.top_k, params.seed) == (0.0, 64, 40, 7)
    assert isinstance(params.max_new_tokens, int) and params.deadline


def test_random_seed() -> None:
    assert sampling_params({"temperature": 1, "seed": -1}).seed is None
    assert sampling_params({"temperature": 1, "seed": None}).seed is None


def test_a_setting_out_of_range_gives_the_question_back(page: Page) -> None:
    session = Session(lang="zh")
    page.do.ask(session, "q")
    shown = run(page, session, 99.0, *SAMPLING[1:])
    assert "temperature" in shown[-1][3]
    assert page.do.settle(session)[4]["value"] == "q" and session.turns == []


def test_an_answer_that_never_began_gives_the_question_back(page: Page) -> None:
    session = Session()
    page.do.ask(session, "lost")
    settled = page.do.settle(session)
    assert settled[4]["value"] == "lost" and settled[5]["visible"] is True


def test_a_waiting_question_is_not_displaced(page: Page) -> None:
    session = Session()
    page.do.ask(session, "first")
    for another in (
        lambda: page.do.ask(session, "second"),
        lambda: page.do.ask_example(session, SimpleNamespace(value=page.prompts["en"][0])),  # type: ignore[arg-type]
        lambda: page.do.edit(session, SimpleNamespace(index=0, value="second")),  # type: ignore[arg-type]
        lambda: page.do.retry(session, SimpleNamespace(index=0)),  # type: ignore[arg-type]
    ):
        with pytest.raises(gr.Error, match="waiting"):
            another()
        assert [turn.text for turn in session.turns] == ["first"] and session.status.key == "status.queued"
    run(page, session)
    assert [turn.text for turn in session.turns] == ["first", "ok <b>"] and session.error is None
    page.do.ask(session, "second")  # and after the answer the next one is welcome
    chat.stop(session)  # a question taken back makes room too
    page.do.ask(session, "third")
    assert session.turns[-1].text == "third"


def test_a_refused_edit_is_not_lost(page: Page) -> None:
    session = Session()
    page.do.ask(session, "one")
    run(page, session)
    long = "x" * (chat.MAX_CHARS + 1)
    with pytest.raises(gr.Error, match="characters"):
        page.do.edit(session, SimpleNamespace(index=0, value=long))  # type: ignore[arg-type]
    assert page.do.show(session)[4]["value"] == long and len(session.turns) == 2


def test_refusals_are_told_in_the_visitors_language(page: Page) -> None:
    page.do.load = lambda: (1, 32)
    with pytest.raises(gr.Error, match="排队"):
        page.do.ask(Session(lang="zh"), "q")
    with pytest.raises(gr.Error, match="waiting"):
        page.do.ask(Session(lang="en"), "q")


def test_while_loading_and_after_a_failure_chat_is_closed() -> None:
    loader = EngineLoader(lambda progress: None)
    page, session = Page(loader, Settings()), Session()
    with pytest.raises(gr.Error, match="loading"):
        page.do.ask(session, "q")
    looked = page.do.look(session)
    assert (
        looked[-1]["active"] is True and looked[-2]["interactive"] is False and session.status.key == "status.loading"
    )
    loader.state = type(loader.state)(error=FetchError("No network.", "没有网络。"))
    looked = page.do.look(session)
    assert session.status.key == "status.failed" and "Model not loaded" in looked[3]
    assert "No network" in looked[0] and looked[1]["visible"] is True and looked[-1]["active"] is False
    loader.state = type(loader.state)(engine=FakeEngine())
    looked = page.do.look(session)
    assert looked[0] == "" and looked[-2]["interactive"] is True and session.status.key == "status.idle"


def test_edit_and_retry_events(page: Page) -> None:
    session = Session()
    for question in ("one", "two"):
        page.do.ask(session, question)
        run(page, session)
    page.do.edit(session, SimpleNamespace(index=2, value=[{"type": "text", "text": "TWO <\u2060b>"}]))  # type: ignore[arg-type]
    assert [t.text for t in session.turns] == ["one", "ok <b>", "TWO <b>"]
    run(page, session)
    page.do.retry(session, SimpleNamespace(index=(1, 0)))  # type: ignore[arg-type]
    assert [t.text for t in session.turns] == ["one"]


def test_an_example_is_asked(page: Page) -> None:
    session = Session()
    page.do.ask_example(session, SimpleNamespace(value=page.prompts["zh"][0]))  # type: ignore[arg-type]
    assert session.turns[0].text == page.prompts["zh"][0]["text"]


def test_rewording_covers_the_page(page: Page) -> None:
    session = Session()
    reworded = page.do.reword(session, "zh")
    assert session.lang == "zh" and len(reworded) == len(page.words.components) + 4
    text = repr(reworded)
    for word in ("发送", "新对话", "回答设置", "温度", "专家在工作", "请输入医学问题", "说明"):
        assert word in text
    assert "Send" not in text.replace('"Send the edited question"', "")


def test_no_text_stays_in_the_other_language() -> None:
    """Every visible text of the built page comes from a component that `reword` reaches."""
    page = Page(EngineLoader.of(FakeEngine()), Settings())
    reached = {c._id for c in page.words.components} | {
        c._id for c in (page.chat.badge, page.chat.loading, page.chat.status, page.chat.notices)
    }
    silent = {page.lang._id} | {b._id for b in page.blocks.blocks.values() if b.get_config().get("visible") == "hidden"}
    silent |= {b._id for b in page.blocks.blocks.values() if b.get_block_name() == "api"}  # on no page
    for block in page.blocks.blocks.values():
        config = block.get_config()
        said = [config.get(k) for k in ("label", "placeholder", "info") if config.get(k)]
        if block.get_block_name() in ("button", "html"):
            said.append(config.get("value"))
        if any(said) and block._id not in reached | silent:
            pytest.fail(f"{block} says {said} in one language only")


@pytest.mark.parametrize("kind", ["npz", "json"])
def test_the_saved_record_opens_again_and_is_labelled(page: Page, kind: str) -> None:
    session = Session()
    with pytest.raises(gr.Error):
        page.do.save(kind)(session)
    page.do.ask(session, "q")
    run(page, session)
    path = Path(page.do.save(kind)(session)["value"])
    trace = RouterTrace.load(path)
    assert path.suffix == f".{kind}" and len(trace) == len(session.trace or ()) and trace.config["ai_generated"] is True


def test_temporary_files_go(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """By themselves: nobody has to save another record for the last one to go."""
    monkeypatch.setattr("ming_app.ui.files.MAX_AGE", 0.2)
    folder = page.do.files.new()
    (folder / "x").write_text("x")
    end = time.monotonic() + 10
    while folder.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert folder.parent.exists()


def test_example_prompts() -> None:
    prompts = load_prompts(PROMPTS)
    assert len(prompts["zh"]) == len(prompts["en"]) >= 4
    assert all(0 < len(p["text"]) < chat.MAX_CHARS and p["display_text"] for side in prompts.values() for p in side)
    assert load_prompts(Path("nowhere.toml")) == {"zh": [], "en": []}
