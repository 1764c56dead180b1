"""The banks of the development data: every row accounted for, and as fast as a student expects."""

from __future__ import annotations

import gzip
import json

import pytest

from ming_app.exam.formats import read_bank, write_bank
from tests.conftest import SHARED

NAMES = (
    "exam_bank_en.jsonl.gz",
    "exam_bank_zh.jsonl.gz",
    "exam_bench_cmmlu_zh.jsonl",
    "exam_bench_mmlu_en.jsonl",
    "exam_dev_en.jsonl",
    "exam_dev_zh.jsonl",
)


def content(name: str) -> bytes:
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"the development data (../shared/data/{name}) is not beside this checkout")
    return gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_a_question_that_says_what_the_row_says(name: str) -> None:
    data = content(name)
    rows = [json.loads(line) for line in data.splitlines()]
    found = read_bank(data, name)
    assert found.rows == len(rows)
    by_id = {question.id: question for question in found.questions}
    for rejected in found.rejected:
        assert "same question" in rejected.reason.en
    assert len(found.rejected) <= len(rows) // 200
    for row in rows:
        if row["id"] in by_id:
            question = by_id[row["id"]]
            assert list(question.answer) == sorted(row["answer"])
            assert list(question.options) == list(row["options"])
            assert question.type == ("X" if len(row["answer"]) > 1 else "A1")
            assert bool(question.explanation) == bool(row["explanation"])


@pytest.mark.parametrize("kind", ["csv", "gift", "moodle"])
def test_real_questions_survive_other_formats(kind: str) -> None:
    questions = read_bank(content("exam_dev_zh.jsonl"), "dev.jsonl").questions
    found = read_bank(write_bank(questions, kind), f"dev.{kind}")
    assert found.rejected == ()
    assert [(q.key, q.answer, q.explanation) for q in found.questions] == [
        (q.key, q.answer, q.explanation) for q in questions
    ]
