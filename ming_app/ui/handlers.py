"""Handlers of the page's events: plain functions and one generator of a Session, giving Gradio updates.

Every handler leaves the session consistent and `show` turns it into updates. A refusal goes to `session.error`, and a
gr.Error ends the chain of events. `answer` streams; however it ends, the engine is free again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from typing import Any

import gradio as gr

from ming_app.conversation.presets import MAX_SYSTEM, OWN, chosen, system_of
from ming_app.engine.types import DEADLINE, PATIENCE, EngineInfo, SamplingParams
from ming_app.errors import MingError
from ming_app.settings import Settings
from ming_app.ui import chat, experts, render
from ming_app.ui.answer import answer, refuse
from ming_app.ui.bilingual import Bilingual
from ming_app.ui.chat import Session
from ming_app.ui.files import TempFolder
from ming_app.ui.loader import EngineLoader
from ming_app.ui.talks import Talks, begin_consultation
from ming_app.ui.text import refusal, t

Updates = dict[Any, Any]
"""component -> its update"""
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""options of events that are quick"""
QUEUED: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "show_progress": "hidden",
    "api_visibility": "private",
}
"""options of events that need the model; the engine lets `settings.streams` of them run at a time, and bounds who waits"""
CUT = ("length", "cancelled", "deadline", "closing")
"""how an answer ends that can be gone on with; the others the model has ended itself"""


