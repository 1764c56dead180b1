"""The Exam tab: layout, and events over `room.Room`. What a person does at a question goes through the card's one event
and is not queued; whatever needs the model takes its turn with the answers of the chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import gradio as gr

from ming_app.errors import MingError
from ming_app.exam.desk import ONLY, ORDERS, Choice
from ming_app.exam.sitting import MODES, PRESETS, Sitting
from ming_app.exam.statistics import result, statistics
from ming_app.exam.store import CAUSES
from ming_app.reading import whole_text
from ming_app.settings import Settings
from ming_app.ui.assets import read
from ming_app.ui.bilingual import Bilingual, Words, labelled, valued
from ming_app.ui.chat import Session
from ming_app.ui.exam import pages, payload
from ming_app.ui.exam.banks_pane import BanksPane
from ming_app.ui.exam.help_pane import HelpPane
from ming_app.ui.exam.plans import OWN, filled, own_blueprint, preset_item
from ming_app.ui.exam.room import Room, Rooms
from ming_app.ui.handlers import QUIET, Handlers, Updates
from ming_app.ui.text import day_text, duration_text, t

KEEP = "(text) => ming.keep('exam', text)"
HISTORY = 50  # finished sittings that can be opened again


def _radio_words(name: str, values: Sequence[str]) -> Words:
    return lambda lang: {
        "label": t(lang, f"exam.{name}"),
        "choices": [(t(lang, f"exam.{name}_{value}"), value) for value in values],
    }


def _like(handler: Callable[..., Updates], session: Any, changes: Any) -> Callable[..., Updates]:
    """The handler, which also empties `changes` unless it sets them: what an earlier action wrote is not kept again.

    It gives the session back as well, so that Gradio does not take a visitor who answers questions for one who has gone.
    """

    @wraps(handler)
    def run(*values: Any, **events: Any) -> Updates:
        return {session: values[0], changes: "", **handler(*values, **events)}

    return run


class ExamTab:
    """Builds its components inside the Blocks that are open; `wire` connects them."""

    def __init__(self, words: Bilingual, handlers: Handlers, session: gr.State, settings: Settings):
        self.words, self.do, self.session = words, handlers, session
        self.rooms, self.settings = Rooms(settings), settings
        self.panes = BanksPane(self)
        with gr.Column(elem_id="ming-exam"):
            self.message = gr.HTML("", apply_default_css=False, elem_id="ming-exam-message")
            with gr.Column(elem_id="ming-exam-home", elem_classes="m-card"):
                self._home()
            with gr.Column(elem_id="ming-exam-run", elem_classes="m-card", visible=False) as self.run_box:
                self._run()

    # -- layout --------------------------------------------------------------------------------------------------

    def _home(self) -> None:
        words = self.words
        words(
            gr.HTML, lambda lang: {"value": f'<p class="xp-hint">{t(lang, "exam.intro")}</p>'}, apply_default_css=False
        )
        with gr.Row(elem_id="ming-exam-bank-row"):
            self.bank = words(
                gr.Dropdown,
                labelled("exam.bank"),
                choices=[],
                interactive=True,
                elem_id="ming-exam-bank",
                min_width=260,
            )
        self.counts = gr.HTML("", apply_default_css=False, elem_id="ming-exam-counts")
        with gr.Row(visible=False, elem_id="ming-exam-unfinished") as self.unfinished_row:
            self.unfinished = words(
                gr.Dropdown, labelled("exam.unfinished"), choices=[], interactive=True, min_width=260
            )
            self.resume = self.button("exam.resume", "ming-exam-resume", primary=True)
            self.discard = self.button("exam.discard", "ming-exam-discard")
        with gr.Tabs(elem_id="ming-exam-tabs"):
            with words(gr.Tab, labelled("exam.practise"), id="practise"):
                self._practise()
            with words(gr.Tab, labelled("exam.mock"), id="mock"):
                self._mock()
            self.statistics_tab = words(gr.Tab, labelled("exam.statistics"), id="statistics")
            with self.statistics_tab:
                with gr.Row():
                    self.days = gr.Plot(show_label=False, visible=False, min_width=320)
                    self.forecast = gr.Plot(show_label=False, visible=False, min_width=320)
                self.statistics = gr.HTML("", apply_default_css=False, elem_id="ming-exam-statistics")
                with gr.Row(visible=False, elem_id="ming-exam-history") as self.history_row:
                    self.history = words(
                        gr.Dropdown, labelled("exam.history"), choices=[], interactive=True, min_width=260
                    )
                    self.review = self.button("exam.history_open", "ming-exam-history-open")
            with words(gr.Tab, labelled("exam.banks"), id="banks"):
                self.panes.banks()
            with words(gr.Tab, labelled("exam.data"), id="data"):
                self.panes.data()

    def _practise(self) -> None:
        words = self.words
        radios = {"only": ONLY, "order": ORDERS, "mode": MODES}
        self.radios = {
            name: words(gr.Radio, _radio_words(name, values), value=values[0], elem_id=f"ming-exam-{name}")
            for name, values in radios.items()
        }
        with gr.Row():
            self.tags = {
                name: words(gr.Dropdown, labelled(key), choices=[], multiselect=True, interactive=True, min_width=180)
                for name, key in (
                    ("type", "exam.types"),
                    ("subject", "exam.subjects"),
                    ("difficulty", "exam.difficulties"),
                    ("more", "exam.more_tag"),
                )
            }
            self.causes = words(
                gr.Dropdown,
                lambda lang: {
                    "label": t(lang, "exam.causes"),
                    "choices": [(t(lang, f"exam.card.cause_{cause}"), cause) for cause in CAUSES],
                },
                multiselect=True,
                interactive=True,
                min_width=180,
            )
            self.count = words(gr.Number, labelled("exam.count"), value=20, precision=0, minimum=0, min_width=140)
        with gr.Row():
            self.shuffle = words(gr.Checkbox, labelled("exam.shuffle_options"), value=True, min_width=180)
            self.partial = words(gr.Checkbox, labelled("exam.partial"), value=False, min_width=180)
        self.start = self.button("exam.start", "ming-exam-start", primary=True)

    def _mock(self) -> None:
        words = self.words
        self.preset = words(
            gr.Dropdown,
            lambda lang: {
                "label": t(lang, "exam.preset"),
                "choices": [(preset_item(lang, p), p.name) for p in PRESETS] + [(t(lang, "exam.preset_own"), OWN)],
            },
            value=PRESETS[0].name,
            elem_id="ming-exam-preset",
        )
        self.fill = gr.HTML("", apply_default_css=False, elem_id="ming-exam-fill")
        with gr.Row(visible=False) as self.own_row:
            number: dict[str, Any] = {"precision": 0, "minimum": 1, "min_width": 120}
            self.own_count = words(gr.Number, labelled("exam.own_count"), value=50, maximum=1000, **number)
            self.own_minutes = words(gr.Number, labelled("exam.own_minutes"), value=60, maximum=1000, **number)
            self.own_pass = words(gr.Number, labelled("exam.own_pass"), value=60, maximum=100, **number)
            self.own_types = words(gr.Dropdown, labelled("exam.types"), choices=[], multiselect=True, interactive=True)
            self.own_subjects = words(
                gr.Dropdown, labelled("exam.subjects"), choices=[], multiselect=True, interactive=True
            )
            self.own_pause = words(gr.Checkbox, labelled("exam.own_pause"), value=True, min_width=120)
        with gr.Row():
            self.mock_shuffle = words(gr.Checkbox, labelled("exam.shuffle_options"), value=True, min_width=180)
            self.mock_partial = words(gr.Checkbox, labelled("exam.partial"), value=False, min_width=180)
        self.start_mock = self.button("exam.start_mock", "ming-exam-start-mock", primary=True)

    def _run(self) -> None:
        words = self.words
        self.result = gr.HTML("", apply_default_css=False, elem_id="ming-exam-result")
        with gr.Row(visible=False, elem_id="ming-exam-after") as self.after_row:
            self.again = self.button("exam.result.again", "ming-exam-again")
            self.beside = self.button("exam.result.beside", "ming-exam-beside")
            self.home = self.button("exam.result.home", "ming-exam-back", primary=True)
        self.card = words(
            lambda words: gr.HTML(
                value={"open": False},
                html_template=read("exam.html"),
                js_on_load=read("exam.js"),
                apply_default_css=False,
                elem_id="ming-exam-card",
                words=words,
            ),
            lambda lang: {"words": payload.card_words(lang)},
        )
        self.help = HelpPane(self)

    def button(self, key: str, elem_id: str, primary: bool = False, visible: bool = True) -> gr.Button:
        return self.words(
            gr.Button,
            valued(key),
            size="sm",
            elem_id=elem_id,
            visible=visible,
            **({"variant": "primary"} if primary else {"elem_classes": "m-quiet"}),
        )

    # -- events --------------------------------------------------------------------------------------------------

    def wire(self, tabs: gr.Tabs, tab: gr.Tab, page: list[Any], show: Callable[[Session], list[Any]]) -> None:
        """Connects the events; `tab` among `tabs` shows all this, `page` are the chat's components that `show` updates."""
        session = self.session
        self.changes = gr.Textbox("", visible="hidden", elem_id="ming-exam-changes")
        choices = [
            self.bank,
            self.unfinished_row,
            self.unfinished,
            *self.tags.values(),
            self.own_types,
            self.own_subjects,
        ]
        homes = [*choices, self.panes.where, self.counts, self.fill, self.history_row, self.history, self.message]
        runs = [
            self.card,
            self.run_box,
            self.result,
            self.after_row,
            *self.help.parts,
        ]
        everything = [*homes, *runs, self.changes]
        self.everything = everything

        def quick(
            event: Any, handler: Callable[..., Updates], inputs: list[Any], outputs: list[Any], **more: Any
        ) -> Any:
            shown = list(dict.fromkeys([*outputs, session, self.changes]))
            done = event(_like(handler, session, self.changes), inputs, shown, **{**QUIET, **more})
            if not self.rooms.on_disk:
                done.then(None, [self.changes], None, js=KEEP)
            return done

        quick(tab.select, self.arrive, [session], everything)
        quick(self.bank.input, self.choose_bank, [session, self.bank], everything)
        quick(self.card.select, self.act, [session], everything, trigger_mode="multiple")
        practised = [
            session,
            self.bank,
            *self.radios.values(),
            *self.tags.values(),
            self.causes,
            self.count,
            self.shuffle,
            self.partial,
        ]
        quick(self.start.click, self.practise, practised, everything)
        own = [self.own_count, self.own_minutes, self.own_pass, self.own_types, self.own_subjects, self.own_pause]
        mocked = [session, self.bank, self.preset, self.mock_shuffle, self.mock_partial, *own]
        quick(self.start_mock.click, self.begin_mock, mocked, everything)
        self.preset.input(self.choose_preset, [session, self.preset], [self.own_row, self.fill], **QUIET)
        quick(self.resume.click, self.go_on, [session, self.unfinished], everything)
        sure = "(s, name) => [s, ming.sure('discard') ? name : null]"
        quick(self.discard.click, self.drop, [session, self.unfinished], everything, js=sure)
        quick(self.review.click, self.go_on, [session, self.history], everything)
        quick(self.again.click, self.repeat_wrong, [session], everything)
        quick(self.home.click, self.back, [session], everything)
        drawn = [self.statistics, self.days, self.forecast]
        self.statistics_tab.select(self.show_statistics, [session], drawn, **QUIET)
        self.panes.wire(quick)
        self.help.wire(tabs, page, show)

    # -- what is shown -------------------------------------------------------------------------------------------

    def wire_arrival(self, arrived: Any) -> None:
        """After the page was opened, and it is known who opened it: the browser's progress comes back."""
        if not self.rooms.on_disk:
            kept = arrived.then(
                self.panes.restore,
                [self.session, self.changes],
                [self.message, self.changes],
                js="(s) => [s, ming.kept('exam')]",
                **QUIET,
            )
            kept.then(None, [self.changes], None, js=KEEP)

    def room(self, session: Session) -> Room:
        with self.rooms.lock:
            if session.exam is None:
                session.exam = self.rooms.new(session.account)
            return session.exam

    def arrive(self, session: Session) -> Updates:
        """The tab was opened: a question in view stays as it is, with what the model said about it."""
        try:
            room = self.room(session)
            if room.open and room.shown == room.place:
                return {self.card: payload.card(room, session.lang)}
        except MingError as error:
            return {self.message: pages.told(session.lang, "", error)}
        return self.refresh(session)

    def refresh(self, session: Session) -> Updates:
        """Everything as it stands."""
        try:
            room = self.room(session)
            if room.desk.store.notice is not None:  # the file was damaged: said once, to whoever comes first
                error, room.desk.store.notice = room.desk.store.notice, None
                return {
                    **self._home_now(session),
                    **self._card_now(session),
                    self.message: pages.told(session.lang, "", error),
                }
            return {**self._home_now(session), **self._card_now(session)}
        except MingError as error:
            return {self.message: pages.told(session.lang, "", error)}

    def _home_now(self, session: Session) -> Updates:
        room, lang = self.room(session), session.lang
        listed = room.desk.shelf.list()
        names = [bank.name for bank in listed]
        if room.bank not in names:
            room.bank = next((bank.name for bank in listed if bank.name.endswith(lang)), names[0] if names else "")
        choices = [(bank.titles.get(lang) or bank.name, bank.name) for bank in listed]
        found: Updates = {self.bank: gr.update(choices=choices, value=room.bank or None), self.message: ""}
        found[self.panes.where] = self.panes.where_text(lang, room)
        if room.bank:
            found |= self._bank_now(room, lang)
        waiting = room.desk.unfinished()
        items = [(self._unfinished_item(session, room, sitting), sitting.id) for sitting in waiting]
        past = self._history(session, room)
        found[self.history_row] = gr.update(visible=bool(past))
        found[self.history] = gr.update(choices=past, value=past[0][1] if past else None)
        found[self.unfinished_row] = gr.update(visible=bool(items))
        found[self.unfinished] = gr.update(choices=items, value=items[0][1] if items else None)
        return found

    def _bank_now(self, room: Room, lang: str) -> Updates:
        desk = room.desk
        bank = desk.bank(room.bank)
        counts = {"n": len(bank.questions)} | {
            name: sum(key in bank.places for key in keys)
            for name, keys in (
                ("seen", desk.store.weakness()),
                ("due", desk.store.due()),
                ("wrong", desk.store.wrong()),
                ("flagged", desk.store.flagged()),
            )
        }

        def choices(tag: str) -> list[tuple[str, str]]:
            return [(f"{pages.name_of(lang, tag, value)} ({n})", value) for value, n in bank.values(tag)]

        more = [
            (f"{value} ({n})", f"{tag}={value}")
            for tag in bank.tags
            if tag not in ("subject", "difficulty")
            for value, n in bank.values(tag)[:200]
        ]
        lists = {tag: choices(tag) for tag in ("type", "subject", "difficulty")} | {"more": more}
        # filters that were set stay for as long as the bank does
        unset: dict[str, Any] = {} if room.filtered == (bank.name, lang) else {"value": []}
        room.filtered = (bank.name, lang)
        found: Updates = {
            self.tags[tag]: gr.update(choices=values, visible=bool(values), **unset) for tag, values in lists.items()
        }
        found |= {
            self.own_types: gr.update(choices=lists["type"], **unset),
            self.own_subjects: gr.update(choices=lists["subject"], **unset),
            self.counts: f'<p class="xp-hint">{t(lang, "exam.counts", **counts)}</p>',
            self.fill: filled(lang, bank, room.preset),
        }
        return found

    def _unfinished_item(self, session: Session, room: Room, sitting: Sitting) -> str:
        lang = session.lang
        counts = {"done": sitting.answered(), "n": len(sitting.questions)}
        said = t(
            lang,
            "exam.unfinished_item",
            title=room.title(sitting, lang),
            when=day_text(sitting.started, session.east),
            **counts,
        )
        left = sitting.remaining(room.desk.store.now())
        return said if left is None else f"{said} · {t(lang, 'exam.unfinished_left', left=duration_text(lang, left))}"

    def _history(self, session: Session, room: Room) -> list[tuple[str, str]]:
        """Finished sittings, newest first; those whose questions are gone are left out."""
        found, lang = [], session.lang
        for row in room.desk.store.sittings(finished=True)[:HISTORY]:
            try:
                sitting = room.desk.sitting(row["id"])
            except MingError:
                continue
            came = result(sitting)
            if came.total:
                title = room.title(sitting, lang)
                item = {
                    "when": day_text(sitting.started, session.east),
                    "title": title,
                    "right": came.right,
                    "total": came.total,
                }
                found.append((t(lang, "exam.history_item", **item), sitting.id))
        return found

    def _card_now(self, session: Session) -> Updates:
        """The card and what stands around it."""
        room, lang = self.room(session), session.lang
        sitting, room.shown = room.sitting, room.place
        found: Updates = {self.card: payload.card(room, lang), self.run_box: gr.update(visible=sitting is not None)}
        if sitting is None:
            return found
        over = sitting.finished is not None
        found[self.result] = (
            pages.result_page(lang, room.title(sitting, lang), sitting, result(sitting)) if over else ""
        )
        found[self.after_row] = gr.update(visible=over)
        found |= self.help.fresh(sitting)
        return found

    def with_changes(self, session: Session, found: Updates) -> Updates:
        """The updates, and what the browser has to keep."""
        room = self.room(session)
        if room.in_browser:
            found[self.changes] = json.dumps(room.desk.store.take_changes(), ensure_ascii=False)
        return found

    # -- practising ----------------------------------------------------------------------------------------------

    def act(self, session: Session, event: gr.EventData) -> Updates:
        """One action of the card. Only what changed is sent back."""
        room = self.room(session)
        try:
            short = isinstance(event.value, str) and len(event.value) < 10_000
            said = whole_text(json.loads(event.value)) if short else None
        except (ValueError, RecursionError):
            said = None
        try:
            room.act(said)
        except MingError as error:
            room.error = error
        room.seen(said)
        found: Updates
        try:
            place = room.place
        except MingError as error:  # the sitting or its bank is gone
            room.open = ""
            return {
                **self._home_now(session),
                **self._card_now(session),
                self.message: pages.told(session.lang, "", error),
            }
        if not room.open:
            found = {**self._home_now(session), **self._card_now(session)}
        elif room.shown == place:
            found = {self.card: payload.card(room, session.lang)}
        else:
            found = self._card_now(session)
        room.notice = ""
        return self.with_changes(session, found)

    def _begun(self, session: Session, begin: Callable[[Room], None]) -> Updates:
        """Begins or resumes a sitting, or says why not."""
        room = self.room(session)
        try:
            room.error, room.notice = None, ""
            begin(room)
            found = self._card_now(session)
        except MingError as error:
            return {self.message: pages.told(session.lang, "", error)}
        room.notice = ""
        return self.with_changes(session, {**found, self.message: ""})

    def choose_bank(self, session: Session, name: str | None) -> Updates:
        room = self.room(session)
        room.bank = name or ""
        return self.refresh(session)

    def choose_preset(self, session: Session, name: str) -> Updates:
        room = self.room(session)
        room.preset = name
        shown: Updates = {self.own_row: gr.update(visible=name == OWN)}
        if room.bank:
            shown[self.fill] = filled(session.lang, room.desk.bank(room.bank), name)
        return shown

    def practise(self, session: Session, bank: str | None, only: str, order: str, mode: str, *rest: Any) -> Updates:
        *tags, causes, count, shuffle, partial = rest
        wanted: dict[str, list[str]] = {}
        for name, values in zip(self.tags, tags, strict=True):
            for value in values or []:
                tag, _, word = value.partition("=") if name == "more" else (name, "", value)
                wanted.setdefault(tag, []).append(word)
        choice = Choice(
            only=only,
            order=order,
            tags=wanted,
            count=int(count or 0),
            causes=causes or (),
            mode=mode,
            shuffle_options=bool(shuffle),
            partial=bool(partial),
        )
        return self._begun(session, lambda room: room.practise(bank or "", choice))

    def begin_mock(
        self, session: Session, bank: str | None, preset: str, shuffle: bool, partial: bool, *own: Any
    ) -> Updates:
        plan = next((p for p in PRESETS if p.name == preset), None) or own_blueprint(*own)

        def begin(room: Room) -> None:
            sitting, drawn = room.desk.mock(bank or "", plan, shuffle_options=bool(shuffle), partial=bool(partial))
            room.open = sitting.id
            room.notice = pages.short_notice(session.lang, drawn)

        return self._begun(session, begin)

    def go_on(self, session: Session, name: str | None) -> Updates:
        def begin(room: Room) -> None:
            room.open = room.desk.come_back(name or "").id

        return self._begun(session, begin)

    def drop(self, session: Session, name: str | None) -> Updates:
        room = self.room(session)
        if name:
            room.desk.drop(name)
        return self.with_changes(session, self.refresh(session))

    def repeat_wrong(self, session: Session) -> Updates:
        return self._begun(session, Room.repeat_wrong)

    def back(self, session: Session) -> Updates:
        self.room(session).open = ""
        return self.refresh(session)

    def show_statistics(self, session: Session) -> Updates:
        found, lang = statistics(self.room(session).desk.store, session.east), session.lang
        some = bool(found.total.total)
        return {
            self.statistics: pages.statistics_page(lang, found),
            self.days: gr.update(value=pages.days_figure(lang, found) if some else None, visible=some),
            self.forecast: gr.update(value=pages.forecast_figure(lang, found) if some else None, visible=some),
        }
