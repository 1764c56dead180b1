"""`build_page`: the layout as Gradio Blocks, wired to the handlers of handlers.py. No model here and no text of its own.

One visitor is one `Session` in a gr.State, which handlers change in place. Whose turn it is the engine decides
(`settings.streams` answers at a time, `settings.max_queue` wait), together with the requests of the API: Gradio's queue lets
all of them through.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import gradio as gr

from ming_app.settings import Settings
from ming_app.ui import chat, render
from ming_app.ui.about import about
from ming_app.ui.bilingual import Bilingual
from ming_app.ui.chat import Session
from ming_app.ui.chat_tab import ChatTab
from ming_app.ui.client_api import add_client_api
from ming_app.ui.exam.tab import ExamTab
from ming_app.ui.explorer_tab import ExplorerTab
from ming_app.ui.guard import WholeBlocks, keep_no_old_components, keep_words_out_of_logs
from ming_app.ui.handlers import QUEUED, QUIET, Handlers
from ming_app.ui.loader import EngineLoader
from ming_app.ui.text import t

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts.toml"
LOAD_POLL = 1.0  # seconds between looks at the loading engine


def build_page(engine_or_loader: Any, settings: Settings) -> gr.Blocks:
    """The page over an Engine, or over an EngineLoader that may still be at work. Launch it with `launch.launch`."""
    keep_words_out_of_logs()
    loader = engine_or_loader if isinstance(engine_or_loader, EngineLoader) else EngineLoader.of(engine_or_loader)
    return Page(loader, settings).blocks


def at_once(settings: Settings) -> int:
    """Requests to the model that Gradio may have under way: all that the engine takes, and some to be refused by it."""
    return settings.streams + settings.max_queue + 8


class Page:
    """Builds the layout, then wires the events. Components are attributes, for the handlers and for tests."""

    def __init__(self, loader: EngineLoader, settings: Settings):
        keep_no_old_components()
        self.settings = settings
        self.prompts = load_prompts(PROMPTS)
        self.words = Bilingual("en")
        self.do = Handlers(loader, settings, self.words)
        self.blocks = WholeBlocks(
            title=t("en", "app.title"), analytics_enabled=False, delete_cache=(600, 1800), fill_width=True
        )
        with self.blocks:
            add_client_api(self.do)  # before the handlers, or one of them would take its name
            self.session = gr.State(Session(), delete_callback=chat.abandon)
            self._header()
            with gr.Tabs(elem_id="ming-tabs") as self.tabs:
                with (
                    self.words(gr.Tab, lambda lang: {"label": t(lang, "tab.chat")}, id="chat"),
                    gr.Row(elem_id="ming-main"),
                ):
                    self.chat = ChatTab(self.words, self.do, self.session, settings, self.prompts)
                self.exam_tab = self.words(gr.Tab, lambda lang: {"label": t(lang, "tab.exam")}, id="exam")
                with self.exam_tab:
                    self.exam = ExamTab(self.words, self.do, self.session, settings)
                self.explorer_tab = self.words(gr.Tab, lambda lang: {"label": t(lang, "tab.experts")}, id="experts")
                with self.explorer_tab:
                    self.explorer = ExplorerTab(self.words, self.do, self.session)
                with self.words(gr.Tab, lambda lang: {"label": t(lang, "tab.about")}, id="about"):
                    self.words(gr.HTML, lambda lang: {"value": about(lang)}, apply_default_css=False)
            self.words(
                gr.HTML, lambda lang: {"value": render.footer(lang)}, apply_default_css=False, elem_id="ming-foot"
            )
            self.timer = gr.Timer(LOAD_POLL, active=False)
            self.east = gr.Number(0, visible="hidden")
            self._wire()
        for event in self.blocks.fns.values():
            if event.concurrency_id == QUEUED["concurrency_id"]:
                event.concurrency_limit = at_once(settings)
        self.blocks.queue(max_size=2 * at_once(settings), default_concurrency_limit=4)
        self.do.sampling = list(self.chat.sampling)

    # -- layout --------------------------------------------------------------------------------------------------

    def _header(self) -> None:
        words = self.words
        with gr.Row(elem_id="ming-head"):
            words(gr.HTML, lambda lang: {"value": render.brand(lang)}, apply_default_css=False, elem_id="ming-brand")
            look: dict[str, Any] = {"show_label": False, "container": False, "elem_classes": "m-seg", "min_width": 0}
            self.lang = words(
                gr.Radio,
                lambda lang: {"label": t(lang, "app.language")},
                choices=[("中文", "zh"), ("English", "en")],
                value="en",
                elem_id="ming-lang",
                **look,
            )
            self.theme = words(
                gr.Radio,
                lambda lang: {
                    "label": t(lang, "app.theme"),
                    "choices": [(t(lang, f"app.theme_{name}"), name) for name in ("auto", "light", "dark")],
                },
                value="auto",
                elem_id="ming-theme",
                **look,
            )

    # -- events --------------------------------------------------------------------------------------------------

    def _wire(self) -> None:
        self.chat.wire()
        self.explorer.wire(self.tabs, self.explorer_tab)
        self.exam.wire(self.tabs, self.exam_tab, self.chat.page, self.do.show)
        self._wire_frame()

    def _wire_frame(self) -> None:
        """Language, appearance and loading."""
        tab = self.chat
        reworded = [*self.words.components, tab.badge, tab.loading, tab.status, tab.notices]
        engine = [tab.loading, tab.reload, tab.badge, tab.status, tab.chatbot, tab.send, self.timer]
        arrived = self.blocks.load(
            self.do.arrive,
            [self.session, self.lang, self.theme, self.east],
            [self.session, self.lang, self.theme, *reworded],
            js="(s) => [s, ...ming.first()]",
            **QUIET,
        )
        arrived.then(None, None, None, js="() => ming.ready()")
        arrived.then(self.do.look, [self.session], engine, **QUIET)
        self.exam.wire_arrival(arrived)
        arrived.then(
            self.do.restore,
            [self.session, tab.kept, tab.box],
            tab.page,
            js="(s) => [s, ming.kept('chat'), ming.lastTalk()]",
            **QUIET,
        )
        reworded_page = self.lang.input(
            self.do.reword,
            [self.session, self.lang],
            reworded,
            js="(s, lang) => { ming.setLang(lang); return [s, lang]; }",
            **QUIET,
        )
        reworded_page.then(self.do.show, [self.session], tab.page, **QUIET)
        reworded_page.then(self.explorer.refresh, [self.session], self.explorer.everything, **QUIET)
        reworded_page.then(self.exam.refresh, [self.session], self.exam.everything, **QUIET)
        self.theme.input(None, [self.theme], None, js="(theme) => ming.setTheme(theme)")
        self.timer.tick(self.do.look, [self.session], engine, **QUIET)
        tab.reload.click(self.do.reload, [self.session], engine, **QUIET)


def load_prompts(path: Path) -> dict[str, list[dict[str, str]]]:
    """Example questions per language as Chatbot examples; none when the file is not there (an installed package)."""
    found = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {
        lang: [{"text": p["text"], "display_text": p["title"]} for p in found.get(lang, [])] for lang in ("zh", "en")
    }
