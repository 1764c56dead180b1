"""Puts MoLoRA into a transformer by structure, not by name of a family, and moves adapters in and out.

A gated FFN is any module with linear children gate_proj, up_proj and down_proj (Qwen2, Llama, Mistral, Gemma, ...);
attention is any module with the linear children named by `config.attention_targets`. Layers count in module order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ming_app.errors import AdapterError
from ming_app.molora.checkpoint import Adapter, attention_key, projection_key
from ming_app.molora.config import PROJECTIONS, MoLoRAConfig
from ming_app.molora.layer import LoRALinear, MoLoRALinear, RankRouter, RoutingState


@dataclass
class InjectedModel:
    """Handle on a model that carries MoLoRA: its linears by (layer, projection) and the state they share."""

    model: nn.Module
    config: MoLoRAConfig
    state: RoutingState
    linears: dict[tuple[int, str], MoLoRALinear]
    attention: dict[tuple[int, str], LoRALinear]

    @property
    def num_layers(self) -> int:
        return max(layer for layer, _ in self.linears) + 1

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Every trainable tensor once, in a stable order."""
        seen: dict[int, nn.Parameter] = {}
        for module in [*self.linears.values(), *self.attention.values()]:
            for name, parameter in module.named_parameters():
                if not name.startswith("base_layer."):
                    seen.setdefault(id(parameter), parameter)
        return list(seen.values())


class _NamedTensor(NamedTuple):
    """One adapter tensor of an injected model: its native key and a view of the parameter in native shape."""

    key: str
    view: Tensor

    def array(self) -> np.ndarray:
        """float32 copy on the CPU."""
        return np.ascontiguousarray(self.view.detach().to("cpu", torch.float32).numpy())


def gated_ffns(model: nn.Module) -> list[nn.Module]:
    """The gated FFNs of a model, in order. Raises AdapterError when there is none (e.g. fused gate_up_proj)."""
    found = [m for m in model.modules() if all(_is_linear(getattr(m, f"{p}_proj", None)) for p in PROJECTIONS)]
    if not found:
        raise AdapterError(
            "This base has no gated feed-forward blocks (gate_proj, up_proj, down_proj); MoLoRA cannot be added to it.",
            "该基座没有门控前馈层（gate_proj、up_proj、down_proj），无法加入 MoLoRA。",
        )
    return found


def inject_molora(model: nn.Module, config: MoLoRAConfig, *, merged: bool = False) -> InjectedModel:
    """Wraps every FFN projection and the attention targets in place; base parameters are frozen. `merged`: the base's
    attention weights hold their LoRA already.

    Adapter parameters are float32 on the device of the layer they wrap. Raises AdapterError when the structure
    is missing or MoLoRA is there already.
    """
    model.requires_grad_(False)
    state = RoutingState()
    linears: dict[tuple[int, str], MoLoRALinear] = {}
    ffns = gated_ffns(model)
    for layer, ffn in enumerate(ffns):
        bases: dict[str, nn.Module] = {p: getattr(ffn, f"{p}_proj") for p in PROJECTIONS}
        if any(isinstance(base, MoLoRALinear) for base in bases.values()):
            raise AdapterError("This model carries MoLoRA already.", "该模型已经加入过 MoLoRA。")
        device = next(bases["gate"].parameters()).device
        here = config.at(layer, len(ffns))
        shared = RankRouter(_width(bases["gate"]), 2, here, device)
        own = RankRouter(_width(bases["down"]), 1, here, device)
        for projection, router, slot in (("gate", shared, 0), ("up", shared, 1), ("down", own, 0)):
            wrapped = MoLoRALinear(bases[projection], router, slot, layer, projection, state)
            setattr(ffn, f"{projection}_proj", wrapped)
            linears[layer, projection] = wrapped
    wrapped_attention: dict[tuple[int, str], LoRALinear] = {}
    if config.attention_targets:
        for layer, block in enumerate(_attention_blocks(model, config)):
            for target in config.attention_targets:
                base = getattr(block, target)
                lora = LoRALinear(base, config, next(base.parameters()).device, layer, state, merged=merged)
                setattr(block, target, lora)
                wrapped_attention[layer, target] = lora
    for added in [*linears.values(), *wrapped_attention.values()]:
        for name, module in added.named_modules():
            if not name.startswith("base_layer"):  # new modules follow the mode of the model, the base keeps its own
                module.training = model.training
    return InjectedModel(model, config, state, linears, wrapped_attention)


