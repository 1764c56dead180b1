"""Our models in lm-evaluation-harness, on a tiny base and the local task of examples/lm_eval."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="the optional extra lm-eval is not installed")

from lm_eval.api.instance import Instance

from training.base import load_base
from training.harness import MingMoE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MING_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MING_BACKEND", "torch")
    model = MingMoE(model=str(tiny_folder), precision="float32")
    yield model
    model.engine.close()


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_log_probabilities_are_those_of_the_model(model, tiny_folder: Path) -> None:
    reference = load_base(str(tiny_folder), "cpu", "float32", packing=False).model
    pairs = [("The answer is", " B"), ("", "abc"), ("答案：", "丙")]
    found = model.loglikelihood(ask("loglikelihood", *pairs))
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        before = model.tok_encode(context) or [model.prefix_token_id]
        after = model.tok_encode(continuation)
        with torch.no_grad():
            logits = reference(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(after)), after]
        assert total == pytest.approx(float(expected.sum()), abs=1e-3)
        assert greedy == (logits.argmax(-1).tolist() == after)
    (rolled,) = model.loglikelihood_rolling(ask("loglikelihood_rolling", ("abc",)))
    assert rolled == pytest.approx(found[1][0], abs=1e-3)


def test_chats_keep_their_control_tokens(model) -> None:
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.tok_encode(text)[0] == model.chat.start_id
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "An"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False).endswith("assistant\nAn")


def test_answers_are_cut_where_asked(model) -> None:
    long = ask("generate_until", ("abc", {"until": [], "max_gen_toks": 12}))
    (whole,) = model.generate_until(long)
    cut = ask("generate_until", ("abc", {"until": [whole[2]], "max_gen_toks": 12}), ("abc", {"max_gen_toks": 3}))
    first, short = model.generate_until(cut)
    assert first == whole.split(whole[2])[0]
    assert whole.startswith(short[:1])


def test_the_local_task_runs(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)  # the task names its file from here
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    tasks = TaskManager(include_path=str(ROOT / "examples" / "lm_eval"), include_defaults=False)
    result = simple_evaluate(model=model, tasks=["medical_letters"], task_manager=tasks, bootstrap_iters=0)
    rows = [json.loads(line) for line in (ROOT / "examples/lm_eval/medical_letters.jsonl").open(encoding="utf-8")]
    assert result["n-samples"]["medical_letters"]["original"] == len(rows)
    assert np.isfinite(result["results"]["medical_letters"]["acc,none"])
    assert all(row["answer"] in "ABCD" and len(set(row["options"])) == 4 for row in rows)
