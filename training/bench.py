"""Speed and memory of a training step: sparse MoLoRA against PEFT's LoRA and against all experts computed densely.

    python -m training bench [--model ming-moe-0.5b] [--precision bf16] [--tokens 1024] [--repeat 5]

All variants share the frozen base's tensors and are run in turn, so that what disturbs the machine disturbs all alike; figures
are medians of forward and backward on the same rows, ratios are of the same turn. `kept` is what autograd keeps for the
backward pass (weights not counted), on a GPU beside it the peak of allocated memory.

    molora     as trained here: E experts of rank r, k chosen
    lora       PEFT: one LoRA of rank r k on the FFN, r on the attention (package peft)
    dense      every expert for every token, stacked [E, T, out] and weighted, as the original's formula stands
    molora_E*  k and r as above, other numbers of experts
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ming_app.console import Console
from ming_app.errors import UsageError
from ming_app.molora.config import MoLoRAConfig
from ming_app.molora.inject import gated_ffns, inject_molora
from ming_app.molora.layer import LoRALinear, select_experts
from training.base import Base, load_base, set_training
from training.losses import head_cross_entropy
from training.memory import FreedMemory

LENGTH = 128  # tokens of a row
GROWTH = (2, 4, 8, 16)


@dataclass(frozen=True)
class Measured:
    """Medians over the repeats."""

    seconds: float
    kept_bytes: int
    peak_bytes: int
    """0 on a CPU"""


class DenseLinear(nn.Module):
    """The original's MoLoRA linear: every expert computes, the router's weights pick."""

    def __init__(self, base_layer: nn.Module, config: MoLoRAConfig):
        super().__init__()
        n_in, n_out = int(base_layer.in_features), int(base_layer.out_features)  # type: ignore[arg-type]  # a linear's
        self.base_layer, self.config = base_layer, config
        self.in_features, self.out_features = n_in, n_out
        device = next(base_layer.parameters()).device
        self.router = nn.Linear(n_in, config.num_experts, device=device)
        self.A = nn.ParameterList(
            [nn.Parameter(torch.randn(config.rank, n_in, device=device) * 0.02) for _ in range(config.num_experts)]
        )
        self.B = nn.ParameterList(
            [nn.Parameter(torch.zeros(n_out, config.rank, device=device)) for _ in range(config.num_experts)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = self.base_layer(x)
        logits = F.linear(x.float(), self.router.weight, self.router.bias)
        experts, weights = select_experts(logits, self.config)
        gate = torch.zeros_like(logits).scatter(-1, experts, weights * self.config.scale)
        outputs = torch.stack(
            [F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) for a, b in zip(self.A, self.B, strict=True)]
        )
        return y + (outputs * gate.movedim(-1, 0).unsqueeze(-1).to(outputs.dtype)).sum(0)


def shared_copy(model: nn.Module) -> Any:
    """The same modules anew over the same tensors."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def molora(model: nn.Module, config: MoLoRAConfig) -> None:
    """Ours."""
    inject_molora(model, config)


def dense(model: nn.Module, config: MoLoRAConfig) -> None:
    """Dense experts on the FFN, the same attention LoRA as ours."""
    for ffn in gated_ffns(model):
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(ffn, name, DenseLinear(getattr(ffn, name), config))
    for block in [m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "o_proj")]:
        for name in config.attention_targets:
            setattr(block, name, LoRALinear(getattr(block, name), config, next(block.parameters()).device))


def lora(model: nn.Module, config: MoLoRAConfig) -> None:
    """PEFT's LoRA of rank r k on the FFN. Raises UsageError when PEFT is not installed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(
            "The benchmark needs PEFT: pip install peft.", "该基准测试需要 PEFT：pip install peft。"
        ) from error
    wide = config.rank * config.top_k
    targets = [*config.attention_targets, "gate_proj", "up_proj", "down_proj"]
    pattern = dict.fromkeys(config.attention_targets, config.rank)
    peft = LoraConfig(r=wide, lora_alpha=2 * wide, target_modules=targets, rank_pattern=pattern, lora_dropout=0.0)
    inject_adapter_in_model(peft, model)


def variants(config: MoLoRAConfig) -> dict[str, Callable[[nn.Module], None]]:
    """Name -> what puts the variant's layers into a model."""
    made: dict[str, Callable[[nn.Module], None]] = {
        "molora": lambda model: molora(model, config),
        "lora": lambda model: lora(model, config),
        "dense": lambda model: dense(model, config),
    }
    for experts in GROWTH:
        other = replace(config, num_experts=experts)
        made[f"molora_E{experts}"] = lambda model, other=other: molora(model, other)  # type: ignore[misc]  # bound now
    return made


