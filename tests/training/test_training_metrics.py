"""Measures by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from training.evaluate import specialisation
from training.metrics import (
    entities,
    in_language,
    lines,
    loops,
    repetition,
    rouge_l,
    strict_f1,
    tidy,
)
from training.suite import measure_task, task_metric


def test_entities_and_lines() -> None:
    assert entities("疾病：感冒、肺炎\n症状:头疼") == Counter({"疾病:感冒": 1, "疾病:肺炎": 1, "症状:头疼": 1})
    assert entities("好的\n疾病：感冒") == Counter({"好的": 1, "疾病:感冒": 1})
    assert lines(" 发热：有 \n\n咳嗽：无。") == Counter({"发热:有": 1, "咳嗽:无": 1})
    assert tidy("相 同。") == "相同"


def test_strict_f1_sums_over_answers() -> None:
    wanted, found = [Counter("ab"), Counter("c")], [Counter("ax"), Counter()]
    assert strict_f1(wanted, found) == {"precision": 0.5, "recall": pytest.approx(1 / 3), "f1": pytest.approx(0.4)}
    assert strict_f1([Counter("a")], [Counter()])["f1"] == 0


@pytest.mark.parametrize(
    ("wanted", "found", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat on it", "cat it", 4 / 7),
        ("头痛发热", "发热头痛", 0.5),
        ("a", "", 0.0),
        ("", "", 1.0),
    ],
)
def test_rouge_l(wanted: str, found: str, score: float) -> None:
    assert rouge_l(wanted, found) == pytest.approx(score)


def test_tasks_have_their_metric() -> None:
    pairs = [("疾病：感冒", "疾病：感冒"), ("疾病：a", "疾病：b")]
    assert task_metric("cMedQANER") == "entities" and task_metric("somebody's") == "rouge"
    assert measure_task("entities", pairs)["score"] == 0.5
    assert measure_task("label", pairs)["score"] == 0.5
    assert measure_task("lines", pairs)["metric"] == "strict F1 of lines"
    assert measure_task("rouge", pairs)["score"] == pytest.approx((1 + 2 / 3) / 2)


def test_repetition_and_loops() -> None:
    assert loops("哈" * 12) and not loops("哈" * 8)
    assert repetition("one two three four five") == 0
    assert repetition("a b c d " * 3) == pytest.approx(1 - 4 / 9)
    assert loops("Drink water. " + "Rest well and sleep. " * 3)
    assert loops("请多喝水，" * 3) and not loops("请多喝水，" * 2)
    assert loops("症状：" + "".join(f"{i}. 发热和咳嗽。" for i in range(1, 5)))  # it goes on counting
    assert not loops("one two three four five six seven eight nine ten")


@pytest.mark.parametrize(
    ("text", "lang", "right"),
    [
        ("建议服用阿司匹林 aspirin 100mg", "zh", True),
        ("Take aspirin.", "zh", False),
        ("Take aspirin (阿司匹林) once a day, with food and water, please.", "en", False),
        ("Take aspirin once a day with food and plenty of water and call a doctor if it hurts (药).", "en", True),
        ("阿司匹林", "en", False),
        ("120", "zh", True),
        ("", "en", True),
    ],
)
def test_language_of_answers(text: str, lang: str, right: bool) -> None:
    assert in_language(text, lang) == right


def test_specialisation_against_chance() -> None:
    rng = np.random.default_rng(0)
    alike = {name: rng.dirichlet(np.ones(4), (30, 2, 3)) for name in "ab"}
    found = specialisation(alike)
    assert found["distance"] < 1.5 * found["shuffled"]["mean"]
    apart = {"a": np.tile([0.7, 0.1, 0.1, 0.1], (9, 2, 3, 1)), "b": np.tile([0.1, 0.7, 0.1, 0.1], (9, 2, 3, 1))}
    found = specialisation(apart)
    assert found["distance"] == pytest.approx(0.3) and found["shuffled"]["largest"] < 0.25
