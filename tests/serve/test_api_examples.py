"""The scripts of examples/api, each as its own process, against a real server over the tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from ming_app.molora.trace import RouterTrace
from tests.conftest import ROOT

KEY = "a-key-of-this-test-server"


def run(*words: str, key: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    environment.pop("OPENAI_API_KEY", None)
    if key:
        environment["OPENAI_API_KEY"] = key
    program = [*words] if words[0] == "bash" else [sys.executable, "-m", *words]
    return subprocess.run(program, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=120, env=environment)


def output(*words: str, key: str = "") -> str:
    done = run(*words, key=key)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_chat_prints_the_warning_first_and_streams_in_both_languages(serve) -> None:
    served = serve(api_keys=KEY)
    shown = output("examples.api.chat", served.url, "--max-tokens", "8", key=KEY)
    zh, en = shown.split("> ")[1:]
    assert zh.splitlines()[1].startswith("! ") and "120" in zh.splitlines()[1] and "\n! " not in en
    assert shown.count("(AI-generated") + shown.count("(内容由人工智能生成") == 2
    refused = run("examples.api.chat", served.url, key="a-wrong-key-of-nobody")
    assert refused.returncode == 1 and "AuthenticationError" in refused.stderr


def test_trace_keeps_a_file_and_prints_the_load(serve, tmp_path) -> None:
    file = tmp_path / "answer.npz"
    shown = output("examples.api.trace", serve().url, "--out", str(file), "--max-tokens", "12")
    trace = RouterTrace.load(file)
    assert trace.num_experts == 4 and f"{len(trace.tokens)} tokens, even share 25.0%" in shown
    shares = re.findall(r"^expert \d +([\d.]+)%", shown, re.MULTILINE)
    assert len(shares) == 4 and abs(sum(map(float, shares)) - 100) < 0.3


def test_gradio_client_asks_the_page(serve) -> None:
    url = serve().url
    shown = output(
        "examples.api.gradio_ask", "突然说不出话，嘴歪", url, "--lang", "zh", "--max-new-tokens", "8", "--seed", "1"
    )
    assert shown.startswith("! ") and "120" in shown.splitlines()[0] and "(内容由人工智能生成" in shown
    refused = run("examples.api.gradio_ask", " ", url, "--lang", "zh")
    assert refused.returncode == 1 and "请先输入问题。" in refused.stderr


@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("bash"), reason="bash or curl is missing")
def test_curl_alone_is_enough(serve) -> None:
    served = serve(api_keys=KEY)
    ready, models, whole, streamed = output("bash", "examples/api/curl.sh", served.url, key=KEY).split("\n", 3)
    assert json.loads(ready)["status"] == "ready" and json.loads(models)["data"][0]["id"] == "tiny"
    assert json.loads(whole)["choices"][0]["message"]["role"] == "assistant"
    assert streamed.startswith("data: ") and streamed.strip().endswith("data: [DONE]")
    refused = run("bash", "examples/api/curl.sh", served.url)
    assert refused.returncode != 0 and "invalid_api_key" in refused.stdout
