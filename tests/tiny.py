"""Tiny real models for tests: a random Qwen2 or Llama with a byte-level ChatML tokenizer, as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ming_app.molora.checkpoint import Adapter, expected_shapes
from ming_app.molora.config import MoLoRAConfig

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 512,
}


def tokenizer_json() -> str:
    """A byte-level BPE tokenizer with one merge-free token per byte, plus ChatML control tokens and a plain added token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in CONTROL])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    return tokenizer.to_str()


def write_base(folder: Path, family: str = "Qwen2", *, seed: int = 0, **changes) -> Path:
    """A random base (float32 safetensors, config, tokenizer) under `folder`."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes}, bos_token_id=None, eos_token_id=258)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "norm" not in name:
                parameter.normal_(std=0.08)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    return folder


def make_adapter(base: Path, *, seed: int = 0, scale: float = 0.3, fingerprint: str = "", **changes) -> Adapter:
    """A random adapter that fits `base`, strong enough that its experts matter."""
    config = MoLoRAConfig(**{"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8.0, **changes})
    base_config = json.loads((base / "config.json").read_text())
    layers = base_config["num_hidden_layers"]
    shapes = expected_shapes(Adapter(config, layers, {}), base_config)
    rng = np.random.default_rng(seed)
    tensors = {
        name: (rng.standard_normal(shape) * (scale if "router" not in name else 0.5)).astype(np.float32)
        for name, shape in shapes.items()
    }
    return Adapter(config, layers, tensors, fingerprint)


def make_engine(folder: Path, context: int = 512, **changes):
    """A float32 Engine over a random base and adapter written under `folder`; `changes` are the base's."""
    from ming_app.engine.backends.torch import TorchBackend
    from ming_app.engine.engine import Engine
    from ming_app.engine.prompt import ChatTokenizer
    from ming_app.engine.types import EngineInfo
    from ming_app.models.load import load_torch_model
    from ming_app.molora.checkpoint import save_adapter

    base = write_base(folder / "base", **changes)
    adapter = make_adapter(base)
    save_adapter(folder / "adapter", adapter)
    backend = TorchBackend(load_torch_model(base, adapter), context)
    info = EngineInfo("tiny", "Tiny", "torch", "float32", "cpu", 2, 4, 2, context, "ab+cd", adapter.config.to_dict())
    return Engine(backend, ChatTokenizer.from_folder(base), info, folder / "adapter")
