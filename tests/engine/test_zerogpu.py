"""The engine in forked workers: what comes back is what the Engine alone gives, and nothing that goes wrong spreads."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from gradio.context import LocalContext

from ming_app import errors
from ming_app.engine import loading
from ming_app.engine.engine import Engine
from ming_app.engine.inspection import contrast, inspect, inspect_given, option_probabilities
from ming_app.engine.types import Finish, Intervention, Message, SamplingParams, Start, Token
from ming_app.engine.zerogpu import LEAST, MOST, START, ZeroEngine, explained, seconds_for
from ming_app.errors import MingError, PromptTooLongError, QuotaError, StoppedError, UsageError
from ming_app.models.catalog import find_model
from ming_app.settings import Settings
from ming_app.ui.pump import Pump
from tests.spaces_stand_in import Spaces
from tests.tiny import make_engine

ASK = [Message("user", "什么是高血压？ What is it?")]
GREEDY = SamplingParams(max_new_tokens=24, temperature=0, repetition_penalty=1.0)
LONG = SamplingParams(max_new_tokens=300, temperature=0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return make_engine(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def spaces() -> Iterator[Spaces]:
    made = Spaces()
    yield made
    until(lambda: not made.alive(), 30)  # not join(): the thread that forked a worker waits for it as well


@pytest.fixture
def zero(plain: Engine, spaces: Spaces) -> ZeroEngine:
    return ZeroEngine(plain, spaces.GPU)


@pytest.fixture
def slow(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes a while, and no answer ends by itself."""
    forward = plain.backend.forward

    def wait_first(*args: Any, **options: Any) -> Any:
        time.sleep(0.02)
        return forward(*args, **options)

    monkeypatch.setattr(plain.backend, "forward", wait_first)
    monkeypatch.setattr(plain.tokenizer, "stop_ids", frozenset())


def breaking(plain: Engine, monkeypatch: pytest.MonkeyPatch, how: Any) -> None:
    """In the workers the model fails."""
    home = os.getpid()
    forward = plain.backend.forward

    def fail(*args: Any, **options: Any) -> Any:
        return forward(*args, **options) if os.getpid() == home else how()

    monkeypatch.setattr(plain.backend, "forward", fail)


