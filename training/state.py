"""Checkpoints of a run: everything that decides its next step, written whole or not at all.

Layout of a run folder:
    recipe.json           what the run was started with
    metrics.jsonl         one JSON object per step, dev evaluation and event
    checkpoints/step-N/   state.safetensors (adapter, AdamW moments, float32; torch RNG of the first process) + state.json
    adapter/              the exported adapter, native layout
A folder is written under a temporary name and renamed; the last `KEEP` stay.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.errors import TrainingError
from training.processes import fill, whole
from training.schedule import Progress

KEEP = 2
SCHEMA = 1


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds besides tensors."""

    progress: Progress
    recipe_identity: str
    base_fingerprint: str
    best: float | None = None
    """smallest dev score so far"""


def save_state(
    run: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, state: RunState, *, write: bool = True
) -> Path:
    """Writes `checkpoints/step-N` atomically and removes all but the newest KEEP. Raises TrainingError on a full disk.

    Every process of a run must call it, for what each holds a slice of; only the one that is to `write` does.
    """
    folder = run / "checkpoints" / f"step-{state.progress.step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    for i, parameter in enumerate(parameters):
        tensors[f"p{i}.value"] = whole(parameter)
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"p{i}.{name}"] = whole(value)
    if not write:
        return folder
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / "state.safetensors")
        described = {
            "schema": SCHEMA,
            "progress": state.progress.to_dict(),
            "recipe_identity": state.recipe_identity,
            "base_fingerprint": state.base_fingerprint,
            "best": state.best,
            "sha256": _sha256(partial / "state.safetensors"),
        }
        (partial / "state.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"The checkpoint {folder} could not be written: {error}. The earlier checkpoint is kept.",
            f"无法写入检查点 {folder}：{error}。之前的检查点仍然保留。",
        ) from error
    for old in checkpoints(run)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.suffix != ".partial")


def load_state(run: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer | None = None) -> RunState:
    """Restores the newest checkpoint that is whole, in place (the global torch RNG too, when `optimizer` is given).

    Raises TrainingError when there is none, or when it holds other tensors than the model.
    """
    for folder in reversed(checkpoints(run)):
        read = _read(folder)
        if read is not None:
            described, tensors = read
            _restore(folder, parameters, optimizer, tensors)
            progress = Progress(**described["progress"])
            return RunState(
                progress, described["recipe_identity"], described["base_fingerprint"], described.get("best")
            )
    raise TrainingError(f"There is no usable checkpoint in {run}.", f"{run} 中没有可用的检查点。")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """A checkpoint's parts, or None when it is damaged (then the one before it is used)."""
    try:
        described = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if described["schema"] != SCHEMA or described["sha256"] != _sha256(folder / "state.safetensors"):
            return None
        return described, load_file(folder / "state.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _restore(
    folder: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer | None, tensors: dict[str, Tensor]
) -> None:
    shapes = [tuple(tensors[f"p{i}.value"].shape) if f"p{i}.value" in tensors else None for i in range(len(parameters))]
    if shapes != [tuple(p.shape) for p in parameters] or f"p{len(parameters)}.value" in tensors:
        raise TrainingError(
            f"{folder} was made for another model or another adapter configuration.",
            f"{folder} 属于另一个模型或另一种适配器配置。",
        )
    for i, parameter in enumerate(parameters):
        fill(parameter, tensors[f"p{i}.value"])
    if optimizer is None:
        return
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng_cuda"])
    for i, parameter in enumerate(parameters):
        if f"p{i}.exp_avg" not in tensors:
            continue
        moments = {"step": tensors[f"p{i}.step"].clone()}
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.zeros_like(parameter)
            fill(moments[name], tensors[f"p{i}.{name}"])
        optimizer.state[parameter] = moments


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
