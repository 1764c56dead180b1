"""One process or many, by Hugging Face accelerate: what the trainer needs of it.

`python -m training train` is one process. `accelerate launch [--num_processes N | --config_file F] -m training train ...` (on
CPUs: `torchrun --nproc_per_node N -m -- training train ...`) is as many as it says, on one node or several: DDP, or FSDP2
(whose parameters are DTensors, each process holding a slice).
Every process draws the same mix and takes every N-th micro-batch of a step, so N processes give the losses of one with the
same recipe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ming_app.errors import UsageError
from training.recipe import TRACKERS

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(device: str, trackers: tuple[str, ...] = (), folder: str = ".") -> Accelerator:
    """Raises UsageError for a tracker whose package is not installed."""
    from importlib.util import find_spec

    from accelerate import Accelerator

    for tracker in trackers:
        if find_spec(TRACKERS[tracker]) is None:
            raise UsageError(
                f"The recipe logs to {tracker}, which is not installed: pip install {TRACKERS[tracker]}, or leave it out.",
                f"配方要求记录到 {tracker}，但未安装：pip install {TRACKERS[tracker]}，或从配方中去掉。",
            )
    # "no": the recipe says in what is computed, and routers stay float32, whatever a launcher's configuration says
    return Accelerator(cpu=device == "cpu", mixed_precision="no", log_with=list(trackers) or None, project_dir=folder)


class Processes:
    """The processes of a run, seen from one of them."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.count, self.rank = accelerator.num_processes, accelerator.process_index
        self.main = accelerator.is_main_process

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Wraps both for the kind of parallelism that was launched."""
        if self.accelerator.distributed_type == "DEEPSPEED":
            raise UsageError(
                "DeepSpeed keeps its own copies of weights and moments, which the checkpoints here do not hold. Launch with DDP or FSDP2.",
                "DeepSpeed 自行保存权重和动量，本程序的检查点不包含它们。请使用 DDP 或 FSDP2 启动。",
            )
        return self.accelerator.prepare(module, optimizer)

    def share(self, batches: list[Any]) -> list[Any]:
        """This process's micro-batches of a step. Raises UsageError when they cannot be shared out evenly."""
        if len(batches) % self.count:
            raise UsageError(
                f"budget.accumulate = {len(batches)} must be a multiple of the {self.count} processes.",
                f"budget.accumulate = {len(batches)} 必须是进程数 {self.count} 的整数倍。",
            )
        return batches[self.rank :: self.count]

    @contextlib.contextmanager
    def gradients(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        """Gradients travel between processes after the last micro-batch of a step only."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(module):
            yield

    def backward(self, loss: Tensor) -> None:
        """Processes average their gradients; the loss is a sum over all micro-batches, hence times their number."""
        self.accelerator.backward(loss * self.count)

    def clip(self, parameters: list[nn.Parameter], largest: float) -> float:
        """Norm of the whole gradient before clipping."""
        norm = self.accelerator.clip_grad_norm_(parameters, largest)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over processes."""
        if self.count == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.sum(torch.tensor([float(flag)])) > 0)


def whole(tensor: Tensor) -> Tensor:
    """A CPU copy of a parameter or moment, all slices of it; every process must ask."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().contiguous()


def fill(tensor: Tensor, value: Tensor) -> None:
    """Copies a whole CPU tensor into a parameter or moment, of which this process may hold a slice only."""
    with torch.no_grad():
        if hasattr(tensor, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]  # a DTensor
        tensor.copy_(value)