def until(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def same_trace(a: Any, b: Any) -> None:
    assert np.array_equal(a.experts, b.experts) and np.allclose(a.weights, b.weights, atol=2e-3)
    assert [(t.id, t.text, t.role) for t in a.tokens] == [(t.id, t.text, t.role) for t in b.tokens]
    assert a.config == b.config and a.fingerprint == b.fingerprint


def test_events_are_those_of_the_engine_alone(plain: Engine, zero: ZeroEngine, spaces: Spaces) -> None:
    for params in (GREEDY, SamplingParams(max_new_tokens=24, temperature=1.2, seed=7)):
        there, here = list(zero.stream(ASK, params)), list(plain.stream(ASK, params))
        assert [type(event) for event in there] == [type(event) for event in here]
        for a, b in zip(there, here, strict=True):
            if isinstance(a, Token) and isinstance(b, Token):
                assert a.text == b.text and a.logprob == pytest.approx(b.logprob, abs=1e-4)
                assert np.array_equal(a.experts, b.experts)
        assert isinstance(there[0], Start) and isinstance(here[0], Start)
        same_trace(there[0].trace, here[0].trace)
        assert isinstance(there[-1], Finish) and isinstance(here[-1], Finish)
        same_trace(there[-1].trace, here[-1].trace)
        assert (there[-1].reason, there[-1].new_tokens) == (here[-1].reason, here[-1].new_tokens)
    assert zero.info.device == "ZeroGPU" and zero.adapter == plain.adapter
    assert len(spaces.workers) == 2 and zero.load_now() == (0, 0)


def test_the_main_process_never_runs_the_model(
    plain: Engine, zero: ZeroEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, forward = os.getpid(), plain.backend.forward

    def there(*args: Any, **options: Any) -> Any:
        assert os.getpid() != home
        return forward(*args, **options)

    monkeypatch.setattr(plain.backend, "forward", there)
    *_, finish = zero.stream(ASK, GREEDY)
    zero.score(ASK, ["A", "B"])
    inspect(zero, finish.trace)
    assert plain.load_now() == zero.load_now() == (0, 0) and plain.backend.fixed_steps is False


def test_what_a_gpu_is_not_needed_to_refuse_is_refused_before(zero: ZeroEngine, spaces: Spaces) -> None:
    with pytest.raises(PromptTooLongError):
        zero.stream([Message("user", "x" * 2000)], GREEDY)
    with pytest.raises(UsageError):
        zero.stream(ASK, SamplingParams(interventions=(Intervention("ban", 99),)))
    assert not spaces.asked


def test_seconds_follow_the_tokens_and_are_bounded(zero: ZeroEngine, spaces: Spaces) -> None:
    assert seconds_for(10, 1) == START + LEAST and seconds_for(10**6, 10**6) == START + MOST
    assert START + LEAST < seconds_for(300, 400) < seconds_for(300, 800) < START + MOST
    list(zero.stream(ASK, GREEDY))
    assert spaces.asked == [(START + LEAST, None)]


def test_cancelled_it_finishes_with_what_there_is(zero: ZeroEngine, spaces: Spaces, slow: None) -> None:
    cancel, seen = threading.Event(), []
    for event in zero.stream(ASK, LONG, cancel):
        seen.append(event)
        if len(seen) == 5:
            assert zero.load_now() == (1, 0)
            cancel.set()
            at = time.monotonic()
    assert time.monotonic() - at < 2
    finish = seen[-1]
    assert isinstance(finish, Finish) and finish.reason == "cancelled" and 4 <= finish.new_tokens < 100
    assert finish.trace is not None and len(finish.trace.tokens) == finish.prompt_tokens + finish.new_tokens
    until(lambda: spaces.alive() == 0, 2)


def test_closed_early_the_worker_ends_soon(zero: ZeroEngine, spaces: Spaces, slow: None) -> None:
    events = zero.stream(ASK, LONG)
    next(events)
    next(events)
    events.close()  # type: ignore[attr-defined]
    until(lambda: spaces.alive() == 0 and zero.load_now() == (0, 0), 2)
    assert isinstance(list(zero.stream(ASK, GREEDY))[-1], Finish)


def test_waiting_for_a_gpu_can_be_stopped(plain: Engine, slow: None) -> None:
    spaces = Spaces(gpus=0)
    zero = ZeroEngine(plain, spaces.GPU)
    cancel = threading.Event()
    threading.Timer(0.2, cancel.set).start()
    [finish] = zero.stream(ASK, LONG, cancel)
    assert isinstance(finish, Finish) and finish.reason == "cancelled" and finish.trace is None
    [finish] = zero.stream(ASK, SamplingParams(patience=0.2))
    assert isinstance(finish, Finish) and finish.reason == "deadline"
    assert zero.load_now() == (0, 2)
    spaces.free.release(2)  # those who have gone do not use the GPU that comes
    until(lambda: zero.load_now() == (0, 0) and spaces.alive() == 0, 3)


def test_an_answer_longer_than_the_gpu_is_lent_ends_by_its_deadline(
    zero: ZeroEngine, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ming_app.engine.zerogpu.seconds_for", lambda *_: START + 1)
    begin = time.monotonic()
    *_, finish = zero.stream(ASK, LONG)
    assert finish.reason == "deadline" and time.monotonic() - begin < 4


@pytest.mark.parametrize("how", ["refusal", "bug", "death"])
def test_a_failure_is_that_requests_alone(
    plain: Engine, zero: ZeroEngine, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Any:
        if how == "refusal":
            raise errors.WeightsError("It is damaged.", "已损坏。")
        if how == "bug":
            raise ValueError("高血压 secret words")
        os._exit(3)

    with pytest.MonkeyPatch.context() as patch:
        breaking(plain, patch, fail)
        with pytest.raises(MingError) as caught:
            list(zero.stream(ASK, GREEDY))
        with pytest.raises(MingError):
            zero.score(ASK, ["A"])
    if how == "refusal":
        assert isinstance(caught.value, errors.WeightsError) and caught.value.zh == "已损坏。"
    else:
        assert "ended before" in caught.value.en and "GPU" in caught.value.zh
        assert ("ValueError" in caught.value.en) == (how == "bug")
    assert "secret" not in caplog.text
    assert isinstance(list(zero.stream(ASK, GREEDY))[-1], Finish) and zero.load_now() == (0, 0)


def test_scores_are_those_of_the_engine_alone(plain: Engine, zero: ZeroEngine) -> None:
    letters, changed = ["A", "B", "高血压"], (Intervention("ban", 1),)
    assert zero.score(ASK, letters) == pytest.approx(plain.score(ASK, letters), abs=1e-4)
    assert zero.score([1, 2, 3], letters, changed) == pytest.approx(plain.score([1, 2, 3], letters, changed), abs=1e-4)
    with pytest.raises(UsageError):
        zero.score(ASK, [])


def test_close_reading_happens_in_the_worker(plain: Engine, zero: ZeroEngine) -> None:
    *_, finish = plain.stream(ASK, GREEDY)
    changes = [Intervention("off")]
    there, here = inspect(zero, finish.trace), inspect(plain, finish.trace)
    same_trace(there, here)
    assert there.probabilities is not None and here.probabilities is not None
    assert np.allclose(there.probabilities, here.probabilities, atol=2e-3)
    two, both = contrast(zero, finish.trace, changes), contrast(plain, finish.trace, changes)
    assert np.allclose(two.divergence, both.divergence, atol=1e-4) and two.first_difference == both.first_difference
    same_trace(inspect_given(zero, ASK, "答案"), inspect_given(plain, ASK, "答案"))
    odds = [option_probabilities(one, ASK, "AB", changes) for one in (zero, plain)]
    assert np.allclose([row[1:] for row in odds[0]], [row[1:] for row in odds[1]], atol=1e-4)
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(StoppedError):
        inspect(zero, finish.trace, cancel=stopped)


def test_two_visitors_at_once_get_their_own_answers_on_their_own_quota(plain: Engine, spaces: Spaces) -> None:
    zero = ZeroEngine(plain, spaces.GPU)
    said: dict[str, str] = {}

    def visit(name: str) -> None:  # as a Gradio handler: the context names the request
        LocalContext.request.set(name)  # type: ignore[arg-type]
        pump = Pump(zero, [Message("user", name)], LONG, threading.Event())
        said[name] = "".join(event.text for event in pump.events(1) if isinstance(event, Token))

    names = ("高血压是什么", "What is asthma?", "咳嗽")
    threads = [threading.Thread(target=visit, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {request for _, request in spaces.asked} == set(names)
    for name in names:
        alone = plain.stream([Message("user", name)], LONG)
        assert said[name] == "".join(event.text for event in alone if isinstance(event, Token))


def test_what_a_worker_keeps_is_lost_with_it(zero: ZeroEngine) -> None:
    for _ in range(2):
        first, *_ = zero.stream(ASK, GREEDY)
        assert isinstance(first, Start) and first.reused_tokens == 0


def test_a_closed_engine_refuses(tmp_path: Path, spaces: Spaces) -> None:
    zero = ZeroEngine(make_engine(tmp_path), spaces.GPU)
    zero.close()
    with pytest.raises(UsageError):
        list(zero.stream(ASK, GREEDY))


def test_a_spent_quota_is_said_in_words(plain: Engine) -> None:
    zero = ZeroEngine(plain, Spaces(quota=12).GPU)
    with pytest.raises(QuotaError) as caught:
        list(zero.stream(ASK, GREEDY))
    assert "12 s left" in caught.value.en and "03:05" in caught.value.en and "own computer" in caught.value.en
    assert "还剩 12 秒" in caught.value.zh and "3 小时 5 分钟后" in caught.value.zh and "自己的电脑" in caught.value.zh


@pytest.mark.parametrize(
    ("title", "message", "en", "zh"),
    [
        (
            "ZeroGPU quota exceeded",
            "You have exceeded your ZeroGPU quota (60s requested vs. 0s left). Try again in 1 day, 2:03:04. ",
            "today is used up. Sign in to Hugging Face for more, try again in 26:03",
            "26 小时 3 分钟后",
        ),
        ("ZeroGPU quota exceeded", "You have exceeded your ZeroGPU runs limit. ", "try again later", "稍后再试"),
        ("ZeroGPU quota exceeded", "Space app has reached its GPU limit. Try", "Space's own GPU time", "刷新页面"),
        ("ZeroGPU quota exceeded", "No GPU was available after 60s. Try", "No GPU is free", "没有空闲"),
        ("ZeroGPU queue timeout", "No GPU was available after 60s", "No GPU is free", "没有空闲"),
        ("ZeroGPU pending credits exceeded", "You have too many", "still run", "正在运行"),
        ("ZeroGPU illegal duration", "The requested GPU duration (118s) is larger", "shorter answer", "缩短"),
        ("ZeroGPU client error", "Expired ZeroGPU proxy token", "Reload the page", "刷新页面"),
        ("ZeroGPU worker error", "GPU task aborted", "Only this request is lost", "仅此请求"),
        ("Error", "something new", "did not lend a GPU", "未能"),
    ],
)
def test_refusals_are_explained_in_both_languages(title: str, message: str, en: str, zh: str) -> None:
    said = explained(gr.Error(message, title=title))
    assert en in said.en and zh in said.zh


def test_errors_cross_between_processes() -> None:
    for kind in (MingError, UsageError, PromptTooLongError, QuotaError):
        back = pickle.loads(pickle.dumps(kind("What.", "什么。")))
        assert type(back) is kind and (back.en, back.zh, str(back)) == ("What.", "什么。", "What.")


def test_settings_and_choices_on_a_zerogpu_space(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.load(env={"SPACE_ID": "a/b", "SPACES_ZERO_GPU": "true"})
    assert settings.zerogpu and not Settings.load(env={"SPACES_ZERO_GPU": "false"}).zerogpu
    monkeypatch.setattr(loading, "_has_cuda", lambda: False)  # the main process of a ZeroGPU Space has none
    model = find_model("ming-moe-0.5b")
    assert loading.choose_backend(settings, model) == ("torch", "bf16", "cuda")
    assert loading.choose_backend(settings.with_(precision="nf4"), model) == ("torch", "nf4", "cuda")
    assert loading.choose_backend(settings.with_(backend="cpu"), model)[0] == "cpu"


def test_loading_on_zerogpu_gives_an_engine_of_workers(
    plain: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way from the settings, with the stand-in in place of `spaces` and the CPU in place of its GPU."""
    from ming_app.models import load

    base = plain.adapter.parent / "base"  # type: ignore[union-attr]
    spaces, really = Spaces(), load.load_torch_model
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    placed: list[tuple[str, str]] = []

    def place(local: Any, adapter: Any, precision: str, device: str, progress: Any) -> Any:
        placed.append((precision, device))
        return really(local, adapter, "float32", "cpu", progress)

    monkeypatch.setattr(load, "load_torch_model", place)
    settings = Settings(model=str(base), adapter=str(plain.adapter), cache_dir=tmp_path, context=512, zerogpu=True)
    made = Engine.load(settings)
    assert placed == [("bf16", "cuda")] and isinstance(made, ZeroEngine)
    *_, finish = made.stream(ASK, GREEDY)
    assert finish.new_tokens and len(spaces.workers) == 1
    monkeypatch.setitem(sys.modules, "spaces", None)
    with pytest.raises(UsageError, match="spaces"):
        Engine.load(settings)


def test_spaces_is_imported_before_torch(tmp_path: Path) -> None:
    (tmp_path / "spaces.py").write_text("import sys\nprint('spaces', 'torch' in sys.modules)\n")
    script = "import ming_app.ui.launch as l; l.serve = lambda s: print('served') or 0; import ming_app.entry as e; e.main([])"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}", "SPACES_ZERO_GPU": "true"}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines()[-2:] == ["spaces False", "served"], run.stderr
