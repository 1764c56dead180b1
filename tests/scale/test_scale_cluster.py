"""A real cluster on this machine: examples/scale/serve.yaml with two replicas of a tiny model. A minute; one cluster for all."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from examples.scale import show
from examples.scale.grade_bank import grade
from ming_app.engine.engine import Engine
from ming_app.engine.types import Message, SamplingParams
from ming_app.exam.bank import Shelf
from ming_app.exam.candidate import sit_exam, spread
from ming_app.molora.checkpoint import save_adapter
from ming_app.scale.replica import cluster_settings
from tests.away import finished
from tests.tiny import make_adapter, write_base

WHY = "ray is not installed (requirements-scale.txt)"
ray, serve = pytest.importorskip("ray", reason=WHY), pytest.importorskip("ray.serve", reason=WHY)
scale = pytest.importorskip("ming_app.scale.app", reason=WHY)
remote = pytest.importorskip("ming_app.scale.remote", reason=WHY)
ROOT = Path(__file__).resolve().parents[2]
CLI = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
WORDS = "what-nobody-may-log"


@dataclass
class Cluster:
    """`config`: what is deployed. `dashboard`: where `serve deploy` sends it."""

    folder: Path
    url: str
    dashboard: str
    logs: Path
    config: dict[str, Any]

    def deploy(self, **user_config: str) -> None:
        """With the real command, as an operator would."""
        self.config["applications"][0]["deployments"][0]["user_config"] = user_config
        (self.folder / "serve.yaml").write_text(yaml.safe_dump(self.config))
        program = str(Path(sys.executable).with_name("serve"))
        words = [program, "deploy", "-a", self.dashboard, str(self.folder / "serve.yaml")]
        subprocess.run(words, env=CLI, check=True, capture_output=True, timeout=60)

    def replicas(self) -> list[dict[str, Any]]:
        handle = serve.get_deployment_handle("EngineReplica", "ming")
        return handle.broadcast("look").results(timeout_s=20)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, messages: list[dict[str, str]], **options: Any) -> Any:
        given = {"model": "", "max_tokens": 20, "temperature": 0, "user": "somebody", **options}
        return self.client().chat.completions.create(messages=messages, **given)  # type: ignore[call-overload]

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came to that"
            time.sleep(0.1)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200 and len(self.replicas()) == 2
        except Exception:  # not there yet
            return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    base = write_base(folder / "base")
    for seed, name in enumerate(("old", "new")):
        save_adapter(folder / name, make_adapter(base, seed=seed))
    config = yaml.safe_load((ROOT / "examples" / "scale" / "serve.yaml").read_text())
    app = config["applications"][0]
    dirs = {"cache_dir": str(folder / "cache"), "data_dir": str(folder / "data")}
    app["args"] |= {"model": str(base), "precision": "8bit", "context": 512, "max_replicas": 2, **dirs}
    app["deployments"][0]["autoscaling_config"]["max_replicas"] = 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = config["http_options"]["port"] = free.getsockname()[1]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    begun = ray.init(num_cpus=3, include_dashboard=True, object_store_memory=150 << 20, log_to_driver=False)
    made = Cluster(
        folder, f"http://127.0.0.1:{port}", f"http://{begun.dashboard_url}", Path(begun["session_dir"]) / "logs", config
    )
    try:
        made.deploy(adapter=str(folder / "old"))
        made.until(made.ready, 120)
        yield made
    finally:
        serve.shutdown()
        ray.shutdown()


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_page_and_api_answer_over_two_replicas(cluster: Cluster) -> None:
    assert "MING" in httpx.get(cluster.url).text
    for number in range(12):
        assert cluster.ask(question(f"question {number}")).usage.completion_tokens > 0
    assert all(one["outcomes"] for one in cluster.replicas()), "one replica had nothing to do"
    text = "".join(
        chunk.choices[0].delta.content or "" for chunk in cluster.ask(question("hello"), stream=True) if chunk.choices
    )
    assert text == cluster.ask(question("hello")).choices[0].message.content


def test_a_conversation_stays_where_it_is_remembered(cluster: Cluster) -> None:
    for number in range(4):
        talk = question(f"conversation {number} begins with a sentence of some length")
        first = cluster.ask(talk)
        talk += [{"role": "assistant", "content": first.choices[0].message.content}, *question("and then")]
        again = cluster.ask(talk)
        assert again.usage.prompt_tokens_details.cached_tokens > 0.8 * first.usage.prompt_tokens


def test_a_client_that_goes_away_frees_the_replica(cluster: Cluster) -> None:
    body = {"messages": question("go on for long"), "max_tokens": 400, "temperature": 0, "stream": True}
    ended = sum(len(one["outcomes"]) for one in cluster.replicas())
    with httpx.stream("POST", f"{cluster.url}/v1/chat/completions", json=body, timeout=30) as sent:
        for number, _ in enumerate(sent.iter_lines()):
            if number == 8:
                break
    cluster.until(lambda: not any(one["running"] for one in cluster.replicas()), 10)
    replicas = cluster.replicas()
    assert sum(len(one["outcomes"]) for one in replicas) == ended + 1
    assert any(
        one.reason in ("cancelled", "stop") and one.new_tokens < 350 for r in replicas for one in r["outcomes"][-1:]
    )


def test_a_killed_replica_costs_its_own_answers_only(cluster: Cluster) -> None:
    seen, had = show.Seen(), 0

    async def work() -> None:
        nonlocal had
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
            until = time.monotonic() + 6
            visitors = [asyncio.create_task(show.visitor(client, i, until, 60, seen)) for i in range(6)]
            await asyncio.sleep(2)
            busiest = max(await asyncio.to_thread(cluster.replicas), key=lambda one: one["running"])
            had = busiest["running"] + busiest["waiting"]
            os.kill(busiest["pid"], signal.SIGKILL)
            await asyncio.gather(*visitors)

    finished(work())
    lost = seen.ends["error event lost"] + seen.ends["503 lost"]
    assert lost <= had + 1 and set(seen.ends) <= {"stop", "length", "error event lost", "503 lost"}, seen.ends
    assert seen.ends["stop"] + seen.ends["length"] > 10
    cluster.until(cluster.ready, 90)  # another took its place


def test_the_adapter_changes_while_answers_run(cluster: Cluster) -> None:
    before = cluster.ask(question("hello"))
    seen, stop = show.Seen(), time.monotonic() + 12

    async def work() -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
            await asyncio.gather(*(show.visitor(client, i, stop, 60, seen) for i in range(4)))

    thread = threading.Thread(target=lambda: finished(work()))
    thread.start()
    time.sleep(1)
    cluster.deploy(adapter=str(cluster.folder / "new"))
    thread.join()
    assert set(seen.ends) <= {"stop", "length"}, seen.ends  # nothing was lost
    old = before.system_fingerprint
    cluster.until(lambda: len({one["fingerprint"] for one in cluster.replicas()}) == 1)
    after = cluster.ask(question("hello"), extra_body={"router_trace": True})
    assert after.system_fingerprint != old and set(seen.served) == {old, after.system_fingerprint}
    assert after.choices[0].message.content != before.choices[0].message.content
    served = after.model_extra["ming"]["router_trace"]["fingerprint"]
    assert served == cluster.replicas()[0]["fingerprint"]


def test_a_bank_graded_by_ray_data_is_graded_as_by_one_engine(cluster: Cluster) -> None:
    values = dict(cluster.config["applications"][0]["args"], adapter=str(cluster.folder / "old"), context=4096)
    del values["max_replicas"]
    settings = cluster_settings(values)
    found = grade("clinical-en", settings, engines=1, limit=6)  # one CPU is left beside the replicas
    with closing(Engine.load(settings)) as engine:
        alone, too_long = sit_exam(engine, spread(Shelf().open("clinical-en").questions, 6))
    assert found["attempts"] == [asdict(one) for one in alone] and len(alone) + too_long == 6
    assert found["too_long"] == too_long and found["n"] == len(alone)


def test_nobodys_words_are_logged(cluster: Cluster) -> None:
    cluster.ask(question(WORDS))
    with pytest.raises(openai.BadRequestError, match="tokens"):
        cluster.ask(question(WORDS * 100))
    logs = sorted(Path(path) for path in cluster.logs.rglob("*") if path.is_file())
    assert logs and [path for path in logs if WORDS.encode() in path.read_bytes()] == []


def test_two_replicas_write_twice_as_much_where_cores_do_not_bind(cluster: Cluster) -> None:
    """Each step of the model takes 30 ms longer, asleep: what the cluster adds is then not hidden by a busy processor."""
    values = dict(cluster.config["applications"][0]["args"], adapter=str(cluster.folder / "old"))
    del values["max_replicas"]

    def slow(settings: Any) -> Any:
        engine = Engine.load(settings)
        forward = engine.backend.forward
        engine.backend.forward = lambda *a, **o: (time.sleep(0.03), forward(*a, **o))[1]  # type: ignore[method-assign]
        return engine

    def rate(replicas: int) -> float:
        made = serve.deployment(scale.EngineReplica).options(
            num_replicas=replicas,
            user_config={},
            max_ongoing_requests=16,
            request_router_config=ray.serve.config.RequestRouterConfig(request_router_class=scale.ROUTER),
            ray_actor_options={"num_cpus": 0},
        )
        handle = serve.run(made.bind(values, slow), name="slow", route_prefix=None)
        engine, written = remote.RemoteEngine.connect(handle), []
        params = SamplingParams(40, temperature=0, repetition_penalty=1.0)

        def ask(number: int) -> None:
            *_, last = engine.stream([Message("user", f"question {number}")], params)
            written.append(last.new_tokens)

        began = time.monotonic()
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(ask, range(64)))
        spent = time.monotonic() - began
        engine.close()
        serve.delete("slow")
        return sum(written) / spent

    one, two = rate(1), rate(2)
    print(f"{one:.0f} tokens/s with one replica, {two:.0f} with two")
    assert two > 1.4 * one, (one, two)
