"""Writes an `Adapter` in the official MING layout (see official.py), so that the authors' own code loads it.

That code builds its model from config.json (`MoLoRAQwenForCausalLM`), finds routers and experts in
non_lora_trainables.bin and the attention LoRA by PEFT. It knows one E for all layers: an adapter with fewer experts in
some is written padded (`Adapter.padded`), which computes the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ming_app.molora.checkpoint import Adapter, check_tensors, staged_folder
from ming_app.molora.config import PROJECTIONS

FILES = ("non_lora_trainables.bin", "adapter_model.safetensors", "adapter_config.json", "config.json")


def save_official(
    folder: str | os.PathLike[str], adapter: Adapter, base_config: Mapping[str, Any], base: str = ""
) -> Path:
    """Writes the four files into `folder` (see `staged_folder`), config.json last. Tensors are float32.

    `base_config`: config.json of the base; `base`: its name or path, for PEFT. Raises AdapterError.
    """
    import torch
    from safetensors.numpy import save_file

    adapter = adapter.padded()
    check_tensors(adapter, base_config)
    folder = Path(folder)
    with staged_folder(folder, FILES) as staging:
        experts = {name: torch.from_numpy(np.array(value)) for name, value in ffn_tensors(adapter).items()}
        torch.save(experts, staging / FILES[0])
        save_file(attention_tensors(adapter), staging / FILES[1])
        for name, values in ((FILES[2], peft_config(adapter, base)), (FILES[3], model_config(adapter, base_config))):
            (staging / name).write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    return folder


def ffn_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """Routers and experts under the names of non_lora_trainables.bin."""
    tensors: dict[str, np.ndarray] = {}
    for layer in range(adapter.num_layers):
        for projection in PROJECTIONS:
            weights = adapter.projection(layer, projection)
            stem = f"base_model.model.model.layers.{layer}.mlp.{projection}_proj"
            tensors |= {f"{stem}.switch.weight": weights.router_weight, f"{stem}.switch.bias": weights.router_bias}
            for i, (a, b) in enumerate(zip(weights.A, weights.B, strict=True)):
                tensors |= {f"{stem}.experts.{i}.lora_A_{i}.weight": a, f"{stem}.experts.{i}.lora_B_{i}.weight": b}
            if weights.shared_A is not None and weights.shared_B is not None:
                tensors[f"{stem}.share_experts.lora_A.weight"] = weights.shared_A
                tensors[f"{stem}.share_experts.lora_B.weight"] = weights.shared_B
    return tensors


def attention_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """Attention LoRA under PEFT's names."""
    tensors: dict[str, np.ndarray] = {}
    for layer in range(adapter.num_layers):
        for target in adapter.config.attention_targets:
            pair = adapter.attention(layer, target)
            if pair is not None:
                stem = f"base_model.model.model.layers.{layer}.self_attn.{target}"
                arrays = {f"{stem}.lora_A.weight": pair[0], f"{stem}.lora_B.weight": pair[1]}
                tensors |= {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    return tensors


def peft_config(adapter: Adapter, base: str) -> dict[str, Any]:
    """adapter_config.json: PEFT's LoRA of the attention; r, lora_alpha and use_rslora hold for the experts too."""
    c = adapter.config
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(c.alpha) if float(c.alpha).is_integer() else c.alpha,
        "lora_dropout": c.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": c.rank,
        "target_modules": list(c.attention_targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": c.use_rslora,
    }


def model_config(adapter: Adapter, base_config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json: the base's, and the numbers of the mixture."""
    c = adapter.config
    values = {
        **base_config,
        "architectures": ["MoLoRAQwenForCausalLM"],
        "num_experts": c.num_experts,
        "num_experts_per_token": c.top_k,
        "share_expert": bool(c.num_shared_experts),
        "expert_selection": c.expert_selection,
        "use_rslora": c.use_rslora,
        "output_logit_bias": False,
    }
    return {**values, "num_share_experts": c.num_shared_experts} if c.num_shared_experts else values
