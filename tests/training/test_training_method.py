"""Ways to train: quantised bases, recomputed activations, layers with different E, other starts, what is kept and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny import make_adapter

from ming_app.errors import AdapterError, UsageError
from ming_app.molora.checkpoint import Adapter, load_adapter, save_adapter
from ming_app.molora.config import MoLoRAConfig
from ming_app.molora.inject import extract, inject_molora, load_into
from training.base import Base, load_base, set_training
from training.curves import read_metrics, steps_of
from training.errors import RecipeError, TrainingError
from training.evaluate import dev_report
from training.packing import pack
from training.recipe import read_recipe
from training.start import upcycle, warm_start
from training.step import Objective, hidden_states
from training.trainer import Trainer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MING_CACHE_DIR", str(tmp_path / "cache"))


def fresh(folder: Path, precision: str = "float32") -> Base:
    return load_base(str(folder), "cpu", precision)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in steps_of(read_metrics(run))]


def shaken(trainer: Trainer) -> Trainer:
    """With B = 0 the gradients of A and of the routers vanish."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return trainer


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    trainer.optimizer.zero_grad()
    trainer._accumulate([next(trainer.mix.batches(0))[2]])
    return [p.grad.clone() for p in trainer.parameters]


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_quantised_base_on_a_cpu_learns_after_a_dev_evaluation_too(
    write_recipe, tiny_folder: Path, tmp_path: Path, precision: str
) -> None:
    recipe = read_recipe(write_recipe(steps=30, lr=1e-2))
    trainer = shaken(Trainer(recipe, fresh(tiny_folder, precision), tmp_path / "run"))
    set_training(trainer.base.model, True)
    before = gradients(trainer)
    assert all(gradient.any() for gradient in before)
    set_training(trainer.base.model, False)
    dev_report(trainer.objective, trainer.mix.held_out(), recipe.adapter)
    set_training(trainer.base.model, True)
    packed = [m for m in trainer.base.model.modules() if type(m).__name__ == "Linear4bit"]
    assert bool(packed) == (precision == "nf4")
    assert all(m.training and not getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in packed)
    for ours, theirs in zip(gradients(trainer), before, strict=True):
        assert torch.equal(ours, theirs)
    trainer.optimizer.zero_grad()
    trainer.run()
    values = losses(tmp_path / "run")
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])


def test_four_bit_linears_never_enter_eval_mode(tiny_folder: Path) -> None:
    base = fresh(tiny_folder, "nf4")
    for on in (False, True, False):
        set_training(base.model, on)
        kinds = {type(m).__name__: m.training for m in base.model.modules()}
        assert kinds["Linear4bit"] and kinds["Qwen2DecoderLayer"] == on
    inject_molora(base.model, MoLoRAConfig())
    kinds = {type(m).__name__: m.training for m in base.model.modules()}
    assert kinds["Linear4bit"] and not kinds["MoLoRALinear"] and not kinds["RankRouter"]


def test_recomputed_activations_give_the_same_losses(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    plain = Trainer(read_recipe(write_recipe(steps=4)), fresh(tiny_folder), tmp_path / "a")
    plain.run()
    recipe = write_recipe(('device = "cpu"', 'device = "cpu"\ngradient_checkpointing = true'), steps=4)
    again = Trainer(read_recipe(recipe), fresh(tiny_folder), tmp_path / "b")
    calls = []
    again.base.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    set_training(again.base.model, True)
    again._accumulate([next(again.mix.batches(0))[2]])
    assert len(calls) == 2  # once more in the backward pass
    again.optimizer.zero_grad()
    again.run()
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)


