"""The Engine on a tiny real model: events, routing of every token, stopping, scoring."""

import threading
import time

import numpy as np
import pytest

from ming_app.engine.backends.torch import TorchBackend
from ming_app.engine.engine import Engine
from ming_app.engine.prompt import ChatTokenizer
from ming_app.engine.types import EngineInfo, Finish, Message, Queued, SamplingParams, Start, Token
from ming_app.errors import PromptTooLongError, UsageError
from ming_app.models.load import load_torch_model
from tests.tiny import make_adapter, write_base

QUESTION = [Message("user", "什么是高血压？ What is it?")]
GREEDY = SamplingParams(max_new_tokens=24, temperature=0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    base = write_base(tmp_path_factory.mktemp("base"))
    adapter = make_adapter(base)
    backend = TorchBackend(load_torch_model(base, adapter), 512)
    info = EngineInfo("tiny", "Tiny", "torch", "float32", "cpu", 2, 4, 2, 512, "ab+cd", adapter.config.to_dict())
    return Engine(backend, ChatTokenizer.from_folder(base), info)


def run(engine: Engine, params: SamplingParams = GREEDY, messages=QUESTION):
    start, *tokens, finish = [one for one in engine.stream(messages, params) if not isinstance(one, Queued)]
    assert isinstance(start, Start) and isinstance(finish, Finish) and all(isinstance(t, Token) for t in tokens)
    return start, tokens, finish


def test_greedy_stream_equals_plain_decoding(engine):
    start, tokens, finish = run(engine)
    prompt = np.array(engine.tokenizer.build(QUESTION, 512, 24).ids)
    assert start.prompt_tokens == len(prompt) == finish.prompt_tokens
    ids = list(prompt)
    for _ in range(finish.new_tokens):  # the whole text again for every token: no cache to be wrong
        step = engine.backend.forward([np.array(ids)], engine.backend.new_cache(1, 512))
        ids.append(int(step.logits[0].argmax()))
    assert [t.id for piece in tokens for t in piece.tokens] == ids[len(prompt) :]
    assert finish.reason == ("length" if finish.new_tokens == 24 else "stop")


def test_trace_is_the_routing_of_the_whole_text(engine):
    start, tokens, finish = run(engine)
    ids = np.array([t.id for t in finish.trace.tokens])
    whole = engine.backend.forward([ids], engine.backend.new_cache(1, 512))
    assert np.array_equal(finish.trace.experts, whole.experts[0])
    assert np.abs(finish.trace.weights.astype(float) - whole.weights[0].astype(float)).max() < 2e-3
    n = start.prompt_tokens
    assert np.array_equal(start.trace.experts, finish.trace.experts[:n])
    streamed = np.concatenate([t.experts for t in tokens])
    assert np.array_equal(streamed, finish.trace.experts[n:])
    assert [t.role for t in finish.trace.tokens] == ["prompt"] * n + ["answer"] * finish.new_tokens
    assert finish.trace.config["rank"] == 4 and finish.trace.fingerprint == "ab+cd"


def test_text_of_prompt_and_pieces_is_whole(engine):
    _, tokens, finish = run(engine)
    texts = finish.trace.pieces()
    prompt_text = "".join(text for text, members in texts if members[0] < finish.prompt_tokens)
    assert prompt_text == engine.tokenizer.decode(engine.tokenizer.build(QUESTION, 512, 24).ids)
    assert "".join(t.text for t in tokens) == "".join(t.text for t in finish.trace.tokens if t.role == "answer")


def test_a_seed_repeats_and_another_differs(engine):
    def sampled(seed: int) -> list[str]:
        return [t.text for t in run(engine, SamplingParams(max_new_tokens=20, seed=seed, temperature=1.5))[1]]

    assert sampled(1) == sampled(1) != sampled(2)


def test_untraced_requests_carry_no_routing(engine):
    start, tokens, finish = run(engine, SamplingParams(max_new_tokens=4, trace=False))
    assert start.trace is None and finish.trace is None and tokens[0].experts is None


def test_cancel_frees_the_model_within_two_tokens(engine, monkeypatch):
    cancel, calls = threading.Event(), []
    original = engine.backend.forward
    monkeypatch.setattr(engine.backend, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    events = engine.stream(QUESTION, GREEDY, cancel)
    next(events), next(events)
    cancel.set()
    before = len(calls)
    rest = list(events)
    assert rest[-1].reason == "cancelled" and len(calls) - before <= 2
    assert len(rest[-1].trace) == rest[-1].prompt_tokens + rest[-1].new_tokens


@pytest.fixture
def narrow(engine):
    """The same model with room for one request at a time."""
    one = Engine(engine.backend, engine.tokenizer, engine.info, slots=1)
    yield one
    one._batcher.close()


def endless(engine: Engine, messages=QUESTION):
    """A request that goes on until it is closed."""
    return engine.stream(messages, SamplingParams(max_new_tokens=400, temperature=5.0, repetition_penalty=3.0, seed=1))


def test_closing_the_iterator_lets_the_next_request_in(narrow):
    events = endless(narrow)
    next(events)
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (run(narrow), done.set()))
    waiting.start()
    assert not done.wait(0.2)
    assert narrow.load_now() == (1, 1)
    events.close()
    assert done.wait(20)
    waiting.join()


def test_a_waiting_request_can_be_stopped(narrow):
    events = endless(narrow)
    next(events)
    cancel = threading.Event()
    threading.Timer(0.1, cancel.set).start()
    for params, reason in ((GREEDY, "cancelled"), (SamplingParams(patience=0.1), "deadline")):
        queued, finish = list(narrow.stream(QUESTION, params, cancel if reason == "cancelled" else None))
        assert queued.before == 0 and queued.seconds > 0
        assert finish.reason == reason and finish.new_tokens == 0 and finish.trace is None
    events.close()


def test_stop_texts_end_the_answer_before_them(engine):
    _, tokens, _ = run(engine)
    text = "".join(t.text for t in tokens)
    assert len(text) > 12
    stop = text[8:11]
    at = text.index(stop)
    params = SamplingParams(max_new_tokens=24, temperature=0, repetition_penalty=1.0, stop=("\x00never", stop))
    _, cut, finish = run(engine, params)
    assert "".join(t.text for t in cut) == text[:at] and finish.reason == "stop"
    unseen = SamplingParams(max_new_tokens=24, temperature=0, repetition_penalty=1.0, stop=(text[-1] + "\x00",))
    assert "".join(t.text for t in run(engine, unseen)[1]) == text
    for bad in (("",), ("x" * 101,), ("a",) * 9, (3,)):
        with pytest.raises(UsageError):
            SamplingParams(stop=bad)


def test_deadline_cuts_the_answer(engine):
    events = engine.stream(QUESTION, SamplingParams(max_new_tokens=400, temperature=0, deadline=0.15))
    finish = None
    for event in events:
        time.sleep(0.02)
        finish = event
    assert finish.reason == "deadline" and finish.new_tokens < 400


def test_answers_end_at_the_context_limit(engine):
    question = [Message("user", "x" * 300)]
    start, _, finish = run(engine, SamplingParams(max_new_tokens=5000, temperature=0), question)
    assert start.max_new_tokens == 512 - start.prompt_tokens
    assert finish.reason in ("length", "stop") and finish.prompt_tokens + finish.new_tokens <= 512


def test_dropped_turns_are_told(engine):
    turns = [Message("user" if i % 2 == 0 else "assistant", "y" * 60) for i in range(11)]
    start, _, _ = run(engine, SamplingParams(max_new_tokens=2), turns)
    assert start.dropped_turns >= 2


def test_banned_experts_never_fire(engine):
    bias = np.zeros((2, 3, 4), np.float32)
    bias[:, :, 2] = -1e9
    _, _, finish = run(engine, SamplingParams(max_new_tokens=6, router_bias=bias))
    assert not (finish.trace.experts == 2).any()
    with pytest.raises(UsageError, match="router bias"):
        list(engine.stream(QUESTION, SamplingParams(router_bias=bias[:1])))
    with pytest.raises(UsageError, match="router bias"):
        list(engine.stream(QUESTION, SamplingParams(router_bias=bias * np.nan)))


def test_scores_equal_the_sum_of_log_probabilities(engine):
    choices = ["A", "B", " 高", "a longer one"]
    scores = engine.score(QUESTION, choices)
    prompt = engine.tokenizer.build(QUESTION, 512, 12).ids
    for choice, score in zip(choices, scores, strict=True):
        ids = engine.tokenizer.encode_text(choice)
        step = engine.backend.forward([np.array(prompt + ids)], engine.backend.new_cache(1, 512), all_logits=True)
        logits = step.logits[0].astype(np.float64)
        logp = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        want = sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(ids))
        assert score == pytest.approx(want, abs=1e-3)
    assert engine.score(prompt, choices[:1])[0] == pytest.approx(scores[0], abs=1e-4)
    with pytest.raises(UsageError):
        engine.score(QUESTION, [""])
    with pytest.raises(PromptTooLongError, match="512"):
        engine.score([1] * 500, ["a continuation that is too long"])


def test_timings_add_up(engine):
    _, _, finish = run(engine)
    t = finish.timings
    assert 0 < t.prefill_seconds <= t.first_token_seconds <= t.total_seconds
    assert t.tokens_per_second > 0
