"""Letter scoring against straightforward computations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import question, write_lines

from ming_app.engine.engine import Engine
from ming_app.engine.types import Backend
from ming_app.settings import Settings
from training.base import Base, load_base
from training.exam import read_questions
from training.letters import letter_task, read_exam, score_letters, score_letters_served


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    monkeypatch.setenv("MING_CACHE_DIR", str(tmp_path / "cache"))
    return load_base(str(tiny_folder), "cpu", "float32")


def test_scores_equal_one_prompt_at_a_time(base: Base, tmp_path: Path) -> None:
    rows = [question(i, stem="长" * (1 + 7 * i), lang="zh" if i % 2 else "en") for i in range(6)]
    tasks = [letter_task(q, base.tokenizer, "s") for q in read_questions(write_lines(tmp_path / "b.jsonl", rows))]
    for task, score in zip(tasks, score_letters(base.model, tasks, batch_tokens=900), strict=True):
        with torch.no_grad():
            logits = base.model(torch.tensor([task.ids])).logits[0, -1]
        np.testing.assert_allclose(score, logits[task.letter_ids].log_softmax(-1).numpy(), atol=1e-4)
        assert np.exp(score).sum() == pytest.approx(1)


def test_a_serving_backend_scores_the_same(base: Base, tiny_folder: Path, tmp_path: Path) -> None:
    """Though it reads only what a prompt does not share with the one before."""
    rows = [question(i, stem="长" * (1 + 5 * (i // 2)), lang="zh" if i < 3 else "en") for i in range(6)]
    questions = list(read_questions(write_lines(tmp_path / "b.jsonl", rows)))
    tasks = [letter_task(q, base.tokenizer, "s") for q in [*questions, questions[-1]]]
    backend = Engine.load(
        Settings.load({"model": str(tiny_folder), "backend": "torch", "precision": "float32"})
    ).backend
    read = count_read_tokens(backend)
    scores = score_letters_served(backend, tasks)
    for score, want in zip(scores, score_letters(base.model, tasks), strict=True):
        np.testing.assert_allclose(score, want, atol=1e-4)
    assert read[0] == len(tasks[0].ids) and read[-1] == 1 and sum(read) < sum(len(task.ids) for task in tasks)


def count_read_tokens(backend: Backend) -> list[int]:
    """Lengths of the forwards to come."""
    read, forward = [], backend.forward

    def counted(ids: list[np.ndarray], *args: object, **options: object) -> object:
        read.append(len(ids[0]))
        return forward(ids, *args, **options)

    backend.forward = counted
    return read


def test_prompt_ends_where_the_letter_is_written(base: Base, tmp_path: Path) -> None:
    rows = [question(0), question(1, lang="en")]
    zh, en = (letter_task(q, base.tokenizer, "") for q in read_questions(write_lines(tmp_path / "b.jsonl", rows)))
    assert base.tokenizer.decode(zh.ids).endswith("答案：")
    assert base.tokenizer.decode([*en.ids, en.letter_ids[2]]).endswith("Answer: C")
    assert (zh.right, en.right) == (0, 1)


def test_a_limit_spreads_over_the_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "b.jsonl", [question(i) for i in range(10)])
    assert [q.id for q in read_exam(path, 4)[0]] == ["q-0", "q-2", "q-5", "q-7"]
    assert len(read_exam(path, 99)[0]) == 10
