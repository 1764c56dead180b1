"""Every recipe that ships: read, estimated as its head says, and run for two steps on a tiny base of the same family."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import chat, question, write_lines
from tiny import write_base

from training.base import load_base
from training.estimate import estimate, note
from training.recipe import Recipe, read_recipe
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "training" / "recipes").glob("ming-moe-*.toml"))
LARGE = [path for path in RECIPES if path.stem.split("-")[-1] in ("1.8b", "4b", "7b", "14b")]


def shape_of(recipe: Recipe) -> dict:
    return tomllib.loads((ROOT / "weights" / "catalog.toml").read_text(encoding="utf-8"))["models"][recipe.base][
        "shape"
    ]


def test_all_sizes_have_a_recipe() -> None:
    assert [path.stem.removeprefix("ming-moe-") for path in RECIPES] == ["0.5b", "1.5b", "1.8b", "14b", "4b", "7b"]


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_estimates_stand_in_the_heads(path: Path) -> None:
    recipe = read_recipe(path)
    a = recipe.adapter
    assert (a.num_experts, a.top_k, a.rank, a.alpha, recipe.data.max_length) == (8, 2, 16, 32, 3072)
    assert f"# {note(recipe, shape_of(recipe), 200)}\n" in path.read_text(encoding="utf-8")


def test_an_estimate_by_hand() -> None:
    recipe = read_recipe(next(path for path in LARGE if path.stem.endswith("1.8b")))
    need = estimate(recipe, shape_of(recipe))
    linears = 24 * (4 * 2048**2 + 3 * 2048 * 5504)
    assert need.base_gb == pytest.approx(2 * (linears + 2 * 151936 * 2048) / 1e9)
    plain = estimate(replace(recipe, gradient_checkpointing=False), shape_of(recipe))
    quantised = estimate(replace(recipe, precision="nf4"), shape_of(recipe))
    assert quantised.base_gb < 0.6 * need.base_gb and need.activations_gb < 0.2 * plain.activations_gb
    assert need.flop_per_token > plain.flop_per_token
    assert need.hours(3.6e6, need.flop_per_token / 1e9) == pytest.approx(1)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dry_run_on_a_tiny_base(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MING_CACHE_DIR", str(tmp_path / "cache"))
    recipe = read_recipe(path)
    shape = shape_of(recipe)
    full = shape["num_key_value_heads"] == shape["num_attention_heads"]  # Qwen1.5 has as many; Qwen2.5 shares them
    base = write_base(tmp_path / "base", num_key_value_heads=4 if full else 2)
    for stream in recipe.stream:
        rows = [chat(i, stream.sources[0] if stream.sources else "MedQuAD") for i in range(30)]
        exam = [question(i) for i in range(30)]
        write_lines(tmp_path / stream.file, exam if stream.format.startswith("exam") else rows)
        if stream.bank:
            write_lines(tmp_path / stream.bank, exam)
    for name in recipe.data.evaluation:
        write_lines(tmp_path / name, [question(100 + i) for i in range(3)])
    recipe = replace(
        recipe,
        base=str(base),
        folder=tmp_path,
        device="cpu",
        threads=1,
        data=replace(recipe.data, folder=".", system="", held_out=0.2, held_out_rows=2, block=30),
        budget=replace(recipe.budget, steps=2, tokens=0, max_minutes=0, batch_tokens=512, accumulate=2),
    )
    outcome = Trainer(recipe, load_base(recipe.base, "cpu", recipe.precision), tmp_path / "run").run()
    assert outcome.status == "finished" and outcome.progress.step == 2
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").is_file()
