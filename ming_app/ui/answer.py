"""An answer as a plain generator over an Engine: what the model is asked, and how its words reach the session. No gradio.

In a guided consultation the model words the next question, or explains; what stands on the page is checked first.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

from ming_app.conversation import consult
from ming_app.conversation.tree import Turn
from ming_app.engine.types import EngineInfo, Event, Finish, Message, Queued, SamplingParams, Start, Token
from ming_app.errors import MingError, UsageError
from ming_app.router.payload import LivePayload, empty_payload, trace_payload
from ming_app.safety.output import check_answer, loop_start, sends_to_emergency, without_doses
from ming_app.safety.red_flags import danger
from ming_app.ui.chat import Meter, Note, Run, Session, keep, take_back
from ming_app.ui.pump import Pump, Streams
from ming_app.ui.text import refusal

logger = logging.getLogger(__name__)

TEXT_SECONDS = 0.1
PANEL_SECONDS = 0.3
PATIENCE = 0.25
URGED = 0.35
"""score of a conversation (safety.score) from which an answer that sends to emergency care raises the warning too"""


def answer(
    engine: Streams,
    session: Session,
    params: SamplingParams,
    *,
    system: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> Generator[None, None, None]:
    """Answers the question at the end of `session`, or goes on with its last answer; yields after each visible change, the
    last one complete. `system`: what the model is told first; "" leaves its own default.

    The text changes about 10 times a second, the expert panel 3 times. A refusal by the engine (MingError) is not
    raised: it goes to `session.error`, and the question to `session.returned`.
    """
    plan = _plan(session, params, system)
    if plan.said:  # nothing for the model
        keep(session, session.talk.add(Turn("assistant", plan.said, reason=plan.reason)))
        session.status = Note("status.done")
        yield
        return
    run = session.run = Run()
    writer = _Writer(session, engine.info, plan, clock)
    pump: Pump | None = None
    try:
        session.status = Note("status.reading", {"seconds": 0})
        yield
        for part in plan.parts:
            writer.begin_part(part)
            pump = Pump(engine, part.messages, plan.params, run.stop)
            for event in pump.events(PATIENCE):
                if writer.take(event):
                    yield
            if writer.ended:  # closing the pump of a part would stop the parts after it too
                break
    except Exception as error:
        if not isinstance(error, MingError):  # a bug; the log names it without the person's words
            logger.error(
                "answering failed: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
            )
            error = refusal("refuse.unexpected", kind=type(error).__name__)
        refuse(session, error)
        yield
    finally:
        if pump is not None:
            pump.close()
        session.run = None
        writer.drop_wordless()
        session.continuing = False
        try:
            keep(session, *writer.written)
        finally:
            run.done.set()


@dataclass(frozen=True)
class _Part:
    """One request to the model. `head` stands before its words."""

    messages: list[Message]
    head: str = ""


@dataclass(frozen=True)
class _Plan:
    """How the waiting question is answered: by the model, in one part or several, whose words `shown` turns into what stands
    on the page (the second argument: whether they are complete), or, for `said`, without it."""

    parts: tuple[_Part, ...] = ()
    params: SamplingParams = SamplingParams()
    shown: Callable[[str, bool], str] = lambda text, _over: text
    cut: str = "notice.length"
    """what is said where the model used up its tokens; "" for nothing"""
    said: str = ""
    reason: str = "stop"
    """of an answer without the model; READY where a consultation's summary stands"""


READY = "ready"


def _plan(session: Session, params: SamplingParams, system: str) -> _Plan:
    turns = session.turns
    if session.talk.mode == "consult":
        return _consultation(session, params)
    messages = [Message("system", system)] if system else []
    messages += [Message(turn.role, turn.text) for turn in turns]
    if session.starting and not session.continuing:
        messages.append(Message("assistant", session.starting))
    return _Plan((_Part(messages),), params)