def step(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """Forward and backward on rows `ids` [B, S], the loss on the second half of each."""
    half = ids.shape[1] // 2

    def run() -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = head_cross_entropy(hidden[:, half:-1].flatten(0, 1), model.lm_head, ids[:, half + 1 :].flatten())
        return loss / ids.numel()

    return run


def measure(models: dict[str, Any], ids: Tensor, repeat: int) -> tuple[dict[str, Measured], dict[str, list[float]]]:
    """Medians by variant, and the seconds of every turn."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    kept, peak = dict.fromkeys(models, 0), dict.fromkeys(models, 0)
    for turn in range(repeat + 1):
        for name, model in models.items():
            run = step(model, ids)
            if ids.is_cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            if turn == 0:  # warm-up; what is kept is counted here
                loss, kept[name] = _counting(run, model)
                loss.backward()
            else:
                began = time.perf_counter()
                run().backward()
                if ids.is_cuda:
                    torch.cuda.synchronize()
                    peak[name] = torch.cuda.max_memory_allocated()
                seconds[name].append(time.perf_counter() - began)
            model.zero_grad(set_to_none=True)
    return {n: Measured(statistics.median(seconds[n]), kept[n], peak[n]) for n in models}, seconds


def _counting(run: Callable[[], Tensor], model: nn.Module) -> tuple[Tensor, int]:
    """The loss, and bytes of all storages that autograd keeps, each once, those of weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    return loss, sum(storages.values())


def bench(
    model: str, precision: str, tokens: int, repeat: int, only: Sequence[str], console: Console
) -> dict[str, Any]:
    """{"base", "device", "tokens", "results": {variant: {"seconds", "tokens_per_second", "kept_gb", ...}}, "ratios"}."""
    base: Base = load_base(model, "auto", precision, console.progress, packing=False)
    if base.device.type == "cpu":
        FreedMemory()
    config = MoLoRAConfig(num_experts=4, top_k=2, rank=8, alpha=16.0)
    models: dict[str, Any] = {}
    for name, put in variants(config).items():
        if not only or name in only:
            models[name] = shared_copy(base.model)
            put(models[name])
            set_training(models[name], True)
    ids = (
        torch.randint(1000, 50_000, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
        % base.config["vocab_size"]
    )
    measured, seconds = measure(models, ids.to(base.device), repeat)
    results = {
        name: {
            "seconds": m.seconds,
            "tokens_per_second": ids.numel() / m.seconds,
            "kept_gb": m.kept_bytes / 1e9,
            "peak_gb": m.peak_bytes / 1e9 or None,
        }
        for name, m in measured.items()
    }
    return {
        "base": base.title,
        "device": str(base.device),
        "precision": precision,
        "tokens": ids.numel(),
        "results": results,
        "ratios": _ratios(seconds, measured),
    }


def _ratios(seconds: dict[str, list[float]], measured: dict[str, Measured]) -> dict[str, float]:
    """Medians of the ratios of each turn."""

    def of(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    ratios = {}
    if {"molora", "lora"} <= seconds.keys():
        ratios["molora step / lora step"] = of("molora", "lora")
    if {"molora", "dense"} <= seconds.keys():
        ratios["dense step / molora step"] = of("dense", "molora")
        ratios["molora kept / dense kept"] = measured["molora"].kept_bytes / measured["dense"].kept_bytes
    first = f"molora_E{GROWTH[0]}"
    for experts in GROWTH[1:]:
        name = f"molora_E{experts}"
        if {name, first} <= seconds.keys():
            ratios[f"E={experts} step / E={GROWTH[0]} step"] = of(name, first)
    return ratios
