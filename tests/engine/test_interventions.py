"""Interventions: their text, what they compile to, that they act on their own request alone; and looking closely at answers."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from ming_app.engine.backends.torch import TorchBackend
from ming_app.engine.engine import Engine
from ming_app.engine.inspection import contrast, inspect
from ming_app.engine.interventions import compile_interventions, parse_intervention, written
from ming_app.engine.prompt import ChatTokenizer
from ming_app.engine.types import EngineInfo, Finish, Intervention, Message, SamplingParams
from ming_app.errors import StoppedError, TraceError, UsageError
from ming_app.models.load import load_torch_model
from tests.tiny import make_adapter, write_base

QUESTION = [Message("user", "什么是高血压？ What is it?")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def engine_of(base, adapter) -> Engine:
    backend = TorchBackend(load_torch_model(base, adapter), 512)
    experts = adapter.config.num_experts if adapter else 0
    config = adapter.config.to_dict() if adapter else {}
    info = EngineInfo("tiny", "Tiny", "torch", "float32", "cpu", 2, experts, 2 if adapter else 0, 512, "ab+cd", config)
    return Engine(backend, ChatTokenizer.from_folder(base), info)


@pytest.fixture(scope="module")
def engine(base) -> Engine:
    return engine_of(base, make_adapter(base))


def answer(engine: Engine, *texts: str, tokens: int = 12) -> Finish:
    params = SamplingParams(
        tokens, temperature=0, repetition_penalty=1.0, interventions=tuple(parse_intervention(t) for t in texts)
    )
    *_, finish = engine.stream(QUESTION, params)
    return finish


@pytest.mark.parametrize("text", ["ban:2", "force:0@1-1", "k:1@0-1/gate+down", "uniform/up", "off@0-0", "base"])
def test_text_round_trips(text: str) -> None:
    assert written(parse_intervention(text)) == text


@pytest.mark.parametrize(
    "text", ["", "ban two", "explode", "ban:2@", "ban:2/left", "ban:123456", "k:1@1-", "ban:2@0-1/gate+", "ban:-1"]
)
def test_wrong_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_intervention(text)


def test_compiled_by_hand() -> None:
    words = ["ban:3", "force:1@1-1/down", "k:3@0-0", "uniform/up", "off@1-1/gate", "base@0-0"]
    found = compile_interventions([parse_intervention(word) for word in words], layers=2, experts=4, top_k=2)
    assert found.bias is not None and found.gates is not None
    assert (found.bias[..., 3] < -1e5).all() and found.bias[1, 2, 1] == 1e4 and np.count_nonzero(found.bias) == 6 + 1
    assert found.gates.top_k[0].tolist() == [[3, 3, 3], [2, 2, 2]]
    assert found.gates.uniform[0].tolist() == [[False, True, False]] * 2
    assert found.gates.strength[0].tolist() == [[0, 0, 0], [0, 1, 1]]
    assert found.gates.attention[0].tolist() == [0, 1] and found.largest_k(2) == 3


def test_bans_alone_need_no_gates_until_fewer_than_k_are_left() -> None:
    two = [Intervention("ban", 0), Intervention("ban", 1)]
    assert compile_interventions(two, 2, 4, 2).gates is None
    three = compile_interventions([*two, Intervention("ban", 2)], 2, 4, 2)
    assert three.gates is not None and (three.gates.top_k == 1).all()
    with pytest.raises(UsageError, match="at least one"):
        compile_interventions([*two, Intervention("ban", 2), Intervention("ban", 3)], 2, 4, 2)


@pytest.mark.parametrize("text", ["ban:4", "force:9", "k:0", "k:5", "ban", "off@0-2", "off@1-0"])
def test_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        compile_interventions([parse_intervention(text)], 2, 4, 2)


def test_the_adapter_switched_off_is_the_base(engine: Engine, base) -> None:
    bare = engine_of(base, None)
    *_, plain = bare.stream(QUESTION, SamplingParams(12, temperature=0, repetition_penalty=1.0))
    switched = answer(engine, "base")
    assert switched.new_tokens == plain.new_tokens
    scores = [e.score(QUESTION, ["yes", "否"], i) for e, i in ((engine, [Intervention("base")]), (bare, []))]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert engine.score(QUESTION, ["yes", "否"]) != pytest.approx(scores[1], abs=1e-3)
    with pytest.raises(UsageError, match="no experts"):
        bare.score(QUESTION, ["x"], [Intervention("base")])


def test_the_trace_shows_what_was_changed(engine: Engine) -> None:
    trace = answer(engine, "k:3@1-1", "ban:0").trace
    assert trace is not None and trace.top_k == 3 and not (trace.experts[trace.weights > 0] == 0).any()
    assert (trace.weights[:, 0, :, 2] == 0).all() and (trace.weights[:, 1, :, 2] > 0).any()
    assert trace.config["interventions"] == ["k:3@1-1", "ban:0"]
    assert "interventions" not in answer(engine).trace.config


def test_requests_running_at_the_same_time_are_untouched(engine: Engine) -> None:
    alone = answer(engine)
    changed = answer(engine, "base")
    found: dict[int, Finish] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: answer(engine, *(["base"] if n % 2 else []))}))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, finish in found.items():
        expected = changed if n % 2 else alone
        assert [t.id for t in finish.trace.tokens] == [t.id for t in expected.trace.tokens]
        assert np.array_equal(finish.trace.experts, expected.trace.experts)


def test_inspection_reads_the_same_and_records_all(engine: Engine) -> None:
    trace = answer(engine).trace
    seen = inspect(engine, trace, others=3)
    assert np.array_equal(seen.experts, trace.experts)
    assert seen.probabilities.shape == (len(trace), 2, 3, 4) and (seen.contributions[..., 0] > 0).all()
    for before, after in zip(trace.tokens, seen.tokens, strict=True):
        assert (before.id, before.text, before.role) == (after.id, after.text, after.role)
        if after.role == "answer":
            assert after.logprob == pytest.approx(before.logprob, abs=1e-4)
            assert len(after.others) == 3 and after.others[0][1] == pytest.approx(after.logprob, abs=1e-5)  # greedy
        else:
            assert after.logprob is None and after.others == ()


def test_contrast_by_definition(engine: Engine) -> None:
    trace = answer(engine).trace
    found = contrast(engine, trace, [parse_intervention("off@0-0")])
    ids = np.array([t.id for t in trace.tokens])
    changes = engine.changes([parse_intervention("off@0-0")])
    logs = []
    for gates in (None, changes.gates):
        step = engine.backend.forward([ids], engine.backend.new_cache(1, 512), gates=gates, all_logits=True)
        logs.append(torch.from_numpy(step.logits[0]).double().log_softmax(-1).numpy())
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    prompt = sum(t.role == "prompt" for t in trace.tokens)
    assert found.divergence == pytest.approx(divergence[prompt - 1 : -1], abs=1e-4) and found.divergence.max() > 1e-3
    answers = [t for t in found.changed.tokens if t.role == "answer"]
    assert [t.logprob for t in answers] == pytest.approx(
        [logs[1][prompt - 1 + i, t.id] for i, t in enumerate(answers)], abs=1e-3
    )
    differs = [i for i in range(len(answers)) if logs[0][prompt - 1 + i].argmax() != logs[1][prompt - 1 + i].argmax()]
    assert found.first_difference == (differs[0] if differs else None)
    assert contrast(engine, trace, []).first_difference is None


def test_only_the_engines_own_texts_are_read_again(engine: Engine) -> None:
    trace = answer(engine).trace
    foreign = replace(trace, tokens=(replace(trace.tokens[0], id=5000), *trace.tokens[1:]))
    with pytest.raises(TraceError):
        inspect(engine, foreign)
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(StoppedError):
        inspect(engine, trace, cancel=stopped)


def test_a_reading_ends_with_the_engine(base, monkeypatch) -> None:
    engine = engine_of(base, make_adapter(base))
    trace = answer(engine).trace
    forward, begun = engine.backend.forward, threading.Event()

    def slow(*args, **options):
        begun.set()
        time.sleep(0.3)
        return forward(*args, **options)

    engine.backend.forward = slow
    found: list[BaseException] = []

    def read() -> None:
        try:
            inspect(engine, trace)
        except BaseException as error:
            found.append(error)

    monkeypatch.setattr("ming_app.engine.inspection.CHUNK", 1)
    reader, later = threading.Thread(target=read), threading.Thread(target=read)
    reader.start()
    assert begun.wait(10)
    later.start()  # waits for its turn until there is no model any more
    began = time.monotonic()
    engine.close()
    reader.join(20)
    later.join(20)
    assert time.monotonic() - began < 5 and [type(error) for error in found] == [StoppedError] * 2