def load_into(injected: InjectedModel, adapter: Adapter) -> None:
    """Copies an adapter's experts and routers (and attention LoRA, where injected) into the model's parameters.

    Raises AdapterError when layer counts or shapes differ.
    """
    if adapter.num_layers != injected.num_layers:
        raise AdapterError(
            f"The adapter has {adapter.num_layers} layers, the base has {injected.num_layers}.",
            f"适配器有 {adapter.num_layers} 层，而基座有 {injected.num_layers} 层。",
        )
    targets = list(_named_tensors(injected))
    for key, view in targets:
        shape = tuple(view.shape)
        if key not in adapter.tensors or adapter.tensors[key].shape != shape:
            found = adapter.tensors[key].shape if key in adapter.tensors else "nothing"
            raise AdapterError(
                f"The adapter does not fit the base: {key} should be {shape}, found {found}.",
                f"适配器与基座不匹配：{key} 的形状应为 {shape}，实际为 {found}。",
            )
    with torch.no_grad():
        for key, view in targets:
            view.data.copy_(torch.from_numpy(np.array(adapter.tensors[key], dtype=np.float32)))


def extract(
    injected: InjectedModel,
    *,
    base_fingerprint: str = "",
    summary: dict | None = None,
    whole: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Adapter:
    """The adapter now in the model, float32, as `save_adapter` takes it. `whole` gathers a parameter that is sharded."""
    tensors = {named.key: named.array() for named in _named_tensors(injected, whole)}
    return Adapter(
        injected.config, injected.num_layers, tensors, base_fingerprint=base_fingerprint, summary=summary or {}
    )


def _named_tensors(
    injected: InjectedModel, whole: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[_NamedTensor]:
    """Every adapter tensor of the model; keys and shapes as checkpoint.py states. Views of the parameters, unless `whole`
    copies."""
    for (layer, projection), linear in injected.linears.items():
        router, slot, c = linear.rank_router, linear.slot, linear.config
        routed = c.num_experts * c.rank
        a, b = whole(router.A)[slot], whole(linear.B)
        views: dict[str, Tensor] = {
            "A": a[:routed].view(c.num_experts, c.rank, -1),
            "B": b[:routed].view(c.num_experts, c.rank, -1).transpose(1, 2),  # (E, out, r)
            "router.weight": whole(router.router_weight)[slot],
            "router.bias": whole(router.router_bias)[slot],
        }
        if c.num_shared_experts:
            views |= {"shared.A": a[routed:], "shared.B": b[routed:].T}
        for part, view in views.items():
            yield _NamedTensor(projection_key(layer, projection, part), view)
    for (layer, target), lora in injected.attention.items():
        yield _NamedTensor(attention_key(layer, target, "A"), whole(lora.A))
        yield _NamedTensor(attention_key(layer, target, "B"), whole(lora.B))


def _attention_blocks(model: nn.Module, config: MoLoRAConfig) -> list[nn.Module]:
    blocks = [m for m in model.modules() if all(_is_linear(getattr(m, t, None)) for t in config.attention_targets)]
    if len(blocks) != len(gated_ffns(model)):
        raise AdapterError(
            f"The base has {len(blocks)} attention blocks with {', '.join(config.attention_targets)}, one per layer is needed.",
            f"基座中含有 {'、'.join(config.attention_targets)} 的注意力模块数为 {len(blocks)}，应每层一个。",
        )
    return blocks


def _is_linear(module: object) -> bool:
    return isinstance(module, nn.Module) and hasattr(module, "in_features") and hasattr(module, "out_features")


def _width(base: nn.Module) -> int:
    return base.in_features  # type: ignore[return-value]  # declared by every linear
