"""The case view over a real tiny model: both sides asked, options found in the prompt, page escaped and self-contained."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from ming_app import case_view
from ming_app.case_view import case_html, case_page, option_routes, study
from ming_app.cli import main
from ming_app.engine.engine import Engine
from ming_app.engine.types import SamplingParams, Start
from ming_app.errors import StoppedError, UsageError
from ming_app.exam.candidate import BASE, probabilities
from ming_app.exam.formats import write_bank
from ming_app.exam.wording import ask_for_letter
from tests.exam.conftest import group, question
from tests.fakes import FakeEngine
from tests.tiny import make_engine

HOSTILE = question(1, stem="Is <script>alert(1)</script> it?", explanation="<b>x</b>", tags={"subject": "<i>"})


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return make_engine(tmp_path_factory.mktemp("case"), context=2048, max_position_embeddings=2048)


def test_both_models_are_asked(engine: Engine) -> None:
    seen: list[str] = []
    case = study(engine, HOSTILE, tokens=6, on_text=lambda side, text: seen.append(side))
    for side, changes in (("adapted", ()), ("base", BASE)):  # read again in other pieces: float32 rounds differently
        again = probabilities(engine, HOSTILE, list("ABCDE"), (), changes)
        assert case.sides[side].chances == pytest.approx(again, abs=1e-5)
    assert case.sides["base"].chances != case.sides["adapted"].chances and set(seen) == {"base", "adapted"}
    assert list(case.routes) == list("ABCDE") and case.routes["A"].shape == (2, 3, 4)


def test_routes_are_those_of_the_options_tokens(engine: Engine) -> None:
    one = question(7)
    start = next(
        e for e in engine.stream(ask_for_letter(one), SamplingParams(1, temperature=0)) if isinstance(e, Start)
    )
    trace = start.trace
    assert trace is not None
    found = option_routes(trace, one)
    letters = [
        token.text for token in trace.tokens
    ]  # the tiny tokenizer has a token per letter, but for the chat's frame
    line = list("C. c of 7")
    at = next(i for i in range(len(letters)) if letters[i : i + len(line)] == line)
    inside = range(at, at + len(line))
    weights = np.zeros((2, 3, 4))
    for i in inside:
        for layer in range(2):
            for p in range(3):
                for k in range(2):
                    weights[layer, p, trace.experts[i, layer, p, k]] += float(trace.weights[i, layer, p, k])
    assert found["C"] == pytest.approx(weights / len(inside), abs=1e-6)
    assert found["C"].sum(-1) == pytest.approx(np.ones((2, 3)), abs=1e-2)
    assert option_routes(trace, question(8)) == {}


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_page_is_escaped_and_alone(engine: Engine, lang: str) -> None:
    page = case_page(study(engine, HOSTILE, tokens=4), lang)
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>x</b>" not in page
    assert not re.search(r"(?:src|href)=|https?://", page)
    assert page.count('class="ec-bar') == 10 and page.count("<tr><th") == 5
    assert case_html(study(engine, HOSTILE, tokens=4), lang) in page
    assert set(case_view._WORDS) >= {"title", "ai"} and ("人工智能" in page) == (lang == "zh")


def test_what_cannot_be_compared_is_said(engine: Engine) -> None:
    with pytest.raises(UsageError, match="several right answers"):
        study(engine, question(1, "X", "AB"))
    with pytest.raises(UsageError, match="no adapter"):
        study(FakeEngine(num_experts=0), question(1))
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        study(engine, question(1), cancel=stop)


def test_an_unfolding_case_tells_its_earlier_parts(engine: Engine) -> None:
    a4 = group("A4", 20, 2)
    assert "Question 20?\nQuestion 21?" in case_html(study(engine, a4[1], a4[:1], tokens=2), "en")


def test_the_command(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank, out = tmp_path / "b.jsonl", tmp_path / "deep" / "case.html"
    bank.write_bytes(write_bank([question(1), question(2)], "jsonl"))
    kept, engine.close = engine.close, lambda: None  # type: ignore[method-assign]
    words = ["exam", "case", "--bank", str(bank), "--id", "q2", "--out", str(out), "--json"]
    assert main(words, load_engine=lambda settings, progress: engine) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["key"] == "B" and sum(values["base"]["chances"].values()) == pytest.approx(1)
    assert "Question 2?" in out.read_text(encoding="utf-8")
    words[5] = "nope"
    assert main(words, load_engine=lambda settings, progress: engine) == 2
    engine.close = kept  # type: ignore[method-assign]
    assert "No question has the id" in json.loads(capsys.readouterr().out)["error"]["en"]
