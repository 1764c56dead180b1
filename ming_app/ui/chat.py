"""The conversation as the page keeps it, and the answer as a plain generator over an Engine. Knows no gradio.

`Session` is one visitor's state. `ask`, `ask_again`, `edit_question` and `go_on` say what is to be answered or refuse with
a MingError; `answer` then runs the engine and yields after every visible change, with the session already up to date.
Whoever iterates `answer` may close it at any time: the model is free within two tokens.

Every question is looked at for signs of an emergency before the model sees it, in the light of the whole conversation,
and every answer for what needs a note; no text of the model can change either.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

from ming_app.conversation import consult
from ming_app.conversation.store import ConversationStore
from ming_app.conversation.tree import Conversation, Turn
from ming_app.engine.types import EngineInfo, Finish, Message, SamplingParams, Start, Token
from ming_app.errors import MingError, UsageError
from ming_app.molora.trace import RouterTrace
from ming_app.router.payload import LivePayload, empty_payload, trace_payload
from ming_app.safety.output import OutputNote, check_answer, loop_start, sends_to_emergency, without_doses
from ming_app.safety.red_flags import Assessment, assess, danger
from ming_app.ui.explorer import Explorer
from ming_app.ui.pump import Pump, Streams
from ming_app.ui.text import refusal

logger = logging.getLogger(__name__)

MAX_CHARS = 8000
"""Longest question that is sent at all; the engine decides by tokens what fits."""
TEXT_SECONDS = 0.1
PANEL_SECONDS = 0.3
PATIENCE = 0.25
URGED = 0.35
"""score of a conversation (safety.score) from which an answer that sends to emergency care raises the warning too"""


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
    talk: Conversation = field(default_factory=Conversation)
    store: ConversationStore | None = None
    """where conversations are kept; None for one that nobody keeps"""
    preset: str = ""
    """name of the system prompt that new conversations begin with"""
    own: str = ""
    """the person's own"""
    search: str = ""
    """what the list of conversations is searched for"""
    incognito: bool = False
    """what is said now is kept nowhere"""
    starting: str = ""
    """words that answers are to begin with"""
    continuing: bool = False
    """the last answer is to be gone on with"""
    run: Run | None = None
    status: Note = Note("status.idle")
    notices: tuple[Note, ...] = ()
    error: MingError | None = None
    """why the last question was not answered"""
    returned: str | None = None
    """a refused question, to be put back into the input"""
    meter: Meter = Meter()
    danger: Assessment = Assessment((), "en")
    """signs of an emergency in what the person has written in this conversation"""
    urged: bool = False
    """the last answer sends to emergency care, and the question reads like one of somebody in danger"""
    checks: dict[str, tuple[OutputNote, ...]] = field(default_factory=dict)
    """id of an answer -> what in it needs a note"""
    payload: dict[str, Any] = field(default_factory=empty_payload)
    trace: RouterTrace | None = None
    """routing of the last answer, once it is finished"""
    explorer: Explorer = field(default_factory=Explorer)
    """traces to look at closely: every answer, opened files, answers made again"""
    exam: Any = None
    """the visitor's exam.room.Room, once they opened that tab"""

    @property
    def turns(self) -> list[Turn]:
        """The turns in view, oldest first."""
        return self.talk.path

    @property
    def question_waits(self) -> bool:
        """A question stands at the end, or an answer to be gone on with, and nobody is at it yet."""
        if self.run is not None or not self.talk.leaf:
            return False
        return self.continuing or self.talk.nodes[self.talk.leaf].role == "user"


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
    _begin(session, question)


def edit_question(session: Session, index: int, text: str) -> None:
    """Asks the question at message `index` in other words; the old one, and what followed it, stay as another branch."""
    question = _checked(session, text)
    turns = session.turns
    if not 0 <= index < len(turns) or turns[index].role != "user":
        raise refusal("refuse.empty")
    session.talk.rewind(turns[index - 1] if index else None)
    _begin(session, question)


def ask_again(session: Session, index: int | None = None) -> None:
    """Asks the question of the answer at message `index` (the last when None) again; the old answer stays as a branch."""
    _refuse_while_running(session)
    upto = session.turns if index is None else session.turns[: index + 1]
    asked = [turn for turn in upto if turn.role == "user"]
    if not asked:
        raise refusal("refuse.empty")
    session.talk.rewind(asked[-1])
    _begin(session, None)


def go_on(session: Session) -> None:
    """The last answer is to be continued from where it ended."""
    _refuse_while_running(session)
    turns = session.turns
    if not turns or turns[-1].role != "assistant" or not turns[-1].text.strip():
        raise refusal("refuse.nothing_to_continue")
    _begin(session, None)
    session.continuing = True


