"""The queue for the model: bounds, fair turns, estimates; and, on a real engine, places that are told and a server that stops."""

import threading
import time
from dataclasses import dataclass

import pytest

from ming_app.engine.types import Finish, Message, Outcome, Queued, SamplingParams, Start
from ming_app.engine.waiting import WaitingRoom
from ming_app.errors import BusyError
from tests.engine.tiny_engine import tiny_engine

LONG = SamplingParams(max_new_tokens=300, temperature=0)  # this model goes on for longer
SHORT = SamplingParams(max_new_tokens=3, temperature=0)
ASK = [Message("user", "发烧 cough")]


@dataclass(eq=False)
class Asked:
    visitor: str
    name: str = ""


def names(room: WaitingRoom, running=()) -> str:
    return "".join(one.name for one in room.order(running))


def test_turns_go_round() -> None:
    room: WaitingRoom[Asked] = WaitingRoom(2)
    for visitor, name in (("a", "1"), ("a", "2"), ("a", "3"), ("b", "4"), ("c", "5"), ("b", "6")):
        room.enter([Asked(visitor, name)], [])
    assert names(room) == "145263"
    alone = Asked("", "7")
    room.enter([alone, Asked("", "8")], [])
    assert names(room).startswith("14578")  # those who share with nobody are each a visitor of their own


def test_the_one_with_answers_running_waits_behind_the_others() -> None:
    room: WaitingRoom[Asked] = WaitingRoom(2)
    greedy, other = Asked("a", "1"), Asked("b", "2")
    room.enter([greedy], [])
    room.enter([other], [])
    assert names(room, [Asked("a")]) == "21"
    room.leave(other)
    assert names(room) == "1" and len(room) == 1


def test_too_many_are_refused_with_a_time_to_come_again() -> None:
    room: WaitingRoom[Asked] = WaitingRoom(2, limit=3)
    running = [Asked("x"), Asked("y")]
    for _ in range(3):
        room.enter([Asked("z")], running)
    with pytest.raises(BusyError) as caught:
        room.enter([Asked("w")], running)
    assert caught.value.kind == "full" and caught.value.retry_after == room.seconds(3)
    assert "3 requests" in caught.value.en and "3 个请求" in caught.value.zh and len(room) == 3
    room.enter([Asked("w"), Asked("w")], [])  # nobody runs: two of the places are free


def test_one_visitor_is_bounded_others_are_not() -> None:
    room: WaitingRoom[Asked] = WaitingRoom(2, per_visitor=2)
    mine = Asked("me")
    room.enter([mine], [])
    with pytest.raises(BusyError) as caught:
        room.enter([Asked("me")], [Asked("me")])
    assert caught.value.kind == "visitor"
    room.enter([Asked("you"), Asked("you")], [])
    room.enter([Asked("") for _ in range(9)], [])
    room.leave(mine)
    room.enter([Asked("me")], [Asked("me")])


def test_the_estimate_follows_how_long_answers_take() -> None:
    room: WaitingRoom[Asked] = WaitingRoom(4)
    for _ in range(60):
        room.ended(2.0)
    assert room.seconds(0) == pytest.approx(0.5, rel=0.01)
    assert room.seconds(7) == pytest.approx(4.0, rel=0.01)


# -- on an engine -----------------------------------------------------------------------------------------------------


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_places_are_told_and_change(tmp_path) -> None:
    with tiny_engine(tmp_path, pause=0.01, slots=1) as engine:
        first = engine.stream(ASK, LONG)
        next(first)
        told: list[list] = [[], []]

        def ask(index: int) -> None:
            for event in engine.stream(ASK, SHORT):
                told[index].append(event)

        threads = []
        for index in range(2):
            threads.append(threading.Thread(target=ask, args=(index,)))
            threads[-1].start()
            until(lambda: bool(told[index]))  # noqa: B023
        assert engine.load_now() == (1, 2)
        first.close()
        for thread in threads:
            thread.join()
        places = [[event.before for event in one if isinstance(event, Queued) and event.seconds] for one in told]
        assert places == [[0], [1, 0]]
        for one in told:
            turn = one[[isinstance(event, Start) for event in one].index(True) - 1]
            assert turn == Queued(0, 0.0) and isinstance(one[-1], Finish)


def test_bounds_hold_and_every_end_is_counted_once(tmp_path) -> None:
    with tiny_engine(tmp_path, pause=0.01, slots=1, max_waiting=1, per_visitor=1) as engine:
        outcomes: list[Outcome] = []
        engine.on_end(outcomes.append)
        mine = SamplingParams(max_new_tokens=300, temperature=0, visitor="me")
        first = engine.stream(ASK, mine)
        assert isinstance(next(first), Start)
        with pytest.raises(BusyError, match="unfinished"):
            next(engine.stream(ASK, mine))
        waiting = threading.Thread(target=lambda: list(engine.stream(ASK, SHORT)))
        waiting.start()
        until(lambda: engine.load_now() == (1, 1))
        with pytest.raises(BusyError, match="waiting") as caught:
            next(engine.stream(ASK, SHORT))
        assert engine.expected_wait() == caught.value.retry_after > 0
        first.close()
        waiting.join()
        assert engine.expected_wait() == 0
        until(lambda: len(outcomes) == 4)
        assert sorted(one.reason for one in outcomes) == ["cancelled", "full", "length", "visitor"]
        done = next(one for one in outcomes if one.reason == "length")
        assert done.new_tokens == 3 and done.prompt_tokens > 3 and 0 < done.waited_seconds <= done.first_token_seconds
        list(engine.stream(ASK, mine.__class__(max_new_tokens=2, visitor="me")))  # and nothing is left behind


def test_a_stopping_server_lets_answers_end_and_takes_no_more(tmp_path) -> None:
    with tiny_engine(tmp_path, pause=0.01, slots=1) as engine:
        outcomes: list[Outcome] = []
        engine.on_end(outcomes.append)
        first = engine.stream(ASK, SamplingParams(max_new_tokens=40, temperature=0, repetition_penalty=1.0))
        next(first)
        found: list[object] = []

        def wait() -> None:
            try:
                found.extend(engine.stream(ASK, SHORT))
            except BusyError as error:
                found.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        until(lambda: engine.load_now() == (1, 1))
        assert engine.drain(30.0)
        waiting.join()
        assert isinstance(found[-1], BusyError) and found[-1].kind == "closing"
        *_, finish = list(first)
        assert finish.reason in ("stop", "length") and engine.load_now() == (0, 0)
        with pytest.raises(BusyError, match="stopped"):
            next(engine.stream(ASK, SHORT))
        assert [one.reason for one in outcomes].count("closing") == 2


def test_what_does_not_end_in_time_is_kept_as_it_is(tmp_path) -> None:
    with tiny_engine(tmp_path, pause=0.01, slots=1) as engine:
        events = engine.stream(ASK, LONG)
        next(events)
        assert not engine.drain(0.0)
        engine.close()
        *tokens, finish = list(events)
        assert finish.reason == "closing" and finish.new_tokens >= len(tokens)


def test_who_has_heard_the_end_may_ask_again_at_once(tmp_path) -> None:
    with tiny_engine(tmp_path, slots=2, per_visitor=1) as engine:
        mine = SamplingParams(max_new_tokens=2, temperature=0, visitor="me")
        for _ in range(100):
            *_, finish = engine.stream(ASK, mine)
            assert isinstance(finish, Finish) and engine.load_now() == (0, 0)
