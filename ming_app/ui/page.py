"""`build_page`: the layout as Gradio Blocks, wired to the handlers of handlers.py. No model here and no text of its own.

One visitor is one `Session` in a gr.State, which handlers change in place. All answers share the concurrency id
"model": the engine runs one at a time, and the others wait in Gradio's queue.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ming_app.engine.types import SamplingParams
from ming_app.settings import Settings
from ming_app.ui import chat, experts, render
from ming_app.ui.about import about
from ming_app.ui.bilingual import Bilingual, valued
from ming_app.ui.chat import MAX_CHARS, Session
from ming_app.ui.exam.tab import ExamTab
from ming_app.ui.explorer_tab import ExplorerTab
from ming_app.ui.handlers import QUEUED, QUIET, Handlers
from ming_app.ui.loader import EngineLoader
from ming_app.ui.text import t

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts.toml"
LOAD_POLL = 1.0  # seconds between looks at the loading engine
LATEX = [
    {"left": a, "right": b, "display": d}
    for a, b, d in (("$$", "$$", True), (r"\[", r"\]", True), (r"\(", r"\)", False))
]


def build_page(engine_or_loader: Any, settings: Settings) -> gr.Blocks:
    """The page over an Engine, or over an EngineLoader that may still be at work. Launch it with `launch.launch`."""
    loader = engine_or_loader if isinstance(engine_or_loader, EngineLoader) else EngineLoader.of(engine_or_loader)
    return Page(loader, settings).blocks


class Page:
    """Builds the layout, then wires the events. Components are attributes, for the handlers and for tests."""

    def __init__(self, loader: EngineLoader, settings: Settings):
        self.settings = settings
        self.prompts = load_prompts(PROMPTS)
        self.words = Bilingual("en")
        self.do = Handlers(loader, settings, self.words)
        self.blocks = gr.Blocks(
            title=t("en", "app.title"), analytics_enabled=False, delete_cache=(600, 1800), fill_width=True
        )
        with self.blocks:
            self.session = gr.State(Session(), delete_callback=chat.abandon)
            self._header()
            with gr.Tabs(elem_id="ming-tabs") as self.tabs:
                with (
                    self.words(gr.Tab, lambda lang: {"label": t(lang, "tab.chat")}, id="chat"),
                    gr.Row(elem_id="ming-main"),
                ):
                    with gr.Column(elem_id="ming-chat-card", elem_classes="m-card"):
                        self._chat()
                    with gr.Column(elem_id="ming-panel-card", elem_classes="m-card"):
                        self._experts()
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
        self.blocks.queue(max_size=settings.max_queue, default_concurrency_limit=4)
        self.do.queued = self._queued
        self.do.sampling = list(self.sampling)

    def _queued(self) -> tuple[int, int]:
        """Answers that wait and answers that run. Gradio's queue has no public count."""
        model = self.blocks._queue.event_queue_per_concurrency_id.get("model")
        return (len(model.queue), model.current_concurrency) if model else (0, 0)

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

    def _chat(self) -> None:
        words = self.words
        with gr.Row(elem_id="ming-tools"):
            self.badge = gr.HTML(render.badge("en", self.do.info), apply_default_css=False)
            self.new = words(
                gr.Button,
                lambda lang: {"value": t(lang, "chat.new")},
                size="sm",
                elem_classes="m-quiet",
                elem_id="ming-new",
            )
        self.loading = gr.HTML(
            render.loading("en", self.do.loader.state), apply_default_css=False, elem_id="ming-loading"
        )
        self.reload = words(
            gr.Button, lambda lang: {"value": t(lang, "load.retry")}, size="sm", elem_classes="m-quiet", visible=False
        )
        self.chatbot = words(
            gr.Chatbot,
            self._chatbot_words,
            elem_id="ming-chat",
            height="56dvh",
            min_height=320,
            show_label=False,
            container=False,
            layout="bubble",
            editable="user",
            buttons=["copy"],
            feedback_options=None,
            sanitize_html=True,
            allow_tags=False,
            group_consecutive_messages=False,
            latex_delimiters=LATEX,
        )
        self.notices = gr.HTML("", apply_default_css=False, elem_id="ming-notices")
        self.status = gr.HTML(render.status(Session(), self.do.info), apply_default_css=False, elem_id="ming-status")
        with gr.Row(elem_id="ming-ask"):
            self.box = words(
                gr.Textbox,
                lambda lang: {"label": t(lang, "chat.input_label"), "placeholder": t(lang, "chat.placeholder")},
                elem_id="ming-input",
                show_label=False,
                container=False,
                lines=1,
                max_lines=8,
                max_length=MAX_CHARS,
                autofocus=True,
            )
            self.send = words(
                gr.Button, lambda lang: {"value": t(lang, "chat.send")}, variant="primary", elem_id="ming-send"
            )
            self.stop = words(
                gr.Button,
                lambda lang: {"value": t(lang, "chat.stop")},
                variant="stop",
                elem_id="ming-stop",
                visible=False,
            )
        words(gr.HTML, lambda lang: {"value": render.browser_words(lang)}, apply_default_css=False, visible="hidden")
        self._settings()

    def _chatbot_words(self, lang: str) -> dict[str, Any]:
        return {
            "label": t(lang, "chat.label"),
            "placeholder": render.welcome(lang),
            "watermark": self.do.watermark(lang),
            "examples": self.prompts[lang],
        }

    def _settings(self) -> None:
        words, base = self.words, SamplingParams()
        with words(gr.Accordion, lambda lang: {"label": t(lang, "set.title")}, open=False, elem_id="ming-settings"):
            ranges = {
                "temperature": (0, 2, 0.05),
                "max_new_tokens": (16, max(32, min(4096, self.settings.context)), 16),
                "top_p": (0.05, 1, 0.01),
                "top_k": (0, 200, 1),
                "min_p": (0, 0.5, 0.01),
                "repetition_penalty": (0.8, 2, 0.01),
            }
            self.sampling: dict[str, Any] = {}
            with gr.Row():
                for name, (low, high, step) in ranges.items():
                    value = min(getattr(base, name), high)
                    self.sampling[name] = words(
                        gr.Slider,
                        _labels(name),
                        minimum=low,
                        maximum=high,
                        step=step,
                        value=value,
                        min_width=200,
                        elem_id=f"ming-{name}",
                    )
                self.sampling["seed"] = words(
                    gr.Number, _labels("seed"), value=-1, precision=0, minimum=-1, maximum=2**31 - 1, min_width=200
                )
            self.reset = words(
                gr.Button, lambda lang: {"value": t(lang, "set.reset")}, size="sm", elem_classes="m-quiet"
            )

    def _experts(self) -> None:
        words = self.words
        self.panel = words(lambda words: experts.panel("en"), lambda lang: {"words": experts.words(lang)})
        with gr.Row(elem_id="ming-save"):
            words(
                gr.HTML,
                lambda lang: {"value": f'<span class="xp-hint m-foot">{t(lang, "experts.download")}</span>'},
                apply_default_css=False,
            )
            self.saves = {
                kind: words(
                    gr.Button,
                    valued(f"experts.download_{kind}"),
                    size="sm",
                    elem_classes="m-quiet",
                    elem_id=f"ming-save-{kind}",
                )
                for kind in ("npz", "json")
            }
            self.download = gr.DownloadButton("download", visible="hidden", elem_id="ming-download")

    # -- events --------------------------------------------------------------------------------------------------

    def _wire(self) -> None:
        page = [self.chatbot, self.panel, self.status, self.notices, self.box, self.send, self.stop]
        sampling = list(self.sampling.values())
        asked = [
            gr.on([self.box.submit, self.send.click], self.do.ask, [self.session, self.box], page, **QUIET),
            self.chatbot.example_select(self.do.ask_example, [self.session], page, **QUIET),
            self.chatbot.edit(self.do.edit, [self.session], page, **QUIET),
            self.chatbot.retry(self.do.retry, [self.session], page, **QUIET),
        ]
        runs = []
        for event in asked:
            event.failure(self.do.show, [self.session], page, **QUIET)
            run = event.success(
                self.do.answer,
                [self.session, *sampling],
                page,
                **QUEUED,
            )
            run.then(self.do.settle, [self.session], page, **QUIET)
            runs.append(run)
        stopped = self.stop.click(chat.stop, [self.session], None, **QUIET)
        stopped.then(None, cancels=runs).then(self.do.show, [self.session], page, **QUIET)
        cleared = self.new.click(chat.clear, [self.session], None, **QUIET)
        cleared.then(None, cancels=runs).then(self.do.show, [self.session], page, **QUIET)
        defaults = [component.value for component in sampling]
        self.reset.click(lambda: defaults, None, sampling, **QUIET)
        for kind, button in self.saves.items():
            saved = button.click(self.do.save(kind), [self.session], self.download, **QUIET)
            saved.success(None, [self.download], None, js="(file) => ming.save(file)")
            saved.failure(self.do.show, [self.session], page, **QUIET)
        self.explorer.wire(self.tabs, self.explorer_tab)
        self.exam.wire(self.tabs, self.exam_tab, page, self.do.show)
        self._wire_frame()

    def _wire_frame(self) -> None:
        """Language, appearance and loading."""
        reworded = [*self.words.components, self.badge, self.loading, self.status, self.notices]
        engine = [self.loading, self.reload, self.badge, self.status, self.chatbot, self.send, self.timer]
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
        reworded_page = self.lang.input(
            self.do.reword,
            [self.session, self.lang],
            reworded,
            js="(s, lang) => { ming.setLang(lang); return [s, lang]; }",
            **QUIET,
        )
        reworded_page.then(self.explorer.refresh, [self.session], self.explorer.everything, **QUIET)
        reworded_page.then(self.exam.refresh, [self.session], self.exam.everything, **QUIET)
        self.theme.input(None, [self.theme], None, js="(theme) => ming.setTheme(theme)")
        self.timer.tick(self.do.look, [self.session], engine, **QUIET)
        self.reload.click(self.do.reload, [self.session], engine, **QUIET)


def load_prompts(path: Path) -> dict[str, list[dict[str, str]]]:
    """Example questions per language as Chatbot examples; none when the file is not there (an installed package)."""
    found = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {
        lang: [{"text": p["text"], "display_text": p["title"]} for p in found.get(lang, [])] for lang in ("zh", "en")
    }


def _labels(name: str) -> Callable[[str], dict[str, Any]]:
    return lambda lang: {"label": t(lang, f"set.{name}"), "info": t(lang, f"set.{name}_info")}