def explain(session: Session, summary: str) -> None:
    """Asks for the explanation of a consultation, over the summary as the person left it."""
    _refuse_while_running(session)
    if not summary.strip() or session.talk.mode != "consult":
        raise refusal("refuse.empty")
    session.talk.summary = summary.strip()[:MAX_CHARS]
    _drop_unanswered(session)
    _begin(session, consult.word("request", session.lang, summary=session.talk.summary))


def stop(session: Session, timeout: float = 10.0) -> None:
    """Asks the running answer to end and waits for it. A question that still waits for its turn is taken back."""
    run = session.run
    if run is not None:
        run.stop.set()
        run.done.wait(timeout)
    elif session.continuing:
        session.continuing = False
        session.status = Note("status.stopped")
    elif session.question_waits:
        session.returned = _take_back(session).text
        session.status = Note("status.stopped")


def clear(session: Session) -> None:
    """Begins a new conversation. Language, account, the exam room and where conversations are kept stay."""
    stop(session)
    kept = {
        name: getattr(session, name)
        for name in ("lang", "east", "account", "exam", "store", "incognito", "starting", "preset", "own", "search")
    }
    talk = Conversation(preset=session.preset, system=session.own)
    session.__dict__.update(vars(Session(**kept, talk=talk)))


def open_talk(session: Session, talk: Conversation) -> None:
    """Brings a kept conversation into view."""
    clear(session)
    session.talk = talk
    session.incognito = False
    look(session)
    for turn in session.turns:
        if turn.role == "assistant":
            session.checks[turn.id] = check_answer(turn.text)


def show_branch(session: Session, index: int, step: int) -> None:
    """Another version of message `index`: `step` branches later (or earlier, when negative)."""
    _refuse_while_running(session)
    turns = session.turns
    if not 0 <= index < len(turns):
        raise refusal("refuse.empty")
    beside = session.talk.branches(turns[index])
    at = beside.index(turns[index]) + step
    if 0 <= at < len(beside):
        session.talk.show(beside[at])
        session.continuing = False
        look(session)
        keep(session)


def rate(session: Session, index: int, rating: int, comment: str) -> None:
    """What the person thinks of the answer at message `index`."""
    turns = session.turns
    if 0 <= index < len(turns) and turns[index].role == "assistant":
        turns[index].rating, turns[index].comment = rating, comment
        keep(session, turns[index])


def look(session: Session) -> None:
    """Looks through everything the person has written in the conversation in view."""
    session.danger = assess([turn.text for turn in session.turns if turn.role == "user"])
    session.urged = False


def keep(session: Session, *turns: Turn) -> None:
    """Keeps the conversation's head and these turns, unless it is kept nowhere. What cannot be kept is told, not lost: the
    page still has it."""
    if session.store is None or session.incognito or not session.talk.nodes:
        return
    try:
        session.store.save(session.talk, *turns)
    except MingError as error:
        session.error = error


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
    run = session.run = Run()
    plan = _plan(session, params, system)
    if plan.said:  # nothing for the model
        keep(session, session.talk.add(Turn("assistant", plan.said, reason=plan.reason)))
        session.status, session.run = Note("status.done"), None
        run.done.set()
        yield
        return
    pump = Pump(engine, plan.messages, plan.params, run.stop)
    writer = _Writer(session, engine.info, plan.shown, clock)
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
        session.continuing = False
        keep(session, *writer.written)
        run.done.set()


@dataclass(frozen=True)
class _Plan:
    """How the waiting question is answered: by the model, whose words `shown` turns into what stands on the page (the second
    argument: whether they are complete), or, for `said`, without it."""

    messages: list[Message] = field(default_factory=list)
    params: SamplingParams = SamplingParams()
    shown: Callable[[str, bool], str] = lambda text, _over: text
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
    return _Plan(messages, params)