def test_layers_with_different_numbers_of_experts(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(("num_experts = 4", "num_experts = 4\nexperts_per_layer = [2, 4]"), steps=12, lr=1e-2)
    trainer = Trainer(read_recipe(recipe), fresh(tiny_folder), tmp_path / "run")
    outcome = trainer.run()
    adapter = load_adapter(outcome.adapter)
    assert adapter.config.experts_per_layer == (2, 4)
    assert [adapter.projection(layer, "up").A.shape[0] for layer in (0, 1)] == [2, 4]
    record = next(line for line in read_metrics(tmp_path / "run") if "expert_load" in line)
    assert np.sum(record["expert_load"][0], axis=-1) == pytest.approx([1, 1, 1], abs=1e-3)
    assert np.asarray(record["expert_load"])[0, :, 2:].sum() == 0

    # backends know one E: the padded adapter has it, and computes the same
    batch = pack(trainer.mix.first_samples(6), 400)[0]
    unpadded, padded = fresh(tiny_folder), fresh(tiny_folder)
    for base, what in ((unpadded, adapter), (padded, adapter.padded())):
        load_into(inject_molora(base.model, what.config), what)
    with torch.no_grad():
        states = [hidden_states(base.model, batch) for base in (unpadded, padded)]
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("counts", [[1, 4], [2, 3], ["a", 4], [4, 400]])
def test_wrong_numbers_of_experts_are_refused(write_recipe, counts: list) -> None:
    change = ("num_experts = 4", f"num_experts = 4\nexperts_per_layer = {json.dumps(counts)}")
    with pytest.raises(RecipeError, match="experts_per_layer"):
        read_recipe(write_recipe(change))


def states(base: Base, batch) -> torch.Tensor:
    with torch.no_grad():
        return hidden_states(base.model, batch)


def test_a_run_goes_on_from_an_adapter_of_another_scale(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_folder, alpha=16.0, fingerprint=fresh(tiny_folder).fingerprint)
    save_adapter(tmp_path / "start", adapter, dtype="float32")
    recipe = write_recipe(("[optimizer]", '[start]\nadapter = "start"\n\n[optimizer]'))
    trainer = Trainer(read_recipe(recipe), fresh(tiny_folder), tmp_path / "run")
    batch = next(trainer.mix.batches(0))[2]
    direct = fresh(tiny_folder)
    load_into(inject_molora(direct.model, adapter.config), adapter)
    torch.testing.assert_close(states(trainer.base, batch), states(direct, batch), atol=1e-4, rtol=1e-4)


def test_an_adapter_of_another_shape_or_base_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    base = fresh(tiny_folder)
    injected = inject_molora(base.model, MoLoRAConfig(num_experts=4, top_k=2, rank=8))
    about = {"base_fingerprint": base.fingerprint, "base_config": base.config}
    save_adapter(tmp_path / "rank", make_adapter(tiny_folder))
    save_adapter(tmp_path / "base", make_adapter(tiny_folder, rank=8, fingerprint="0" * 64))
    with pytest.raises(AdapterError, match="rank=8"):
        warm_start(injected, tmp_path / "rank", **about)
    with pytest.raises(AdapterError, match="another base"):
        warm_start(injected, tmp_path / "base", **about)


def write_peft(folder: Path, adapter: Adapter) -> Path:
    """One LoRA in PEFT's layout."""
    tensors = {}
    for name, value in adapter.tensors.items():
        _, layer, kind, linear, *part = name.split(".")
        if part[0] == "router":
            continue
        block = f"self_attn.{linear}" if kind == "attention" else f"mlp.{linear}_proj"
        tensors[f"base_model.model.model.layers.{layer}.{block}.lora_{part[0]}.weight"] = np.ascontiguousarray(
            value if kind == "attention" else value[0]
        )
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    c = adapter.config
    peft = {"peft_type": "LORA", "r": c.rank, "lora_alpha": c.alpha, "use_rslora": c.use_rslora}
    (folder / "adapter_config.json").write_text(json.dumps(peft))
    return folder


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_one_lora_becomes_experts_that_compute_it(write_recipe, tiny_folder: Path, tmp_path: Path, layout: str) -> None:
    base = fresh(tiny_folder)
    lora = make_adapter(tiny_folder, num_experts=1, top_k=1, rank=4, alpha=2.0, attention_targets=("q_proj", "v_proj"))
    if layout == "peft":
        write_peft(tmp_path / "lora", lora)
    else:
        save_adapter(tmp_path / "lora", lora, dtype="float32")
    recipe = read_recipe(write_recipe(("[optimizer]", '[start]\nlora = "lora"\n\n[optimizer]')))
    trainer = Trainer(recipe, base, tmp_path / "run")
    batch = next(trainer.mix.batches(0))[2]
    direct = fresh(tiny_folder)
    load_into(inject_molora(direct.model, lora.config), lora)
    torch.testing.assert_close(states(base, batch), states(direct, batch), atol=1e-4, rtol=1e-4)
    router = extract(trainer.injected).tensors["layers.0.mlp.up.router.weight"]
    assert router.shape[0] == 4 and len(np.unique(router[:, 0])) == 4  # drawn apart, so experts will part too


def test_loras_that_cannot_be_upcycled_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    base = fresh(tiny_folder)
    injected = inject_molora(base.model, MoLoRAConfig(num_experts=4, rank=4, attention_targets=("q_proj",)))
    about = {"base_fingerprint": base.fingerprint, "base_config": base.config}
    good = make_adapter(tiny_folder, num_experts=1, top_k=1, attention_targets=("q_proj",))
    write_peft(tmp_path / "half", replace(good, tensors={k: v for k, v in good.tensors.items() if ".down." not in k}))
    with pytest.raises(AdapterError, match=r"missing tensors: layers\.0\.mlp\.down"):
        upcycle(injected, tmp_path / "half", **about)
    save_adapter(tmp_path / "more", make_adapter(tiny_folder))
    with pytest.raises(AdapterError, match="one LoRA of rank 4"):
        upcycle(injected, tmp_path / "more", **about)
    wide = make_adapter(tiny_folder, num_experts=1, top_k=1, attention_targets=("q_proj", "k_proj"))
    with pytest.raises(AdapterError, match="k_proj"):
        upcycle(injected, write_peft(tmp_path / "wide", wide), **about)
    folder = write_peft(tmp_path / "dora", good)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True, "r": 4}))
    with pytest.raises(AdapterError, match="use_dora"):
        upcycle(injected, folder, **about)