class Handlers:
    """`sampling`: names of the settings whose values `answer` gets after the session.

    The page sets it once it is built.
    """

    def __init__(self, loader: EngineLoader, settings: Settings, words: Bilingual):
        self.loader, self.settings, self.words = loader, settings, words
        self.sampling: list[str] = []
        self.files = TempFolder()
        self.talks = Talks(settings, self.files)

    @property
    def info(self) -> EngineInfo | None:
        engine = self.loader.state.engine
        return engine.info if engine is not None else None

    def load(self) -> tuple[int, int]:
        """(answers that are being written, requests that wait for their turn)."""
        engine = self.loader.state.engine
        return engine.load_now() if engine is not None else (0, 0)

    def watermark(self, lang: str) -> str:
        """What copied answers end with: AI label and disclaimer."""
        return t(lang, "app.watermark", model=self.info.title if self.info else "MING-MOE")

    def show(self, session: Session) -> list[Any]:
        """Updates for everything that shows the session (ChatTab.page); a returned question goes back into the box."""
        box = gr.skip()
        if session.returned is not None:
            box, session.returned = gr.update(value=session.returned), None
        busy = session.run is not None or session.status.key == "status.queued"
        turns = session.turns
        can_go_on = not busy and bool(turns) and turns[-1].reason in CUT and session.talk.mode == "chat"
        summary = session.talk.summary if session.talk.mode == "consult" else ""
        messages, *rest = self._view(session)
        return [
            gr.update(value=messages, feedback_value=render.ratings(session)),
            *rest,
            box,
            gr.update(visible=not busy),
            gr.update(visible=busy),
            render.alert_banner(session, self.settings.region),
            render.marks(session),
            gr.update(visible=can_go_on and bool(turns[-1].text.strip())),
            gr.update(value=session.talk.mode),
            gr.update(visible=bool(summary) and not busy),
            summary,
            self.talks.payload(session),
            self.talks.kept(session),
            gr.update(value=chosen(session.talk)),
            gr.update(value=session.talk.system, visible=session.talk.preset == OWN),
            session,  # so that Gradio does not take somebody who writes for one who has gone
        ]

    def _view(self, session: Session) -> list[Any]:
        return [
            render.messages(session.turns),
            session.payload,
            render.status(session, self.info),
            render.notices(session),
        ]

    def _admit(self, session: Session, put: Callable[[], None], text: str = "", *, boxed: str = "") -> list[Any]:
        """Runs `put`, which sets the question, when the engine can take it; else says in a message why not, and warns all the
        same of an emergency.

        `text`: a question that is not in the box; it goes there when it is refused. `boxed`: one that stands there.
        """
        if session.store is None:  # Gradio forgot a visitor whose computer slept
            self.talks.enter(session)
        try:
            self._refuse_when_closed()
            if session.question_waits and session.status.key == "status.queued":  # a new one would displace it
                raise refusal("refuse.waiting")
            put()
        except MingError as error:
            session.returned = text or None
            if text or boxed:
                chat.look(session, (text or boxed)[: chat.MAX_CHARS])
            raise _refused(session, error) from None
        session.status = chat.Note("status.queued")
        return self.show(session)

    def _refuse_when_closed(self) -> None:
        state = self.loader.state
        if state.engine is None:
            raise refusal("refuse.failed" if state.error else "refuse.loading")
        _, waiting = self.load()
        if (
            waiting >= self.settings.max_queue
        ):  # the engine would refuse too, when the question is part of the page already
            raise refusal("refuse.busy", n=waiting, seconds=round(state.engine.expected_wait()))

    def ask(self, session: Session, text: str) -> list[Any]:
        shown = self._admit(session, lambda: chat.ask(session, text or ""), boxed=text or "")
        shown[4] = gr.update(value="")
        return shown

    def ask_example(self, session: Session, event: gr.SelectData) -> list[Any]:
        text = chat.flatten(event.value)
        return self._admit(session, lambda: chat.ask(session, text), text)

    def edit(self, session: Session, event: gr.EditData) -> list[Any]:
        text = render.restore(chat.flatten(event.value))
        return self._admit(session, lambda: chat.edit_question(session, _index(event.index), text), text)

    def retry(self, session: Session, event: gr.RetryData) -> list[Any]:
        return self._admit(session, lambda: chat.ask_again(session, _index(event.index)))

    def answer(self, session: Session, *sampling: Any) -> Iterator[list[Any]]:
        """Streams the answer to the waiting question into ChatTab.streamed. The engine is freed however this generator ends."""
        if not session.question_waits or session.status.key != "status.queued":  # what waited was taken back
            return
        try:
            params = sampling_params(dict(zip(self.sampling, sampling, strict=True)))
        except MingError as error:
            refuse(session, error)
            yield self._streamed(session)
            return
        params = replace(params, visitor=session.visitor)
        system = system_of(session.talk, session.lang)
        with closing(answer(self.loader.state.engine, session, params, system=system)) as steps:
            for _ in steps:
                yield self._streamed(session)

    def _streamed(self, session: Session) -> list[Any]:
        """What changes while an answer is written (ChatTab.streamed); the warning stays."""
        return [*self._view(session), render.alert_banner(session, self.settings.region)]

    def settle(self, session: Session) -> list[Any]:
        """After an answer, or after one that never began (its place in the queue was lost): the box gets it back."""
        if session.question_waits:
            chat.stop(session)
        *shown, _system, _own, last = self.show(session)
        return [*shown, gr.skip(), gr.skip(), last]  # the role is as it was, and somebody may be writing one

    def go_on(self, session: Session) -> list[Any]:
        """The last answer is to be continued."""
        return self._admit(session, lambda: chat.go_on(session))

    def explain(self, session: Session, summary: str) -> list[Any]:
        """The explanation of a consultation, over the summary as the person left it."""
        return self._admit(session, lambda: chat.explain(session, summary or ""))

    def correct(self, session: Session, summary: str) -> Any:
        """The person changes the summary of a consultation. Gives what the browser has to keep."""
        if session.talk.mode == "consult" and session.talk.summary and summary and summary.strip():
            session.talk.summary = summary[: chat.MAX_CHARS]
            chat.keep(session)
        return self.talks.kept(session)

    def choose_mode(self, session: Session, mode: str) -> None:
        begin_consultation(session, mode == "consult")

    def tell(self, session: Session, system: str, own: str, starting: str) -> Any:
        """What the model is told first, and the words its answers begin with."""
        session.talk.preset, session.talk.system = str(system or "")[:40], (own or "")[:MAX_SYSTEM]
        session.preset, session.own = session.talk.preset, session.talk.system
        session.starting = (starting or "")[:200]
        return gr.update(visible=system == OWN)

    def act(self, session: Session, event: gr.EventData) -> list[Any]:
        """One event of the list of conversations."""
        file = None
        try:
            file = self.talks.act(session, event.value)
        except MingError as error:
            session.error = error
        return [*self.show(session), gr.update(value=file)]

    def load_file(self, session: Session, path: str | None) -> list[Any]:
        """Conversations from an exported file."""
        try:
            if path:
                session.error = None
                session.notices = (chat.Note("talk.imported", {"n": self.talks.load_file(session, path)}),)
        except MingError as error:
            session.error = error
        return self.show(session)

    def show_branch(self, session: Session, asked: str) -> list[Any]:
        """Another version of a message; `asked`: [index, step] as JSON."""
        try:
            index, step = json.loads(asked or "")
            if isinstance(index, int) and step in (-1, 1):
                chat.show_branch(session, index, step)
        except MingError as error:
            session.error = error
        except (ValueError, TypeError, RecursionError):
            pass  # not what our page sends
        return self.show(session)

    def rate(self, session: Session, event: gr.LikeData) -> list[Any]:
        """Feedback on an answer: liked, not liked, or the reason why not."""
        liked = event.liked
        reason = "" if isinstance(liked, bool) or liked is None else str(liked)[:60]
        rating = 0 if liked is None or liked == "" else 1 if liked is True or liked == "Like" else -1
        chat.rate(session, _index(event.index), rating, "" if reason in ("Like", "Dislike") else reason)
        return self.show(session)

    def save_note(self, session: Session, summary: str) -> Any:
        """The summary of a consultation as a file."""
        session.talk.summary = (summary or session.talk.summary)[: chat.MAX_CHARS]
        chat.keep(session)
        return gr.update(value=self.talks.act(session, json.dumps({"do": "export", "value": "note"})))

    def restore(self, session: Session, kept: str, last: str) -> list[Any]:
        """A page was opened, and it is known who opened it: their conversations, and the one that was in view."""
        self.talks.restore(session, kept or "", last or "")
        return self.show(session)

    def save(self, kind: str) -> Callable[[Session], Any]:
        """The handler that writes the routing record as `kind` and gives the file to the download button."""

        def save(session: Session) -> Any:
            try:
                if session.trace is None:
                    raise refusal("refuse.no_trace")
                return gr.update(value=str(experts.dated_record(session.trace, kind, self.files.new())))
            except MingError as error:
                raise _refused(session, error) from None

        return save

    def arrive(
        self,
        session: Session,
        lang: str,
        theme: str,
        east: float,
        request: gr.Request,
        profile: gr.OAuthProfile | None,
    ) -> list[Any]:
        """A page was opened: language and appearance as the browser remembers them, its clock against UTC, and who has
        signed in (with a Hugging Face account on a Space, or as the server's own users do).

        The session is among the outputs so that Gradio forgets it an hour after the page was closed.
        """
        session.visitor = request.session_hash or ""
        session.account = f"hf:{profile.username}" if profile is not None else request.username or ""
        session.east = max(-86_400.0, min(86_400.0, float(east or 0)))
        return [session, gr.update(value=lang), gr.update(value=theme), *self.reword(session, lang)]

    def reword(self, session: Session, lang: str) -> list[Any]:
        """The whole page in another language."""
        session.lang = "zh" if lang == "zh" else "en"
        lang = session.lang
        shown = [
            render.badge(lang, self.info),
            render.loading(lang, self.loader.state),
            render.status(session, self.info),
            render.notices(session),
        ]
        return [*self.words.updates(lang), *shown]

    def look(self, session: Session) -> list[Any]:
        """How far loading is; the timer stops when it ended."""
        state, lang = self.loader.state, session.lang
        if state.engine is not None and session.status.key in ("status.loading", "status.failed"):
            session.status = chat.Note("status.idle")
        elif state.error is not None and session.status.key in ("status.loading", "status.idle"):
            session.status = chat.Note("status.failed")
        elif state.busy and session.run is None:
            session.status = chat.Note("status.loading")
        named = gr.skip() if state.busy else gr.update(watermark=self.watermark(lang))
        return [
            render.loading(lang, state),
            gr.update(visible=state.error is not None),
            render.badge(lang, self.info),
            render.status(session, self.info),
            named,
            gr.update(interactive=state.engine is not None),
            gr.update(active=state.busy),
        ]

    def reload(self, session: Session) -> list[Any]:
        """Loads the engine again after an error."""
        self.loader.start()
        return self.look(session)


def sampling_params(values: dict[str, Any]) -> SamplingParams:
    """SamplingParams from the page's settings (numbers come as int or float). Raises UsageError out of range."""
    whole = {f.name for f in fields(SamplingParams) if "int" in str(f.type)}
    numbers: dict[str, Any] = {n: int(v) if n in whole else float(v) for n, v in values.items() if n != "seed"}
    seed = values.get("seed")
    return SamplingParams(
        **numbers, seed=int(seed) if seed is not None and seed >= 0 else None, deadline=DEADLINE, patience=PATIENCE
    )


def _index(index: int | Sequence[int]) -> int:
    return index if isinstance(index, int) else index[0]


def _refused(session: Session, error: MingError) -> gr.Error:
    """Ends the chain of events. The page shows the reason beside the input, so no message pops up and none is logged."""
    session.error = error
    return gr.Error(error.message(session.lang), visible=False, print_exception=False)
