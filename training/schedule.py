"""How far a run is, and what follows from it: learning rate, end, time left.

Progress is the largest used-up share of the recipe's limits (steps, tokens, active minutes).
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from training.recipe import Budget, Optimizer


class ActiveClock:
    """Seconds a run has really worked. On a CPU: process time over threads, so that neither a stopped process nor
    other programs on the cores use up the budget. On a GPU: wall-clock."""

    def __init__(self, device: torch.device):
        self._cpu = device.type == "cpu"
        self._last = self._now()

    def _now(self) -> float:
        return time.process_time() / torch.get_num_threads() if self._cpu else time.monotonic()

    def lap(self) -> float:
        """Active seconds since the last lap."""
        now = self._now()
        passed, self._last = now - self._last, now
        return passed


@dataclass
class Progress:
    """Counters of a run; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    """real tokens read"""
    loss_tokens: int = 0
    rows: int = 0
    active_seconds: float = 0.0
    wall_seconds: float = 0.0
    block: int = 0
    batch: int = 0
    """position of the next batch in the mix"""

    def share(self, budget: Budget) -> float:
        """How much of the budget is used, 0..1."""
        shares = [
            self.step / budget.steps if budget.steps else 0.0,
            self.tokens / budget.tokens if budget.tokens else 0.0,
            self.active_seconds / (60 * budget.max_minutes) if budget.max_minutes else 0.0,
        ]
        return min(1.0, max(shares))

    def seconds_left(self, budget: Budget) -> float | None:
        """Wall-clock seconds to the end at the pace so far; None before the first step."""
        share = self.share(budget)
        return self.wall_seconds * (1 - share) / share if share > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def learning_rate(optimizer: Optimizer, share: float) -> float:
    """Linear warm-up over the first `warmup` of the budget, then cosine down to `final` x lr."""
    if share < optimizer.warmup:
        # the first step must move too, hence not from zero
        return optimizer.lr * max(share / optimizer.warmup, 0.05)
    after = (share - optimizer.warmup) / (1 - optimizer.warmup)
    return optimizer.lr * (optimizer.final + (1 - optimizer.final) * (1 + math.cos(math.pi * min(after, 1.0))) / 2)
