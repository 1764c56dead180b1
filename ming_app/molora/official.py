"""Reads the official MING checkpoint layout (MediaBrain-SJTU/MING, branch ming-moe) into an `Adapter`.

    config.json                             base config + num_experts, num_experts_per_token, expert_selection, ...
    adapter_config.json                     PEFT LoRA config; its r, lora_alpha, use_rslora describe the experts too
    adapter_model.safetensors | .bin        attention LoRA
    non_lora_trainables.bin                 routers and experts (a pickled dict, read with weights_only)

The original loads with strict=False and serves random routers when keys are missing; here every key is accounted for.
Supported variant: always-on shared experts (`.share_experts.`, development branch).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ming_app.errors import AdapterError
from ming_app.molora.checkpoint import (
    MAX_ADAPTER_BYTES,
    MAX_LAYERS,
    Adapter,
    attention_key,
    projection_key,
    read_json,
    read_safetensors,
    refuse_names,
)
from ming_app.molora.config import ATTENTION_TARGETS, PROJECTIONS, MoLoRAConfig
from ming_app.reading import require_regular

_FFN = re.compile(
    r"model\.layers\.(?P<layer>0|[1-9][0-9]{0,3})\.mlp\.(?P<projection>gate|up|down)_proj\."
    r"(?:switch\.(?P<switch>weight|bias)"
    r"|experts\.(?P<expert>0|[1-9][0-9]{0,2})\.lora_(?P<matrix>[AB])_(?P<again>[0-9]{1,3})\.weight"
    r"|share_experts\.lora_(?P<shared>[AB])(?:\.weight)?)"
)
_ATTENTION = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>0|[1-9][0-9]{0,3})\.self_attn\.(?P<target>[qkvo]_proj)\.lora_(?P<matrix>[AB])(?:\.default)?\.weight"
)
_NEUTRAL_PEFT = {"bias": ("none",), "use_dora": (False,), "fan_in_fan_out": (False,), "lora_bias": (False,)}
_EMPTY_PEFT = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layer_replication")


def load_official(folder: Path) -> Adapter:
    """An `Adapter` with native tensor names from an official folder. Raises AdapterError; shapes are checked by the caller."""
    model_config = read_json(folder / "config.json")
    peft_config = read_json(folder / "adapter_config.json")
    raw_ffn = _strip(_read_bin(folder / "non_lora_trainables.bin"))
    config = _config(model_config, peft_config, raw_ffn)
    tensors = _ffn_tensors(raw_ffn, config)
    if config.attention_targets or any((folder / f"adapter_model.{end}").is_file() for end in ("safetensors", "bin")):
        tensors |= _attention_tensors(_read_attention(folder), config)
    layers = model_config.get("num_hidden_layers")
    if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS:
        raise AdapterError("config.json lacks num_hidden_layers.", "config.json 缺少 num_hidden_layers。")
    return Adapter(config, layers, tensors)


def _config(model: Mapping[str, Any], peft: Mapping[str, Any], raw: Mapping[str, np.ndarray]) -> MoLoRAConfig:
    if peft.get("peft_type", "LORA") != "LORA":
        raise AdapterError(
            f"adapter_config.json is of type {peft.get('peft_type')!r}; only LORA is read.",
            f"adapter_config.json 的类型是 {peft.get('peft_type')!r}，只支持 LORA。",
        )
    unusual = [key for key, allowed in _NEUTRAL_PEFT.items() if peft.get(key, allowed[0]) not in allowed]
    unusual += [key for key in _EMPTY_PEFT if peft.get(key)]
    if unusual:
        raise AdapterError(
            f"adapter_config.json uses options this loader does not know: {', '.join(unusual)}.",
            f"adapter_config.json 使用了不支持的选项：{'、'.join(unusual)}。",
        )
    ours, theirs = model.get("use_rslora"), peft.get("use_rslora")
    if ours is not None and theirs is not None and ours != theirs:
        raise AdapterError(
            f"config.json says use_rslora={ours}, adapter_config.json says {theirs}; the scale of the experts is ambiguous.",
            f"config.json 中 use_rslora={ours}，而 adapter_config.json 中为 {theirs}；专家的缩放系数不明确。",
        )
    missing = [key for key in ("r", "lora_alpha") if key not in peft]
    if missing:
        raise AdapterError(
            f"adapter_config.json lacks {', '.join(missing)}.", f"adapter_config.json 缺少 {'、'.join(missing)}。"
        )
    rank = peft["r"]
    return MoLoRAConfig(
        num_experts=model.get("num_experts", 4),
        top_k=model.get("num_experts_per_token", 2),
        rank=rank,
        alpha=peft["lora_alpha"],
        use_rslora=next((value for value in (theirs, ours) if value is not None), False),
        expert_selection=model.get("expert_selection", "top_k"),
        num_shared_experts=_shared_experts(model, raw, rank),
        lora_dropout=peft.get("lora_dropout", 0.0),
        attention_targets=_targets(peft.get("target_modules")),
    )


def _shared_experts(model: Mapping[str, Any], raw: Mapping[str, np.ndarray], rank: Any) -> int:
    """n of the always-on pair, read off the tensors and held against config.json where that names it."""
    shared = [array for key, array in raw.items() if ".share_experts." in key and "lora_A" in key]
    declared = model.get("num_share_experts")
    if not shared:
        if model.get("share_expert") or declared:
            raise AdapterError(
                "config.json announces shared experts, but the checkpoint holds no .share_experts. tensors.",
                "config.json 声明了共享专家，但检查点中没有 .share_experts. 张量。",
            )
        return 0
    rows = shared[0].shape[0] if shared[0].ndim == 2 else 0
    counted = declared is None or isinstance(declared, int)
    if (
        not counted
        or not isinstance(rank, int)
        or rank < 1
        or rows < 1
        or rows % rank
        or (declared and declared * rank != rows)
    ):
        raise AdapterError(
            f"The shared experts have {rows} rank rows, which do not fit rank {rank} and num_share_experts {declared}.",
            f"共享专家的秩行数为 {rows}，与 rank={rank}、num_share_experts={declared} 不符。",
        )
    return rows // rank


def _targets(modules: Any) -> tuple[str, ...]:
    if not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
        raise AdapterError(
            "adapter_config.json: target_modules must be a list of names.",
            "adapter_config.json 中 target_modules 应为名称列表。",
        )
    unknown = sorted(set(modules) - set(ATTENTION_TARGETS))
    if unknown:
        raise AdapterError(
            f"adapter_config.json targets {', '.join(unknown)}; only the attention linears {', '.join(ATTENTION_TARGETS)} are expected.",
            f"adapter_config.json 的目标模块含 {'、'.join(unknown)}；只应包含注意力线性层 {'、'.join(ATTENTION_TARGETS)}。",
        )
    return tuple(t for t in ATTENTION_TARGETS if t in modules)


def _ffn_tensors(raw: Mapping[str, np.ndarray], config: MoLoRAConfig) -> dict[str, np.ndarray]:
    """Official switch/experts keys -> stacked native tensors; every key must match and every expert be there."""
    tensors: dict[str, np.ndarray] = {}
    experts: dict[tuple[int, str, str], dict[int, np.ndarray]] = {}
    extra = []
    for key, array in raw.items():
        found = _FFN.fullmatch(key)
        if not found or (
            found["expert"] and (found["expert"] != found["again"] or int(found["expert"]) >= config.num_experts)
        ):
            extra.append(key)
            continue
        layer, projection = int(found["layer"]), found["projection"]
        if found["switch"]:
            tensors[projection_key(layer, projection, f"router.{found['switch']}")] = array
        elif found["shared"]:
            _put_once(tensors, projection_key(layer, projection, f"shared.{found['shared']}"), array)
        else:
            experts.setdefault((layer, projection, found["matrix"]), {})[int(found["expert"])] = array
    refuse_names("extra", sorted(extra))
    for (layer, projection, matrix), members in experts.items():
        prefix = f"model.layers.{layer}.mlp.{projection}_proj.experts"
        absent = sorted(set(range(config.num_experts)) - set(members))
        refuse_names("missing", [f"{prefix}.{i}.lora_{matrix}_{i}.weight" for i in absent])
        if len({array.shape for array in members.values()}) != 1:
            raise AdapterError(f"The experts under {prefix} have different shapes.", f"{prefix} 下各专家的形状不一致。")
        tensors[projection_key(layer, projection, matrix)] = np.stack([members[i] for i in range(config.num_experts)])
    if not experts:
        refuse_names("missing", [f"model.layers.0.mlp.{p}_proj.experts.0.lora_A_0.weight" for p in PROJECTIONS])
    return tensors


def _attention_tensors(raw: Mapping[str, np.ndarray], config: MoLoRAConfig) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    extra = []
    for key, array in raw.items():
        found = _ATTENTION.fullmatch(key)
        if found and found["target"] in config.attention_targets:
            _put_once(tensors, attention_key(int(found["layer"]), found["target"], found["matrix"]), array)
        else:
            extra.append(key)
    refuse_names("extra", sorted(extra))
    return tensors


def _put_once(tensors: dict[str, np.ndarray], name: str, array: np.ndarray) -> None:
    """Two spellings of one tensor are refused: which of them should count?"""
    if name in tensors:
        raise AdapterError(f"The checkpoint holds {name} twice.", f"检查点中 {name} 出现了两次。")
    tensors[name] = array


def _read_attention(folder: Path) -> dict[str, np.ndarray]:
    path = folder / "adapter_model.safetensors"
    return read_safetensors(path) if path.is_file() else _read_bin(folder / "adapter_model.bin")


def _strip(raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The original's rule: drop a leading `base_model.`; if any key then starts with `model.model.`, drop one `model.`."""
    short = {key.removeprefix("base_model."): array for key, array in raw.items()}
    if any(key.startswith("model.model.") for key in short):
        short = {key.removeprefix("model."): array for key, array in short.items()}
    if len(short) != len(raw):
        raise AdapterError("The checkpoint names a tensor twice.", "检查点中有重复的张量名。")
    return short


