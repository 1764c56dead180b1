"""Letter scoring and dev loss against straightforward computations; the command line end to end."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import question, write_lines

from ming_app.engine.engine import Engine
from ming_app.engine.types import Backend
from ming_app.settings import Settings
from training.base import Base, load_base
from training.cli import main
from training.evaluate import (
    letter_accuracy,
    letter_task,
    read_exam,
    score_letters,
    score_letters_served,
    wilson,
)
from training.exam import read_questions


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


def test_accuracy_counts_by_hand(base: Base, tmp_path: Path) -> None:
    rows = [question(i) for i in range(8)] + [question(9, answer=["A", "B"])]
    path = write_lines(tmp_path / "b.jsonl", rows)
    accuracy = letter_accuracy(partial(score_letters, base.model), base.tokenizer, path, system="")
    right = 0
    for q in list(read_questions(path))[:8]:
        task = letter_task(q, base.tokenizer, "")
        with torch.no_grad():
            logits = base.model(torch.tensor([task.ids])).logits[0, -1]
        best = max(task.letter_ids, key=lambda i: float(logits[i]))
        right += base.tokenizer.decode([best]) == q.answer[0]
    assert (accuracy.right, accuracy.n, accuracy.left_out) == (right, 8, 1)
    assert sum(accuracy.chosen.values()) == 8


def test_a_limit_spreads_over_the_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "b.jsonl", [question(i) for i in range(10)])
    assert [q.id for q in read_exam(path, 4)[0]] == ["q-0", "q-2", "q-5", "q-7"]
    assert len(read_exam(path, 99)[0]) == 10


def test_wilson_interval() -> None:
    low, high = wilson(40, 100)  # values from the published formula
    assert (low, high) == (pytest.approx(0.3094, abs=1e-4), pytest.approx(0.4980, abs=1e-4))
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict]:
    code = main([str(word) for word in words])
    out = capsys.readouterr().out
    return code, json.loads(out) if out else {}


def test_train_evaluate_export(write_recipe, base: Base, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, folder = write_recipe(steps=3), corpus / "run"
    code, result = run(capsys, "train", "--recipe", recipe, "--run", folder, "--json")
    assert code == 0 and result["status"] == "finished" and result["progress"]["step"] == 3
    assert Path(result["curves"]).is_file() and Path(result["metrics"]).is_file()
    code, result = run(capsys, "export", "--recipe", recipe, "--run", folder, "--out", corpus / "out", "--json")
    assert code == 0 and result["bytes"] > 0
    exam = write_lines(corpus / "dev.jsonl", [question(100 + i) for i in range(5)])
    words = ("evaluate", "--recipe", recipe, "--adapter", corpus / "out", "--exam", exam, "--limit", 4, "--json")
    code, result = run(capsys, *words)
    assert code == 0
    assert set(result["dev"]) == {"base", "adapter"} and set(result["dev"]["adapter"]["loss"]) == {"qa", "letters"}
    assert result["exam"]["dev.jsonl"]["adapter"]["n"] == 4
    load = np.asarray(result["dev"]["adapter"]["load"]["qa"])
    assert load.shape == (2, 3, 4) and np.allclose(load.sum(-1), 1)

    served = (*words, "--served", "float32", "--skip-base")
    code, in_float32 = run(capsys, *served)
    assert code == 0 and set(in_float32["exam"]["dev.jsonl"]) == {"adapter float32"}
    assert run(capsys, *served[:5], *served[9:], "--json")[0] == 2  # served without an exam

    (corpus / "eval.json").write_text(json.dumps(result))
    words = (
        "export",
        "--recipe",
        recipe,
        "--run",
        folder,
        "--out",
        corpus / "out",
        "--evaluation",
        corpus / "eval.json",
    )
    code, exported = run(capsys, *words, "--json")
    card = (corpus / "out" / "MODEL_CARD.md").read_text(encoding="utf-8")
    accuracy = result["exam"]["dev.jsonl"]["adapter"]["accuracy"]
    assert code == 0 and exported["fingerprint"] in card and f"{accuracy:.1%}" in card
    assert "CC BY 4.0" in card and "qa" in card and "nan" not in card
    (corpus / "eval.json").write_text(json.dumps({**result, "fingerprint": "0" * 64}))
    code, failure = run(capsys, *words, "--json")
    assert code == 2 and "another base" in failure["error"]["en"]


def test_data_shows_the_mix_and_what_is_learnt(
    write_recipe, base: Base, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe())
    assert main(["data", "--recipe", recipe, "--show", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    streams = {row["stream"]: row for row in result["streams"]}
    assert streams["qa"]["rows"] + streams["qa"]["held_out"] == 40 and streams["qa"]["languages"].keys() == {"en"}
    assert streams["qa"]["sources"]["MedQuAD"]["licence"] == "CC BY 4.0"
    assert sum(row["share_of_tokens"] for row in result["streams"]) == pytest.approx(1)
    sample = next(sample for sample in result["samples"])
    before, learnt, after = re.split("[⟦⟧]", sample["marked"])
    assert before.endswith("<|im_start|>assistant\n") and learnt.endswith("<|im_end|>") and after == ""
    assert sample["learnt"] == len(base.tokenizer.encode_text(learnt.removesuffix("<|im_end|>"))) + 1
    assert main(["data", "--recipe", recipe]) == 0
    shown = capsys.readouterr().out
    assert "| qa | en |" in shown and "CC BY 4.0" in shown


def test_exit_codes(write_recipe, base: Base, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe"]) == 2
    assert main(["paint"]) == 2
    code, result = run(capsys, "train", "--recipe", corpus / "none.toml", "--json")
    assert code == 2 and "none.toml" in result["error"]["en"] and result["error"]["zh"]
    code, result = run(
        capsys, "export", "--recipe", write_recipe(), "--run", corpus / "no", "--out", corpus / "o", "--json"
    )
    assert code == 1 and "no usable checkpoint" in result["error"]["en"]
    code, result = run(capsys, "evaluate", "--json")
    assert code == 2 and result["error"]["zh"]


def test_module_help_is_quick_and_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, training.cli; print([m for m in ('torch', 'transformers', 'gradio') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert done.stdout.strip() == "[]"
