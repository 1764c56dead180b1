"""What a run starts from, when not from fresh experts: another adapter, or one LoRA made into E experts.

    [start]
    adapter = "path"   a native or official adapter of the same configuration: training goes on from it
    lora = "path"      a LoRA on the FFN (and attention): a PEFT folder, or an adapter of ours with one expert; every
                       expert becomes a copy of it, so that the run starts at the LoRA's own function, since the
                       weights of the chosen experts sum to 1 (sparse upcycling, arXiv 2212.05055); routers are fresh

Read as hostile: sizes, names, shapes and values are checked before anything is copied (see ming_app.molora.checkpoint).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ming_app.errors import AdapterError
from ming_app.molora.checkpoint import (
    Adapter,
    attention_key,
    load_adapter,
    projection_key,
    read_json,
    read_safetensors,
    refuse_names,
)
from ming_app.molora.config import ATTENTION_TARGETS, PROJECTIONS, MoLoRAConfig
from ming_app.molora.inject import InjectedModel, extract, load_into

_PEFT = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>0|[1-9][0-9]{0,3})\.(?:mlp\.(?P<ffn>gate|up|down)_proj|self_attn\.(?P<attention>[qkvo]_proj))"
    r"\.lora_(?P<matrix>[AB])(?:\.default)?\.weight"
)


def warm_start(injected: InjectedModel, folder: Path, *, base_fingerprint: str, base_config: Mapping[str, Any]) -> None:
    """Copies an adapter of the same shape into the model. Raises AdapterError."""
    adapter = load_adapter(folder, base_fingerprint=base_fingerprint, base_config=base_config)
    ours, theirs = injected.config, adapter.config
    for name in ("rank", "experts_per_layer", "num_experts", "num_shared_experts", "attention_targets"):
        if getattr(ours, name) != getattr(theirs, name):
            raise AdapterError(
                f"The run asks for {name}={getattr(ours, name)}, the adapter to start from has {getattr(theirs, name)}.",
                f"配方要求 {name}={getattr(ours, name)}，而起始适配器为 {getattr(theirs, name)}。",
            )
    load_into(injected, replace(adapter, tensors=_rescaled(adapter, ours)))


def upcycle(injected: InjectedModel, folder: Path, *, base_fingerprint: str, base_config: Mapping[str, Any]) -> None:
    """Makes every expert a copy of one LoRA; routers stay as they were drawn. Raises AdapterError."""
    lora = (
        _read_peft(folder, injected.num_layers)
        if (folder / "adapter_config.json").is_file()
        else load_adapter(folder, base_fingerprint=base_fingerprint, base_config=base_config)
    )
    if lora.config.num_experts != 1 or lora.config.rank != injected.config.rank:
        raise AdapterError(
            f"Upcycling needs one LoRA of rank {injected.config.rank}; {folder} holds E={lora.config.num_experts} of rank {lora.config.rank}.",
            f"扩展专家需要一个秩为 {injected.config.rank} 的 LoRA；{folder} 中为 E={lora.config.num_experts}、秩 {lora.config.rank}。",
        )
    beyond = sorted(set(lora.config.attention_targets) - set(injected.config.attention_targets))
    if beyond:
        raise AdapterError(
            f"The LoRA acts on {', '.join(beyond)}, which the run's attention_targets leave out: it would not start at the same function.",
            f"该 LoRA 作用于 {'、'.join(beyond)}，而配方的 attention_targets 未包含：起点将与该 LoRA 不同。",
        )
    tensors = dict(extract(injected).tensors)
    copies = _rescaled(lora, injected.config)
    for name in tensors:
        if name in copies and ".router." not in name:
            routed = ".mlp." in name and ".shared." not in name
            tensors[name] = np.repeat(copies[name], len(tensors[name]), axis=0) if routed else copies[name]
    load_into(injected, replace(extract(injected), tensors=tensors))


def _rescaled(adapter: Adapter, wanted: MoLoRAConfig) -> dict[str, np.ndarray]:
    """The adapter's tensors with B as the scale of `wanted` needs it for the same function."""
    factor = adapter.config.scale / wanted.scale
    return {name: value * factor if name.endswith(".B") else value for name, value in adapter.tensors.items()}


def _read_peft(folder: Path, layers: int) -> Adapter:
    """A PEFT LoRA on gate, up and down (attention at will) as an adapter with one expert and a zero router."""
    peft = read_json(folder / "adapter_config.json")
    odd = [
        key for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "lora_bias") if peft.get(key)
    ]
    if peft.get("peft_type") != "LORA" or odd:
        raise AdapterError(
            f"{folder} is not a plain LoRA: {', '.join(odd) or peft.get('peft_type')}.",
            f"{folder} 不是普通的 LoRA：{'、'.join(odd) or peft.get('peft_type')}。",
        )
    tensors: dict[str, np.ndarray] = {}
    unknown = []
    for key, value in read_safetensors(folder / "adapter_model.safetensors").items():
        found = _PEFT.fullmatch(key)
        if not found or value.ndim != 2:
            unknown.append(key)
        elif found["ffn"]:
            tensors[projection_key(int(found["layer"]), found["ffn"], found["matrix"])] = value[None]
        else:
            tensors[attention_key(int(found["layer"]), found["attention"], found["matrix"])] = value
    refuse_names("extra", sorted(unknown))
    ffn = [projection_key(layer, p, m) for layer in range(layers) for p in PROJECTIONS for m in "AB"]
    refuse_names("missing", [name for name in ffn if name not in tensors])
    targets = tuple(t for t in ATTENTION_TARGETS if attention_key(0, t, "A") in tensors)
    config = MoLoRAConfig(
        num_experts=1,
        top_k=1,
        rank=peft.get("r", 0),
        alpha=peft.get("lora_alpha", 0),
        use_rslora=bool(peft.get("use_rslora")),
        attention_targets=targets,
    )
    return Adapter(config, layers, tensors)
