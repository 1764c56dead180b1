"""Suites: read, measured on a tiny model, and answers the same several at a time as one by one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import chat, question, write_lines
from tiny import tokenizer_json

from ming_app.engine.engine import Engine
from ming_app.settings import Settings
from training.answers import Generated, greedy_answers
from training.chat import ChatTokenizer
from training.errors import DataError, RecipeError
from training.letters import LetterTask
from training.readers import ChatRow, Turn
from training.suite import Exam, Suite, answer_figures, measure_exam, measure_generation, measure_nlp, read_suite

TOKENIZER = ChatTokenizer(tokenizer_json())
SUITE = """
name = "small"
folder = "data"

[[exam]]
file = "bank.jsonl"
shuffles = 2

[[nlp]]
file = "tasks.jsonl"
max_new_tokens = 5

[[generation]]
file = "chats.jsonl"
limit = 2
max_new_tokens = 7
"""


@pytest.fixture
def engine(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MING_CACHE_DIR", str(tmp_path / "cache"))
    engine = Engine.load(Settings.load({"model": str(tiny_folder), "backend": "torch", "precision": "float32"}))
    yield engine
    engine.close()


def test_answers_several_at_a_time_equal_answers_one_by_one(engine) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 250, size).tolist() for size in (3, 40, 7, 21, 5, 13, 2)]
    stops = set(range(0, 256, 5))  # a random model must meet one now and then
    seen = []
    together = greedy_answers(engine.backend, prompts, stops, 12, slots=3, tick=lambda *step: seen.append(step))
    alone = [greedy_answers(engine.backend, [prompt], stops, 12)[0] for prompt in prompts]
    assert together == alone
    assert {answer.ended for answer in alone} == {True, False}
    assert all(len(answer.ids) <= 12 and not stops & set(answer.ids) for answer in alone)
    assert seen[-1] == (7, 7)
    assert greedy_answers(engine.backend, [], stops, 5) == []


def test_a_suite_is_measured(engine, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "suite.toml").write_text(SUITE, encoding="utf-8")
    write_lines(tmp_path / "data" / "tasks.jsonl", [chat(i, "cMedQQ" if i % 2 else "other") for i in range(4)])
    write_lines(tmp_path / "data" / "chats.jsonl", [{**chat(i), "lang": "zh" if i else "en"} for i in range(4)])
    suite = read_suite(tmp_path / "suite.toml")
    assert suite.data("x") == tmp_path / "data" / "x"
    found = measure_nlp(suite, suite.nlp[0], partial(greedy_answers, engine.backend), TOKENIZER, None)
    assert {source: task["n"] for source, task in found["tasks"].items()} == {"cMedQQ": 2, "other": 2}
    assert found["tasks"]["cMedQQ"]["metric"] == "accuracy" and found["tasks"]["other"]["metric"] == "ROUGE-L"
    found = measure_generation(suite, suite.generation[0], partial(greedy_answers, engine.backend), TOKENIZER, None)
    assert {lang: figures["ended"]["n"] for lang, figures in found.items()} == {"en": 1, "zh": 1}
    assert json.dumps(found) and found["en"]["tokens"]["max"] <= 7


def test_consistency_and_parts_by_hand(tmp_path: Path) -> None:
    rows = [question(i, type="A1" if i < 4 else "A2", tags={"subject": "x"} if i % 2 else {}) for i in range(8)]
    rows.append(question(8, options={"A": "one", "B": "two", "C": "all of the above"}, answer=["A"]))
    rows.append(question(9, answer=["A", "C"]))
    write_lines(tmp_path / "bank.jsonl", rows)

    def first_letter(tasks: list[LetterTask]) -> list[np.ndarray]:
        return [np.log(np.array([0.6, *[0.4 / (len(t.letter_ids) - 1)] * (len(t.letter_ids) - 1)])) for t in tasks]

    def knows(tasks: list[LetterTask]) -> list[np.ndarray]:
        return [np.log(np.where(np.arange(len(t.letter_ids)) == t.right, 0.8, 0.05)) for t in tasks]

    suite, exam = Suite("s", str(tmp_path)), Exam("bank.jsonl", shuffles=3)
    found = measure_exam(suite, exam, knows, TOKENIZER)
    assert (found["right"], found["n"], found["left_out"]) == (9, 9, 1)
    assert found["shuffled"]["consistent"]["accuracy"] == 1 and found["shuffled"]["consistent"]["n"] == 8
    assert {name: part["n"] for name, part in found["by_type"].items()} == {"A1": 5, "A2": 4}
    assert found["by_subject"]["x"]["n"] == 4 and found["by_lang"]["zh"]["n"] == 9
    assert found["calibration"]["ece"] == pytest.approx(0.2)
    found = measure_exam(suite, exam, first_letter, TOKENIZER)
    assert found["chosen"] == {"A": 9} and found["shuffled"]["consistent"]["accuracy"] < 0.5
    assert found["shuffled"]["orders"] == 4


def test_figures_of_answers_by_hand() -> None:
    row = ChatRow("r", "s", "zh", (Turn("user", "?"), Turn("assistant", "!")))
    answers = [
        (row, Generated([1] * 10, True), "请多休息，注意饮食。"),
        (row, Generated([1] * 20, False), "please rest now, " * 5),
    ]
    found = answer_figures("zh", answers)
    assert found["ended"]["accuracy"] == found["in_language"]["accuracy"] == found["without_loops"]["accuracy"] == 0.5
    assert found["tokens"] == {"mean": 15, "p95": pytest.approx(19.5), "max": 20}
    assert found["failed"] == {"ended": ["r"], "in_language": ["r"], "without_loops": ["r"]}


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ('name = "x"\nexams = []', "exams"),
        ('name = "x"\n[[exam]]\nlimit = 3', "exam"),
        ("name = 3", "name"),
        ("=", "TOML"),
    ],
)
def test_wrong_suites_are_refused_by_entry(tmp_path: Path, text: str, entry: str) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(RecipeError, match=entry):
        read_suite(tmp_path / "s.toml")


def test_an_empty_file_is_an_error(engine, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "suite.toml").write_text(SUITE, encoding="utf-8")
    (tmp_path / "data" / "chats.jsonl").write_text("")
    suite = read_suite(tmp_path / "suite.toml")
    with pytest.raises(DataError, match="no rows"):
        measure_generation(suite, suite.generation[0], partial(greedy_answers, engine.backend), TOKENIZER, None)
