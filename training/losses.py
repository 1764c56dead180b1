"""Losses: masked next-token cross-entropy with the head on the looked-at positions only, and router terms.

The head is frozen, so its loss and the gradient for the hidden states come from one pass over small chunks: no
[B, S, V] and no [positions, V] tensor is ever kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ming_app.molora.config import MoLoRAConfig

HEAD_CHUNK = 256  # positions per pass: 256 x 151,936 bf16 logits are 78 MB


class FrozenHeadCrossEntropy(torch.autograd.Function):
    """sum of -v log softmax(hidden W^T)[target]; hidden [N, H], weight [V, H] frozen, targets int64 [N], v float32 [N].

    All passes over [chunk, V] stay in the weight's dtype; the target's own column, where rounding would hurt (p - 1 of a
    token the model is sure of), is taken out and treated in float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, values: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, hidden.shape[0], HEAD_CHUNK):
            rows = slice(start, start + HEAD_CHUNK)
            chosen, value = targets[rows].unsqueeze(-1), values[rows].unsqueeze(-1)
            logits = F.linear(hidden[rows], weight)
            p = logits.softmax(-1)
            largest, place = logits.max(-1, keepdim=True)
            log_sum = largest.float() - p.gather(-1, place).float().log()
            loss = log_sum - logits.gather(-1, chosen).float()
            total += (loss * value).sum()
            if gradient is not None:
                p[torch.arange(len(p), device=p.device), targets[rows]] = 0.0
                others, own = (p @ weight).float(), weight[targets[rows]].float()
                gradient[rows] = (others.addcmul_(own, torch.expm1(-loss)).mul_(value)).to(gradient.dtype)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        return ctx.gradient * grads[0].to(ctx.gradient.dtype), None, None, None


def head_cross_entropy(hidden: Tensor, head: torch.nn.Linear, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of token losses, each times its weight, float32 scalar; the frozen head gets no gradient.

    hidden [N, H], targets int64 [N], weights float32 [N] (None: 1 each).
    """
    values = torch.ones(targets.shape, device=hidden.device) if weights is None else weights
    if head.bias is not None:
        return (F.cross_entropy(head(hidden).float(), targets, reduction="none") * values).sum()
    return FrozenHeadCrossEntropy.apply(hidden, head.weight.detach(), targets, values)


DEAD = 0.01  # an expert with a smaller share of its router's choices is dead


@dataclass(frozen=True)
class RouterLoss:
    """Router terms of one forward, averaged over routers, and how the tokens were spread."""

    balance: Tensor
    """Switch loss E sum_i f_i P_i; 1 when the load is even, E when one expert takes all"""
    z: Tensor
    """mean of logsumexp(logits)^2"""
    load: Tensor
    """[L, P, E] share of the k T choices that went to each expert; sums to 1. Zero beyond the experts of a layer that has
    fewer than E"""
    entropy: Tensor
    """[L, P] mean entropy of softmax(logits) per token, in units of log E (1 = undecided)"""


def router_loss(logits: Sequence[tuple[int, int, Tensor]], real: Tensor, top_k: int) -> RouterLoss:
    """Terms from `RoutingState.logits`: (layer, projection, float32 [..., E] of T tokens); `real` bool [T] leaves padding out.

    f_i counts all k choices over k T, so that f sums to 1 as in the Switch paper's k = 1 (arXiv 2101.03961, eq. 4).
    Layers may differ in E; every router counts alike.
    """
    in_order = sorted(logits, key=lambda item: item[:2])
    layers, largest = 1 + in_order[-1][0], max(row.shape[-1] for _, _, row in logits)
    balance, z, load, entropy = [], [], [], []
    for group in _alike(in_order):  # runs of routers with the same E: usually one
        stacked = torch.stack([row.flatten(0, -2)[real] for _, _, row in group])  # (R, T, E)
        experts = stacked.shape[-1]
        p = stacked.softmax(-1)
        with torch.no_grad():
            share = F.one_hot(stacked.topk(top_k, dim=-1).indices, experts).sum(-2).float().mean(1) / top_k  # (R, E)
            load.append(F.pad(share, (0, largest - experts)))
            scale = math.log(max(experts, 2))
            entropy.append(-(p * p.clamp_min(1e-9).log()).sum(-1).mean(1) / scale)
        balance.append(experts * (share * p.mean(1)).sum(-1))
        z.append(stacked.logsumexp(-1).square().mean(-1))
    return RouterLoss(
        torch.cat(balance).mean(),
        torch.cat(z).mean(),
        torch.cat(load).view(layers, -1, largest),
        torch.cat(entropy).view(layers, -1),
    )


@torch.no_grad()
def load_by_group(logits: Sequence[tuple[int, int, Tensor]], group: Tensor, groups: int, top_k: int) -> Tensor:
    """Choices that went to each expert by group of tokens: `group` int64 [T] in 0..groups-1, -1 leaves a token out.

    Returns float32 [groups, L, P, E]; each router's choices of a group sum to 1 (0 for a group without tokens).
    """
    in_order = sorted(logits, key=lambda item: item[:2])
    layers, largest = 1 + in_order[-1][0], max(row.shape[-1] for _, _, row in logits)
    counted = group >= 0
    tables = []
    for _, _, row in in_order:
        experts = row.shape[-1]
        chosen = F.one_hot(row.flatten(0, -2)[counted].topk(top_k, dim=-1).indices, experts).sum(-2).float()
        table = torch.zeros(groups, experts, device=row.device).index_add_(0, group[counted], chosen)
        tables.append(F.pad(table, (0, largest - experts)))
    load = torch.stack(tables, dim=1).view(groups, layers, -1, largest)
    return load / load.sum(-1, keepdim=True).clamp_min(1e-9)


def _alike(rows: Sequence[tuple[int, int, Tensor]]) -> list[list[tuple[int, int, Tensor]]]:
    groups: list[list[tuple[int, int, Tensor]]] = []
    for row in rows:
        if groups and groups[-1][-1][2].shape[-1] == row[2].shape[-1]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def dead_experts(load: Tensor, config: MoLoRAConfig) -> int:
    """How many experts get less than DEAD of their router's choices; load [L, P, E] as `RouterLoss.load`."""
    return int((there(load, config) & (load < DEAD)).sum())


def there(load: Tensor, config: MoLoRAConfig) -> Tensor:
    """bool [L, P, E]: which places of a load are experts; layers with fewer of them are padded."""
    layers = load.shape[0]
    present = torch.zeros_like(load, dtype=torch.bool)
    for layer in range(layers):
        present[layer, :, : config.at(layer, layers).num_experts] = True
    return present
