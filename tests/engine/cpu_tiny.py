"""Tiny random bases and adapters for the tests of the CPU engine, with transformers + ming_app.molora as reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ming_app.molora.checkpoint import Adapter
from ming_app.molora.config import MoLoRAConfig
from ming_app.molora.inject import InjectedModel, extract, inject_molora

VOCAB = 160
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


@dataclass
class DictSource:
    """A TensorSource over a transformers model in memory."""

    model: torch.nn.Module
    config: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self.model.config.to_dict()
        self._tensors = dict(self.model.state_dict())
        if self.config.get("tie_word_embeddings"):
            self._tensors.pop("lm_head.weight")

    def names(self) -> list[str]:
        return list(self._tensors)

    def get(self, name: str) -> np.ndarray:
        return np.ascontiguousarray(self._tensors[name].float().numpy())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        yield self.get(name)

    def raw(self, name: str) -> None:
        return None

    def close(self) -> None:
        pass


def qwen2(**changes: Any) -> Qwen2ForCausalLM:
    """A tiny Qwen2: attention bias on q, k, v (random here, for zero would hide a mistake)."""
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "tie_word_embeddings": False, **changes})).float().eval()
    return _widen(model)


def llama(**changes: Any) -> LlamaForCausalLM:
    """A tiny Llama: no biases, tied head, explicit head_dim, llama3 rope."""
    torch.manual_seed(2)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    sizes = {**SIZES, "head_dim": 32, "tie_word_embeddings": True, "rope_parameters": rope, **changes}
    return _widen(LlamaForCausalLM(LlamaConfig(**sizes)).float().eval())


def _widen(model: torch.nn.Module) -> Any:
    """Random biases and gains, and weights large enough that every layer matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 1.0 if "embed" in name else 0.12)
    return model


def with_adapter(model: torch.nn.Module, config: MoLoRAConfig) -> tuple[InjectedModel, Adapter]:
    """Injects a random adapter (B not zero) and gives it as an Adapter too."""
    torch.manual_seed(3)
    injected = inject_molora(model, config)
    with torch.no_grad():
        for parameter in injected.adapter_parameters():
            parameter.normal_(0, 0.06)
    injected.model.eval()
    return injected, extract(injected)


@dataclass
class Reference:
    """Float32 answer for one row: logits [T, V], experts and weights [T, L, 3, k] (None without adapter)."""

    logits: np.ndarray
    experts: np.ndarray | None
    weights: np.ndarray | None


def reference(
    model: torch.nn.Module, injected: InjectedModel | None, ids: np.ndarray, bias: np.ndarray | None = None
) -> Reference:
    """Runs one row whole, in float32."""
    if injected is not None:
        injected.state.capture = True
        injected.state.bias = None if bias is None else torch.from_numpy(bias[None])
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    if injected is None:
        return Reference(logits, None, None)

    def stack(cells: dict) -> np.ndarray:
        layers = [[cells[layer, p].reshape(len(ids), -1) for p in range(3)] for layer in range(injected.num_layers)]
        return np.stack([torch.stack(layer, 1).numpy() for layer in layers], 1)

    found = Reference(logits, stack(injected.state.experts), stack(injected.state.weights))
    injected.state.bias = None
    return found
