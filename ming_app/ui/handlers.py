"""Handlers of the page's events: plain functions and one generator of a Session, giving Gradio updates.

Every handler leaves the session consistent and `show` turns it into updates. A refusal goes to `session.error`, and a
gr.Error ends the chain of events. `answer` streams; however it ends, the engine is free again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any

import gradio as gr

from ming_app.engine.types import EngineInfo, SamplingParams
from ming_app.errors import MingError
from ming_app.settings import Settings
from ming_app.ui import chat, experts, render
from ming_app.ui.bilingual import Bilingual
from ming_app.ui.chat import Session
from ming_app.ui.files import TempFolder
from ming_app.ui.loader import EngineLoader
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
"""options of events that need the model: one at a time, the others wait"""
DEADLINE = 300.0  # seconds one answer may take, so that a queue always moves on


class Handlers:
    """`sampling`: names of the settings whose values `answer` gets after the session.

    `queued` tells how many requests wait and how many run; the page sets both once it is built.
    """

    def __init__(self, loader: EngineLoader, settings: Settings, words: Bilingual):
        self.loader, self.settings, self.words = loader, settings, words
        self.sampling: list[str] = []
        self.queued: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.files = TempFolder()

    @property
    def info(self) -> EngineInfo | None:
        engine = self.loader.state.engine
        return engine.info if engine is not None else None

    def watermark(self, lang: str) -> str:
        """What copied answers end with: AI label and disclaimer."""
        return t(lang, "app.watermark", model=self.info.title if self.info else "MING-MOE")

    def show(self, session: Session) -> list[Any]:
        """Updates for everything that shows the session; a returned question goes back into the box."""
        box = gr.skip()
        if session.returned is not None:
            box, session.returned = gr.update(value=session.returned), None
        busy = session.run is not None or session.status.key == "status.queued"
        buttons = [gr.update(visible=not busy), gr.update(visible=busy)]
        return [*self._view(session), box, *buttons]

    def _view(self, session: Session) -> list[Any]:
        return [
            render.messages(session.turns),
            session.payload,
            render.status(session, self.info),
            render.notices(session),
        ]

    def _admit(self, session: Session, put: Callable[[], None], text: str = "") -> list[Any]:
        """Runs `put`, which sets the question, when the engine can take it; else says in a message why not.

        `text`: a question that is not in the box; it goes there when it is refused.
        """
        try:
            self._refuse_when_closed()
            if session.question_waits and session.status.key == "status.queued":  # a new one would displace it
                raise refusal("refuse.waiting")
            put()
        except MingError as error:
            session.returned = text or None
            raise _refused(session, error) from None
        session.status = chat.Note("status.queued", {"n": sum(self.queued())})
        return self.show(session)

    def _refuse_when_closed(self) -> None:
        state = self.loader.state
        if state.engine is None:
            raise refusal("refuse.failed" if state.error else "refuse.loading")
        waiting, _ = self.queued()
        if waiting >= self.settings.max_queue:  # Gradio would refuse too, but in English only
            raise refusal("refuse.busy", n=waiting)

    def ask(self, session: Session, text: str) -> list[Any]:
        shown = self._admit(session, lambda: chat.ask(session, text or ""))
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
        """Streams the answer to the waiting question. The engine is freed however this generator ends."""
        if not session.question_waits:
            return
        same = [gr.skip()] * 3  # the box and the buttons
        try:
            params = sampling_params(dict(zip(self.sampling, sampling, strict=True)))
        except MingError as error:
            chat.refuse(session, error)
            yield [*self._view(session), *same]
            return
        with closing(chat.answer(self.loader.state.engine, session, params)) as steps:
            for _ in steps:
                yield [*self._view(session), *same]

    def settle(self, session: Session) -> list[Any]:
        """After an answer, or after one that never began (its place in the queue was lost): the box gets it back."""
        if session.question_waits:
            chat.stop(session)
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
    return SamplingParams(**numbers, seed=int(seed) if seed is not None and seed >= 0 else None, deadline=DEADLINE)


def _index(index: int | Sequence[int]) -> int:
    return index if isinstance(index, int) else index[0]


def _refused(session: Session, error: MingError) -> gr.Error:
    """Ends the chain of events. The page shows the reason beside the input, so no message pops up and none is logged."""
    session.error = error
    return gr.Error(error.message(session.lang), visible=False, print_exception=False)
