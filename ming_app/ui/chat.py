"""The conversation as the page keeps it, and the answer as a plain generator over an Engine. Knows no gradio.

`Session` is one visitor's state. `ask`, `ask_again` and `edit_question` put a question at its end or refuse with a
MingError; `answer` then runs the engine and yields after every visible change, with the session already up to date.
Whoever iterates `answer` may close it at any time: the model is free within two tokens.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ming_app.engine.types import Finish, Message, SamplingParams, Start, Token
from ming_app.errors import MingError, UsageError
from ming_app.molora.trace import RouterTrace
from ming_app.router.payload import LivePayload, empty_payload, trace_payload
from ming_app.ui.explorer import Explorer
from ming_app.ui.pump import Pump, Streams
from ming_app.ui.text import refusal

logger = logging.getLogger(__name__)

MAX_CHARS = 8000
"""Longest question that is sent at all; the engine decides by tokens what fits."""
TEXT_SECONDS = 0.1
PANEL_SECONDS = 0.3
PATIENCE = 0.25


@dataclass
class Turn:
    """One message of the conversation. `reason`: how an answer ended (Finish.reason; "" while it is written)."""

    role: str
    text: str
    reason: str = ""
    exhibit: str = ""
    """key of an answer's trace in the explorer"""


@dataclass(frozen=True)
class Note:
    """A text of the page by its key, with the values it needs; the page words it in the interface language."""

    key: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Meter:
    """Figures of the last answer. Zeros before the first."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    tokens_per_second: float = 0.0
    first_token_seconds: float = 0.0

    @property
    def used(self) -> int:
        return self.prompt_tokens + self.new_tokens


@dataclass(eq=False)
class Run:
    """An answer being made; `stop` asks it to end, `done` says that it has."""

    stop: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class Session:
    """One visitor's conversation and what the page shows with it. Changed only by this module and the page's handlers."""

    lang: str = "en"
    east: float = 0.0
    """seconds that the visitor's clock is ahead of UTC"""
    account: str = ""
    """who is signed in; "" for nobody"""
    turns: list[Turn] = field(default_factory=list)
    run: Run | None = None
    status: Note = Note("status.idle")
    notices: tuple[Note, ...] = ()
    error: MingError | None = None
    """why the last question was not answered"""
    returned: str | None = None
    """a refused question, to be put back into the input"""
    meter: Meter = Meter()
    payload: dict[str, Any] = field(default_factory=empty_payload)
    trace: RouterTrace | None = None
    """routing of the last answer, once it is finished"""
    explorer: Explorer = field(default_factory=Explorer)
    """traces to look at closely: every answer, opened files, answers made again"""
    exam: Any = None
    """the visitor's exam.room.Room, once they opened that tab"""

    @property
    def question_waits(self) -> bool:
        """A question stands at the end and nobody answers it yet."""
        return self.run is None and bool(self.turns) and self.turns[-1].role == "user"


