"""The command line end to end on a tiny base."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import question, write_lines

from ming_app.models.load import load_torch_model
from ming_app.molora.checkpoint import load_adapter
from training.base import Base, load_base
from training.cli import main


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    monkeypatch.setenv("MING_CACHE_DIR", str(tmp_path / "cache"))
    return load_base(str(tiny_folder), "cpu", "float32")


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
    code, result = run(capsys, *words, "--out", corpus / "measured")
    assert code == 0
    assert set(result["dev"]) == {"base", "adapter"} and set(result["dev"]["adapter"]["loss"]) == {"qa", "letters"}
    assert result["exam"]["dev.jsonl"]["adapter"]["n"] == 4
    load = np.asarray(result["dev"]["adapter"]["load"]["qa"])
    assert load.shape == (2, 3, 4) and np.allclose(load.sum(-1), 1)

    specialisation = result["dev"]["adapter"]["specialisation"]
    assert 0 <= specialisation["shuffled"]["mean"] <= specialisation["shuffled"]["largest"] <= 1
    assert json.loads((corpus / "measured" / "evaluation.json").read_text()) == result
    assert "| qa |" in (corpus / "measured" / "report.md").read_text(encoding="utf-8")
    assert "Calibration" in (corpus / "measured" / "report.html").read_text(encoding="utf-8")

    code, served = run(capsys, *words, "--precision", "float32", "--skip-base")
    assert code == 0 and set(served["exam"]["dev.jsonl"]) == {"adapter"}
    trained = served["precision"].pop("loss")
    assert trained in ("float32", "bf16")  # the recipe's: bf16 where the CPU computes in it
    assert served["precision"] == {"answers": "float32", "exam": "float32"}

    assert f"Measured: loss in {trained}, exam in {trained}." in (corpus / "measured" / "report.md").read_text()

    (corpus / "other").mkdir()
    other = write_lines(corpus / "other" / "dev.jsonl", [question(200)])
    words = ("evaluate", "--model", result["model"], "--adapter", "none", "--exam", exam, "--exam", other, "--json")
    code, named_alike = run(capsys, *words)
    assert code == 0 and {name: kinds["base"]["n"] for name, kinds in named_alike["exam"].items()} == {
        str(exam): 5,
        str(other): 1,
    }

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
    (corpus / "eval.json").write_text(json.dumps({**result, "adapter_fingerprint": "0" * 64}))
    code, failure = run(capsys, *words, "--json")
    assert code == 2 and "another adapter" in failure["error"]["en"]


def test_the_official_layout_gives_the_same_logits(
    write_recipe, base: Base, corpus: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(("num_experts = 4", "num_experts = 4\nexperts_per_layer = [2, 4]"), steps=3, lr=1e-2)
    assert run(capsys, "train", "--recipe", recipe, "--run", corpus / "run", "--json")[0] == 0
    logits = []
    for layout in ("native", "official"):
        words = ("export", "--recipe", recipe, "--run", corpus / "run", "--out", corpus / layout, "--layout", layout)
        code, exported = run(capsys, *words, "--json")
        assert code == 0 and exported["bytes"] > 0
        adapter = load_adapter(corpus / layout, base_config=base.config)
        model = load_torch_model(tiny_folder, adapter, "float32").model
        with torch.no_grad():
            logits.append(model(torch.arange(1, 40)[None]).logits)
    assert (corpus / "official" / "non_lora_trainables.bin").is_file()
    torch.testing.assert_close(*logits, atol=3e-2, rtol=3e-2)  # the native form is stored in bfloat16
    assert not torch.equal(logits[1], torch.zeros(()))


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
