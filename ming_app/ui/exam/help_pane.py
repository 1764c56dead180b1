"""The model in the loop: explanations, hints and similar questions streamed with the expert panel, the model's own answer
beside the student's, and the way to a chat about the question. The bank's key stands over the model's opinion."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import gradio as gr

from ming_app.case_view import case_html, case_page, study
from ming_app.conversation.tree import Conversation, Turn
from ming_app.engine.types import DEADLINE, PATIENCE, SamplingParams
from ming_app.errors import MingError, PromptTooLongError, StoppedError
from ming_app.exam.bank import letters_shown
from ming_app.exam.candidate import Attempt, attempt
from ming_app.exam.question import LETTERS
from ming_app.exam.sitting import Sitting
from ming_app.ui import chat, experts, render
from ming_app.ui.answer import answer
from ming_app.ui.bilingual import labelled, valued
from ming_app.ui.chat import Session
from ming_app.ui.exam import pages, payload, tutor
from ming_app.ui.exam.room import Room
from ming_app.ui.handlers import QUEUED, QUIET, Updates
from ming_app.ui.text import refusal, t

if TYPE_CHECKING:
    from ming_app.ui.exam.tab import ExamTab

HELP_TOKENS = 400
SHUFFLES = 2


class HelpPane:
    """Builds its components inside the card's column of `tab`; `wire` connects them."""

    def __init__(self, tab: ExamTab):
        self.tab, self.words, self.do, self.session = tab, tab.words, tab.do, tab.session
        words = self.words
        with gr.Column(elem_id="ming-exam-help") as self.box:
            words(
                gr.HTML,
                lambda lang: {
                    "value": f'<div class="ea-head"><b>{t(lang, "exam.ai.title")}</b> <span class="ea-label">{t(lang, "exam.ai.warning")}</span></div>'
                },
                apply_default_css=False,
            )
            with gr.Row(elem_id="ming-exam-help-buttons"):
                self.buttons = {
                    kind: self.tab.button(f"exam.ai.{kind}", f"ming-exam-ai-{kind}") for kind in ("explain", "hint")
                }
                self.option = words(
                    gr.Dropdown,
                    labelled("exam.ai.option"),
                    choices=[],
                    interactive=True,
                    min_width=76,
                    container=False,
                    show_label=False,
                    elem_id="ming-exam-option",
                )
                self.buttons |= {
                    kind: self.tab.button(f"exam.ai.{kind}", f"ming-exam-ai-{kind}") for kind in ("why_not", "similar")
                }
                self.candidate = self.tab.button("exam.ai.answer", "ming-exam-ai-answer")
                self.compare = self.tab.button("exam.ai.case", "ming-exam-ai-case")
                self.to_chat = self.tab.button("exam.ai.chat", "ming-exam-ai-chat")
                self.stop = words(
                    gr.Button,
                    valued("exam.ai.stop"),
                    size="sm",
                    variant="stop",
                    visible=False,
                    elem_id="ming-exam-ai-stop",
                )
            self.note = gr.HTML("", apply_default_css=False, elem_id="ming-exam-help-note")
            self.text = gr.Markdown("", elem_id="ming-exam-help-text", sanitize_html=True, visible=False)
            self.case = gr.HTML("", apply_default_css=False, elem_id="ming-exam-case")
            self.print = self.tab.button("exam.ai.print", "ming-exam-ai-print", visible=False)
            with words(gr.Accordion, labelled("tab.experts"), open=False, visible=False) as self.panel_box:
                self.panel = words(
                    lambda words: experts.panel("en", "ming-exam-panel"), lambda lang: {"words": experts.words(lang)}
                )

    @property
    def parts(self) -> list[Any]:
        """Everything that `fresh` updates."""
        return [
            *self.buttons.values(),
            self.option,
            self.candidate,
            self.compare,
            self.to_chat,
            self.box,
            self.note,
            self.text,
            self.panel_box,
            self.case,
            self.print,
            self.stop,
        ]

    def fresh(self, sitting: Sitting) -> Updates:
        """For another question, or one whose key shows now: nothing said yet, and the buttons that make sense."""
        index, over = sitting.position, sitting.finished is not None
        revealed, question, order = sitting.revealed(index), sitting.questions[index], sitting.order(index)
        # what the person may not know yet is not even sent
        wrong = [(LETTERS[at], letter) for at, letter in enumerate(order) if revealed and letter not in question.answer]
        mistaken = [letter for letter in sitting.response(index).chosen if letter in {letter for _, letter in wrong}]
        chosen = next(iter([*mistaken, *(letter for _, letter in wrong)]), None)
        after = [self.buttons[kind] for kind in tutor.REVEALING] + [
            self.option,
            self.candidate,
            self.compare,
            self.to_chat,
        ]
        return {
            **{component: gr.update(visible=revealed) for component in after},
            self.option: gr.update(visible=bool(wrong), choices=wrong, value=chosen),
            self.buttons["why_not"]: gr.update(visible=bool(wrong)),
            self.buttons["hint"]: gr.update(visible=not revealed),
            self.compare: gr.update(visible=revealed and not question.kind.multiple),
            self.box: gr.update(visible=sitting.mode == "tutor" or over),
            self.note: "",
            self.text: gr.update(value="", visible=False),
            self.panel_box: gr.update(visible=False),
            self.case: "",
            self.print: gr.update(visible=False),
            self.stop: gr.update(visible=False),
        }

    def wire(self, tabs: gr.Tabs, page: list[Any], show: Callable[[Session], list[Any]]) -> None:
        session = self.session
        seen = [self.note, self.text, self.panel, self.panel_box, self.stop]
        running = [
            button.click(self.ask(kind), [session, self.option], seen, **QUEUED)
            for kind, button in self.buttons.items()
        ]
        running.append(self.candidate.click(self.let_model_answer, [session], [self.tab.card, *seen], **QUEUED))
        shown = [self.note, self.case, self.print, self.stop]
        running.append(self.compare.click(self.compare_models, [session], shown, **QUEUED))
        tab = self.tab
        running.append(
            tab.beside.click(self.sit_beside, [session], [tab.card, self.box, self.note, self.stop], **QUEUED)
        )
        saved = self.print.click(self.save_case, [session], [self.tab.panes.download], **QUIET)
        saved.success(None, [self.tab.panes.download], None, js="(file) => ming.save(file)")
        self.stop.click(self.stop_help, [session], None, **QUIET).then(None, cancels=running).then(
            lambda: gr.update(visible=False), None, [self.stop], **QUIET
        )

        def go(session: Session, agreed: str) -> list[Any]:
            moved = bool(agreed) and self.continue_in_chat(session)
            return [gr.Tabs(selected="chat") if moved else gr.skip(), *show(session), self.help_error(session)]

        agreed = "(s) => [s, ming.mayReplaceChat() ? 'yes' : '']"
        self.to_chat.click(go, [session, self.tab.changes], [tabs, *page, self.note], js=agreed, **QUIET)

    # -- the model -----------------------------------------------------------------------------------------------

    def _asked(self, session: Session, revealing: bool) -> tuple[Room, Sitting]:
        """The sitting in view, if the model may help with its question now. Raises MingError."""
        room = self.tab.room(session)
        sitting = room.sitting
        self.do.loader.ready()
        if sitting is None or (sitting.mode == "exam" and sitting.finished is None):
            raise refusal("exam.ai.not_in_mock")
        if revealing and not sitting.revealed(sitting.position):
            raise refusal("exam.ai.after")
        return room, sitting

    def ask(self, kind: str) -> Callable[[Session, str | None], Iterator[Updates]]:
        """The handler that streams the model's help of one kind. The engine is freed however it ends."""

        def ask(session: Session, option: str | None) -> Iterator[Updates]:
            lang = session.lang
            try:
                room, sitting = self._asked(session, kind in tutor.REVEALING)
            except MingError as error:
                yield {self.note: pages.told(lang, "", error)}
                return
            index = sitting.position
            question, order = sitting.questions[index], sitting.order(index)
            text = tutor.request(kind, question, order, payload.earlier_parts(sitting, index), option or order[0])
            room.helper = helper = Session(lang=lang, explorer=session.explorer)
            room.helped = place = room.place
            chat.ask(helper, text[: chat.MAX_CHARS])
            note = pages.told(lang, t(lang, "exam.ai.similar_note")) if kind == "similar" else ""
            params = SamplingParams(
                HELP_TOKENS, temperature=0.3, deadline=DEADLINE, patience=PATIENCE, visitor=session.visitor
            )

            def shown(said: str, over: bool) -> str:
                return tutor.blotted(said, question, over) if kind == "hint" else said

            with closing(answer(self.do.loader.state.engine, helper, params)) as steps:
                for _ in steps:
                    if room.place != place:  # another question is in view by now
                        return
                    yield self._help(helper, note, shown)
            # refused, or stopped before its first word, it has no turn
            said = helper.turns[-1].text if helper.turns else ""
            letter = tutor.final_letter(said) if kind in ("explain", "why_not") else ""
            right = letters_shown(order, question.answer)
            if letter and letter not in right:
                note = pages.told(
                    lang, t(lang, "exam.ai.chose_several", letter=letter) + t(lang, "exam.ai.differs", right=right)
                )
            # once more and whole: of updates that come together the page keeps the last only
            yield self._help(helper, note, shown)

        return ask

    def _help(self, helper: Session, note: str, shown: Callable[[str, bool], str]) -> Updates:
        turn = helper.turns[-1] if helper.turns and helper.turns[-1].role == "assistant" else Turn("assistant", "")
        error = pages.told(helper.lang, "", helper.error) if helper.error else ""
        status = f'<p class="ea-label" role="status">{t(helper.lang, helper.status.key, **helper.status.values)}</p>'
        return {
            self.note: error or note + status,
            self.text: gr.update(value=render.inert(shown(turn.text, bool(turn.reason))), visible=True),
            self.panel: helper.payload,
            self.panel_box: gr.update(visible=bool(helper.payload.get("key"))),
            self.stop: gr.update(visible=helper.run is not None),
        }

    def let_model_answer(self, session: Session) -> Iterator[Updates]:
        """The model answers the question beside the student: probabilities over the options, and in other orders."""
        lang = session.lang
        try:
            room, sitting = self._asked(session, True)
            index = sitting.position
            question = sitting.questions[index]
            yield {self.note: pages.told(lang, t(lang, "status.reading", seconds=0))}
            found = attempt(
                self.do.loader.state.engine, question, payload.earlier_parts(sitting, index), shuffles=SHUFFLES
            )
        except MingError as error:
            yield {self.note: pages.told(lang, "", error)}
            return
        room.attempts[question.key] = found
        if room.sitting is not sitting or sitting.position != index:
            return
        yield {
            self.tab.card: payload.card(room, lang),
            self.note: pages.told(lang, _opinion(lang, sitting, index, found)),
        }

    def sit_beside(self, session: Session) -> Iterator[Updates]:
        """The model answers the whole paper after the student, question by question; what is answered stays."""
        lang = session.lang
        try:
            room, sitting = self._asked(session, True)
            room.stop_case = cancel = threading.Event()
            total = len(sitting.questions)
            for index, question in enumerate(sitting.questions):
                if cancel.is_set():
                    raise StoppedError("Stopped.", "已停止。")
                if question.key not in room.attempts:
                    wait = pages.told(lang, t(lang, "exam.result.beside_wait", i=index + 1, n=total))
                    yield {self.box: gr.update(visible=True), self.note: wait, self.stop: gr.update(visible=True)}
                    earlier = payload.earlier_parts(sitting, index)
                    with suppress(PromptTooLongError):  # it counts as not answered
                        room.attempts[question.key] = attempt(self.do.loader.state.engine, question, earlier)
        except MingError as error:
            yield {self.note: pages.told(lang, "", error), self.stop: gr.update(visible=False)}
            return
        yield {
            self.tab.card: payload.card(room, lang),
            self.note: pages.told(lang, pages.beside(lang, sitting, room.attempts)),
            self.stop: gr.update(visible=False),
        }

    def compare_models(self, session: Session) -> Iterator[Updates]:
        """The case view: base and adapted model on the question in view."""
        lang = session.lang
        try:
            room, sitting = self._asked(session, True)
            index = sitting.position
            room.stop_case = cancel = _Left(lambda: room.sitting is not sitting or sitting.position != index)
            wait = pages.told(lang, t(lang, "exam.ai.case_wait"))
            yield {self.note: wait, self.case: "", self.stop: gr.update(visible=True)}
            earlier = payload.earlier_parts(sitting, index)
            room.case = study(self.do.loader.state.engine, sitting.questions[index], earlier, cancel=cancel)
            if room.sitting is not sitting or sitting.position != index:
                return
        except MingError as error:
            yield {self.note: pages.told(lang, "", error), self.stop: gr.update(visible=False)}
            return
        yield {
            self.note: "",
            self.case: case_html(room.case, lang),
            self.print: gr.update(visible=True),
            self.stop: gr.update(visible=False),
        }

    def save_case(self, session: Session) -> Updates:
        """The case view as a file to print."""
        room = self.tab.room(session)
        if room.case is None:
            return {self.tab.panes.download: gr.skip()}
        path = self.do.files.new() / f"ming-case-{time.strftime('%Y%m%d-%H%M%S')}.html"
        path.write_text(case_page(room.case, session.lang), encoding="utf-8")
        return {self.tab.panes.download: gr.update(value=str(path))}

    def stop_help(self, session: Session) -> None:
        room = self.tab.room(session)
        if room.helper is not None:
            chat.stop(room.helper)
        room.stop_case.set()

    def continue_in_chat(self, session: Session) -> bool:
        """Puts the question, and the help given, into the chat. Whether it could."""
        room = self.tab.room(session)
        room.error = None
        try:
            _, sitting = self._asked(session, True)
            if session.run is not None:
                raise refusal("refuse.running")
        except MingError as error:
            room.error = error
            return False
        index = sitting.position
        text = tutor.about(sitting.questions[index], sitting.order(index), payload.earlier_parts(sitting, index))
        helper = room.helper
        answered = (
            helper is not None and helper.run is None and len(helper.turns) == 2 and room.helped[:2] == room.place[:2]
        )
        chat.clear(session)
        if answered and helper is not None:
            session.talk = Conversation.of([Turn("user", text), helper.turns[-1]])
            session.talk.preset, session.talk.system = session.preset, session.own
            chat.read(session)
            chat.keep(session, *session.turns)
            session.trace, session.payload = helper.trace, helper.payload
        else:
            session.returned = text
        return True

    def help_error(self, session: Session) -> str:
        room = self.tab.room(session)
        error, room.error = room.error, None
        return pages.told(session.lang, "", error) if error is not None else ""


class _Left(threading.Event):
    """Set also once the person has gone on to something else."""

    def __init__(self, gone: Callable[[], bool]):
        super().__init__()
        self._gone = gone

    def is_set(self) -> bool:
        return super().is_set() or self._gone()


def _opinion(lang: str, sitting: Sitting, index: int, found: Attempt) -> str:
    """What the model chose, and that the key stands where they differ."""
    order = sitting.order(index)
    letters = letters_shown(order, found.choice)
    if not letters:
        return t(lang, "exam.ai.chose_none")
    if found.probabilities:
        same = "–" if found.consistency is None else f"{found.consistency:.0%}"
        said = t(lang, "exam.ai.chose", letter=letters, share=f"{found.probabilities[found.choice]:.0%}", same=same)
    else:
        said = t(lang, "exam.ai.chose_several", letter=letters)
    key = letters_shown(order, found.answer)
    return said + " " + (t(lang, "exam.ai.agrees") if found.correct else t(lang, "exam.ai.differs", right=key))
