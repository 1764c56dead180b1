"""Many requests at once, on the CPU engine over a tiny model: each gives what it gives alone, memory is bounded, nobody waits
behind long prompts, and what was read before is not read again."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ming_app.engine.backends.native.backend import NativeBackend
from ming_app.engine.backends.native.build import build_engine
from ming_app.engine.engine import Engine
from ming_app.engine.prompt import ChatTokenizer
from ming_app.engine.types import (
    CacheFullError,
    EngineInfo,
    Finish,
    Intervention,
    Message,
    Queued,
    SamplingParams,
    Start,
    Token,
)
from ming_app.errors import UsageError
from ming_app.models.tensors import open_tensors
from tests.tiny import make_adapter, write_base

CONTEXT = 512
WORDS = ("发烧", "cough", "头痛", "iron", "anaemia", "血压", "rest", "water", "何时", "why")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    base = write_base(tmp_path_factory.mktemp("base"))
    adapter = make_adapter(base)
    with open_tensors(base) as source:
        folder = build_engine(source, adapter, "8bit", tmp_path_factory.mktemp("built") / "engine")
    return folder, base, adapter


@pytest.fixture
def make(parts):
    made: list[Engine] = []

    def engine(**options) -> Engine:
        folder, base, adapter = parts
        backend = NativeBackend.open(folder, threads=2, max_context=CONTEXT)
        info = EngineInfo("tiny", "Tiny", "cpu", "8bit", "cpu", 2, 4, 2, CONTEXT, "ab", adapter.config.to_dict())
        made.append(Engine(backend, ChatTokenizer.from_folder(base), info, **options))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def question(seed: int, words: int = 6) -> list[Message]:
    return [Message("user", " ".join(random.Random(seed).choices(WORDS, k=words)))]


def result(events) -> tuple:
    """Everything that a request says, without times."""
    start, *tokens, finish = [event for event in events if not isinstance(event, Queued)]
    assert isinstance(start, Start) and isinstance(finish, Finish) and all(isinstance(t, Token) for t in tokens)
    text = "".join(t.text for t in tokens)
    logprobs = [one.logprob for t in tokens for one in t.tokens]
    return text, logprobs, finish.reason, finish.prompt_tokens, finish.new_tokens, finish.trace


def same(a: tuple, b: tuple) -> bool:
    traces = [
        (one[-1] is None) or (one[-1].experts.tobytes(), one[-1].weights.tobytes(), one[-1].tokens) for one in (a, b)
    ]
    return a[:-1] == b[:-1] and traces[0] == traces[1]


def requests() -> list[tuple[list[Message], SamplingParams]]:
    """Mixed: greedy and sampled, long and short, traced or not, with bias and interventions."""
    bias = np.zeros((2, 3, 4), np.float32)
    bias[:, :, 1] = -50
    kinds = [
        SamplingParams(max_new_tokens=30, temperature=0, repetition_penalty=1.0),
        SamplingParams(max_new_tokens=17, temperature=0.9, seed=3),
        SamplingParams(max_new_tokens=40, temperature=0, trace=False),
        SamplingParams(max_new_tokens=20, temperature=0, router_bias=bias),
        SamplingParams(max_new_tokens=25, temperature=1.2, seed=5, interventions=(Intervention("k", 3),)),
        SamplingParams(max_new_tokens=12, temperature=0, interventions=(Intervention("base"),)),
        SamplingParams(max_new_tokens=9, temperature=0.7, seed=8, stop=("e", "的")),
    ]
    return [(question(i, 3 + 11 * (i % 4)), kinds[i % len(kinds)]) for i in range(21)]


def test_together_equals_alone(make):
    alone_engine, engine = make(slots=1), make(slots=6)
    asked = requests()
    alone = [result(alone_engine.stream(messages, params)) for messages, params in asked]
    found: list[tuple | None] = [None] * len(asked)

    def ask(index: int) -> None:
        time.sleep(random.Random(index).random() * 0.2)  # they come and go in the middle of one another
        found[index] = result(engine.stream(*asked[index]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(a, b) for a, b in zip(alone, found, strict=True))
    assert any(len(one[-1].experts[0, 0, 0]) == 3 for one in alone if one[-1] is not None)


def test_together_is_alone_on_the_reference_backend_too(parts):
    """There within float32 rounding: a batch adds in another order."""
    from ming_app.engine.backends.torch import TorchBackend
    from ming_app.models.load import load_torch_model

    _, base, adapter = parts
    backend = TorchBackend(load_torch_model(base, adapter), CONTEXT)
    info = EngineInfo("tiny", "Tiny", "torch", "float32", "cpu", 2, 4, 2, CONTEXT, "ab", adapter.config.to_dict())
    alone, engine = (Engine(backend, ChatTokenizer.from_folder(base), info, slots=slots) for slots in (1, 5))
    asked = requests()[:12]
    want = [result(alone.stream(*one)) for one in asked]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda one: result(engine.stream(*one)), asked))
    for one, two in zip(want, found, strict=True):
        alike = (
            min(len(one[1]), len(two[1])) if one[0] == two[0] else 1
        )  # the first token was drawn from the same prompt
        np.testing.assert_allclose(one[1][:alike], two[1][:alike], atol=1e-3)
        assert one[3] == two[3] and (one[5] is None) == (two[5] is None)
        if one[5] is not None:
            n = one[3]
            assert (one[5].experts[:n] == two[5].experts[:n]).mean() > 0.99
    assert sum(one[0] == two[0] for one, two in zip(want, found, strict=True)) >= 10  # a tie may fall the other way
    last = result(engine.stream(*asked[0]))  # asked last: which of the twelve are still kept is a matter of timing
    talk = [*asked[0][0], Message("assistant", last[0]), Message("user", "and then?")]
    start = next(iter(engine.stream(talk, asked[0][1])))
    assert start.reused_tokens >= last[3]
    alone.close()


def test_the_next_turn_reads_only_what_is_new(make):
    engine, fresh = make(), make()
    params = SamplingParams(max_new_tokens=24, temperature=0)
    talk = question(1, 20)
    first = result(engine.stream(talk, params))
    talk += [Message("assistant", first[0]), Message("user", "and then?")]
    events = list(engine.stream(talk, params))
    assert events[0].reused_tokens >= first[3] > 100  # the first prompt, and the answer as far as it reads alike
    assert same(result(iter(events)), result(fresh.stream(talk, params)))
    again = list(engine.stream(talk, params))
    assert again[0].reused_tokens == again[0].prompt_tokens - 1
    assert same(result(iter(again)), result(iter(events)))


def test_what_was_read_under_changes_is_not_reused_without_them(make):
    engine, fresh = make(), make()
    changed = SamplingParams(max_new_tokens=8, temperature=0, interventions=(Intervention("base"),))
    plain = SamplingParams(max_new_tokens=8, temperature=0)
    list(engine.stream(question(2, 20), changed))
    events = list(engine.stream(question(2, 20), plain))
    assert events[0].reused_tokens == 0
    assert same(result(iter(events)), result(fresh.stream(question(2, 20), plain)))
    assert list(engine.stream(question(2, 20), changed))[0].reused_tokens > 0
    untraced = SamplingParams(max_new_tokens=8, temperature=0, trace=False)
    list(engine.stream(question(3, 20), untraced))
    assert list(engine.stream(question(3, 20), plain))[0].trace is not None  # routing of every token of the prompt
    assert len(list(engine.stream(question(3, 20), plain))[-1].trace) > 60


def test_a_short_prompt_does_not_wait_for_long_ones(make, monkeypatch):
    engine = make(slots=8, kv_tokens=8 * CONTEXT)
    calls: list[int] = []
    original = engine.backend.forward

    def forward(ids, cache, **options):
        calls.append(sum(map(len, ids)))
        time.sleep(0.03)  # a larger model
        return original(ids, cache, **options)

    monkeypatch.setattr(engine.backend, "forward", forward)
    go = SamplingParams(max_new_tokens=4, temperature=0)
    order: list[str] = []

    def ask(name: str, words: int, seed: int) -> None:
        for event in engine.stream(question(seed, words), go):
            if isinstance(event, Start):
                order.append(name)

    threads = [threading.Thread(target=ask, args=(f"long{i}", 60, i)) for i in range(7)]
    for thread in threads:
        thread.start()
    while not calls:
        time.sleep(0.001)
    short = threading.Thread(target=ask, args=("short", 1, 99))
    short.start()
    for thread in [*threads, short]:
        thread.join()
    assert order.index("short") <= 2  # one chunk may have been under way
    assert max(calls) <= 256 + 8


def test_a_long_prompt_is_read_in_pieces_while_others_write(make, monkeypatch):
    engine = make()
    writer = engine.stream(question(1), SamplingParams(max_new_tokens=200, temperature=5.0, seed=2))
    next(writer), next(writer)
    sizes: list[list[int]] = []
    original = engine.backend.forward
    monkeypatch.setattr(
        engine.backend, "forward", lambda ids, *a, **k: sizes.append([len(x) for x in ids]) or original(ids, *a, **k)
    )
    list(engine.stream(question(2, 60), SamplingParams(max_new_tokens=2, temperature=0)))
    mixed = [one for one in sizes if len(one) == 2 and max(one) > 1]
    assert len(mixed) > 5 and all(min(one) == 1 and max(one) <= 32 for one in mixed)
    writer.close()


def test_a_small_request_may_go_before_one_that_does_not_fit(make, monkeypatch):
    engine = make(slots=4, kv_tokens=CONTEXT)
    go = SamplingParams(max_new_tokens=150, temperature=5.0, seed=1, repetition_penalty=3.0)
    first = engine.stream(question(1, 30), go)
    next(first)
    large = threading.Thread(target=lambda: result(engine.stream(question(2, 40), go)))
    large.start()
    while engine.load_now() != (1, 1):
        time.sleep(0.001)
    assert result(engine.stream(question(3, 1), SamplingParams(max_new_tokens=2, temperature=0)))[4] <= 2
    assert engine.load_now() == (1, 1)
    first.close()
    large.join()


def test_memory_is_bounded_and_requests_wait_for_it(make):
    engine = make(slots=8, kv_tokens=CONTEXT)
    params = SamplingParams(max_new_tokens=150, temperature=0, repetition_penalty=1.0)
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            most[0] = max(most[0], engine.load_now()[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = [None] * 6
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, result(engine.stream(question(i, 10), params))))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set(), watcher.join()
    assert all(one[2] in ("stop", "length") for one in found) and 1 <= most[0] <= 3
    cache = engine._batcher._cache
    assert cache.pages * 16 <= CONTEXT + 16 * len(cache.lengths)
    long = result(engine.stream(question(50, 50), SamplingParams(max_new_tokens=100, temperature=0)))
    assert long[2] in ("stop", "length")  # what idle rows held made room


def test_a_failing_request_fails_alone(make, monkeypatch):
    engine = make()
    original = engine.backend.forward

    def forward(ids, cache, **options):
        if any(len(row) == 1 and row[0] == poison for row in ids):
            raise MemoryError("no")
        return original(ids, cache, **options)

    plain = SamplingParams(max_new_tokens=20, temperature=0, repetition_penalty=1.0)
    good, bad = result(engine.stream(question(1), plain)), result(engine.stream(question(2), plain))
    poison = next(
        t.id for t in bad[-1].tokens if t.role == "answer" and t.id not in {x.id for x in good[-1].tokens[-20:]}
    )
    monkeypatch.setattr(engine.backend, "forward", forward)
    outcome: dict[int, object] = {}

    def ask(index: int) -> None:
        try:
            outcome[index] = result(engine.stream(question(index), plain))
        except MemoryError as error:
            outcome[index] = error

    threads = [threading.Thread(target=ask, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(outcome[2], MemoryError) and same(outcome[1], good)
    monkeypatch.setattr(engine.backend, "forward", original)
    assert same(result(engine.stream(question(2), plain)), bad)
    assert engine.load_now() == (0, 0)


def test_pages_of_a_failed_step_are_not_lost(make, monkeypatch):
    engine = make()
    cache = engine.backend.new_cache(2, 64, tokens=64)
    monkeypatch.setattr(engine.backend, "_part", lambda *_: 1 / 0)
    for _ in range(10):
        with pytest.raises(ZeroDivisionError):
            engine.backend.forward([np.arange(20)], cache, rows=[1])
    cache.truncate(1, 0)
    assert cache.free_tokens == 64


def test_a_thread_that_breaks_tells_everybody_and_is_replaced(make, monkeypatch):
    engine = make()
    params = SamplingParams(max_new_tokens=5, temperature=0)
    good = result(engine.stream(question(1), params))
    monkeypatch.setattr("ming_app.engine.batch._key", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(engine.stream(question(1), params))
    monkeypatch.undo()
    assert same(result(engine.stream(question(1), params)), good)
    monkeypatch.setattr("ming_app.engine.jobs.Sampler.choose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(engine.stream(question(1), params))
    monkeypatch.undo()
    assert same(result(engine.stream(question(1), params)), good)


def test_scores_at_the_same_time_equal_scores_alone(make):
    engine, alone = make(), make(slots=1)
    tasks = [(question(i, 2 + i % 9), ["yes", "否", " A", "a longer one"][: 1 + i % 4]) for i in range(40)]
    changes = [[Intervention("base")] if i % 5 == 0 else [] for i in range(40)]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda task, changed: engine.score(*task, changed), tasks, changes))
    assert found == [alone.score(*task, changed) for task, changed in zip(tasks, changes, strict=True)]
    with pytest.raises(UsageError):
        engine.score(question(1), [""])


def test_closing_ends_what_runs(make):
    engine = make()
    events = engine.stream(question(1), SamplingParams(max_new_tokens=400, temperature=5.0, seed=1))
    next(events), next(events)
    engine.close()
    *_, finish = list(events)  # what was written so far is the answer
    assert isinstance(finish, Finish) and finish.reason == "closing" and finish.new_tokens
    with pytest.raises(UsageError, match="closed"):
        next(engine.stream(question(1), SamplingParams()))


def test_the_thread_ends_when_idle_and_comes_back(make, monkeypatch):
    monkeypatch.setattr("ming_app.engine.batch.LINGER", 0.05)
    engine = make()
    params = SamplingParams(max_new_tokens=3, temperature=0)
    first = result(engine.stream(question(1), params))
    for _ in range(100):
        if engine._batcher._thread is None:
            break
        time.sleep(0.02)
    assert engine._batcher._thread is None
    assert same(result(engine.stream(question(1), params)), first)


def test_the_cache_says_when_it_is_full(make):
    backend = make().backend
    cache = backend.new_cache(2, 64, tokens=32)
    with pytest.raises(CacheFullError) as caught:
        backend.forward([np.arange(20), np.arange(20)], cache)
    assert "32" in caught.value.en and "32" in caught.value.zh
