"""Start-up and use touch loopback only, and nothing a person typed or the model wrote is logged or left on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from gradio.context import LocalContext

from ming_app.settings import Settings
from ming_app.ui.launch import launch, spare_loopback
from ming_app.ui.page import build_page
from tests.fakes import FakeEngine, long_text
from tests.ui.client import PageClient

ROOT = Path(__file__).parents[2]
LOOPBACK = {"127.0.0.1", "localhost", "::1", "0.0.0.0", "None"}


DEAD_PROXY = "http://proxy.invalid:9"
"""An office's proxy that nobody answers for: the page must not be looked for behind it."""


def test_only_loopback_and_nothing_logged(tmp_path: Path) -> None:
    keep = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")}
    proxies = {name: DEAD_PROXY for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY")}
    environment = {**keep, **proxies, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    environment["GRADIO_ANALYTICS_ENABLED"] = "True"
    run = subprocess.run(
        [sys.executable, "-m", "tests.ui.network_probe"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("PROBE "))
    seen = json.loads(line.removeprefix("PROBE "))
    assert seen["answered"]
    assert set(seen["contacted"]) <= LOOPBACK, seen
    assert set(seen["bound"]) <= {"127.0.0.1", "0.0.0.0", "::1"}
    said = run.stdout.replace(line, "") + run.stderr
    left = "".join(path.read_bytes().decode("utf-8", "replace") for path in tmp_path.rglob("*") if path.is_file())
    for word in ("ZEBRAFISH", "斑马鱼", "QUOKKA", "短尾矮袋鼠"):
        assert word not in said and word not in left


@pytest.mark.parametrize(
    "before,after",
    [
        ({}, None),
        ({"NO_PROXY": "a.example"}, "a.example"),
        ({"HTTPS_PROXY": DEAD_PROXY}, "localhost,127.0.0.1,::1"),
        ({"all_proxy": DEAD_PROXY, "NO_PROXY": "a.example, localhost"}, "a.example,localhost,127.0.0.1,::1"),
    ],
)
def test_loopback_is_spared_the_proxy(monkeypatch, before: dict[str, str], after: str | None) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", {**os.environ, **before})
    spare_loopback()
    assert os.environ.get("NO_PROXY") == after
    assert os.environ.get("no_proxy") == (after if len(before) > 1 or "HTTPS_PROXY" in before else None)


@pytest.fixture(scope="module")
def served():
    engine = FakeEngine(long_text(30))
    blocks = build_page(engine, Settings())
    _, url, _ = launch(blocks, Settings(port=0), prevent_thread_lock=True, quiet=True)
    yield blocks, url, engine
    blocks.close()


def test_headers_keep_the_browser_here(served) -> None:
    answer = httpx.get(served[1], trust_env=False)
    policy, who_may_frame = answer.headers["content-security-policy"].split("frame-ancestors")
    assert "default-src 'self'" in policy and "connect-src 'self'" in policy and "http" not in policy
    assert who_may_frame.split() == ["'self'", "https://huggingface.co"]
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_nothing_is_offered_beside_the_page(served) -> None:
    blocks, url, _ = served
    with httpx.Client(base_url=url, trust_env=False) as http:
        config = http.get("config").json()
        info = http.get("gradio_api/info").json()
        assert http.get("monitoring").status_code >= 400
        for path in ("/etc/hostname", str(ROOT / "app.py"), str(ROOT / "pyproject.toml")):
            assert http.get(f"gradio_api/file={path}").status_code >= 400
    assert set(info["named_endpoints"]) == {"/ask"} and info["unnamed_endpoints"] == {}
    assert not config.get("footer_links") and config.get("analytics_enabled") is False


def test_streaming_sends_what_is_new(served, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, url, engine = served
    monkeypatch.setattr(engine, "script", long_text(300))
    monkeypatch.setattr(engine, "delay", 0.01)
    client = PageClient(blocks, url)
    client.call("ask", None, "question")
    messages = client.call("answer", None, 0.7, 400, 0.9, 40, 0, 1.05, -1)
    assert [m["msg"] for m in messages][-1] == "process_completed" and messages[-1]["success"]
    later = [m["output"]["data"] for m in messages if m["msg"] == "process_generating"][1:]
    operations = [change[0] for chat_changes, panel_changes, *_ in later for change in chat_changes + panel_changes]
    assert len(later) >= 10 and set(operations) <= {"add", "append", "replace", "delete"}
    whole = len(json.dumps(messages[-1]["output"]["data"]))
    assert sum(len(json.dumps(data)) for data in later) < 0.2 * whole * len(later)


def test_the_engine_is_asked_in_the_visitors_name(served, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroGPU reads from Gradio's context whose quota a request takes, in whatever thread it is made."""
    blocks, url, engine = served
    seen: list[str] = []
    monkeypatch.setattr(
        engine, "script", lambda messages: seen.append(LocalContext.request.get().headers["x-ip-token"]) or "Well."
    )
    client = PageClient(blocks, url)
    client.http.headers["x-ip-token"] = "somebody"
    client.call("ask", None, "question")
    client.call("answer", None, 0.7, 64, 0.9, 40, 0, 1.05, -1)
    assert seen == ["somebody"]


def test_visitors_do_not_see_each_other(served) -> None:
    blocks, url, engine = served
    one, two = PageClient(blocks, url), PageClient(blocks, url)
    one.call("ask", None, "mine")
    one.call("answer", None, 0.7, 64, 0.9, 40, 0, 1.05, -1)
    shown = two.call("show", None)[-1]["output"]["data"]
    assert shown[0]["value"] == [] and shown[1]["state"] == "empty"
    two.call("ask", None, "yours")
    two.call("answer", None, 0.7, 64, 0.9, 40, 0, 1.05, -1)
    assert [m.content for m in engine.calls[-1][0]] == ["yours"]


def test_a_session_does_not_grow_with_every_question(served, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, url, engine = served
    client = PageClient(blocks, url)

    def ask() -> int:
        client.call("clear", None)
        client.call("ask", None, "question")
        client.call("answer", None, 0.7, 8, 0.9, 40, 0, 1.05, -1)
        client.call("settle", None)
        return len(blocks.state_holder.session_data[client.session].blocks_config.blocks)

    first = [ask() for _ in range(3)][-1]
    assert [ask() for _ in range(4)][-1] == first
