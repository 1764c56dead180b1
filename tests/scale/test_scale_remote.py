"""What stands in for the engine before page and API, over a handle that is scripted: no cluster runs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from ming_app.engine.inspection import inspect
from ming_app.engine.types import Finish, Message, Outcome, Queued, SamplingParams, Start, Token
from ming_app.errors import BusyError, PromptTooLongError, UsageError
from ming_app.scale.replica import Failure
from ming_app.ui.answer import answer
from ming_app.ui.chat import Session, ask
from ming_app.ui.loader import EngineLoader
from tests.engine.tiny_engine import tiny_engine
from tests.fakes import FakeEngine, long_text
from tests.serve.conftest import run_server, settings, stop

WHY = "ray is not installed (requirements-scale.txt)"
scale = pytest.importorskip("ming_app.scale.remote", reason=WHY)
ray, serve = pytest.importorskip("ray.exceptions", reason=WHY), pytest.importorskip("ray.serve.exceptions", reason=WHY)
QUESTION = [Message("user", "What is anaemia?")]
PARAMS = SamplingParams(100)


class Response:
    """Of a streaming call: what `make` yields, until it is cancelled."""

    def __init__(self, make: Callable[[], AsyncIterator[list[Any]]]):
        self._make, self.cancelled = make, False

    def __aiter__(self) -> AsyncIterator[list[Any]]:
        return self._make()

    def cancel(self) -> None:
        self.cancelled = True


class Call:
    def __init__(self, call: Callable[..., Any]):
        self.remote = call


class Result:
    def __init__(self, value: Any):
        self.value = value

    def result(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class Handle:
    """A deployment of one replica: `engine`. `plan`: per call of `stream`, after how many events which error comes."""

    def __init__(self, engine: Any, tokenizer: Any = None):
        self.engine, self.tokenizer = engine, tokenizer
        self.plan: list[tuple[int, Exception]] = []
        self.sessions: list[str] = []
        self.responses: list[Response] = []
        self.scores: list[Any] = []
        self.describe = Call(lambda: Result((engine.info, tokenizer)))
        self.score = Call(lambda *args: Result(self.scores.pop(0)))
        self.stream = Call(self._stream)

    def options(self, session_id: str, stream: bool = False) -> Handle:
        self.sessions.append(session_id)
        return self

    def _stream(self, messages: Sequence[Message], params: SamplingParams) -> Response:
        most, error = self.plan.pop(0) if self.plan else (1 << 30, RuntimeError())

        async def items() -> AsyncIterator[list[Any]]:
            yield [self.engine.info]
            cancel = threading.Event()
            source = self.engine.stream(messages, params, cancel)
            try:
                for _ in range(most):
                    event = await asyncio.to_thread(next, source)
                    yield [event]
                    if isinstance(event, Finish):
                        return
                raise error
            finally:
                cancel.set()

        self.responses.append(Response(items))
        return self.responses[-1]


def dead() -> Exception:
    return ray.ActorDiedError()


def remote(engine: Any = None, **options: Any) -> tuple[Any, Handle, list[Outcome]]:
    handle = Handle(engine or FakeEngine(long_text(20)))
    made, told = scale.RemoteEngine(handle, **options), []
    made.on_end(told.append)
    return made, handle, told


def text_of(events: Sequence[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))


def test_events_are_the_replicas_and_are_counted() -> None:
    engine, handle, told = remote()
    events = list(engine.stream(QUESTION, PARAMS))
    assert text_of(events) == long_text(20) and isinstance(events[-1], Finish)
    assert [one.reason for one in told] == ["stop"] and told[0].new_tokens == events[-1].new_tokens
    assert engine.load_now() == (0, 0)


def test_a_conversation_keeps_its_name_and_others_have_others() -> None:
    first = [Message("system", "Be brief."), Message("user", "贫血？")]
    later = [*first, Message("assistant", "…"), Message("user", "Why?")]
    assert scale.conversation(first, "me") == scale.conversation(later, "me")
    names = {
        scale.conversation(first, "me"),
        scale.conversation(first, "you"),
        scale.conversation(first[1:], "me"),
        scale.conversation(QUESTION, "me"),
    }
    assert len(names) == 4 and not any("贫血" in name for name in names)
    engine, handle, _ = remote()
    list(engine.stream(later, PARAMS))
    assert handle.sessions == [scale.conversation(first, "")]


def test_a_replica_that_dies_before_a_word_is_replaced_unnoticed() -> None:
    engine, handle, told = remote()
    handle.plan = [(0, dead()), (0, dead())]
    assert text_of(list(engine.stream(QUESTION, PARAMS))) == long_text(20)
    assert [one.reason for one in told] == ["stop"] and len(handle.responses) == 3


def test_an_engine_that_is_exchanged_sends_scores_elsewhere() -> None:
    engine, handle, _ = remote()
    handle.scores = [Failure.of(BusyError.closing()), [-1.0]]
    assert engine.score(QUESTION, ["A"]) == [-1.0]
    handle.scores = [Failure.of(BusyError.full(3, 2.0))]
    with pytest.raises(BusyError, match="waiting"):
        engine.score(QUESTION, ["A"])


def test_after_another_base_the_tokenizer_is_that_bases() -> None:
    """While replicas are exchanged, the one that is asked for its tokenizer may still have the old base."""
    fake = FakeEngine("yes")
    engine, handle, _ = remote(fake)
    old = fake.info
    handle.describe = Call(lambda: Result((old, "old tokenizer")))
    fake.info = replace(old, fingerprint="another+adapter")
    list(engine.stream(QUESTION, PARAMS))
    assert engine.info == fake.info and engine.tokenizer is None  # not yet known
    handle.describe = Call(lambda: Result((fake.info, "new tokenizer")))
    list(engine.stream(QUESTION, PARAMS))
    assert engine.tokenizer == "new tokenizer"


def test_after_words_the_request_is_lost_and_says_so() -> None:
    engine, handle, told = remote()
    handle.plan = [(4, dead())]
    seen = []
    with pytest.raises(BusyError) as raised:
        for event in engine.stream(QUESTION, PARAMS):
            seen.append(event)
    assert raised.value.kind == "lost" and len(seen) == 4 and [one.reason for one in told] == ["lost"]
    assert text_of(list(engine.stream(QUESTION, PARAMS))) == long_text(20)  # the next one is answered


def test_where_no_replica_is_left_it_gives_up() -> None:
    engine, handle, _ = remote()
    handle.plan = [(0, dead())] * 3
    with pytest.raises(BusyError, match="no longer there"):
        list(engine.stream(QUESTION, PARAMS))


def test_full_replicas_are_a_full_queue() -> None:
    engine, handle, told = remote()
    handle.plan = [(0, serve.BackPressureError(40, 40))]
    with pytest.raises(BusyError) as raised:
        list(engine.stream(QUESTION, PARAMS))
    assert raised.value.kind == "full" and raised.value.retry_after > 0 and [one.reason for one in told] == ["full"]


def test_refusals_of_the_engine_are_raised_as_its_own() -> None:
    error = PromptTooLongError("too long", "过长")
    engine, _, told = remote(FakeEngine(error=error))

    class Refusing:
        info = engine.info

        def stream(self, *args: Any) -> Any:
            yield Failure.of(error)

    engine, handle, told = remote(Refusing())
    with pytest.raises(PromptTooLongError, match="too long"):
        list(engine.stream(QUESTION, PARAMS))
    assert told == []


@pytest.mark.parametrize("closing", [True, False])
def test_giving_up_cancels_there_and_keeps_what_came(closing: bool) -> None:
    engine, handle, told = remote(FakeEngine(long_text(2000), delay=0.01))
    cancel, seen = threading.Event(), []
    stream = engine.stream(QUESTION, SamplingParams(2000), cancel)
    for event in stream:
        seen.append(event)
        if len(seen) == 10:
            if closing:
                stream.close()  # type: ignore[attr-defined]
            else:
                cancel.set()
    if not closing:
        start, finish = seen[0], seen[-1]
        assert isinstance(start, Start) and isinstance(finish, Finish) and finish.reason == "cancelled"
        assert finish.trace is not None and len(finish.trace.tokens) == start.prompt_tokens + finish.new_tokens
        assert finish.trace.experts.shape[0] == finish.trace.weights.shape[0] == len(finish.trace.tokens)
        assert text_of(seen).startswith(text_of([*seen][:9])) and finish.timings.tokens_per_second > 0
    assert len(seen) <= 12 and [one.reason for one in told] == ["cancelled"]
    end = time.monotonic() + 5
    while not handle.responses[0].cancelled and time.monotonic() < end:
        time.sleep(0.01)
    assert handle.responses[0].cancelled


def test_one_visitor_may_have_so_many_and_draining_takes_none() -> None:
    engine, _, told = remote(FakeEngine(long_text(500), delay=0.005), per_visitor=1)
    params = SamplingParams(500, visitor="me")
    first = engine.stream(QUESTION, params)
    next(first)
    assert engine.load_now() == (1, 0)
    with pytest.raises(BusyError) as raised:
        next(engine.stream(QUESTION, params))
    assert raised.value.kind == "visitor"
    next(other := engine.stream(QUESTION, SamplingParams(5, visitor="you")))
    assert not engine.drain(0.05) and engine.draining
    for _ in other:
        pass
    first.close()  # type: ignore[attr-defined]
    assert engine.drain(1)
    with pytest.raises(BusyError) as raised:
        next(engine.stream(QUESTION, SamplingParams(5, visitor="you")))
    assert raised.value.kind == "closing" and {one.reason for one in told} == {
        "visitor",
        "closing",
        "cancelled",
        "length",
    }


def test_closing_ends_what_runs() -> None:
    engine, _, _ = remote(FakeEngine(long_text(5000), delay=0.01))
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.extend(engine.stream(QUESTION, SamplingParams(5000))))
    thread.start()
    while not engine.load_now()[0]:
        time.sleep(0.01)
    engine.close()
    thread.join(5)
    assert isinstance(seen[-1], Finish) and seen[-1].reason == "closing"


def test_scores_are_asked_again_where_a_replica_went() -> None:
    engine, handle, _ = remote()
    handle.scores = [dead(), [-1.0, -2.0]]
    assert engine.score(QUESTION, ["a", "b"]) == [-1.0, -2.0]
    handle.scores = [dead()] * 3
    with pytest.raises(BusyError):
        engine.score(QUESTION, ["a"])
    handle.scores = [Failure.of(UsageError("nothing", "无"))]
    with pytest.raises(UsageError, match="nothing"):
        engine.score(QUESTION, ["a"])


def test_what_needs_the_model_here_is_refused_in_words() -> None:
    engine, _, _ = remote()
    finish = list(engine.stream(QUESTION, PARAMS))[-1]
    with pytest.raises(UsageError, match="other machines"):
        inspect(engine, finish.trace)  # type: ignore[arg-type]


def test_the_page_says_it_and_gives_the_question_back() -> None:
    engine, handle, _ = remote()
    handle.plan = [(5, dead())]
    session = Session()
    ask(session, "What is anaemia?")
    for _ in answer(engine, session, PARAMS):
        pass
    assert isinstance(session.error, BusyError) and "重新提问" in session.error.zh
    assert session.returned == "What is anaemia?"


def test_the_api_says_503_or_an_event_of_the_stream(tmp_path: Path) -> None:
    with tiny_engine(tmp_path / "model") as model:
        handle = Handle(model, model.tokenizer)
        served = run_server(EngineLoader.of(scale.RemoteEngine(handle)), settings(tmp_path))
        try:
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 50}
            handle.plan = [(4, dead()), (4, dead())]
            whole = httpx.post(f"{served.url}/v1/chat/completions", json=body)
            assert (
                whole.status_code == 503 and whole.json()["error"]["code"] == "lost" and "Retry-After" in whole.headers
            )
            streamed = httpx.post(f"{served.url}/v1/chat/completions", json=body | {"stream": True})
            assert streamed.status_code == 200 and '"code": "lost"' in streamed.text and "[DONE]" not in streamed.text
            again = httpx.post(f"{served.url}/v1/chat/completions", json=body)
            assert again.status_code == 200 and again.json()["system_fingerprint"].startswith("fp_ab_")
            assert 'ming_requests_total{reason="lost"} 2.0' in httpx.get(f"{served.url}/metrics").text
        finally:
            stop(served)


def test_a_place_in_the_queue_is_told() -> None:
    engine, handle, _ = remote(FakeEngine(long_text(5)))
    handle.engine.stream = lambda *a: iter(  # type: ignore[method-assign]
        [Queued(2, 9.0), *FakeEngine(long_text(5)).stream(QUESTION, PARAMS)]
    )
    first, *rest = engine.stream(QUESTION, PARAMS)
    assert first == Queued(2, 9.0) and isinstance(rest[-1], Finish)
