"""An engine in a process of its own, without any cluster: refusals as values, cancelling, an update while answers run, health.
And the calculator of examples/scale."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.scale import plan
from ming_app.engine.engine import Engine
from ming_app.engine.types import EngineInfo, Finish, Message, Outcome, SamplingParams, Token
from ming_app.errors import BusyError, PromptTooLongError, UsageError
from ming_app.scale.replica import FAILURES, EngineReplica, Failure, cluster_settings, replica_settings
from ming_app.settings import Settings
from tests.away import finished
from tests.engine.tiny_engine import tiny_engine

ROOT = Path(__file__).resolve().parents[2]
QUESTION = [Message("user", "What is anaemia?")]
GREEDY = SamplingParams(200, temperature=0, repetition_penalty=1.0)


class Loads:
    """Loads a tiny engine per adapter name, whose fingerprint says which. `slots`: requests it runs at a time."""

    slots = 8

    def __init__(self, folder: Path, pause: float = 0.0):
        self.folder, self.pause = folder, pause
        self.engines: dict[str, Engine] = {}
        self.open: list[Any] = []

    def __call__(self, settings: Settings) -> Engine:
        if settings.adapter == "broken":
            raise UsageError("no such adapter", "没有该适配器")
        made = tiny_engine(self.folder / settings.adapter, pause=self.pause, slots=self.slots)
        self.open.append(made)
        engine = self.engines[settings.adapter] = made.__enter__()
        engine.info = replace(engine.info, fingerprint=f"ab+{settings.adapter}")
        return engine

    def close(self) -> None:
        for made in self.open:
            made.__exit__(None, None, None)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """`run(work, pause)`: `await work(replica, loads)` with a replica that serves adapter "old"."""

    def do(work: Callable[[EngineReplica, Loads], Any], pause: float = 0.0) -> Any:
        loads = Loads(tmp_path, pause)

        async def whole() -> Any:
            replica = EngineReplica({"cache_dir": str(tmp_path), "drain_seconds": 20}, loads)
            await replica.reconfigure({"adapter": "old"})
            try:
                return await work(replica, loads)
            finally:
                await asyncio.gather(*replica._retiring)

        try:
            return finished(whole())
        finally:
            loads.close()

    return do


async def flat(replica: EngineReplica, messages: list[Message], params: SamplingParams) -> list[Any]:
    return [item async for items in replica.stream(messages, params) for item in items]


def test_an_answer_is_the_engines_own(run: Any) -> None:
    async def work(replica: EngineReplica, loads: Loads) -> None:
        found = await flat(replica, QUESTION, GREEDY)
        assert isinstance(found[0], EngineInfo) and found[0].fingerprint == "ab+old"
        own = await asyncio.to_thread(lambda: list(loads.engines["old"].stream(QUESTION, GREEDY)))
        assert isinstance(found[-1], Finish) and pickle.loads(pickle.dumps(found))[-1].reason == found[-1].reason
        assert [e.text for e in found if isinstance(e, Token)] == [e.text for e in own if isinstance(e, Token)]
        assert await replica.score(QUESTION, ["a", "b"]) == loads.engines["old"].score(QUESTION, ["a", "b"])
        info, tokenizer = pickle.loads(pickle.dumps(await replica.describe()))
        assert info == found[0] and tokenizer.encode_text("贫血") == loads.engines["old"].tokenizer.encode_text("贫血")

    run(work)


def test_refusals_travel_as_values(run: Any) -> None:
    async def work(replica: EngineReplica, loads: Loads) -> None:
        *_, last = await flat(replica, [Message("user", "x" * 2000)], GREEDY)
        assert isinstance(last, Failure) and isinstance(last.error(), PromptTooLongError)
        empty = await replica.score(QUESTION, [])
        assert isinstance(empty, Failure) and isinstance(empty.error(), UsageError)

    run(work)
    busy = pickle.loads(pickle.dumps(Failure.of(BusyError.full(3, 12.0)))).error()
    assert isinstance(busy, BusyError) and (busy.kind, busy.retry_after, busy.zh) == (
        "full",
        12.0,
        BusyError.full(3, 12).zh,
    )


def test_a_bug_is_named_without_anybodys_words(caplog: pytest.LogCaptureFixture) -> None:
    words = " ".join(["pri", "vate"])
    try:
        raise ValueError(words)
    except ValueError as error:
        failure = Failure.of(error)
    assert words not in repr(failure) + caplog.text and "ValueError" in str(failure.error())


def test_a_caller_that_cancels_frees_the_model_within_two_tokens(run: Any) -> None:
    async def work(replica: EngineReplica, loads: Loads) -> None:
        seen = 0

        async def read() -> None:
            nonlocal seen
            async for items in replica.stream(QUESTION, GREEDY):
                seen += sum(len(one.tokens) for one in items if isinstance(one, Token))

        task = asyncio.create_task(read())
        while seen < 5:
            await asyncio.sleep(0.01)
        task.cancel()
        at = seen
        while (await replica.look())["running"]:
            await asyncio.sleep(0.01)
        (outcome,) = (await replica.look())["outcomes"]
        assert outcome.reason == "cancelled" and outcome.new_tokens <= at + 2

    run(work, pause=0.05)


def test_an_update_lets_old_answers_end_and_serves_new_ones(run: Any) -> None:
    async def work(replica: EngineReplica, loads: Loads) -> None:
        params = replace(GREEDY, max_new_tokens=60)
        old = asyncio.create_task(flat(replica, QUESTION, params))
        while not (await replica.look())["running"]:
            await asyncio.sleep(0.01)
        await replica.reconfigure({"adapter": "new"})
        assert not old.done()
        new = await flat(replica, QUESTION, replace(GREEDY, max_new_tokens=3))
        assert new[0].fingerprint == "ab+new" and isinstance(new[-1], Finish)
        before = await old
        assert before[0].fingerprint == "ab+old" and before[-1].reason in ("stop", "length")
        await asyncio.gather(*replica._retiring)
        with pytest.raises(BusyError):  # closed
            loads.engines["old"].score(QUESTION, ["a"])

    run(work, pause=0.02)


def test_an_update_waits_for_who_has_not_yet_been_let_in(run: Any) -> None:
    """Between asking for the engine and queueing there is a moment: the old engine is not closed in it."""

    async def work(replica: EngineReplica, loads: Loads) -> None:
        stream = replica.stream(QUESTION, replace(GREEDY, max_new_tokens=3))
        first = await anext(stream)  # only the info so far: the engine has not heard of it
        assert first[0].fingerprint == "ab+old" and not any(loads.engines["old"].load_now())
        await replica.reconfigure({"adapter": "new"})
        await asyncio.sleep(0.5)
        rest = [item async for items in stream for item in items]
        assert isinstance(rest[-1], Finish) and rest[-1].reason in ("stop", "length")

    run(work)


def test_who_still_waits_when_the_old_engine_goes_is_sent_elsewhere(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loads, "slots", 1)

    async def work(replica: EngineReplica, loads: Loads) -> None:
        running = asyncio.create_task(flat(replica, QUESTION, GREEDY))
        while not (await replica.look())["running"]:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(flat(replica, [Message("user", "and gout?")], GREEDY))
        while not (await replica.look())["waiting"]:
            await asyncio.sleep(0.01)
        await replica.reconfigure({"adapter": "new", "drain_seconds": 1})
        error = (await waiting)[-1].error()
        assert isinstance(error, BusyError) and error.kind == "closing"
        await running

    run(work, pause=0.05)


def test_scoring_is_a_sign_of_life(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ming_app.scale.replica.STALLED_SECONDS", 0.3)

    async def work(replica: EngineReplica, loads: Loads) -> None:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            await replica.score(QUESTION, [" A", " B"])
            monkeypatch.setattr(loads.engines["old"], "load_now", lambda: (1, 0))  # the next one runs already
            await replica.check_health()

    run(work)


def test_an_update_that_cannot_be_leaves_what_was_served(run: Any) -> None:
    async def work(replica: EngineReplica, loads: Loads) -> None:
        with pytest.raises(UsageError):
            await replica.reconfigure({"adapter": "broken"})
        await replica.reconfigure({"adapter": "old"})  # nothing changed, so nothing is loaded
        assert (await flat(replica, QUESTION, GREEDY))[0].fingerprint == "ab+old" and len(loads.engines) == 1

    run(work)


def test_health_fails_where_the_engine_is_broken(run: Any) -> None:
    async def work(replica: EngineReplica, loads: Loads) -> None:
        await replica.check_health()
        await flat(replica, QUESTION, replace(GREEDY, max_new_tokens=2))

        def broken(*args: Any, **options: Any) -> Any:
            raise MemoryError

        loads.engines["old"].backend.forward = broken  # type: ignore[method-assign]
        for number in range(FAILURES):
            await replica.check_health()
            *_, last = await flat(replica, [Message("user", f"question {number}")], GREEDY)
            assert isinstance(last, Failure) and str(last.error()).startswith("MemoryError")
        with pytest.raises(RuntimeError, match="ended with an error"):
            await replica.check_health()
        replica._ended(Outcome("stop"))
        await replica.check_health()

    run(work)


def test_health_fails_where_nothing_moves(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ming_app.scale.replica.STALLED_SECONDS", 0.2)
    go = threading.Event()

    async def work(replica: EngineReplica, loads: Loads) -> None:
        forward = loads.engines["old"].backend.forward
        loads.engines["old"].backend.forward = lambda *a, **o: (go.wait(30), forward(*a, **o))[1]  # type: ignore[method-assign]
        task = asyncio.create_task(flat(replica, QUESTION, replace(GREEDY, max_new_tokens=2)))
        end = time.monotonic() + 20
        with pytest.raises(RuntimeError, match="no event"):
            while time.monotonic() < end:
                await replica.check_health()
                await asyncio.sleep(0.02)
        go.set()
        await task

    run(work)


def test_settings_of_a_configuration_file(tmp_path: Path) -> None:
    settings = replica_settings({"cache_dir": str(tmp_path), "streams": 2})
    assert settings.cache_dir == tmp_path and settings.streams == 2
    assert settings.per_visitor == 0  # counted in front of all replicas
    for wrong in ({"stream": 2}, {"streams": "two"}, {"model": 3}, {"streams": 0}):
        with pytest.raises(UsageError):
            cluster_settings(wrong)


# -- the calculator ---------------------------------------------------------------------------------------------------


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    plan.main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_plan_follows_from_the_measured_figures(capsys: pytest.CaptureFixture[str]) -> None:
    bench = json.loads((plan.BENCH / "ming-moe-1.5b.json").read_text())
    medians = {one["name"]: one["median"] for one in bench["results"]}
    found = planned(capsys)
    assert [row["users"] for row in found["rows"]] == [10, 1_000, 1_000_000]
    large = found["rows"][-1]
    assert large["tokens_per_second"] == pytest.approx(1e6 * 5 / 86_400 * 3 * 250)
    alone = large["tokens_per_second"] / medians["streams-8"] / 0.7
    assert alone < large["replicas"] < 1.5 * alone  # reading comes on top of writing
    assert large["machines"] * 4 >= large["replicas"] and found["rows"][0]["replicas"] == 1
    assert large["dollars_per_month"] == pytest.approx(large["machines"] * 0.03 * 730)
    assert large["answers_at_a_time"] == pytest.approx(1e6 * 5 / 86_400 * 3 * large["seconds_per_answer"])


def test_a_gpu_is_planned_for_only_where_its_figure_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--users", "1000")
    assert "gpus" not in found["rows"][0] and any("not measured a GPU" in line for line in found["assumptions"])
    (row,) = planned(capsys, "--users", "1000000", "--gpu-tokens-per-second", "900")["rows"]
    assert row["gpus"] == 69 and row["gpu_dollars_per_month"] == pytest.approx(69 * 0.8 * 730)


def test_the_table_of_the_readme_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "examples" / "scale" / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- plan:begin.*?-->\n[^\n]*\n[^\n]*\n(.*?)\n<!-- plan:end -->", text, re.DOTALL)
    lines = [
        f"| {row['users']:,} | {row['answers_at_a_time']:,.2f} | {row['tokens_per_second']:,.1f} | {row['replicas']} | "
        f"{row['machines']} | {row['dollars_per_month']:,.0f} |"
        for row in planned(capsys)["rows"]
    ]
    assert shown and shown[1] == "\n".join(lines)


def test_the_configuration_names_settings_and_a_builder() -> None:
    (app,) = yaml.safe_load((ROOT / "examples" / "scale" / "serve.yaml").read_text(encoding="utf-8"))["applications"]
    module, name = app["import_path"].split(":")
    assert f"def {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    values = {key: value for key, value in app["args"].items() if key != "max_replicas"}
    settings = cluster_settings(values)
    (engines,) = app["deployments"]
    assert engines["name"] == EngineReplica.__name__ and engines["ray_actor_options"]["num_cpus"] == settings.threads
    assert engines["autoscaling_config"]["target_ongoing_requests"] == settings.streams
    assert engines["autoscaling_config"]["max_replicas"] == app["args"]["max_replicas"]


def test_the_table_and_wrong_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([])
    assert "1,000,000" in (shown := capsys.readouterr().out) and "assumed" in shown and "measured" in shown
    for words in (["--users", "0"], ["--peak", "-1"], ["--tokens", "nan"], ["--utilisation", "2"]):
        with pytest.raises(SystemExit):
            plan.main(words)
