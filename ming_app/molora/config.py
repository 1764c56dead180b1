"""`MoLoRAConfig`: the numbers that define a MoLoRA adapter, checked when made. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ming_app.errors import AdapterError

PROJECTIONS = ("gate", "up", "down")
"""Order of the projection axis P in every trace, router bias and packed output."""
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MAX_EXPERTS = 255  # expert ids are stored as uint8 and 255 stays free


@dataclass(frozen=True)
class MoLoRAConfig:
    """E experts of rank r on each FFN projection, k of them active per token (arXiv 2404.09027, section 3)."""

    num_experts: int = 4
    """E; with `experts_per_layer` the largest of them"""
    top_k: int = 2
    """k, 1 <= k <= E"""
    rank: int = 16
    """r of every expert, and of the attention LoRA"""
    alpha: float = 32.0
    use_rslora: bool = False
    """scale alpha / sqrt(r) in place of alpha / r"""
    expert_selection: str = "top_k"
    """"top_k", or "sampling": k experts drawn without replacement from softmax(logits)"""
    num_shared_experts: int = 0
    """n > 0: one always-on LoRA pair of rank r n with weight 1 (the development variant)"""
    lora_dropout: float = 0.0
    """dropout of the attention LoRA, training only"""
    expert_dropout: float = 0.0
    """dropout of the experts' input, training only"""
    attention_targets: tuple[str, ...] = field(default=ATTENTION_TARGETS)
    """attention linears that carry ordinary LoRA; may be empty"""
    experts_per_layer: tuple[int, ...] = ()
    """E of groups of layers, lowest first (as in MoLA, arXiv 2402.08562): the layers are cut into as many groups of like
    size; one entry per layer is possible. Empty: `num_experts` everywhere"""

    def __post_init__(self) -> None:
        for name in ("attention_targets", "experts_per_layer"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        problem = self._problem()
        if problem:
            raise AdapterError(f"MoLoRA configuration: {problem}.", f"MoLoRA 配置有误：{problem}。")

    def _problem(self) -> str:
        for name in ("num_experts", "top_k", "rank", "num_shared_experts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                return f"{name} must be a whole number, got {value!r}"
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            return f"num_experts={self.num_experts} must be in 1..{MAX_EXPERTS}"
        if not 1 <= self.top_k <= self.num_experts:
            return f"top_k={self.top_k} must be in 1..num_experts={self.num_experts}"
        if not 1 <= self.rank <= 4096:
            return f"rank={self.rank} must be in 1..4096"
        if not 0 <= self.num_shared_experts <= 64:
            return f"num_shared_experts={self.num_shared_experts} must be in 0..64"
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha <= 1e6:
            return f"alpha={str(self.alpha)[:40]} must be a positive number, at most 1e6"
        if not isinstance(self.use_rslora, bool):
            return f"use_rslora={self.use_rslora!r} must be true or false"
        if self.expert_selection not in ("top_k", "sampling"):
            return f"expert_selection={self.expert_selection!r} must be top_k or sampling"
        for name in ("lora_dropout", "expert_dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                return f"{name}={value!r} must be in [0, 1)"
        targets = self.attention_targets
        if (
            not isinstance(targets, tuple)
            or not all(t in ATTENTION_TARGETS for t in targets)
            or len(set(targets)) != len(targets)
        ):
            return (
                f"attention_targets={str(targets)[:80]} must be names among {', '.join(ATTENTION_TARGETS)}, each once"
            )
        counts = self.experts_per_layer
        if not isinstance(counts, tuple) or not all(type(n) is int and self.top_k <= n <= MAX_EXPERTS for n in counts):
            return f"experts_per_layer={str(counts)[:80]} must be whole numbers from top_k={self.top_k} on"
        if counts and max(counts) != self.num_experts:
            return f"the largest of experts_per_layer must be num_experts={self.num_experts}"
        return ""

    def at(self, layer: int, layers: int) -> MoLoRAConfig:
        """The configuration of one of `layers` layers: E is that layer's."""
        counts = self.experts_per_layer
        if not counts:
            return self
        return replace(self, num_experts=counts[layer * len(counts) // layers], experts_per_layer=())

    def padded(self) -> MoLoRAConfig:
        """The configuration of the same adapter with `num_experts` in every layer (see `Adapter.padded`)."""
        return replace(self, experts_per_layer=())

    @property
    def scale(self) -> float:
        """s of the formula: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = {**asdict(self), "attention_targets": list(self.attention_targets)}
        counts = values.pop(
            "experts_per_layer"
        )  # written only where it says something: older readers know no such entry
        return {**values, "experts_per_layer": list(counts)} if counts else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoLoRAConfig:
        """Inverse of `to_dict`. Raises AdapterError for an unknown or missing-typed entry."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise AdapterError(
                f"MoLoRA configuration has unknown entries: {unknown}.", f"MoLoRA 配置中有未知条目：{unknown}。"
            )
        return cls(**values)
