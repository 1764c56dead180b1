"""The conversation as the page keeps it. Knows no gradio.

`Session` is one visitor's state. `ask`, `ask_again`, `edit_question` and `go_on` say what is to be answered or refuse with
a MingError; answer.answer then runs the engine.

Every question is looked at for signs of an emergency before the model sees it, in the light of the whole conversation,
and every answer for what needs a note; no text of the model can change either.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import Any

from ming_app.conversation import consult
from ming_app.conversation.store import ConversationStore
from ming_app.conversation.tree import Conversation, Turn
from ming_app.errors import MingError
from ming_app.molora.trace import RouterTrace
from ming_app.router.payload import empty_payload
from ming_app.safety.output import OutputNote, check_answer
from ming_app.safety.red_flags import Assessment, Memory, assess
from ming_app.ui.explorer import Explorer
from ming_app.ui.text import refusal

MAX_CHARS = 8000
"""Longest question that is sent at all; the engine decides by tokens what fits."""


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
    visitor: str = ""
    """the page's own name for who is there, for fair turns"""
    talk: Conversation = field(default_factory=Conversation)
    store: ConversationStore | None = None
    """where conversations are kept; None for one that nobody keeps"""
    preset: str = ""
    """name of the system prompt that new conversations begin with"""
    own: str = ""
    """the person's own"""
    search: str = ""
    """what the list of conversations is searched for"""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """what the browser was last told to keep"""
    incognito: bool = False
    """what is said now is kept nowhere"""
    starting: str = ""
    """words that answers are to begin with"""
    before: str = ""
    """id of the turn that was in view before the question was edited or asked again"""
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
    memory: Memory = field(default_factory=Memory)
    """what was looked through for that"""
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
    session.before = ""
    _begin(session, question)


def edit_question(session: Session, index: int, text: str) -> None:
    """Asks the question at message `index` in other words; the old one, and what followed it, stay as another branch."""
    question = _checked(session, text)
    turns = session.turns
    if not 0 <= index < len(turns) or turns[index].role != "user":
        raise refusal("refuse.empty")
    session.before = session.talk.leaf
    session.talk.rewind(turns[index - 1] if index else None)
    _begin(session, question)


def ask_again(session: Session, index: int | None = None) -> None:
    """Asks the question of the answer at message `index` (the last when None) again; the old answer stays as a branch."""
    _refuse_while_running(session)
    upto = session.turns if index is None else session.turns[: index + 1]
    asked = [turn for turn in upto if turn.role == "user"]
    if not asked:
        raise refusal("refuse.empty")
    session.before = session.talk.leaf
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
    session.before = ""
    _begin(session, consult.word("request", session.lang, summary=session.talk.summary))


def stop(session: Session, timeout: float = 10.0) -> None:
    """Asks the running answer to end and waits for it. A question that still waits for its turn is taken back."""
    run = session.run
    if run is not None:
        run.stop.set()
        run.done.wait(timeout)
    if session.continuing and run is None:
        session.continuing = False
        session.status = Note("status.stopped")
    elif session.question_waits:
        session.returned = take_back(session).text
        session.status = Note("status.stopped")


def clear(session: Session) -> None:
    """Begins a new conversation. Language, account, the exam room and where conversations are kept stay."""
    stop(session)
    kept = {
        name: getattr(session, name)
        for name in (
            "lang",
            "east",
            "account",
            "visitor",
            "exam",
            "store",
            "incognito",
            "starting",
            "preset",
            "own",
            "search",
            "changes",
        )
    }
    talk = Conversation(preset=session.preset, system=session.own)
    session.__dict__.update(vars(Session(**kept, talk=talk)))


def open_talk(session: Session, talk: Conversation) -> None:
    """Brings a kept conversation into view."""
    stop(session)
    returned = session.returned  # a question that still waited goes back into the box
    clear(session)
    session.talk, session.returned = talk, returned
    session.incognito = False
    read(session)
    if returned:
        look(session, returned)


def read(session: Session) -> None:
    """Looks through a conversation that came from elsewhere: what the person wrote, and every answer in view."""
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


def look(session: Session, also: str = "") -> None:
    """Looks through everything the person has written in the conversation in view, and words that stand in the box."""
    said = [turn.text for turn in session.turns if turn.role == "user"]
    session.danger = assess([*said, also] if also else said, session.memory)
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


def take_back(session: Session) -> Turn:
    """The last turn leaves the conversation, and where it is kept. One that was asked again, with answers, only leaves the
    view. A warning that a question raised stays: its words go back to the person."""
    turn, before = session.turns[-1], session.before
    session.before = ""
    if any(node.parent == turn.id for node in session.talk.nodes.values()):  # asked again: the answers are there still
        session.talk.leaf = before if before in session.talk.nodes else turn.parent
        return turn
    session.talk.drop_leaf()
    if before in session.talk.nodes:  # an edit that was not answered: what it was to replace comes back
        session.talk.leaf = before
    if all(node.role == "assistant" for node in session.talk.nodes.values()):  # nothing, or what opens a consultation
        session.talk.title = ""
    look(session, turn.text if turn.role == "user" else "")
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
    question = text.encode("utf-8", "replace").decode("utf-8").strip()  # no lone surrogates
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
        take_back(session)


def abandon(session: Session) -> None:
    """The visitor has gone: whatever still runs for them is stopped."""
    if session.run is not None:
        session.run.stop.set()