def _consultation(session: Session, params: SamplingParams) -> _Plan:
    """The next question, the summary when all are answered, the explanation once the person asked for it."""
    talk, turns, lang = session.talk, session.turns, session.lang
    step = consult.pending(turns)
    if turns[-1].role == "user" and consult.asks_for_drug(turns[-1].text):
        step = consult.pending(turns[:-1])
        again = f"\n\n{step.asks[lang]}" if step is not None else ""
        return _Plan(said=consult.word("order", lang) + again, reason=consult.ORDER)
    if step is not None:
        asked = replace(
            params,
            max_new_tokens=consult.QUESTION.max_new_tokens,
            temperature=consult.QUESTION.temperature,
        )
        return _Plan(
            (_Part(consult.question_messages(turns, step, lang)),),
            asked,
            lambda text, over: consult.worded(text, step, lang) if over else "",
            cut="",  # it stands there as a whole question all the same
        )
    if not any(turn.reason == READY for turn in turns):
        talk.summary = consult.compose(turns, lang)
        return _Plan(said=consult.word("ready", lang), reason=READY)
    since = max((at for at, turn in enumerate(turns) if turn.reason == READY), default=len(turns) - 2)
    later = turns[since + 2 :]  # after the request to explain
    if later:  # a question after the explanation
        told = consult.explain_messages(talk.summary, lang)
        parts = [_Part([*told, *(Message(turn.role, turn.text) for turn in later)])]
    else:
        parts = [_Part(*section) for section in consult.sections(talk.summary, lang)]

    def shown(text: str, over: bool) -> str:
        ends = [text.rfind(sign) for sign in "。！？!?\n"] + [text.rfind(". ")]
        return without_doses(text if over else text[: max(ends) + 1], lang)

    asked = params if later else replace(params, max_new_tokens=consult.SECTION_TOKENS)
    return _Plan(tuple(parts), asked, shown, cut="notice.cut")


