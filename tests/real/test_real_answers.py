"""The embedded models, for real: both languages, ending by themselves, reproducible, traced."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ming_app.answering import Answer, answer
from ming_app.engine.engine import Engine
from ming_app.engine.types import Message, SamplingParams
from ming_app.molora.trace import RouterTrace

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = {
    "zh": "高血压患者的饮食要注意什么？请分三条说明，每条一两句话。",
    "en": "What does a fever of 38 degrees mean? Answer in two or three sentences.",
}
GREEDY = SamplingParams(max_new_tokens=400, temperature=0.0)


@pytest.fixture(scope="module")
def answers(real_engine: Engine) -> dict[str, Answer]:
    """One greedy answer per language, shared by the tests that look at it."""
    return {lang: answer(real_engine, [Message("user", text)], GREEDY) for lang, text in QUESTIONS.items()}


@pytest.mark.parametrize("lang", QUESTIONS)
def test_answers_in_the_language_of_the_question(answers: dict[str, Answer], lang: str) -> None:
    text = answers[lang].text
    han, latin = len(re.findall(r"[\u4e00-\u9fff]", text)), len(re.findall(r"[A-Za-z]", text))
    assert han + latin > 15
    assert han > latin if lang == "zh" else latin > 10 * han
    assert "\ufffd" not in text and "<|" not in text


@pytest.mark.parametrize("lang", QUESTIONS)
def test_ends_by_itself(answers: dict[str, Answer], lang: str) -> None:
    assert answers[lang].finish.reason == "stop"
    assert answers[lang].finish.new_tokens < GREEDY.max_new_tokens


def test_greedy_is_reproducible(real_engine: Engine, answers: dict[str, Answer]) -> None:
    again = answer(real_engine, [Message("user", QUESTIONS["zh"])], GREEDY)
    first = answers["zh"].finish.trace
    assert again.text == answers["zh"].text
    assert first is not None and again.finish.trace is not None
    assert (again.finish.trace.experts == first.experts).all()


def test_the_trace_covers_every_token_and_layer(
    real_engine: Engine, answers: dict[str, Answer], tmp_path: Path
) -> None:
    reply = answers["zh"]
    trace = reply.finish.trace
    assert trace is not None and trace.num_layers == real_engine.info.num_layers == 24
    assert len(trace) == reply.finish.prompt_tokens + reply.finish.new_tokens
    assert (abs(trace.weights.astype(float).sum(-1) - 1) < 2e-3).all()
    assert len(set(trace.experts.ravel().tolist())) > 1  # more than one expert is in use
    assert "".join(t.text for t in trace.tokens if t.role == "answer") == reply.text
    again = RouterTrace.load(trace.save(tmp_path / "answer.npz"))
    assert (again.experts == trace.experts).all() and again.tokens == trace.tokens


def test_the_default_model_answers_on_the_command_line(tmp_path: Path) -> None:
    """The 1.5B, end to end in a process of its own: fetch or cache, engine, answer, trace."""
    file = tmp_path / "answer.npz"
    words = [
        sys.executable,
        "-m",
        "ming_app",
        "ask",
        "如何预防感冒？请简短回答。",
        "--greedy",
        "--max-new-tokens",
        "256",
    ]
    done = subprocess.run(
        [*words, "--json", "--trace", str(file)], capture_output=True, encoding="utf-8", cwd=ROOT, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["model"] == "ming-moe-1.5b" and values["finish_reason"] == "stop"
    assert len(re.findall(r"[\u4e00-\u9fff]", values["text"])) > 10
    assert values["tokens_per_second"] > 0 and values["seconds_to_first_token"] > 0
    assert RouterTrace.load(file).num_layers == 28


def test_bench_measures_the_engine() -> None:
    """One short round of one case: a figure with its unit, and what it was measured on."""
    words = [
        sys.executable,
        "-m",
        "ming_app",
        "bench",
        "--model",
        "ming-moe-0.5b",
        "--only",
        "decode",
        "--only",
        "decode-base",
    ]
    flags = ["--repeat", "1", "--tokens", "8", "--prompt-tokens", "32", "--json"]
    done = subprocess.run([*words, *flags], capture_output=True, encoding="utf-8", cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    decode, base = report["results"]
    assert decode["name"] == "decode" and decode["unit"] == "tokens/s" and decode["median"] > 0
    assert decode["ratio_to"]["decode-base"] == pytest.approx(decode["median"] / base["median"], rel=1e-3)
    assert report["machine"]["cores"] >= 1 and report["machine"]["ram"] > 1 << 30
