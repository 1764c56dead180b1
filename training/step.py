"""What one micro-batch gives: the masked loss, the router terms, and how the experts were used.

`Objective` is one module so that wrappers (DDP, FSDP) see a single forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ming_app.molora.layer import RoutingState
from training.attention import NAME
from training.losses import head_cross_entropy, load_by_group, router_loss
from training.packing import Batch


class Terms(NamedTuple):
    """Scalars with their graph, and the router's record; a tuple, for wrappers look for tensors in what a forward gives."""

    loss: Tensor
    """weighted sum of token losses"""
    router: Any
    """RouterLoss; None for a bare base"""
    by_sample: Any = None
    """float32 [samples, L, P, E] load of each sample, where asked for"""


class Objective(nn.Module):
    """A transformers causal language model as the trainer calls it; `state` is its RoutingState when it carries MoLoRA.
    With `by_sample` the load of every sample is recorded too."""

    def __init__(self, model: Any, state: RoutingState | None = None, top_k: int = 1, by_sample: bool = False):
        super().__init__()
        self.model: Any = model
        self.state, self.top_k, self.by_sample = state, top_k, by_sample

    def forward(self, batch: Batch) -> Terms:
        """Runs the model on a micro-batch; the head only where the loss looks."""
        device = self.model.lm_head.weight.device
        learn_at, targets, weights, real = (
            torch.from_numpy(x).to(device) for x in (batch.learn_at, batch.targets, batch.weights, batch.real)
        )
        if self.state is not None:
            self.state.clear()
            self.state.collect_logits = True
        hidden = hidden_states(self.model, batch)
        router = by_sample = None
        if self.state is not None:
            self.state.collect_logits = False  # gradient checkpointing runs the layers again in the backward pass
            router = router_loss(self.state.logits, real, self.top_k)
            if self.by_sample:
                group = torch.from_numpy(batch.sample_of).to(device)
                by_sample = load_by_group(self.state.logits, group, len(batch.samples), self.top_k)
            self.state.clear()
        loss = head_cross_entropy(hidden[learn_at], self.model.lm_head, targets, weights)
        return Terms(loss, router, by_sample)


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Last hidden states [T, H] of a micro-batch, in the order of its row."""
    device = model.lm_head.weight.device
    ids, positions = torch.from_numpy(batch.ids).to(device), torch.from_numpy(batch.positions).to(device)
    if packed(model):
        options: dict[str, Any] = {"position_ids": positions[None], "parts": batch.parts}
        rows = 1
    else:
        # plain right-padded rows: with causal attention no real token sees the padding, so no mask is needed
        rows, options = _rows(batch.parts), {}
    output = model.model(input_ids=ids.view(rows, -1), use_cache=False, **options)
    return output.last_hidden_state.flatten(0, 1)


def packed(model: Any) -> bool:
    """Whether the model attends by attention.py, so that rows may be packed."""
    return model.config._attn_implementation == NAME


def _rows(parts: Sequence[Any]) -> int:
    if len(parts) != 1 or parts[0].shared:
        raise ValueError("a packed micro-batch needs the packed attention")
    return parts[0].rows
