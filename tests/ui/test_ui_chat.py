"""The conversation and the answering generator, over the scripted engine: no page, no gradio."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import closing
from typing import Any

import pytest

from ming_app.conversation.tree import Conversation, Turn
from ming_app.engine.types import Message, SamplingParams
from ming_app.errors import MingError, PromptTooLongError
from ming_app.ui import chat
from ming_app.ui.answer import TEXT_SECONDS, answer
from ming_app.ui.chat import MAX_CHARS, Session
from tests.fakes import FakeEngine, long_text

PARAMS = SamplingParams(max_new_tokens=400)


def ask_and_answer(engine: Any, session: Session, text: str, params: SamplingParams = PARAMS) -> None:
    chat.ask(session, text)
    for _ in answer(engine, session, params):
        pass


def texts(session: Session) -> list[str]:
    return [turn.text for turn in session.turns]


def test_an_answer_is_kept_with_its_figures_and_its_whole_trace() -> None:
    engine, session = FakeEngine("多喝水。Rest. 💧"), Session()
    ask_and_answer(engine, session, "  发热怎么办？ ")
    assert texts(session) == ["发热怎么办？", "多喝水。Rest. 💧"]
    assert session.turns[-1].reason == "stop" and session.status.key == "status.done"
    assert session.run is None and engine.open_streams == 0
    assert session.trace is not None and session.payload["state"] == "done"
    assert session.payload["tokens"].count("\n") == len(session.trace)
    assert session.meter.new_tokens == sum(t.role == "answer" for t in session.trace.tokens)


def test_the_engine_gets_the_whole_conversation() -> None:
    engine, session = FakeEngine("yes"), Session()
    ask_and_answer(engine, session, "one")
    ask_and_answer(engine, session, "two")
    messages, params = engine.calls[-1]
    assert [(m.role, m.content) for m in messages] == [("user", "one"), ("assistant", "yes"), ("user", "two")]
    assert params is PARAMS


def test_text_and_panel_grow_while_it_streams() -> None:
    engine, session = FakeEngine(long_text(60), delay=0.02), Session()
    chat.ask(session, "q")
    seen, panels = [], []
    began = time.monotonic()
    for _ in answer(engine, session, PARAMS):
        seen.append(texts(session)[-1])
        panels.append(session.payload["tokens"])
    lengths = [len(p) for p in panels]
    assert lengths == sorted(lengths) and len(set(lengths)) >= 4
    assert all(b.startswith(a) for a, b in zip(seen[2:], seen[3:], strict=False))
    assert len(seen) <= (time.monotonic() - began) / TEXT_SECONDS + 6  # throttled: about ten a second


def test_closing_the_generator_frees_the_engine() -> None:
    engine, session = FakeEngine(long_text(5000), delay=0.01), Session()
    chat.ask(session, "q")
    with closing(answer(engine, session, SamplingParams(max_new_tokens=4000))) as steps:
        for _ in range(4):
            next(steps)
        run = session.run
    assert engine.open_streams == 0 and session.run is None and run is not None and run.done.is_set()


def test_stop_keeps_what_was_written_and_its_trace() -> None:
    engine, session = FakeEngine(long_text(3000), delay=0.01), Session()
    chat.ask(session, "q")
    steps = answer(engine, session, SamplingParams(max_new_tokens=4000))
    consumer = threading.Thread(target=lambda: [None for _ in steps])
    consumer.start()
    while not session.meter.new_tokens:
        time.sleep(0.01)
    began = time.monotonic()
    chat.stop(session)
    assert time.monotonic() - began < 10
    consumer.join(5)
    assert session.turns[-1].reason == "cancelled" and session.turns[-1].text
    assert session.status.key == "status.stopped" and session.trace is not None


def test_stop_takes_a_waiting_question_back() -> None:
    session = Session()
    chat.ask(session, "still waiting")
    chat.stop(session)
    assert session.turns == [] and session.returned == "still waiting"


class SilentPrefill(FakeEngine):
    """Reads forever, until cancelled: ends with Finish and no Start."""

    def stream(self, messages: Any, params: Any, cancel: Any = None) -> Any:
        from ming_app.engine.types import Finish, Timings

        assert cancel.wait(20)
        yield Finish("cancelled", 9, 0, Timings(0, 0, 0, 0), None)


def test_stopping_while_the_prompt_is_read_gives_the_question_back() -> None:
    session = Session()
    chat.ask(session, "a long one")
    steps = answer(SilentPrefill(), session, PARAMS)
    next(steps)
    next(steps)
    assert session.status.key == "status.reading"
    assert session.run is not None
    session.run.stop.set()
    for _ in steps:
        pass
    assert session.turns == [] and session.returned == "a long one" and session.run is None


def test_a_refusal_gives_the_question_back_with_the_reason() -> None:
    error = PromptTooLongError("It has 9000 tokens; the limit is 4096.", "共 9000 个词元，上限 4096。")
    session = Session(talk=Conversation.of([Turn("user", "old"), Turn("assistant", "answer")]))
    ask_and_answer(FakeEngine(error=error), session, "far too long")
    assert texts(session) == ["old", "answer"]
    assert session.returned == "far too long" and session.error is error and session.status.key == "status.error"
    chat.ask(session, "short")
    assert session.error is None and session.returned is None


class Breaks(FakeEngine):
    def _events(self, messages: Any, params: Any, cancel: Any) -> Any:
        events = super()._events(messages, params, cancel)
        yield next(events)
        yield next(events)
        raise RuntimeError(f"secret {messages[-1].content}")


def test_a_bug_is_told_in_words_and_logged_without_the_persons_words(caplog: pytest.LogCaptureFixture) -> None:
    session = Session()
    with caplog.at_level(logging.DEBUG):
        ask_and_answer(Breaks(), session, "my private illness")
    assert session.error is not None and "RuntimeError" in session.error.en
    assert "private" not in caplog.text and "RuntimeError" in caplog.text
    assert session.run is None


def test_cut_and_dropped_are_noticed() -> None:
    session = Session()
    ask_and_answer(FakeEngine(long_text(50)), session, "q", SamplingParams(max_new_tokens=5))
    assert [n.key for n in session.notices] == ["notice.length"] and session.notices[0].values == {"n": 5}
    small, session = FakeEngine("ok", context_limit=60), Session()
    for i in range(6):
        ask_and_answer(small, session, f"question number {i} with some words")
    assert session.notices[0].key == "notice.dropped" and session.notices[0].values["n"] > 0
    ask_and_answer(FakeEngine(long_text(90), delay=0.02), session, "q", SamplingParams(deadline=0.1))
    assert "notice.deadline" in [n.key for n in session.notices]


def test_an_empty_answer_is_noticed() -> None:
    session = Session()
    ask_and_answer(FakeEngine(" "), session, "q")
    assert [n.key for n in session.notices] == ["notice.empty"]


def test_without_adapter_the_panel_says_so() -> None:
    session = Session()
    ask_and_answer(FakeEngine("fine", num_experts=0), session, "q")
    assert session.payload["state"] == "no_adapter" and session.trace is None


def test_editing_truncates_and_asks_anew() -> None:
    engine, session = FakeEngine("ok"), Session()
    for question in ("one", "two", "three"):
        ask_and_answer(engine, session, question)
    chat.edit_question(session, 2, "TWO")
    assert texts(session) == ["one", "ok", "TWO"] and session.question_waits
    for index in (1, 7, -1):
        with pytest.raises(MingError):
            chat.edit_question(session, index, "x")


def test_retry_truncates_to_its_question() -> None:
    engine, session = FakeEngine("ok"), Session()
    for question in ("one", "two"):
        ask_and_answer(engine, session, question)
    last = session.talk.leaf
    chat.ask_again(session, 1)  # the answer's index
    assert texts(session) == ["one"]
    session.talk.leaf = last
    chat.ask_again(session, 0)  # or its question's
    assert texts(session) == ["one"]
    session.talk.leaf = last
    chat.ask_again(session)
    assert texts(session) == ["one", "ok", "two"]
    with pytest.raises(MingError):
        chat.ask_again(Session())


def test_what_cannot_be_sent_is_refused_in_both_languages() -> None:
    session = Session()
    for text in ("", "   \n", "x" * (MAX_CHARS + 1)):
        with pytest.raises(MingError) as refused:
            chat.ask(session, text)
        assert refused.value.en != refused.value.zh
    session.run = chat.Run()
    for refused_while_running in (
        lambda: chat.ask(session, "q"),
        lambda: chat.ask_again(session),
        lambda: chat.edit_question(session, 0, "q"),
    ):
        with pytest.raises(MingError):
            refused_while_running()


def test_a_lost_question_makes_way() -> None:
    session = Session()
    chat.ask(session, "lost in the queue")
    chat.ask(session, "again")
    assert texts(session) == ["again"]


def test_clear_keeps_the_language_only() -> None:
    session = Session(lang="zh")
    ask_and_answer(FakeEngine("ok"), session, "q")
    chat.clear(session)
    assert (
        session.lang == "zh" and session.turns == [] and session.trace is None and session.payload["state"] == "empty"
    )


@pytest.mark.parametrize(
    "content,expected",
    [
        ("plain", "plain"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ({"text": "x", "display_text": "y"}, "x"),
        ([{"type": "file", "file": {}}], ""),
        (None, ""),
    ],
)
def test_flatten(content: Any, expected: str) -> None:
    assert chat.flatten(content) == expected


def test_a_place_in_the_queue_is_told_and_then_the_reading() -> None:
    fake, session = FakeEngine("ok", slots=1), Session()
    first = fake.stream([Message("user", "x")], SamplingParams())
    next(first)
    chat.ask(session, "q")
    told: list[str] = []

    def answered() -> None:
        for _ in answer(fake, session, SamplingParams()):
            told.append(session.status.key)
            if session.status.key == "status.turn":
                assert session.status.values == {"n": 1, "seconds": 20}
                first.close()

    thread = threading.Thread(target=answered)
    thread.start()
    thread.join(20)
    assert told.index("status.turn") < told.index("status.writing") and told[-1] == "status.done"
    assert "status.reading" in told[told.index("status.turn") :]


@pytest.mark.parametrize("gone", [False, True])
def test_an_answer_cut_before_its_first_word_is_none(gone: bool) -> None:
    session = Session()
    chat.ask(session, "q")
    with closing(answer(FakeEngine("\n" * 50, delay=0.2), session, SamplingParams())) as steps:
        for _ in steps:
            if session.status.key == "status.writing":
                if gone:  # the reader has closed the page
                    break
                assert session.run is not None
                session.run.stop.set()
    assert [turn.role for turn in session.turns] == ["user"] and session.run is None
    chat.stop(session)
    assert session.turns == [] and session.returned == "q"
