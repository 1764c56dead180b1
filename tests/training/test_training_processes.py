"""Two processes on one machine (gloo) give the losses and the adapter of one, by DDP and by FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ming_app.molora.checkpoint import load_adapter
from training.curves import read_metrics, steps_of

ROOT = Path(__file__).parents[2]


def run_module(*command: str, fail: bool = False) -> str:
    """Runs `python -m ...` in the repository, one thread per process; what it printed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240
    )
    assert (done.returncode != 0) == fail, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(recipe: Path, run: Path, *options: str) -> None:
    run_module("training", "train", "--recipe", str(recipe), "--run", str(run), *options)


def torchrun(*command: str, fail: bool = False) -> str:
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    return run_module(*launch, "--rdzv_endpoint", "localhost:0", *command, fail=fail)


def ddp(recipe: Path, run: Path, *options: str, fail: bool = False) -> str:
    return torchrun("-m", "--", "training", "train", "--recipe", str(recipe), "--run", str(run), *options, fail=fail)


def fsdp2(recipe: Path, run: Path, *options: str) -> str:
    return torchrun(str(Path(__file__).with_name("fsdp_worker.py")), str(recipe), str(run), *options)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in steps_of(read_metrics(run))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MING_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("launch", [ddp, fsdp2])
def test_two_processes_train_as_one(cache, write_recipe, tmp_path: Path, launch) -> None:
    def recipe(steps: int) -> Path:
        return write_recipe(("[budget]", "[budget]\naccumulate = 2"), steps=steps, every=2)

    train(recipe(5), tmp_path / "one")
    printed = launch(recipe(5), tmp_path / "two")
    assert launch is not ddp or printed.count("Finished:") == 1  # one process speaks
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    ours, theirs = (load_adapter(tmp_path / name / "adapter") for name in ("two", "one"))
    for name, value in theirs.tensors.items():
        np.testing.assert_allclose(ours.tensors[name], value, atol=5e-3, err_msg=name)
    events = [line.get("event") for line in read_metrics(tmp_path / "two")]
    assert events.count("start") == events.count("finished") == 1  # one process writes
    starts = [line["processes"] for name in ("one", "two") for line in read_metrics(tmp_path / name)[:1]]
    assert starts == [1, 2]

    # what two have begun one goes on with, and the other way round
    train(recipe(8), tmp_path / "two", "--resume")
    launch(recipe(8), tmp_path / "one", "--resume")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert len(losses(tmp_path / "two")) == 8


def test_micro_batches_that_cannot_be_shared_out_are_refused(cache, write_recipe, tmp_path: Path) -> None:
    printed = ddp(write_recipe(), tmp_path / "run", fail=True)
    assert "multiple of the 2 processes" in printed
