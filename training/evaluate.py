"""Loss on held-out rows per stream, and how the experts are used there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ming_app.molora.config import MoLoRAConfig
from training.losses import dead_experts, there
from training.packing import Batch, Sample, pack
from training.step import Terms


@torch.no_grad()
def dev_loss(
    objective: Callable[[Batch], Terms],
    samples: Mapping[str, Sequence[Sample]],
    batch_tokens: int = 1024,
    *,
    packing: bool = True,
    observe: Callable[[str, Batch, Terms], None] | None = None,
) -> dict[str, float]:
    """Mean loss per answer token of each stream that has samples, natural log, every token weighing 1. `observe` is called with stream,
    micro-batch and what the objective gave."""
    result = {}
    for name, rows in samples.items():
        total, count = 0.0, 0
        for batch in pack([replace(row, loss_weight=1.0) for row in rows], batch_tokens, share=packing):
            terms = objective(batch)
            total += float(terms.loss)
            count += len(batch.targets)
            if observe:
                observe(name, batch, terms)
        if count:
            result[name] = total / count
    return result


def dev_report(
    objective: Callable[[Batch], Terms],
    samples: Mapping[str, Sequence[Sample]],
    config: MoLoRAConfig,
    batch_tokens: int = 1024,
    *,
    packing: bool = True,
) -> dict[str, Any]:
    """Dev loss per stream of a model that carries an adapter, and the load of its experts.

    {"loss": {stream: float}, "load": {stream: float32 [L, P, E] shares}, "smallest_load", "largest_load", "dead_experts",
    "specialisation"}; the three before the last are over all streams (see losses.dead_experts), the last is made where the
    objective records `by_sample` (see `specialisation`). At least one stream must have a sample.
    """
    loads: dict[str, list[torch.Tensor]] = {}
    sums: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()

    def observe(stream: str, batch: Batch, terms: Terms) -> None:
        tokens = int(batch.real.sum())
        sums[stream] = sums.get(stream, torch.zeros(())) + terms.router.load.cpu() * tokens
        counts[stream] += tokens
        if terms.by_sample is not None:
            loads.setdefault(stream, []).extend(terms.by_sample.cpu())

    loss = dev_loss(objective, samples, batch_tokens, packing=packing, observe=observe)
    overall = torch.stack(list(sums.values())).sum(0) / counts.total()
    report = {
        "loss": loss,
        "load": {name: total / counts[name] for name, total in sums.items()},
        "smallest_load": float(overall[there(overall, config)].min()),
        "largest_load": float(overall.max()),
        "dead_experts": dead_experts(overall, config),
    }
    if len(loads) > 1:
        report["specialisation"] = specialisation({name: torch.stack(of).numpy() for name, of in loads.items()})
    return report


def specialisation(loads: Mapping[str, np.ndarray], shuffles: int = 200) -> dict[str, Any]:
    """Whether streams are routed differently, against chance.

    `loads`: {stream: float [samples, L, P, E]}. "distance" is the total variation distance between a stream's mean load and
    that of all streams, averaged over routers and streams; "shuffled" the same with the samples dealt to streams at random:
    its mean and largest of `shuffles`; "by_stream" the distance of each.
    """
    flat = np.concatenate(list(loads.values())).reshape(
        sum(map(len, loads.values())), -1, next(iter(loads.values())).shape[-1]
    )
    stream = np.repeat(np.arange(len(loads)), [len(of) for of in loads.values()])

    def distances(labels: np.ndarray) -> np.ndarray:
        means = np.stack([flat[labels == i].mean(0) for i in range(len(loads))])  # (streams, routers, E)
        return (np.abs(means - means.mean(0)).sum(-1) / 2).mean(-1)

    found, rng = distances(stream), np.random.default_rng(0)
    chance = [float(distances(rng.permutation(stream)).mean()) for _ in range(shuffles)]
    return {
        "distance": float(found.mean()),
        "shuffled": {"mean": float(np.mean(chance)), "largest": max(chance), "times": shuffles},
        "by_stream": dict(zip(loads, found.tolist(), strict=True)),
    }