def _check_bin(path: Path) -> None:
    """Raises OSError or ValueError for a .bin that is no regular file, too large, or packed: torch stores without packing,
    and unpacks what is packed to whatever size it claims."""
    require_regular(path)
    if path.stat().st_size > MAX_ADAPTER_BYTES:
        raise ValueError("the file is too large for an adapter")
    with path.open("rb") as file:
        if file.read(2) != b"PK":  # torch's older form, no archive
            return
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("its members are packed")


def _read_bin(path: Path) -> dict[str, np.ndarray]:
    """A dict of tensors from a torch .bin file, unpickled with weights_only: code in it is refused, never run."""
    import torch

    try:
        _check_bin(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise AdapterError(
            f"{path.name} is missing from {path.parent}; without it experts or routers would be random.",
            f"{path.parent} 中缺少 {path.name}；没有它，专家或路由器将是随机的。",
        ) from error
    except Exception as error:  # torch raises many kinds for damaged or hostile pickles: all of them mean "refuse"
        raise AdapterError(
            f"{path.name} is damaged or holds more than plain tensors and was refused ({type(error).__name__}).",
            f"{path.name} 已损坏或含有张量以外的内容，已拒绝加载（{type(error).__name__}）。",
        ) from error
    if not isinstance(loaded, dict):
        raise AdapterError(f"{path.name} does not hold a dict of tensors.", f"{path.name} 的内容不是张量字典。")
    tensors: dict[str, np.ndarray] = {}
    total = 0
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise AdapterError(
                f"{path.name} holds {str(key)[:80]!r}, which is not a floating-point tensor.",
                f"{path.name} 中的 {str(key)[:80]!r} 不是浮点张量。",
            )
        plain = value.layout == torch.strided and value.device.type == "cpu"
        # an expanded tensor claims more elements than its bytes hold: a small file that fills the memory
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise AdapterError(
                f"{path.name}: tensor {key[:80]} is not a plain, whole tensor.",
                f"{path.name}：张量 {key[:80]} 不是完整的普通张量。",
            )
        total += value.numel() * 4
        if total > MAX_ADAPTER_BYTES:
            raise AdapterError(
                f"{path.name} unpacks to more than an adapter may hold.", f"{path.name} 解包后超过适配器的大小上限。"
            )
        tensors[key] = value.detach().to(torch.float32).contiguous().numpy()
    return tensors
