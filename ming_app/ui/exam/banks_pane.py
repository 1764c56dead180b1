"""Banks and data of the Exam tab: files are previewed before anything is kept, banks and progress exported, progress
deleted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ming_app.errors import MingError
from ming_app.exam.formats import WRITERS, ColumnsError, Import, read_bank, write_bank
from ming_app.exam.formats.writing import ENDINGS
from ming_app.exam.progress_file import read_progress, write_progress
from ming_app.ui.assets import read
from ming_app.ui.bilingual import labelled
from ming_app.ui.chat import Session
from ming_app.ui.exam import pages
from ming_app.ui.exam.reading import Reading, chosen_options, reading_choices, reading_words
from ming_app.ui.handlers import QUIET, Updates
from ming_app.ui.text import t

if TYPE_CHECKING:
    from ming_app.ui.exam.room import Room
    from ming_app.ui.exam.tab import ExamTab


class BanksPane:
    """Two panes of `tab`: `banks` and `data` build them, `wire` connects them."""

    def __init__(self, tab: ExamTab):
        self.tab, self.words, self.do, self.session = tab, tab.words, tab.do, tab.session

    def banks(self) -> None:
        words = self.words
        words(
            gr.HTML,
            lambda lang: {"value": f'<p class="xp-hint">{t(lang, "exam.import_info")}</p>'},
            apply_default_css=False,
        )
        self.upload = words(
            gr.UploadButton, labelled("exam.import"), size="sm", elem_classes="m-quiet", elem_id="ming-exam-upload"
        )
        with gr.Column(visible=False, elem_id="ming-exam-import") as self.import_box:
            self.preview = gr.HTML("", apply_default_css=False)
            self.reading = words(
                lambda words: gr.HTML(
                    value={},
                    html_template='<div class="xi"></div>',
                    js_on_load=read("import.js"),
                    apply_default_css=False,
                    elem_id="ming-exam-reading",
                    words=words,
                ),
                lambda lang: {"words": reading_words(lang)},
            )
            self.report = self.tab.button("exam.import_report", "ming-exam-report")
            self.bank_title = words(gr.Textbox, labelled("exam.import_title"), max_lines=1, elem_id="ming-exam-title")
            self.keep = self.tab.button("exam.import_keep", "ming-exam-keep", primary=True)
        with gr.Row(elem_id="ming-exam-export-row"):
            self.export_kind = words(
                gr.Dropdown,
                labelled("exam.export"),
                choices=[
                    ("JSON lines", "jsonl"),
                    ("CSV", "csv"),
                    ("GIFT", "gift"),
                    ("Moodle XML", "moodle"),
                    ("Anki", "apkg"),
                ],
                value="jsonl",
                min_width=160,
            )
            self.export = self.tab.button("exam.export_go", "ming-exam-export")
            self.remove = self.tab.button("exam.remove", "ming-exam-remove")
        self.download = gr.DownloadButton("download", visible="hidden")

    def data(self) -> None:
        words = self.words
        self.where = gr.HTML("", apply_default_css=False)
        if self.tab.rooms.by_account and self.tab.settings.sign_in:
            gr.LoginButton(size="sm", variant="secondary", elem_id="ming-sign-in")
        with gr.Row():
            self.data_export = self.tab.button("exam.data_export", "ming-exam-data-export")
            self.data_import = words(
                gr.UploadButton,
                labelled("exam.data_import"),
                file_types=[".json"],
                size="sm",
                elem_classes="m-quiet",
                elem_id="ming-exam-data-import",
            )
            self.data_delete = self.tab.button("exam.data_delete", "ming-exam-data-delete")
        with gr.Row(visible=False) as self.sure_row:
            words(
                gr.HTML,
                lambda lang: {"value": pages.told(lang, t(lang, "exam.data_sure"))},
                apply_default_css=False,
            )
            self.data_yes = self.tab.button("exam.data_yes", "ming-exam-data-yes")

    def where_text(self, lang: str, room: Room) -> str:
        """Where this visitor's progress is kept."""
        if room.account:
            said = t(lang, "exam.data_account", user=room.account.removeprefix("hf:"))
        elif room.in_browser:
            said = t(lang, "exam.data_browser")
        else:
            said = t(lang, "exam.data_disk", path=self.tab.rooms.folder)
        return f'<p class="xp-hint">{escape(said)}</p>'

    # -- events --------------------------------------------------------------------------------------------------

    def wire(self, quick: Callable[..., Any]) -> None:
        """`quick` connects a handler that may have written progress."""
        self._wire_banks(quick)
        self._wire_data(quick)

    def _wire_banks(self, quick: Callable[..., Any]) -> None:
        session = self.session
        seen = [self.import_box, self.preview, self.reading, self.bank_title, self.keep, self.report, self.tab.message]
        waited = {**QUIET, "show_progress": "minimal"}
        self.upload.upload(self.open_file, [session, self.upload], seen, **waited)
        self.reading.select(self.reread, [session], seen, **waited)
        quick(self.keep.click, self.keep_bank, [session, self.bank_title], [*self.tab.everything[:-1], self.import_box])
        sure = "(s, name) => [s, ming.sure('remove') ? name : null]"
        quick(self.remove.click, self.remove_bank, [session, self.tab.bank], self.tab.everything[:-1], js=sure)
        for button, handler, inputs in (
            (self.report, self.save_report, [session]),
            (self.export, self.save_bank, [session, self.tab.bank, self.export_kind]),
        ):
            saved = button.click(handler, inputs, [self.download, self.tab.message], **QUIET)
            saved.success(None, [self.download], None, js="(file) => file && ming.save(file)")

    def _wire_data(self, quick: Callable[..., Any]) -> None:
        session = self.session
        saved = self.data_export.click(self.save_progress, [session], [self.download], **QUIET)
        saved.success(None, [self.download], None, js="(file) => ming.save(file)")
        quick(self.data_import.upload, self.load_progress, [session, self.data_import], self.tab.everything[:-1])
        self.data_delete.click(lambda: gr.update(visible=True), None, [self.sure_row], **QUIET)
        deleted = self.data_yes.click(self.delete_progress, [session], [*self.tab.everything, self.sure_row], **QUIET)
        deleted.then(None, None, None, js="() => ming.forget('exam')")

    # -- banks ---------------------------------------------------------------------------------------------------

    def open_file(self, session: Session, path: str | None) -> Updates:
        """Reads a file and shows what it holds; nothing is kept yet."""
        room = self.tab.room(session)
        if not path:
            return {self.tab.message: gr.skip()}
        room.reading = Reading(Path(path).name, Path(path).read_bytes())
        found = self._read(session, room.reading)
        return {**found, self.bank_title: self._free_title(room, Path(path).stem[:80])}

    def _free_title(self, room: Room, title: str) -> str:
        """A title that no kept bank has: one of the same title would be replaced."""
        taken = {name for bank in room.desk.shelf.list() for name in bank.titles.values()}
        numbered = (f"{title[:74]} ({n})" for n in range(2, 1000))
        return title if title not in taken else next((name for name in numbered if name not in taken), title)

    def reread(self, session: Session, event: gr.EventData) -> Updates:
        """Reads the file again as the person chose."""
        room = self.tab.room(session)
        if room.reading is None:
            return {self.tab.message: gr.skip()}
        try:
            room.reading.options = chosen_options(event.value)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {self.tab.message: gr.skip()}  # not what our page sends
        return self._read(session, room.reading)

    def _read(self, session: Session, reading: Reading) -> Updates:
        """Reads the file and shows what came of it; where it could not be read, the choices stay."""
        lang = session.lang
        said = "" if self.tab.rooms.on_disk else pages.told(lang, t(lang, "exam.import_browser"))
        try:
            reading.found = read_bank(reading.data, reading.name, reading.options)
        except ColumnsError as error:  # the person says which column is which
            reading.found = Import((), (), error.format, error.encoding, error.columns)
            said = pages.told(lang, "", error)
        except MingError as error:
            known = reading.found
            if known is None:
                return {self.import_box: gr.update(visible=False), self.tab.message: pages.told(lang, "", error)}
            reading.found = Import((), (), reading.options.format or known.format, known.encoding, {})
            said = pages.told(lang, "", error)
        return {**self._preview(lang, reading), self.tab.message: said}

    def _preview(self, lang: str, reading: Reading) -> Updates:
        found = reading.found
        assert found is not None
        return {
            self.import_box: gr.update(visible=True),
            self.preview: pages.import_page(lang, reading.name, found),
            self.reading: reading_choices(reading.options, found),
            self.keep: gr.update(interactive=bool(found.questions)),
            self.report: gr.update(visible=bool(found.rejected)),
        }

    def keep_bank(self, session: Session, title: str) -> Updates:
        room, lang = self.tab.room(session), session.lang
        if room.reading is None:
            return {self.tab.message: gr.skip()}
        reading = room.reading
        try:
            bank = room.desk.add_bank(title.strip() or Path(reading.name).stem, reading.questions)
        except MingError as error:
            return {self.tab.message: pages.told(lang, "", error)}
        room.reading, room.bank = None, bank.name
        said = pages.told(lang, t(lang, "exam.import_done", title=bank.title(lang), n=len(bank.questions)))
        return {**self.tab.refresh(session), self.import_box: gr.update(visible=False), self.tab.message: said}

    def remove_bank(self, session: Session, name: str | None) -> Updates:
        room, lang = self.tab.room(session), session.lang
        if not name:
            return {self.tab.message: gr.skip()}
        listed = next((bank for bank in room.desk.shelf.list() if bank.name == name), None)
        if listed is None or listed.ours:
            return {self.tab.message: pages.told(lang, t(lang, "exam.remove_ours"))}
        room.desk.remove_bank(listed.name)
        return {**self.tab.refresh(session), self.tab.message: pages.told(lang, t(lang, "exam.removed"))}

    def save_report(self, session: Session) -> Updates:
        room = self.tab.room(session)
        if room.reading is None:
            return {self.download: gr.skip()}
        path = self.do.files.new() / f"{Path(room.reading.name).stem}-rejected.csv"
        path.write_text(pages.rejected_csv(session.lang, room.reading.rejected), encoding="utf-8")
        return {self.download: gr.update(value=str(path))}

    def save_bank(self, session: Session, name: str | None, kind: str) -> Updates:
        try:
            bank = self.tab.room(session).desk.bank(name or "")
        except MingError as error:
            return {self.tab.message: pages.told(session.lang, "", error)}
        kind = kind if kind in WRITERS else "jsonl"
        path = self.do.files.new() / f"{bank.name}.{ENDINGS[kind]}"
        path.write_bytes(write_bank(bank.questions, kind, bank.title(session.lang)))
        return {self.download: gr.update(value=str(path)), self.tab.message: ""}

    # -- progress ------------------------------------------------------------------------------------------------

    def restore(self, session: Session, text: str) -> Updates:
        """Takes back what the browser kept."""
        try:
            room = self.tab.room(session)
            if not room.in_browser:
                return {self.tab.changes: gr.skip()}
            if text:
                read_progress(room.desk.store, text.encode())
                room.desk.store.take_changes()  # the browser has them
            return {self.tab.changes: json.dumps(room.desk.store.take_changes())}
        except MingError as error:
            return {self.tab.message: pages.told(session.lang, "", error)}

    def save_progress(self, session: Session) -> Updates:
        path = self.do.files.new() / f"ming-progress-{time.strftime('%Y%m%d-%H%M%S')}.json"
        path.write_bytes(write_progress(self.tab.room(session).desk.store))
        return {self.download: gr.update(value=str(path))}

    def load_progress(self, session: Session, path: str | None) -> Updates:
        lang, room = session.lang, self.tab.room(session)
        if not path:
            return {self.tab.message: gr.skip()}
        try:
            done = read_progress(room.desk.store, Path(path).read_bytes())
        except MingError as error:
            return {self.tab.message: pages.told(lang, "", error)}
        said = pages.told(lang, t(lang, "exam.data_imported", n=done.added, bad=done.refused))
        return self.tab.with_changes(session, {**self.tab.refresh(session), self.tab.message: said})

    def delete_progress(self, session: Session) -> Updates:
        lang, room = session.lang, self.tab.room(session)
        try:
            room.desk.wipe()
        except MingError as error:
            return {self.tab.message: pages.told(lang, "", error)}
        room.open, room.attempts = "", {}
        room.desk.store.take_changes()
        said = pages.told(lang, t(lang, "exam.data_deleted"))
        return {**self.tab.refresh(session), self.sure_row: gr.update(visible=False), self.tab.message: said}
