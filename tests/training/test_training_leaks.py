"""The leak check: the same question under another id, reordered, embedded or slightly reworded is found; wording is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import chat, question, write_lines

from training.chat import Turn
from training.errors import DataError
from training.exam import Question
from training.leaks import LeakIndex, ngrams, normalise
from training.mix import Mix, read_stream
from training.readers import ChatRow
from training.recipe import read_recipe

STEM = (
    "A 34-year-old woman has fever, a stiff neck and a spreading purple rash since this morning. What is given first?"
)
ZH = "男，58岁，突发胸骨后压榨样疼痛两小时，向左肩放射，心电图示下壁导联抬高，首先考虑的诊断是"


def exam(stem: str, *options: str, explanation: str = "") -> Question:
    lettered = {chr(65 + i): text for i, text in enumerate(options or ("one", "two", "three"))}
    return Question("q", "s", "en", stem, lettered, ("A",), explanation)


def talk(*texts: str) -> ChatRow:
    turns = tuple(Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts))
    return ChatRow("c", "s", "en", turns)


@pytest.fixture(scope="module")
def index() -> LeakIndex:
    filler = [
        (f"other {i}", exam(f"Which of the following statements about vitamin {i} is correct?")) for i in range(9)
    ]
    return LeakIndex([("stem", exam(STEM)), ("zh", exam(ZH, "甲", "乙")), ("short", exam("DIC?", "x", "y")), *filler])


@pytest.mark.parametrize(
    "row",
    [
        exam(STEM, "three", "ONE.", "two"),
        exam(STEM.upper().replace(",", " ,"), "other", "options"),
        exam("Case: " + STEM.replace("34-year-old", "43 year old"), "a", "b"),
        talk("Please explain. " + STEM, "Ceftriaxone."),
        talk("Tell me about it.", "Consider this: " + STEM),
        exam("Unrelated stem of some length, about nothing", "a", "b", explanation=STEM),
    ],
)
def test_found(index: LeakIndex, row) -> None:
    assert index.find(row) == "stem"


def test_found_in_chinese_and_short_ones_whole(index: LeakIndex) -> None:
    assert index.find(talk(f"请回答：{ZH}什么？", "心肌梗死")) == "zh"
    assert index.find(exam(ZH.replace("58", "５８"), "丙", "丁")) == "zh"
    assert index.find(exam("dic", "Y", "X")) == "short"


@pytest.mark.parametrize(
    "row",
    [
        exam("Which of the following statements about vitamin 77 is correct?"),
        exam("DIC?", "p", "q"),
        exam("A 34-year-old woman has a cough. What is given first?"),
        talk("What is DIC?", "x y"),
    ],
)
def test_not_found(index: LeakIndex, row) -> None:
    assert index.find(row) == ""


def test_ngrams_are_those_of_the_text() -> None:
    a, b = ngrams(normalise("abcdefgh"), 4), ngrams(normalise("X abCD-efgh"), 4)
    assert len(a) == 5 and np.isin(a, b).all() and len(np.unique(b)) == 6
    assert len(ngrams("abc", 4)) == 0


def test_rows_that_leak_are_dropped_and_counted(write_recipe, corpus: Path) -> None:
    write_lines(corpus / "dev.jsonl", [question(i, id=f"dev-{i}") for i in (3, 4, 5)])
    write_lines(corpus / "chats.jsonl", [chat(2)])
    recipe = read_recipe(write_recipe(('system = ""', 'system = ""\nevaluation = ["dev.jsonl", "chats.jsonl"]')))

    class Any:
        pass

    mix = Mix(recipe, Any())  # type: ignore[arg-type]  # nothing is tokenised
    assert {s.stream.name: s.dropped["in an evaluation file"] for s in mix.streams} == {"qa": 6, "letters": 3}
    assert not {"q-3", "q-4", "q-5"} & {row.id for row in (*mix.streams[1].rows, *mix.streams[1].held_out)}


def test_training_on_an_evaluation_file_is_refused(write_recipe, corpus: Path) -> None:
    recipe = read_recipe(write_recipe())
    leaks = LeakIndex.of_files([corpus / "bank.jsonl.gz"])
    with pytest.raises(DataError, match="in an evaluation file"):
        read_stream(recipe, recipe.stream[1], leaks)
    (corpus / "broken.jsonl").write_text(json.dumps({"stem": 3}))
    with pytest.raises(DataError, match="broken.jsonl:1"):
        LeakIndex.of_files([corpus / "broken.jsonl"])
