"""Recipe files: defaults, and errors that name the entry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from training.errors import RecipeError
from training.recipe import read_recipe
from training.schedule import Progress, learning_rate

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "recipes").glob("ming-moe-*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_read(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem and recipe.data.licences == "stated"
    assert not any("dev" in s.file or "bench" in s.file for s in recipe.stream)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("lr = 0.005", "lr = 5", "recipe.optimizer"),
        ("lr = 0.005", "learning_rate = 1", "recipe.optimizer.learning_rate"),
        ("steps = 6", "steps = 0", "recipe.budget"),
        ("steps = 6", 'steps = "many"', "recipe.budget.steps"),
        ("num_experts = 4", "num_experts = 1", "recipe.adapter"),
        ('format = "exam_letter"', 'format = "essay"', r"recipe.stream\[1\]"),
        ("weight = 2.0", "weight = -2", r"recipe.stream\[0\]"),
        ("weight = 2.0", "weight = 2.0\nloss_weight = 0", r"recipe.stream\[0\]"),
        ('name = "letters"', 'name = "qa"', "stream"),
        ('name = "tiny"', "", "name"),
        ("max_length = 240", "max_length = true", "recipe.data.max_length"),
        ("[router]", "[router", "not valid TOML"),
    ],
)
def test_errors_name_the_entry(write_recipe, old: str, new: str, named: str) -> None:
    with pytest.raises(RecipeError, match=named) as raised:
        read_recipe(write_recipe((old, new)))
    assert raised.value.exit_code == 2
    assert raised.value.zh != raised.value.en


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")


def test_a_stream_of_an_included_file_is_changed_by_its_name(write_recipe) -> None:
    included = write_recipe()
    below = read_recipe(included)
    above = included.with_name("above.toml")
    changes = '[[stream]]\nname = "letters"\nweight = 5\nmax_length = 99\n\n[[stream]]\nname = "more"\nfile = "qa.jsonl"\nweight = 1\n'
    above.write_text(f'include = "{included.name}"\n\n{changes}', encoding="utf-8")
    recipe = read_recipe(above)
    assert [stream.name for stream in recipe.stream] == ["qa", "letters", "more"]
    assert recipe.stream[0] == below.stream[0]
    assert recipe.stream[1] == replace(below.stream[1], weight=5.0, max_length=99)


def test_identity_ignores_what_a_resumption_may_change(write_recipe) -> None:
    one = read_recipe(write_recipe(steps=6)).identity()
    assert read_recipe(write_recipe(steps=9, every=2)).identity() == one
    recipe = read_recipe(write_recipe(steps=6))
    assert replace(recipe, optimizer=replace(recipe.optimizer, explosion=12.0)).identity() == one  # only a guard
    assert read_recipe(write_recipe(lr=1e-3)).identity() != one


def test_learning_rate_warms_up_and_falls(write_recipe) -> None:
    optimizer = read_recipe(write_recipe()).optimizer
    rates = [learning_rate(optimizer, share / 100) for share in range(101)]
    peak = rates.index(max(rates))
    assert peak == 3 and rates[0] > 0
    assert rates[peak] == pytest.approx(optimizer.lr)
    assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))
    assert rates[-1] == pytest.approx(optimizer.lr * optimizer.final)


def test_progress_takes_the_most_used_limit(write_recipe) -> None:
    budget = read_recipe(write_recipe(("steps = 6", "steps = 10\ntokens = 1000\nmax_minutes = 1.0"))).budget
    assert Progress(step=1, tokens=500, active_seconds=6).share(budget) == 0.5
    assert Progress(step=1, tokens=5, active_seconds=45).share(budget) == 0.75
    assert Progress(step=11).share(budget) == 1
