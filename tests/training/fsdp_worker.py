"""Run by torchrun in several processes: trains a recipe with FSDP2 on CPUs.

accelerate wraps with FSDP2 on accelerators only, so this does to the modules what it would do there (one group per decoder
layer, one for the rest); all else is the trainer as it is.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

from training.base import load_base
from training.processes import Processes, make_accelerator
from training.recipe import read_recipe
from training.trainer import Trainer


class Sharded(Processes):
    def prepare(self, module, optimizer):
        for layer in module.model.model.layers:
            fully_shard(layer)
        fully_shard(module)
        options = {name: optimizer.defaults[name] for name in ("lr", "betas", "weight_decay")}
        return module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], **options)


if __name__ == "__main__":
    recipe = read_recipe(sys.argv[1])
    processes = Sharded(make_accelerator("cpu"))
    base = load_base(recipe.base, "cpu", recipe.precision)
    Trainer(recipe, base, Path(sys.argv[2]), resume="--resume" in sys.argv, processes=processes).run()
    processes.accelerator.end_training()