class _Writer:
    """Applies engine events to the session and says when enough changed to be shown."""

    def __init__(self, session: Session, info: EngineInfo, plan: _Plan, clock: Callable[[], float]):
        self.session, self.clock, self.num_experts, self.model = session, clock, info.num_experts, info.title
        self.as_shown, self.parts, self.cut, self.talk = plan.shown, list(plan.parts), plan.cut, session.talk
        self.ended = False
        self.begin = self.shown = self.drawn = clock()
        self.first = 0.0
        self.key = uuid.uuid4().hex[:12]
        self.live: LivePayload | None = None
        going_on = session.continuing
        self.turn = (
            session.turns[-1]
            if going_on
            else Turn("assistant", session.starting if session.talk.mode == "chat" else "")
        )
        self.raw = self.turn.text
        self.added = going_on
        self.looped = self.waiting = False
        self.new_tokens = self.prompt_tokens = 0

    def begin_part(self, part: _Part) -> None:
        """The model's words from now on follow `part.head`."""
        self.part = self.parts.pop(0)
        self.raw += ("\n\n" if self.raw and part.head else "") + part.head

    def drop_wordless(self) -> None:
        """An answer that was cut before its first word is none: its question waits again, for the box to get it back."""
        session = self.session
        if not self.added or session.continuing or self.turn.text.strip() or self.turn.reason == "stop":
            return
        if session.talk is self.talk and session.turns and session.turns[-1] is self.turn:
            take_back(session)
            self.added = False

    @property
    def written(self) -> list[Turn]:
        """The answer, once it has begun, and its question."""
        return self.session.turns[-2:] if self.added else []

    def take(self, event: Event | None) -> bool:
        """Applies one event (None: time passed). True when the page should be updated now."""
        if self.session.talk is not self.talk:
            # another conversation is in view, and this answer could not be stopped in time
            self.ended, self.added = True, False
            return False
        match event:
            case Queued():
                self.waiting = event.seconds > 0
                waits = {"n": event.before + 1, "seconds": round(event.seconds)}
                if self.waiting:
                    self.session.status = Note("status.turn", waits)
                else:
                    self.begin = self.clock()
                    self.session.status = Note("status.reading", {"seconds": 0})
                return True
            case Start():
                self._start(event)
                return True
            case Token():
                self._token(event)
            case Finish():
                self._finish(event)
                return True
            case None if self.waiting:
                return self._due(1.0)  # a reader who has gone is only noticed when something is sent
            case None if not self.prompt_tokens:
                self.session.status = Note("status.reading", {"seconds": int(self.clock() - self.begin)})
                return True
        return self._due()

    def _start(self, event: Start) -> None:
        session = self.session
        self.prompt_tokens = event.prompt_tokens
        session.meter = Meter(prompt_tokens=event.prompt_tokens)
        session.status = Note("status.writing")
        session.trace = None
        if not self.added:
            self.turn.model = self.model
            session.talk.add(self.turn)
            self.added = True
        if event.dropped_turns:
            session.notices += (Note("notice.dropped", {"n": event.dropped_turns}),)
        if event.trace is not None:
            self.live = LivePayload(self.key, event.trace.num_experts, event.trace.model)
            self.live.extend(event.trace.tokens, event.trace.experts, event.trace.weights)
            session.payload = self.live.to_dict()
        else:
            session.payload = empty_payload("empty" if self.num_experts else "no_adapter")

    def _token(self, event: Token) -> None:
        now = self.clock()
        if not self.new_tokens:
            self.first = now
        if self.looped:
            return
        self.raw += event.text
        self.new_tokens += len(event.tokens)
        if self.live is not None and event.experts is not None and event.weights is not None:
            self.live.extend(event.tokens, event.experts, event.weights)

    def _due(self, seconds: float = TEXT_SECONDS) -> bool:
        now = self.clock()
        if now - self.shown < seconds:
            return False
        start = loop_start(self.raw)
        if start is not None and self.session.run is not None:  # it only repeats itself: ended, once said
            self.raw, self.looped = self.raw[:start], True
            self.session.run.stop.set()
        self.turn.text = self.as_shown(self.raw, False)
        self.shown = now
        if self.live is not None and now - self.drawn >= PANEL_SECONDS:
            self.drawn = now
            self.session.payload = self.live.to_dict()
        elapsed = now - self.first
        speed = (self.new_tokens - 1) / elapsed if self.new_tokens > 1 and elapsed > 0 else 0.0
        first = self.first - self.begin if self.new_tokens else 0.0
        self.session.meter = Meter(self.prompt_tokens, self.new_tokens, speed, first)
        return True

    def _finish(self, event: Finish) -> None:
        session, timings = self.session, event.timings
        session.error = None  # "an answer is being written", if someone pressed Enter meanwhile, is over
        if not self.prompt_tokens:  # ended while the prompt was read: the person gets the question back
            self.ended = True
            if not session.continuing:
                session.returned = take_back(session).text
            session.notices += (Note("notice.deadline", {"n": 0}),) if event.reason == "deadline" else ()
            session.status = Note("status.stopped")
            return
        start = loop_start(self.raw)
        if start is not None:
            self.raw, self.looped = self.raw[:start], True
        self.turn.text = self.as_shown(self.raw, True)
        reason = "loop" if self.looped else event.reason
        if self.parts and reason in ("stop", "length") and self.turn.text.strip():
            return  # more is to come
        self.ended = True
        self.turn.reason = reason
        session.checks[self.turn.id] = check_answer(self.turn.text)
        asked_by = [turn.text for turn in session.turns if turn.role == "user"]
        session.urged = sends_to_emergency(self.turn.text) and danger(asked_by) >= URGED
        session.meter = Meter(
            event.prompt_tokens, event.new_tokens, timings.tokens_per_second, timings.first_token_seconds
        )
        session.status = Note("status.stopped" if reason == "cancelled" else "status.done")
        told = (
            self.cut if reason == "length" else f"notice.{reason}" if reason in ("deadline", "loop", "closing") else ""
        )
        if told:
            session.notices += (Note(told, {"n": event.new_tokens}),)
        if not self.turn.text.strip() and reason != "cancelled":
            session.notices += (Note("notice.empty"),)
        if event.trace is not None:
            session.trace = event.trace
            session.payload = trace_payload(event.trace, self.key)
            if not session.continuing and not session.starting and session.talk.mode == "chat":
                asked = list(self.part.messages)  # the explorer makes whole answers again
                with contextlib.suppress(UsageError):  # too large for the explorer: an answer all the same
                    self.turn.exhibit = session.explorer.add(asked[-1].content, event.trace, asked, self.turn.text).key


def refuse(session: Session, error: MingError) -> None:
    """The waiting question cannot be answered: it goes back to the person, with the reason."""
    session.error = error
    session.status = Note("status.error")
    session.payload = {**session.payload, "state": "done"} if session.payload["key"] else session.payload
    if session.talk.leaf and session.turns[-1].role == "assistant" and not session.turns[-1].text:
        take_back(session)
    if session.talk.leaf and session.turns[-1].role == "user":
        session.returned = take_back(session).text
