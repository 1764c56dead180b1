"""From the metadata of a GGUF to a Hugging Face config.json, and from its tensor names to Hugging Face names.

Families: qwen2 and llama. Every tensor is accounted for and every shape checked, so that a wrong or tampered file is
refused here and not by a strange error (or silent nonsense) later.
"""

from __future__ import annotations

from typing import Any

from ming_app.models.gguf import GGUFFile, damaged

_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_LAYER_BIASES = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}
_FAMILIES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json of the base in `file`. Raises WeightsError for an unsupported family or impossible numbers."""
    family = file.metadata.get("general.architecture")
    if family not in _FAMILIES:
        raise damaged(
            file.path,
            f"its model family {family!r} is not supported (qwen2 and llama are)",
            f"不支持模型家族 {family!r}（支持 qwen2 和 llama）",
        )
    if "rope_freqs.weight" in file.tensors:  # the factors cannot be turned back into the numbers of config.json
        raise damaged(
            file.path,
            "it uses scaled rotary factors; give this model as a Hugging Face folder instead",
            "它使用了缩放的旋转位置因子；请改用该模型的 Hugging Face 文件夹",
        )
    get = _Reader(file, family)
    heads = get.whole("attention.head_count", 1024)
    hidden = get.whole("embedding_length", 1 << 17)
    tied = "output.weight" not in file.tensors
    embedding = file.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [_FAMILIES[family]],
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": get.whole("feed_forward_length", 1 << 20),
        "num_hidden_layers": get.whole("block_count", 1024),
        "num_attention_heads": heads,
        "num_key_value_heads": get.whole("attention.head_count_kv", 1024, default=heads),
        "hidden_act": "silu",
        "max_position_embeddings": get.whole("context_length", 1 << 24),
        # stored as float32: 9.99999997e-07 is meant to be 1e-06
        "rms_norm_eps": float(f"{get.real('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        "rope_theta": float(f"{get.real('rope.freq_base', 10000.0):.7g}"),
        "vocab_size": embedding.shape[0] if embedding else 0,
        "tie_word_embeddings": tied,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }
    head_dim = get.whole("attention.key_length", 4096, default=hidden // heads)
    if family == "llama":
        config |= {"head_dim": head_dim, "attention_bias": False, "mlp_bias": False}
    else:
        config["use_sliding_window"] = False
    config |= get.scaling()
    for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        token = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int) and 0 <= token < config["vocab_size"]:
            config[key] = token
    if hidden % heads or heads % config["num_key_value_heads"] or head_dim * heads != hidden or head_dim % 2:
        raise damaged(file.path, "its numbers of heads and sizes do not fit together", "其注意力头数与维度不匹配")
    return config


def gguf_names(file: GGUFFile, config: dict[str, Any]) -> dict[str, str]:
    """Hugging Face name -> GGUF name for every tensor, in model order. Raises WeightsError when one is missing, extra or misshapen."""
    family = config["model_type"]
    per_layer = {**_LAYER, **(_LAYER_BIASES if family == "qwen2" else {})}
    names = {"model.embed_tokens.weight": "token_embd.weight"}
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in per_layer.items():
            names[f"model.layers.{layer}.{theirs}"] = f"blk.{layer}.{ours}"
    names["model.norm.weight"] = "output_norm.weight"
    if not config["tie_word_embeddings"]:
        names["lm_head.weight"] = "output.weight"
    missing = [name for name in names.values() if name not in file.tensors][:3]
    extra = sorted(set(file.tensors) - set(names.values()))[:3]
    if missing or extra:
        raise damaged(
            file.path,
            f"tensors are missing ({missing}) or unexpected ({extra}) for the family {family}",
            f"对于 {family} 家族，缺少张量 {missing} 或多出张量 {extra}",
        )
    for theirs, ours in names.items():
        wanted, found = _shape(theirs, config), file.tensors[ours].shape
        if wanted != found:
            raise damaged(
                file.path,
                f"tensor {ours} has the shape {list(found)} instead of {list(wanted)}",
                f"张量 {ours} 的形状是 {list(found)}，应为 {list(wanted)}",
            )
    return names


def _shape(name: str, config: dict[str, Any]) -> tuple[int, ...]:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    if "norm" in name:
        return (hidden,)
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return (vocab, hidden)
    project, kind = name.split(".")[-2:]
    out, in_ = {
        "q_proj": (hidden, hidden),
        "k_proj": (narrow, hidden),
        "v_proj": (narrow, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }[project]
    return (out,) if kind == "bias" else (out, in_)


class _Reader:
    """Checked access to the numbers of one family's metadata."""

    def __init__(self, file: GGUFFile, family: str):
        self._file, self._family = file, family

    def whole(self, key: str, limit: int, *, default: int | None = None) -> int:
        value = self._file.metadata.get(f"{self._family}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise self._bad(key, value)
        return value

    def real(self, key: str, default: float) -> float:
        value = self._file.metadata.get(f"{self._family}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise self._bad(key, value)
        return float(value)

    def scaling(self) -> dict[str, Any]:
        """rope_scaling of config.json, empty when the file asks for none."""
        kind = self._file.metadata.get(f"{self._family}.rope.scaling.type", "none")
        if kind == "none":
            return {}
        if kind not in ("linear", "yarn"):
            raise self._bad("rope.scaling.type", kind)
        scaling: dict[str, Any] = {"rope_type": kind, "factor": self.real("rope.scaling.factor", 1.0)}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self.whole("rope.scaling.original_context_length", 1 << 24)
        return {"rope_scaling": scaling}

    def _bad(self, key: str, value: object) -> Exception:
        return damaged(self._file.path, f"{self._family}.{key} is {value!r}", f"{self._family}.{key} 的值是 {value!r}")
