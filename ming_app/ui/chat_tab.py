"""The Chat tab: list of conversations, conversation, expert panel; layout, and events over handlers.Handlers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from ming_app.engine.types import SamplingParams
from ming_app.settings import Settings
from ming_app.ui import chat, experts, render
from ming_app.ui.assets import read
from ming_app.ui.bilingual import Bilingual, labelled, valued
from ming_app.ui.chat import MAX_CHARS, Session
from ming_app.ui.handlers import QUEUED, QUIET, Handlers
from ming_app.ui.talks import system_choices, talk_words
from ming_app.ui.text import t

LATEX = [
    {"left": a, "right": b, "display": d}
    for a, b, d in (("$$", "$$", True), (r"\[", r"\]", True), (r"\(", r"\)", False))
]
SAVE = "(file) => file && ming.save(file)"
FEEDBACK = ("wrong", "unsafe", "unclear", "language")


def feedback_options(lang: str) -> list[str]:
    """What can be said of an answer: Like and Dislike are the Chatbot's own signs, the others reasons."""
    return ["Like", "Dislike", *(t(lang, f"talk.feedback_{name}") for name in FEEDBACK)]


class ChatTab:
    """Builds its components inside the tab that is open; `wire` connects them. `page`: what handlers.show updates."""

    def __init__(
        self,
        words: Bilingual,
        handlers: Handlers,
        session: gr.State,
        settings: Settings,
        prompts: dict[str, list[dict[str, str]]],
    ):
        self.words, self.do, self.session, self.settings, self.prompts = words, handlers, session, settings, prompts
        with gr.Column(elem_id="ming-talks-card", elem_classes="m-card"):
            self._talks()
        with gr.Column(elem_id="ming-chat-card", elem_classes="m-card"):
            self._chat()
        with gr.Column(elem_id="ming-panel-card", elem_classes="m-card"):
            self._experts()
        self.page = [
            self.chatbot,
            self.panel,
            self.status,
            self.notices,
            self.box,
            self.send,
            self.stop,
            self.alert,
            self.marks,
            self.go_on,
            self.mode,
            self.consult_box,
            self.summary,
            self.talks,
            self.kept,
            self.system,
            self.own,
            session,
        ]
        self.streamed = [self.chatbot, self.panel, self.status, self.notices, self.alert]
        """what changes while an answer is written; to say of the others that they do not would cost more than all else"""

    # -- layout --------------------------------------------------------------------------------------------------

    def _talks(self) -> None:
        self.talks = self.words(
            lambda words: gr.HTML(
                value={"items": []},
                html_template=read("talks.html"),
                js_on_load=read("talks.js"),
                apply_default_css=False,
                elem_id="ming-talks",
                words=words,
            ),
            lambda lang: {"words": talk_words(lang)},
        )
        self.kept = gr.Textbox("", visible="hidden", elem_id="ming-kept")
        self.upload = gr.UploadButton("import", file_types=[".json"], visible="hidden", elem_id="ming-talks-upload")

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
        self.mode = words(
            gr.Radio,
            lambda lang: {
                "label": t(lang, "talk.mode"),
                "choices": [(t(lang, f"talk.mode_{name}"), name) for name in ("chat", "consult")],
            },
            value="chat",
            elem_id="ming-mode",
            show_label=False,
            container=False,
            elem_classes="m-seg",
            min_width=0,
        )
        self.loading = gr.HTML(
            render.loading("en", self.do.loader.state), apply_default_css=False, elem_id="ming-loading"
        )
        self.reload = words(
            gr.Button, lambda lang: {"value": t(lang, "load.retry")}, size="sm", elem_classes="m-quiet", visible=False
        )
        self.alert = gr.HTML("", apply_default_css=False, elem_id="ming-alert")
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
            sanitize_html=True,
            allow_tags=False,
            group_consecutive_messages=False,
            latex_delimiters=LATEX,
        )
        with gr.Column(visible=False, elem_id="ming-consult") as self.consult_box:
            self.summary = words(gr.Textbox, labelled("talk.summary"), lines=4, max_lines=5, max_length=MAX_CHARS)
            with gr.Row():
                self.explain = words(
                    gr.Button, valued("talk.explain"), variant="primary", size="sm", elem_id="ming-explain"
                )
                self.save_note = words(
                    gr.Button, valued("talk.note"), size="sm", elem_classes="m-quiet", elem_id="ming-note"
                )
        self.marks = gr.HTML("", apply_default_css=False, visible="hidden", elem_id="ming-marks")
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
        self.go_on = words(
            gr.Button,
            valued("talk.continue"),
            size="sm",
            elem_classes="m-quiet",
            elem_id="ming-continue",
            visible=False,
        )
        self.branch = gr.Button("branch", visible="hidden", elem_id="ming-branch")
        words(gr.HTML, lambda lang: {"value": render.browser_words(lang)}, apply_default_css=False, visible="hidden")
        self._settings()

    def _chatbot_words(self, lang: str) -> dict[str, Any]:
        return {
            "label": t(lang, "chat.label"),
            "placeholder": render.welcome(lang),
            "watermark": self.do.watermark(lang),
            "examples": self.prompts[lang],
            "feedback_options": feedback_options(lang),
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
            with gr.Row():
                self.system = words(
                    gr.Dropdown,
                    lambda lang: {"label": t(lang, "talk.system"), "choices": system_choices(lang)},
                    value="plain",
                    min_width=200,
                    elem_id="ming-system",
                )
                self.starting = words(
                    gr.Textbox,
                    lambda lang: {"label": t(lang, "talk.starting"), "info": t(lang, "talk.starting_info")},
                    max_lines=1,
                    max_length=200,
                    min_width=200,
                    elem_id="ming-starting",
                )
            self.own = words(
                gr.Textbox,
                labelled("talk.own_label"),
                lines=2,
                max_length=4_000,
                visible=False,
                elem_id="ming-own-system",
            )
            words(
                gr.HTML,
                lambda lang: {"value": f'<p class="m-keys">{t(lang, "talk.keys")}</p>'},
                apply_default_css=False,
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

    def wire(self) -> None:
        """Connects the events of the tab."""
        session, page, do = self.session, self.page, self.do
        asked = [
            gr.on([self.box.submit, self.send.click], do.ask, [session, self.box], page, **QUIET),
            self.chatbot.example_select(do.ask_example, [session], page, **QUIET),
            self.chatbot.edit(do.edit, [session], page, **QUIET),
            self.chatbot.retry(do.retry, [session], page, **QUIET),
            self.go_on.click(do.go_on, [session], page, **QUIET),
            self.explain.click(do.explain, [session, self.summary], page, **QUIET),
        ]
        runs = []
        for event in asked:
            event.failure(do.show, [session], page, **QUIET)
            run = event.success(do.answer, [session, *self.sampling.values()], self.streamed, **QUEUED)
            run.then(do.settle, [session], page, **QUIET)
            runs.append(run)
        stopped = self.stop.click(chat.stop, [session], None, **QUIET)
        stopped.then(None, cancels=runs).then(do.show, [session], page, **QUIET)
        changed = [
            self.new.click(chat.clear, [session], None, **QUIET),
            self.mode.input(do.choose_mode, [session, self.mode], None, **QUIET),
        ]
        for event in changed:
            event.then(None, cancels=runs).then(do.show, [session], page, **QUIET)
        listed = self.talks.select(do.act, [session], [*page, self.download], trigger_mode="multiple", **QUIET)
        listed.success(None, [self.download], None, js=SAVE)
        self.upload.upload(do.load_file, [session, self.upload], page, **QUIET)
        self.branch.click(
            do.show_branch, [session, self.kept], page, js="(s) => [s, JSON.stringify(ming.branchAsked)]", **QUIET
        )
        self.chatbot.like(do.rate, [session], page, **QUIET)
        self.kept.change(None, [self.kept], None, js="(text) => ming.keep('chat', text)")
        self.summary.blur(do.correct, [session, self.summary], [self.kept], **QUIET)
        noted = self.save_note.click(do.save_note, [session, self.summary], [self.download], **QUIET)
        noted.success(None, [self.download], None, js=SAVE)
        self._wire_settings()

    def _wire_settings(self) -> None:
        session, sampling = self.session, list(self.sampling.values())
        defaults = [component.value for component in sampling]
        told = [session, self.system, self.own, self.starting]
        reset = self.reset.click(lambda: [*defaults, ""], None, [*sampling, self.starting], **QUIET)
        reset.then(self.do.tell, told, [self.own], **QUIET)
        # a text box: when it is left. Its `input` comes before its value does, and `change` when the server writes, too
        changed = [self.system.input, self.own.blur, self.starting.blur, self.starting.submit]
        gr.on(changed, self.do.tell, told, [self.own], trigger_mode="always_last", **QUIET)
        for kind, button in self.saves.items():
            saved = button.click(self.do.save(kind), [session], self.download, **QUIET)
            saved.success(None, [self.download], None, js=SAVE)
            saved.failure(self.do.show, [session], self.page, **QUIET)


def _labels(name: str) -> Callable[[str], dict[str, Any]]:
    return lambda lang: {"label": t(lang, f"set.{name}"), "info": t(lang, f"set.{name}_info")}
