"""Whole runs on a tiny random base: learning, gradients, resume, signals, bad numbers, export."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from ming_app.molora.checkpoint import load_adapter, save_adapter
from ming_app.molora.inject import inject_molora, load_into
from training.base import Base, load_base
from training.curves import read_metrics, steps_of, write_curves
from training.errors import DataError, TrainingError
from training.export import export_adapter
from training.recipe import read_recipe
from training.state import checkpoints
from training.trainer import Outcome, Trainer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MING_CACHE_DIR", str(tmp_path / "cache"))


def fresh(folder: Path, precision: str = "float32") -> Base:
    return load_base(str(folder), "cpu", precision)


def train(recipe: Path, folder: Path, run: Path, **options) -> tuple[Trainer, Outcome]:
    trainer = Trainer(read_recipe(recipe), fresh(folder), run, **options)
    return trainer, trainer.run()


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in steps_of(read_metrics(run))]


def test_loss_falls_and_the_base_stays(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    base = fresh(tiny_folder)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    outcome = Trainer(read_recipe(write_recipe(steps=40, lr=1e-2)), base, tmp_path / "run").run()
    after = {name.replace(".base_layer", ""): value for name, value in base.model.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    values = losses(tmp_path / "run")
    assert outcome.status == "finished" and len(values) == 40
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])


def test_bf16_base_trains_too(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    base = fresh(tiny_folder, "bf16")
    Trainer(read_recipe(write_recipe(steps=25, lr=1e-2)), base, tmp_path / "run").run()
    values = losses(tmp_path / "run")
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])


def test_gradient_reaches_every_adapter_tensor(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(read_recipe(write_recipe()), fresh(tiny_folder, "bf16"), tmp_path / "run")
    assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters)
    with torch.no_grad():  # with B = 0 the gradient of A and of the router vanishes
        for parameter in trainer.parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer._accumulate([next(trainer.mix.batches(0))[2]])
    missing = [
        n for n, p in trainer.base.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not missing
    frozen = [p for p in trainer.base.model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


def test_one_step_equals_a_plain_computation(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    """The first loss is that of the bare base, by transformers' own masked loss."""
    from transformers import AutoModelForCausalLM

    trainer, _ = train(write_recipe(("balance = 0.01", "balance = 0.0"), steps=1), tiny_folder, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    total, count = 0.0, 0
    for sample in next(trainer.mix.batches(0))[2].samples:
        ids = torch.from_numpy(sample.encoded.ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(sample.encoded.mask), ids, -100)
        learnt = int(sample.encoded.mask[1:].sum())
        total, count = total + float(model(ids, labels=labels).loss.detach()) * learnt, count + learnt
    assert losses(tmp_path / "run")[0] == pytest.approx(total / count, rel=1e-4)


def test_accumulation_weighs_every_token_alike(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(("balance = 0.01", "balance = 0.0")))
    trainer = Trainer(recipe, fresh(tiny_folder), tmp_path / "run")
    batches = [batch for _, _, batch in (next(trainer.mix.batches(0, i)) for i in range(2))]
    together = trainer._accumulate(batches)
    gradients = [p.grad.clone() for p in trainer.parameters]
    trainer.optimizer.zero_grad()
    alone = []
    for batch in batches:
        alone.append(trainer._accumulate([batch]))
    counts = [len(batch.targets) for batch in batches]
    assert together["loss"] == pytest.approx(np.average([a["loss"] for a in alone], weights=counts), rel=1e-5)
    assert any(gradient.any() for gradient in gradients)


def test_resume_gives_the_losses_of_an_uninterrupted_run(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    whole, _ = train(write_recipe(steps=9, every=4), tiny_folder, tmp_path / "whole")
    run = tmp_path / "cut"

    def stop(metrics: dict) -> None:
        if metrics["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    _, outcome = train(write_recipe(steps=9, every=4), tiny_folder, run, report=stop)
    assert outcome.status == "interrupted" and outcome.progress.step == 5 and outcome.adapter is None
    assert not (run / "adapter").exists()
    resumed, outcome = train(write_recipe(steps=9, every=4), tiny_folder, run, resume=True)
    assert outcome.status == "finished" and outcome.progress.step == 9
    assert losses(run) == losses(tmp_path / "whole")
    for ours, theirs in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(write_recipe(steps=4, every=2), tiny_folder, run)
    newest = checkpoints(run)[-1] / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 0xFF
    newest.write_bytes(bytes(data))
    trainer = Trainer(read_recipe(write_recipe(steps=6)), fresh(tiny_folder), run, resume=True)
    assert trainer.progress.step == 2


def test_wrong_ways_to_start(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match="no usable checkpoint"):
        train(write_recipe(), tiny_folder, run, resume=True)
    train(write_recipe(steps=2), tiny_folder, run)
    with pytest.raises(TrainingError, match="--resume"):
        train(write_recipe(steps=3), tiny_folder, run)
    with pytest.raises(TrainingError, match="another recipe"):
        train(write_recipe(steps=3, lr=1e-4), tiny_folder, run, resume=True)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    write_recipe, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trainer = Trainer(read_recipe(write_recipe(steps=9, every=2)), fresh(tiny_folder), run)

    def poison(metrics: dict) -> None:
        if metrics["step"] == 3:
            trainer.parameters[0].data.fill_(float("nan"))

    trainer.report = poison
    with pytest.raises(TrainingError, match="Step 4"):
        trainer.run()
    assert [path.name for path in checkpoints(run)] == ["step-000002"]
    assert not (run / "adapter").exists()
    again = Trainer(read_recipe(write_recipe(steps=9)), fresh(tiny_folder), run, resume=True)
    assert all(torch.isfinite(parameter).all() for parameter in again.parameters)


def test_a_full_disk_leaves_the_earlier_checkpoint(
    write_recipe, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(write_recipe(steps=2), tiny_folder, run)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.state.save_file", full)
    with pytest.raises(TrainingError, match="No space left"):
        train(write_recipe(steps=4), tiny_folder, run, resume=True)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]


def test_a_corpus_without_held_out_rows_is_trained_on_all_the_same(
    write_recipe, tiny_folder: Path, tmp_path: Path
) -> None:
    few = ("held_out = 0.2", "held_out = 1e-9")
    trainer, outcome = train(write_recipe(few, steps=3), tiny_folder, tmp_path / "run")
    assert outcome.status == "finished" and outcome.adapter is not None and trainer.best is None
    recipe = write_recipe(few, ("every_steps = ", 'best_by = ["qa"]\nevery_steps = '), steps=3)
    with pytest.raises(DataError, match="qa"):
        Trainer(read_recipe(recipe), fresh(tiny_folder), tmp_path / "other")


def test_the_best_loss_is_known_when_a_run_is_gone_on_with(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    trainer, _ = train(write_recipe(steps=2), tiny_folder, tmp_path / "run")
    assert trainer.best is not None
    again = Trainer(read_recipe(write_recipe(steps=3)), fresh(tiny_folder), tmp_path / "run", resume=True)
    assert again.best == trainer.best


def test_export_refuses_another_recipe(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    train(write_recipe(steps=2), tiny_folder, tmp_path / "run")
    other = read_recipe(write_recipe(("alpha = 8.0", "alpha = 16.0"), steps=2))
    with pytest.raises(TrainingError, match="another recipe"):
        export_adapter(other, fresh(tiny_folder), tmp_path / "run")


def test_exported_adapter_gives_the_trained_logits(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(steps=8, lr=1e-2)
    trainer, outcome = train(recipe, tiny_folder, tmp_path / "run")
    assert outcome.adapter is not None
    ids = torch.arange(24)[None]
    with torch.no_grad():
        expected = trainer.base.model(ids).logits
    exported = export_adapter(read_recipe(recipe), fresh(tiny_folder), tmp_path / "run")
    save_adapter(tmp_path / "out", exported)
    base = fresh(tiny_folder)
    for folder in (outcome.adapter, tmp_path / "out"):
        adapter = load_adapter(folder, base_fingerprint=base.fingerprint, base_config=base.config)
        assert adapter.fingerprint == exported.fingerprint
        assert adapter.summary["steps"] == 8
        seen = adapter.summary["seen"]
        assert set(seen) == {"qa", "letters"} and set(seen["qa"]) == {"MedQuAD"}
        counts = [count for sources in seen.values() for count in sources.values()]
        assert sum(count["rows"] for count in counts) == outcome.progress.rows
        assert sum(count["tokens"] for count in counts) == outcome.progress.tokens
    injected = inject_molora(base.model, adapter.config)
    load_into(injected, adapter)
    with torch.no_grad():
        logits = base.model(ids).logits
    bare = fresh(tiny_folder).model(ids).logits
    assert (logits - expected).abs().max() < 0.05 * (expected - bare).abs().max()  # stored in bf16


def test_curves_need_no_network(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    train(write_recipe(steps=11), tiny_folder, tmp_path / "run")
    html = write_curves(tmp_path / "run").read_text(encoding="utf-8")
    assert "Dev loss by stream" in html and "smallest of all" in html
    assert '<script src="http' not in html
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    load = next(line["expert_load"] for line in lines if "expert_load" in line)
    assert np.asarray(load).shape == (2, 3, 4)
    np.testing.assert_allclose(np.asarray(load).sum(-1), 1, atol=1e-3)