def flatten(content: Any) -> str:
    """Plain text of a Chatbot message's content: a string, or a list of {"type": "text", "text": ...} blocks."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return str(content.get("text") or "")
    if isinstance(content, list):
        return "\n".join(text for text in map(flatten, content) if text)
    return ""


def ask(session: Session, text: str) -> None:
    """Puts a new question at the end. Raises MingError with a text for the person when it cannot be sent."""
    question = _checked(session, text)
    _drop_unanswered(session)
    _begin(session, [*session.turns, Turn("user", question)])


def edit_question(session: Session, index: int, text: str) -> None:
    """Replaces the question at message `index`; everything after it is forgotten and it is asked anew."""
    question = _checked(session, text)
    if not 0 <= index < len(session.turns) or session.turns[index].role != "user":
        raise refusal("refuse.empty")
    _begin(session, [*session.turns[:index], Turn("user", question)])


def ask_again(session: Session, index: int | None = None) -> None:
    """Asks the question of the answer at message `index` (the last when None) again, forgetting what followed it."""
    _refuse_while_running(session)
    upto = session.turns if index is None else session.turns[: index + 1]
    asked = [i for i, turn in enumerate(upto) if turn.role == "user"]
    if not asked:
        raise refusal("refuse.empty")
    _begin(session, session.turns[: asked[-1] + 1])


def stop(session: Session, timeout: float = 10.0) -> None:
    """Asks the running answer to end and waits for it. A question that still waits for its turn is taken back."""
    run = session.run
    if run is not None:
        run.stop.set()
        run.done.wait(timeout)
    elif session.question_waits:
        session.returned = session.turns.pop().text
        session.status = Note("status.stopped")


def clear(session: Session) -> None:
    """Forgets the conversation and the routing of its answers; the language and the exam room stay."""
    stop(session)
    session.__dict__.update(vars(Session(session.lang, session.east, session.account, exam=session.exam)))


def answer(
    engine: Streams,
    session: Session,
    params: SamplingParams,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[None, None, None]:
    """Answers the question at the end of `session`; yields after each visible change, the last one complete.

    The text changes about 10 times a second, the expert panel 3 times. A refusal by the engine (MingError) is not
    raised: it goes to `session.error`, and the question to `session.returned`.
    """
    run = session.run = Run()
    messages = [Message(turn.role, turn.text) for turn in session.turns]
    pump = Pump(engine, messages, params, run.stop)
    writer = _Writer(session, engine.info.num_experts, clock)
    try:
        session.status = Note("status.reading", {"seconds": 0})
        yield
        for event in pump.events(PATIENCE):
            if writer.take(event):
                yield
    except Exception as error:
        if not isinstance(error, MingError):  # a bug; the log names it without the person's words
            logger.error(
                "answering failed: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
            )
            error = refusal("refuse.unexpected", kind=type(error).__name__)
        refuse(session, error)
        yield
    finally:
        pump.close()
        session.run = None
        run.done.set()


class _Writer:
    """Applies engine events to the session and says when enough changed to be shown."""

    def __init__(self, session: Session, num_experts: int, clock: Callable[[], float]):
        self.session, self.clock, self.num_experts = session, clock, num_experts
        self.begin = self.shown = self.drawn = clock()
        self.first = 0.0
        self.key = uuid.uuid4().hex[:12]
        self.live: LivePayload | None = None
        self.turn = Turn("assistant", "")
        self.new_tokens = self.prompt_tokens = 0

    def take(self, event: Start | Token | Finish | None) -> bool:
        """Applies one event (None: time passed). True when the page should be updated now."""
        match event:
            case Start():
                self._start(event)
                return True
            case Token():
                self._token(event)
            case Finish():
                self._finish(event)
                return True
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
        session.turns.append(self.turn)
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
        self.turn.text += event.text
        self.new_tokens += len(event.tokens)
        if self.live is not None and event.experts is not None and event.weights is not None:
            self.live.extend(event.tokens, event.experts, event.weights)

    def _due(self) -> bool:
        now = self.clock()
        if now - self.shown < TEXT_SECONDS:
            return False
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
            session.returned = session.turns.pop().text
            session.notices += (Note("notice.deadline", {"n": 0}),) if event.reason == "deadline" else ()
            session.status = Note("status.stopped")
            return
        self.turn.reason = event.reason
        session.meter = Meter(
            event.prompt_tokens, event.new_tokens, timings.tokens_per_second, timings.first_token_seconds
        )
        session.status = Note("status.stopped" if event.reason == "cancelled" else "status.done")
        if event.reason in ("length", "deadline"):
            session.notices += (Note(f"notice.{event.reason}", {"n": event.new_tokens}),)
        if not self.turn.text.strip() and event.reason != "cancelled":
            session.notices += (Note("notice.empty"),)
        if event.trace is not None:
            session.trace = event.trace
            session.payload = trace_payload(event.trace, self.key)
            asked = [Message(turn.role, turn.text) for turn in session.turns[:-1]]
            with contextlib.suppress(UsageError):  # too large for the explorer: an answer all the same
                self.turn.exhibit = session.explorer.add(asked[-1].content, event.trace, asked, self.turn.text).key


def refuse(session: Session, error: MingError) -> None:
    """The waiting question cannot be answered: it goes back to the person, with the reason."""
    session.error = error
    session.status = Note("status.error")
    session.payload = {**session.payload, "state": "done"} if session.payload["key"] else session.payload
    if session.turns and session.turns[-1].role == "assistant" and not session.turns[-1].text:
        session.turns.pop()
    if session.turns and session.turns[-1].role == "user":
        session.returned = session.turns.pop().text


def _begin(session: Session, turns: Sequence[Turn]) -> None:
    session.turns = list(turns)
    session.notices = ()
    session.error = None
    session.returned = None


def _checked(session: Session, text: str) -> str:
    _refuse_while_running(session)
    question = text.strip()
    if not question:
        raise refusal("refuse.empty")
    if len(question) > MAX_CHARS:
        raise refusal("refuse.long", n=len(question), limit=MAX_CHARS)
    return question


def _refuse_while_running(session: Session) -> None:
    if session.run is not None:
        raise refusal("refuse.running")


def _drop_unanswered(session: Session) -> None:
    """A question whose answer never began (the connection broke in the queue) makes way for the next one."""
    if session.question_waits:
        session.turns.pop()


def abandon(session: Session) -> None:
    """The visitor has gone: whatever still runs for them is stopped."""
    if session.run is not None:
        session.run.stop.set()
