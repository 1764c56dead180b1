"""From a run's newest checkpoint to an adapter folder that the app loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ming_app.molora.checkpoint import Adapter
from ming_app.molora.inject import extract, inject_molora
from training.base import Base
from training.curves import read_metrics, steps_of
from training.errors import DataError, TrainingError
from training.mix import Mix
from training.recipe import Recipe
from training.state import load_state


def export_adapter(recipe: Recipe, base: Base, run: Path) -> Adapter:
    """The adapter of the newest checkpoint of `run`, with a summary made from the run's own records.

    `base.model` receives the adapter. Raises TrainingError when the checkpoint belongs to another base or recipe.
    """
    mix = Mix(recipe, base.tokenizer)
    injected = inject_molora(base.model, recipe.adapter)
    state = load_state(run, injected.adapter_parameters())
    if state.base_fingerprint != base.fingerprint:
        raise TrainingError(
            f"The run was trained on base {state.base_fingerprint[:12]}…, this is {base.fingerprint[:12]}….",
            f"该训练所用的基座为 {state.base_fingerprint[:12]}…，与当前基座 {base.fingerprint[:12]}… 不同。",
        )
    if state.recipe_identity != recipe.identity():
        raise TrainingError(
            f"The run in {run} was made with another recipe; only budget limits, saving, explosion, device, threads and gradient checkpointing may differ.",
            f"{run} 中的训练使用的是另一份配方；只有预算上限、保存、explosion、设备、线程和梯度检查点可以不同。",
        )
    summary = run_summary(mix, run, state.progress.to_dict())
    return extract(injected, base_fingerprint=base.fingerprint, summary=summary)


def run_summary(mix: Mix, run: Path, progress: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the adapter should know: rows and tokens read of each source, hyper-parameters, last dev losses."""
    metrics = read_metrics(run)
    starts = [line for line in metrics if line.get("event") == "start"]
    if not starts:
        raise DataError(f"{run} has no record of its start.", f"{run} 中没有训练开始的记录。")
    evaluations = [line for line in metrics if line.get("event") == "dev"]
    steps = steps_of(metrics)
    recipe = mix.recipe
    loads = [line["expert_load"] for line in steps if "expert_load" in line]
    summary = {
        "recipe": recipe.name,
        "base": recipe.base,
        "steps": progress["step"],
        "rows": progress["rows"],
        "tokens": progress["tokens"],
        "answer_tokens": progress["loss_tokens"],
        "active_minutes": round(progress["active_seconds"] / 60, 1),
        "wall_minutes": round(progress["wall_seconds"] / 60, 1),
        "optimizer": recipe.to_dict()["optimizer"],
        "router": recipe.to_dict()["router"],
        "precision": starts[-1].get("precision", recipe.precision),
        "device": starts[-1].get("device", ""),
        "threads": starts[-1].get("threads", 0),
        "licences": {
            row["stream"]: {name: of["licence"] for name, of in row["sources"].items()} for row in starts[-1]["mix"]
        },
        "seed": recipe.seed,
        "licence_filter": recipe.data.licences,
        "held_out": {row["stream"]: row["held_out"] for row in starts[-1]["mix"]},
        "seen": mix.seen(progress["block"], progress["batch"]),
        "repeats": [stream.name for stream in recipe.stream if stream.repeats],
        "last_loss": steps[-1]["loss"] if steps else None,
        "dev_loss": evaluations[-1]["dev_loss"] if evaluations else None,
    }
    if loads:
        flat = [share for layer in loads[-1] for projection in layer for share in projection]
        summary["expert_load"] = {"smallest": min(flat), "largest": max(flat)}
    return json.loads(json.dumps(summary))