def test_the_best_adapter_is_kept(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(("[save]", '[save]\nbest_by = ["qa"]'), steps=4, lr=1e-2))
    trainer = Trainer(recipe, fresh(tiny_folder), tmp_path / "run")
    trainer.run()
    best = load_adapter(tmp_path / "run" / "best").fingerprint
    trainer._evaluate()  # the same score is no better
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.mul_(30)
    trainer._evaluate()
    assert load_adapter(tmp_path / "run" / "best").fingerprint == best
    events = [line for line in read_metrics(tmp_path / "run") if line.get("event") == "dev"]
    assert [line["best"] for line in events] == [True, False, False]
    assert events[0]["score"] == events[0]["dev_loss"]["qa"] and set(events[0]["load"]) == {"qa", "letters"}


def test_an_exploding_loss_stops_the_run(write_recipe, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(("[optimizer]", "[optimizer]\nexplosion = 1.3"), steps=60, every=10))

    def break_it(metrics: dict) -> None:
        if metrics["step"] == 30:
            with torch.no_grad():
                for parameter in trainer.parameters:
                    parameter.mul_(200)

    trainer = Trainer(recipe, fresh(tiny_folder), tmp_path / "run", report=break_it)
    with pytest.raises(TrainingError, match="Step 31 gave loss"):
        trainer.run()
    last = read_metrics(tmp_path / "run")[-1]
    assert last["event"] in ("exploded", "not finite")
    assert not (tmp_path / "run" / "adapter").exists()
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000020", "step-000030"]


def test_a_tracker_that_is_not_installed_is_named(
    write_recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from training.processes import make_accelerator

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install wandb"):
        make_accelerator("cpu", ("wandb",))
    with pytest.raises(RecipeError, match="trackers"):
        read_recipe(write_recipe(("[save]", '[save]\ntrackers = ["comet"]')))


def test_lora_dropout_acts_while_training_and_not_while_measuring(
    write_recipe, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = read_recipe(write_recipe(("alpha = 8.0", "alpha = 8.0\nlora_dropout = 0.5")))
    trainer = shaken(Trainer(recipe, fresh(tiny_folder), tmp_path / "run"))
    batch = next(trainer.mix.batches(0))[2]
    objective = Objective(trainer.base.model, trainer.injected.state, 2)
    with torch.no_grad():
        for on in (True, False):
            set_training(trainer.base.model, on)
            assert (float(objective(batch).loss) == float(objective(batch).loss)) != on