def _consultation(session: Session, params: SamplingParams) -> _Plan:
    """The next question, the summary when all are answered, the explanation once the person asked for it."""
    talk, turns, lang = session.talk, session.turns, session.lang
    step = consult.pending(turns)
    if consult.asks_for_drug(turns[-1].text) and turns[-1].role == "user":
        again = f"\n\n{step.asks[lang]}" if step is not None else ""
        return _Plan(said=consult.word("order", lang) + again)
    if step is not None:
        asked = replace(consult.QUESTION, seed=params.seed, deadline=params.deadline)
        return _Plan(
            consult.question_messages(turns, step, lang),
            asked,
            lambda text, over: consult.worded(text, step, lang) if over else "",
        )
    if not talk.summary:
        talk.summary = consult.compose(turns, lang)
        return _Plan(said=consult.word("ready", lang), reason=READY)
    since = max((at for at, turn in enumerate(turns) if turn.reason == READY), default=len(turns) - 2)
    later = turns[since + 2 :]  # after the request to explain
    messages = consult.explain_messages(talk.summary, lang)
    messages += [Message(turn.role, turn.text) for turn in later]

    def shown(text: str, over: bool) -> str:
        ends = [text.rfind(sign) for sign in "。！？!?\n"] + [text.rfind(". ")]
        return without_doses(text if over else text[: max(ends) + 1], lang)

    return _Plan(messages, params, shown)


class _Writer:
    """Applies engine events to the session and says when enough changed to be shown."""

    def __init__(
        self, session: Session, info: EngineInfo, shown: Callable[[str, bool], str], clock: Callable[[], float]
    ):
        self.session, self.clock, self.num_experts, self.model = session, clock, info.num_experts, info.title
        self.as_shown = shown
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
        self.looped = False
        self.new_tokens = self.prompt_tokens = 0

    @property
    def written(self) -> list[Turn]:
        """The answer, once it has begun, and its question."""
        return self.session.turns[-2:] if self.added else []

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

    def _due(self) -> bool:
        now = self.clock()
        if now - self.shown < TEXT_SECONDS:
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
            if not session.continuing:
                session.returned = _take_back(session).text
            session.notices += (Note("notice.deadline", {"n": 0}),) if event.reason == "deadline" else ()
            session.status = Note("status.stopped")
            return
        start = loop_start(self.raw)
        if start is not None:
            self.raw, self.looped = self.raw[:start], True
        self.turn.text = self.as_shown(self.raw, True)
        reason = "loop" if self.looped else event.reason
        self.turn.reason = reason
        session.checks[self.turn.id] = check_answer(self.turn.text)
        asked_by = [turn.text for turn in session.turns if turn.role == "user"]
        session.urged = sends_to_emergency(self.turn.text) and danger(asked_by) >= URGED
        session.meter = Meter(
            event.prompt_tokens, event.new_tokens, timings.tokens_per_second, timings.first_token_seconds
        )
        session.status = Note("status.stopped" if reason == "cancelled" else "status.done")
        if reason in ("length", "deadline", "loop"):
            session.notices += (Note(f"notice.{reason}", {"n": event.new_tokens}),)
        if not self.turn.text.strip() and reason != "cancelled":
            session.notices += (Note("notice.empty"),)
        if event.trace is not None:
            session.trace = event.trace
            session.payload = trace_payload(event.trace, self.key)
            if not session.continuing and not session.starting:  # the explorer makes whole answers again
                asked = [Message(turn.role, turn.text) for turn in session.turns[:-1]]
                with contextlib.suppress(UsageError):  # too large for the explorer: an answer all the same
                    self.turn.exhibit = session.explorer.add(asked[-1].content, event.trace, asked, self.turn.text).key


def refuse(session: Session, error: MingError) -> None:
    """The waiting question cannot be answered: it goes back to the person, with the reason."""
    session.error = error
    session.status = Note("status.error")
    session.payload = {**session.payload, "state": "done"} if session.payload["key"] else session.payload
    if session.talk.leaf and session.turns[-1].role == "assistant" and not session.turns[-1].text:
        _take_back(session)
    if session.talk.leaf and session.turns[-1].role == "user":
        session.returned = _take_back(session).text


def _take_back(session: Session) -> Turn:
    """The last turn leaves the conversation, and where it is kept. One that was asked again, with answers, only leaves the
    view."""
    turn = session.turns[-1]
    if any(node.parent == turn.id for node in session.talk.nodes.values()):
        session.talk.rewind(session.talk.nodes.get(turn.parent))
        return turn
    session.talk.drop_leaf()
    look(session)
    if session.store is not None and not session.incognito:
        with contextlib.suppress(MingError):
            session.store.drop_turn(session.talk, turn)
    return turn


def _begin(session: Session, question: str | None) -> None:
    """`question`: a new one; None asks what is there."""
    session.notices = ()
    session.error = None
    session.returned = None
    session.continuing = False
    if question is not None:
        session.talk.add(Turn("user", question))
        keep(session, *session.turns[-2:])  # with the opening of a consultation, which nobody had answered yet
    look(session)


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
    if session.question_waits and not session.continuing:
        _take_back(session)


def abandon(session: Session) -> None:
    """The visitor has gone: whatever still runs for them is stopped."""
    if session.run is not None:
        session.run.stop.set()
