"""The Experts tab: layout and events over `explorer.Explorer`. Choosing and drawing is quick and not queued; whatever needs
the model takes its turn with the answers of the chat."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from ming_app.engine.inspection import contrast, inspect, option_probabilities
from ming_app.engine.interventions import compile_interventions, parse_intervention, written
from ming_app.engine.types import DEADLINE, PATIENCE, Finish, Intervention, Message, SamplingParams, Token
from ming_app.errors import MingError, UsageError
from ming_app.molora.config import PROJECTIONS
from ming_app.molora.trace import RouterTrace
from ming_app.router.groups import option_letters
from ming_app.router.report import report_html, report_views
from ming_app.ui import experts, render
from ming_app.ui.bilingual import Bilingual, labelled, valued
from ming_app.ui.chat import Session
from ming_app.ui.explorer import VIEWS, Exhibit, answers_html, contrast_view, heading_html, selected, table_html
from ming_app.ui.handlers import QUEUED, QUIET, Handlers
from ming_app.ui.pump import Pump
from ming_app.ui.text import refusal, t

WAITED = {**QUEUED, "show_progress": "minimal"}
EXAMPLE = Path(__file__).parents[2] / "examples" / "atlas" / "trace.npz"
NUMBERED = ("ban", "force", "k")  # changes that need a number
ANSWER_TOKENS = 400  # of an answer made again


class ExplorerTab:
    """Builds its components inside the Blocks that are open; `wire` connects them."""

    def __init__(self, words: Bilingual, handlers: Handlers, session: gr.State):
        self.words, self.do, self.session = words, handlers, session
        with gr.Column(elem_id="ming-explorer"):
            self.intro = words(
                gr.HTML,
                lambda lang: {"value": f'<p class="xp-hint">{t(lang, "exp.intro")}</p>'},
                apply_default_css=False,
            )
            self._sources()
            with gr.Row(elem_id="ming-explorer-main"):
                with gr.Column(elem_classes="m-card", elem_id="ming-explorer-panel-card"):
                    self.panel = words(
                        lambda words: experts.panel("en", "ming-explorer-panel"),
                        lambda lang: {"words": experts.words(lang)},
                    )
                with gr.Column(elem_classes="m-card"):
                    self._views()
                    self._changes()

    # -- layout --------------------------------------------------------------------------------------------------

    def _sources(self) -> None:
        words = self.words
        with gr.Row(elem_id="ming-explorer-sources"):
            self.source = words(gr.Dropdown, labelled("exp.source"), choices=[], interactive=True, min_width=260)
            self.other = words(gr.Dropdown, labelled("exp.other"), choices=[], interactive=True, min_width=200)
            self.upload = words(
                gr.UploadButton,
                labelled("exp.open_file"),
                file_types=[".npz", ".json"],
                size="sm",
                elem_classes="m-quiet",
                elem_id="ming-open-record",
            )
            self.example = words(
                gr.Button,
                valued("exp.example"),
                size="sm",
                elem_classes="m-quiet",
                elem_id="ming-example",
                visible=EXAMPLE.is_file(),
            )
            self.measure = words(
                gr.Button,
                valued("exp.measure"),
                size="sm",
                variant="primary",
                elem_id="ming-measure",
            )
        words(
            gr.HTML,
            lambda lang: {"value": f'<p class="xp-hint">{t(lang, "exp.measure_info")}</p>'},
            apply_default_css=False,
        )
        self.notice = gr.HTML("", apply_default_css=False, elem_id="ming-explorer-notice")

    def _views(self) -> None:
        words = self.words
        self.view = words(
            gr.Radio,
            lambda lang: {"label": t(lang, "exp.view"), "choices": [(t(lang, f"exp.view_{v}"), v) for v in VIEWS]},
            value="load",
            elem_id="ming-view",
            elem_classes="m-tabs",
        )
        with gr.Row(elem_id="ming-view-options"):
            self.grouping = words(
                gr.Dropdown,
                labelled("exp.grouping"),
                choices=[],
                interactive=True,
                visible=False,
            )
            self.answers_only = words(gr.Checkbox, labelled("exp.answers_only"), value=True)
        self.heading = gr.HTML("", apply_default_css=False)
        self.plot = gr.Plot(show_label=False, elem_id="ming-plot", visible=False)
        self.detail = gr.HTML("", apply_default_css=False, elem_id="ming-view-detail")
        with gr.Row(elem_id="ming-view-save"):
            self.saves = {
                kind: words(gr.Button, valued(key), size="sm", elem_classes="m-quiet", elem_id=f"ming-explorer-{kind}")
                for kind, key in (
                    ("html", "exp.download_html"),
                    ("csv", "exp.download_csv"),
                    ("npz", "experts.download_npz"),
                    ("json", "experts.download_json"),
                )
            }
        self.download = gr.DownloadButton("download", visible="hidden")

    def _changes(self) -> None:
        words = self.words
        with words(gr.Accordion, labelled("exp.change"), open=False, elem_id="ming-changes"):
            words(
                gr.HTML,
                lambda lang: {"value": f'<p class="xp-hint">{t(lang, "exp.change_info")}</p>'},
                apply_default_css=False,
            )
            with gr.Row():
                self.kind = words(
                    gr.Dropdown,
                    lambda lang: {
                        "label": t(lang, "exp.kind"),
                        "choices": [(t(lang, f"exp.kind_{kind}"), kind) for kind in Intervention.KINDS],
                    },
                    value="ban",
                    min_width=170,
                    elem_id="ming-kind",
                )
                self.value = words(gr.Number, labelled("exp.value"), value=0, precision=0, minimum=0, min_width=90)
                self.first = words(gr.Number, labelled("exp.first"), value=0, precision=0, minimum=0, min_width=90)
                self.last = words(gr.Number, labelled("exp.last"), value=0, precision=0, minimum=0, min_width=90)
                self.matrices = words(
                    gr.CheckboxGroup,
                    labelled("exp.matrices"),
                    choices=list(PROJECTIONS),
                    value=list(PROJECTIONS),
                    min_width=170,
                )
            self.add = words(
                gr.Button,
                valued("exp.add"),
                size="sm",
                elem_classes="m-quiet",
                elem_id="ming-add-change",
            )
            self.changes = words(
                gr.CheckboxGroup, labelled("exp.list"), choices=[], value=[], visible=False, elem_id="ming-change-list"
            )
            with gr.Row():
                self.answer = words(
                    gr.Button,
                    valued("exp.answer"),
                    variant="primary",
                    size="sm",
                    elem_id="ming-reanswer",
                )
                self.reread = words(
                    gr.Button,
                    valued("exp.reread"),
                    size="sm",
                    elem_classes="m-quiet",
                    elem_id="ming-reread",
                )
            self.pair = gr.HTML("", apply_default_css=False, elem_id="ming-pair")
            self.moved_heading = gr.HTML("", apply_default_css=False)
            self.moved = gr.Plot(show_label=False, visible=False, elem_id="ming-moved")
            self.moved_detail = gr.HTML("", apply_default_css=False, elem_id="ming-moved-detail")

    # -- events --------------------------------------------------------------------------------------------------

    def wire(self, tabs: gr.Tabs, tab: gr.Tab) -> None:
        """Connects the events; `tab` among `tabs` is the one that shows all this. Called inside the Blocks, outside the tab."""
        # a tab is drawn when it is first opened: what the chat's buttons press must lie outside
        open_answer = gr.Button("open", visible="hidden", elem_id="ming-open-answer")
        opened = gr.Number(-1, precision=0, visible="hidden")
        shelf = [self.source, self.other, self.panel, self.first, self.last, self.view]
        seen = [self.grouping, self.heading, self.plot, self.detail]
        everything = [*shelf, *seen, self.notice]
        self.everything = everything
        # not the notice: the tab is selected by code as well, with something to say
        tab.select(lambda session: self.refresh(session)[:-1], [self.session], everything[:-1], **QUIET)
        self.source.input(self.choose, [self.session, self.source], everything, **QUIET)
        self.upload.upload(self.open, [self.session, self.upload], everything, **QUIET)
        self.example.click(self.open_example, [self.session], everything, **QUIET)
        inputs = [self.session, self.view, self.grouping, self.answers_only, self.other]
        for component in (self.view, self.grouping, self.answers_only, self.other):
            component.input(self.redraw, inputs, seen, **QUIET)
        self.panel.select(self.follow, [self.session], seen, trigger_mode="always_last", **QUIET)
        self.measure.click(self.look_closely, [self.session], everything, **WAITED)
        self.kind.input(lambda kind: gr.update(visible=kind in NUMBERED), [self.kind], [self.value], **QUIET)
        added = [self.session, self.kind, self.value, self.first, self.last, self.matrices, self.changes]
        self.add.click(self.add_change, added, [self.changes, self.notice], **QUIET)
        asked = [self.session, self.changes]
        self.answer.click(self.answer_again, asked, [self.pair, self.source, self.other, self.notice], **WAITED)
        self.reread.click(
            self.read_again, asked, [self.moved_heading, self.moved, self.moved_detail, self.notice], **WAITED
        )
        open_answer.click(
            self.show_answer,
            [self.session, opened],
            [tabs, *everything],
            js="(session) => [session, ming.opened ?? -1]",
            **QUIET,
        )
        for kind, button in self.saves.items():
            saved = button.click(self._saver(kind), [self.session], self.download, **QUIET)
            saved.success(None, [self.download], None, js="(file) => ming.save(file)")

    # -- handlers ------------------------------------------------------------------------------------------------

    def refresh(self, session: Session) -> list[Any]:
        """Everything as it stands; the newest answer when nothing was chosen."""
        explorer, current = session.explorer, session.explorer.current
        explorer.look(current.key if current else None)
        choices = explorer.choices(session.lang)
        if explorer.find(explorer.other) is None or (current and explorer.other == current.key):
            explorer.other = None
        last = current.trace.num_layers - 1 if current else 0
        ranged = gr.update(value=last, maximum=last) if last != explorer.last_layer else gr.skip()
        explorer.last_layer = last
        return [
            gr.update(choices=choices, value=current.key if current else None),
            gr.update(choices=explorer.others(session.lang), value=explorer.other),
            explorer.payload(),
            gr.update(maximum=last),
            ranged,
            explorer.view,
            *self._seen(session),
            "",
        ]

    def choose(self, session: Session, key: str | None) -> list[Any]:
        session.explorer.look(key)
        return self.refresh(session)

    def show_answer(self, session: Session, index: float) -> list[Any]:
        """Opens the answer that is the `index`-th of the conversation."""
        answers = [turn.exhibit for turn in session.turns if turn.role == "assistant"]
        key = answers[int(index)] if 0 <= index < len(answers) else ""
        if session.explorer.find(key) is None:
            *seen, _ = self.refresh(session)
            return [gr.Tabs(selected="experts"), *seen, render.alert(t(session.lang, "exp.gone"))]
        return [gr.Tabs(selected="experts"), *self.choose(session, key)]

    def open_example(self, session: Session) -> list[Any]:
        """The atlas that comes with the app; it needs no model."""
        title = t(session.lang, "exp.example_title")
        kept = next((exhibit for exhibit in session.explorer.exhibits if exhibit.title == title), None)
        return self.choose(session, kept.key) if kept else self.open(session, str(EXAMPLE), title)

    def open(self, session: Session, path: str | None, title: str = "") -> list[Any]:
        """A record from a file; what is wrong with it is said above the views."""
        try:
            if path is None:
                raise refusal("refuse.no_trace")
            trace = RouterTrace.load(path)
            if not len(trace):
                raise UsageError("The record holds no tokens.", "该记录中没有词元。")
            made = session.explorer.add(title or Path(path).name, trace)
        except MingError as error:
            return [*[gr.skip()] * (len(self.everything) - 1), render.alert(error.message(session.lang))]
        return self.choose(session, made.key)

    def redraw(
        self, session: Session, view: str, grouping: str | None, answers_only: bool, other: str | None
    ) -> list[Any]:
        explorer = session.explorer
        explorer.view, explorer.grouping, explorer.answers_only, explorer.other = (
            view,
            grouping or "",
            answers_only,
            other,
        )
        return self._seen(session)

    def follow(self, session: Session, event: gr.EventData) -> list[Any]:
        """Layer and matrix were chosen in the panel."""
        chosen = selected(event.value)
        if chosen is not None:
            session.explorer.layer, session.explorer.projection = chosen
            session.explorer.look(session.explorer.chosen)
        return self._seen(session)

    def look_closely(self, session: Session) -> list[Any]:
        """Reads the current record again with everything measured."""
        explorer = session.explorer  # "New chat" may put another in its place meanwhile
        try:
            current = explorer.need()
            found = inspect(self.do.loader.ready(), current.trace, _changes_of(current.trace), cancel=_deadline())
            explorer.replace(current, found)
            if explorer.view == "load":
                explorer.view = "contribution"
        except MingError as error:
            return [*[gr.skip()] * (len(self.everything) - 1), render.alert(error.message(session.lang))]
        return self.refresh(session)

    def add_change(
        self,
        session: Session,
        kind: str,
        value: float | None,
        first: float | None,
        last: float | None,
        matrices: list[str],
        chosen: list[str],
    ) -> list[Any]:
        try:
            info = self.do.loader.ready().info
            layers = (int(first or 0), info.num_layers - 1 if last is None else int(last))
            everywhere = layers == (0, info.num_layers - 1)
            made = Intervention(
                kind,
                int(value or 0) if kind in NUMBERED else None,
                None if everywhere else layers,
                tuple(p for p in PROJECTIONS if p in matrices),
            )
            texts = [*dict.fromkeys([*chosen, written(made)])]
            compile_interventions([parse_intervention(x) for x in texts], info.num_layers, info.num_experts, info.top_k)
        except MingError as error:
            return [gr.skip(), render.alert(error.message(session.lang))]
        return [gr.update(choices=texts, value=texts, visible=True), ""]

    def answer_again(self, session: Session, texts: list[str]) -> Iterator[list[Any]]:
        """Asks the current answer's question twice, greedily: as it is and with the changes; streams the second."""
        skip = [gr.skip()] * 2
        try:
            explorer = session.explorer
            engine, current, changes = self.do.loader.ready(), explorer.need(), self._asked(texts)
            if current.messages is None:
                raise refusal("exp.no_question")
            plain = yield from self._greedy(
                engine, current.messages, (), lambda text: [_working(session.lang), *skip, ""]
            )
            done = plain[1]
            changed = yield from self._greedy(
                engine, current.messages, changes, lambda text: [answers_html(done, text, session.lang), *skip, ""]
            )
        except MingError as error:
            yield [gr.skip(), *skip, render.alert(error.message(session.lang))]
            return
        explorer.chosen = current.key
        for (trace, text), named in ((plain, "greedy"), (changed, ", ".join(texts))):
            made = explorer.add(current.title, trace, current.messages, text, named)
        explorer.other = made.key
        choices = explorer.choices(session.lang)
        yield [
            answers_html(plain[1], changed[1], session.lang),
            gr.update(choices=choices, value=current.key),
            gr.update(choices=explorer.others(session.lang), value=made.key),
            "",
        ]

    def read_again(self, session: Session, texts: list[str]) -> list[Any]:
        """The same answer under the changes: how far the probabilities move."""
        try:
            engine, current, changes = self.do.loader.ready(), session.explorer.need(), self._asked(texts)
            found = contrast(engine, current.trace, changes, cancel=_deadline())
            letters = option_letters(current.messages[-1].content) if current.messages else []
            options = option_probabilities(engine, current.messages or (), letters, changes)
            view = contrast_view(found, options, session.lang)
        except MingError as error:
            return [*[gr.skip()] * 3, render.alert(error.message(session.lang))]
        return [*_drawn(view, "", session.lang), ""]

    # -- pieces --------------------------------------------------------------------------------------------------

    def _asked(self, texts: list[str]) -> tuple[Intervention, ...]:
        if not texts:
            raise refusal("exp.no_changes")
        return tuple(parse_intervention(text) for text in texts)

    def _greedy(
        self,
        engine: Any,
        messages: tuple[Message, ...],
        changes: tuple[Intervention, ...],
        shown: Callable[[str], list[Any]],
    ) -> Any:
        """Streams one answer; yields what `shown` makes of the text so far and returns (trace, text)."""
        params = SamplingParams(
            ANSWER_TOKENS,
            temperature=0,
            repetition_penalty=1.0,
            deadline=DEADLINE,
            patience=PATIENCE,
            interventions=changes,
        )
        text, trace = "", None
        with closing(Pump(engine, messages, params, threading.Event())) as pump:
            for event in pump.events(0.25):
                if isinstance(event, Token):
                    text += event.text
                elif isinstance(event, Finish):
                    trace = event.trace
                yield shown(text)
        if trace is None:
            raise refusal("refuse.no_trace")
        return trace, text

    def _seen(self, session: Session) -> list[Any]:
        explorer, lang = session.explorer, session.lang
        kinds = explorer.group_choices(lang)
        offered = [kind for _, kind in kinds]
        wanted = explorer.grouping if explorer.grouping in offered else next(iter(offered), None)
        current = explorer.current
        try:
            alike = self._similarity(current) if explorer.view == "alike" and current else None
            view = explorer.show(lang, alike)
            missing = explorer.missing(lang)
        except MingError as error:  # two traces of different shapes
            view, missing = None, error.message(lang)
        options = gr.update(choices=kinds, value=wanted, visible=explorer.view == "groups")
        return [options, *_drawn(view, missing, lang)]

    def _similarity(self, current: Exhibit) -> np.ndarray | None:
        engine = self.do.loader.state.engine
        if (
            engine is None
            or getattr(engine, "adapter", None) is None
            or engine.info.fingerprint != current.trace.fingerprint
        ):
            return None
        return _likeness(engine.adapter)

    def _saver(self, kind: str) -> Callable[[Session], Any]:
        def save(session: Session) -> Any:
            try:
                return written_file(session)
            except MingError as error:
                raise gr.Error(error.message(session.lang), print_exception=False) from None

        def written_file(session: Session) -> Any:
            current = session.explorer.need()
            folder = self.do.files.new()
            if kind in ("npz", "json"):
                return gr.update(value=str(experts.dated_record(current.trace, kind, folder)))
            if kind == "html":
                path = folder / "ming-moe-routing.html"
                found = report_views(current.trace, session.lang, self._similarity(current))
                path.write_text(report_html(current.trace, session.lang, found), encoding="utf-8")
                return gr.update(value=str(path))
            view = session.explorer.show(session.lang, self._similarity(current))
            path = folder / f"ming-moe-{view.name if view else 'nothing'}.csv"
            path.write_text(view.table.to_csv() if view else "", encoding="utf-8")
            return gr.update(value=str(path))

        return save


@lru_cache(maxsize=1)
def _likeness(folder: Path) -> np.ndarray:
    from ming_app.molora.similarity import similarity_of

    return similarity_of(folder)


def _drawn(view: Any, missing: str, lang: str) -> list[Any]:
    """Updates of a heading, a plot and the table under it."""
    import plotly.graph_objects as go

    figure = go.Figure(view.figure) if view is not None and view.figure else None
    return [heading_html(view, missing), gr.update(value=figure, visible=figure is not None), table_html(view, lang)]


def _changes_of(trace: RouterTrace) -> list[Intervention]:
    """What a trace says was changed. Raises UsageError when it says nonsense: it may come from anybody's file."""
    texts = trace.config.get("interventions", [])
    return [parse_intervention(text) for text in texts if isinstance(text, str)] if isinstance(texts, list) else []


def _deadline() -> threading.Event:
    """An event that is set when a request has taken as long as one may."""
    event = threading.Event()
    timer = threading.Timer(DEADLINE, event.set)
    timer.daemon = True
    timer.start()
    return event


def _working(lang: str) -> str:
    return f'<p class="xp-hint" role="status">{escape(t(lang, "exp.working"))}</p>'
