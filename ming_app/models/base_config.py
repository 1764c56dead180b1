"""config.json of a base, read as hostile: the numbers that sizes and loops are made from are checked in one place.

Whoever needs a base's configuration calls `read_base_config`; whoever is handed one from elsewhere, `check_base_config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ming_app.errors import WeightsError
from ming_app.models.gguf import damaged
from ming_app.reading import read_bounded

# Entries and the largest value that is believed: far above every known model, far below what exhausts a machine by itself.
_NEEDED = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "vocab_size": 1 << 24,
}
_OPTIONAL = {"num_key_value_heads": 1024, "head_dim": 4096, "max_position_embeddings": 1 << 24}


def read_base_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder, checked, with `rope_theta` where every version of transformers once kept it.

    Raises WeightsError when it cannot be read or `check_base_config` refuses it.
    """
    config = read_json(folder / "config.json")
    check_base_config(config)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    return config


def check_base_config(config: Mapping[str, Any]) -> None:
    """Raises WeightsError, naming the entry, unless the sizes in `config` are those of a decoder that can exist."""
    for name, limit in _NEEDED.items():
        if config.get(name) is None:
            raise _refused(f"it lacks {name}", f"缺少 {name}", config)
        _check_whole(config, name, limit)
    for name, limit in _OPTIONAL.items():
        if config.get(name) is not None:
            _check_whole(config, name, limit)
    heads = config["num_attention_heads"]
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        raise _refused(
            "hidden_size is not a multiple of num_attention_heads",
            "hidden_size 不是 num_attention_heads 的倍数",
            config,
        )
    if heads % (config.get("num_key_value_heads") or heads):
        raise _refused(
            "num_attention_heads is not a multiple of num_key_value_heads",
            "num_attention_heads 不是 num_key_value_heads 的倍数",
            config,
        )


def _check_whole(config: Mapping[str, Any], name: str, limit: int) -> None:
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        shown = repr(value)[:60]
        raise _refused(
            f"{name} is {shown}, not a whole number from 1 to {limit}",
            f"{name} 的值是 {shown}，应为 1 到 {limit} 的整数",
            config,
        )


def _refused(en: str, zh: str, config: Mapping[str, Any]) -> WeightsError:
    kind = repr(config.get("model_type"))[:60]
    return WeightsError(
        f"The base's config.json (model type {kind}) cannot be used: {en}. Give a Qwen2-like or Llama-like base.",
        f"无法使用基座的 config.json（模型类型 {kind}）：{zh}。请提供类似 Qwen2 或 Llama 的基座。",
    )


def read_json(path: Path, limit: int = 100_000_000) -> dict[str, Any]:
    """A JSON table from a file that may be hostile. Raises WeightsError."""
    try:
        value = json.loads(read_bounded(path, limit).decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not a table")
    except OSError as error:
        raise damaged(path, f"it cannot be opened ({error.strerror})", f"无法打开（{error.strerror}）") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is not sound JSON ({error})", f"不是有效的 JSON（{error}）") from error
    return value
