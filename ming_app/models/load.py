"""Base + adapter -> a torch model ready to run: the float32 reference, bf16, or nf4/int8 by bitsandbytes.

Tensor by tensor from a `TensorSource`, so that no second copy of the base is ever held. Attention LoRA is merged in float32
into the base weight (of a GGUF that does not run in float32: its bfloat16 conversion) before that is rounded or quantised;
experts and routers stay in their own precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ming_app.errors import FetchError, WeightsError
from ming_app.models.convert import ensure_safetensors
from ming_app.models.progress import Meter, ProgressCallback
from ming_app.models.quantize import QUANTISED, quantise_linear
from ming_app.models.tensors import TensorSource, open_tensors
from ming_app.molora.checkpoint import Adapter
from ming_app.molora.inject import InjectedModel, inject_molora, load_into

if TYPE_CHECKING:
    from ming_app.models.fetch import LocalModel

COMPUTE_DTYPE = {"float32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16, "int8": torch.bfloat16}
_TARGET_PATHS = {f".self_attn.{target}.weight": target for target in ("q_proj", "k_proj", "v_proj", "o_proj")}


@dataclass(frozen=True)
class TorchModel:
    """A causal language model in eval mode on one device; `injected` is None when served without an adapter."""

    model: nn.Module
    injected: InjectedModel | None
    config: Mapping[str, Any]
    precision: str
    device: torch.device


def load_torch_model(
    base: LocalModel | Path | str,
    adapter: Adapter | None = None,
    precision: str = "float32",
    device: str = "cpu",
    progress: ProgressCallback | None = None,
    *,
    attention: str = "sdpa",
) -> TorchModel:
    """Loads a base (GGUF or safetensors folder) with an adapter for inference, or bare, to be trained on.

    `precision`: float32, bf16, nf4 or int8 (the last two quantise every linear but lm_head). `attention`: transformers'
    name of the attention implementation. The GGUF of a `LocalModel` is converted once, in the cache, unless `precision` is
    float32. Raises WeightsError for a base that lacks tensors or has unexpected ones,
    AdapterError for an adapter that does not fit.
    """
    where = torch.device(device)
    with open_tensors(_weights_of(base, precision, progress)) as source:
        model = empty_model(source.config, COMPUTE_DTYPE[precision], attention)
        _fill(model, source, adapter, precision, where, progress)
    model.to(where)
    model.eval()
    injected = None
    if adapter is not None:
        injected = inject_molora(model, adapter.config, merged=True)
        load_into(injected, adapter)
        if COMPUTE_DTYPE[precision] != torch.float32:
            for linear in injected.linears.values():  # routers stay float32; ranks run in the compute dtype
                linear.B.data = linear.B.data.to(COMPUTE_DTYPE[precision])
                linear.rank_router.A.data = linear.rank_router.A.data.to(COMPUTE_DTYPE[precision])
            for lora in injected.attention.values():
                lora.A.data, lora.B.data = (p.data.to(COMPUTE_DTYPE[precision]) for p in (lora.A, lora.B))
    return TorchModel(model, injected, source.config, precision, where)


def _weights_of(base: LocalModel | Path | str, precision: str, progress: ProgressCallback | None) -> LocalModel | Path:
    """What to read: a GGUF of the cache is converted once to bfloat16 where it runs in that type, for faster starts.

    float32 is the reference and reads the exact values.
    """
    if isinstance(base, Path | str):
        return Path(base)
    if COMPUTE_DTYPE[precision] != torch.bfloat16 or base.base.is_dir():
        return base
    try:
        return ensure_safetensors(base, "bfloat16", progress)
    except FetchError:  # no room, or a cache that is read only: it still runs, and starts as slowly the next time
        return base


def empty_model(config: Mapping[str, Any], dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """The architecture of an HF config.json with unset weights on the CPU (pages are touched only when filled).

    Only architectures that transformers itself knows; code of a checkpoint is never run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    values = {k: v for k, v in config.items() if k not in ("auto_map", "quantization_config", "architectures")}
    try:
        hf_config = AutoConfig.for_model(**values)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=attention)
        model.tie_weights()  # part of the initialisation that was left out
    except Exception as error:  # a config.json is anybody's: whatever transformers raises over it is its fault
        kind = config.get("model_type")
        raise WeightsError(
            f"The base is of type {kind!r}, which cannot be built ({error}).",
            f"无法构建类型为 {kind!r} 的基座（{error}）。",
        ) from error
    return model


def merged_weight(source: TensorSource, name: str, adapter: Adapter | None) -> np.ndarray:
    """Tensor `name` of the base, float32, with the adapter's attention LoRA added where it has one."""
    weight = source.get(name)
    target = next((t for ending, t in _TARGET_PATHS.items() if name.endswith(ending)), None)
    if adapter is None or target is None:
        return weight
    layer = int(name.split("layers.")[1].split(".")[0])
    lora = adapter.attention(layer, target)
    return weight if lora is None else weight + adapter.config.scale * (lora[1] @ lora[0])


def _fill(
    model: nn.Module,
    source: TensorSource,
    adapter: Adapter | None,
    precision: str,
    device: torch.device,
    progress: ProgressCallback | None,
) -> None:
    parameters = dict(model.named_parameters())
    tied = bool(source.config.get("tie_word_embeddings"))
    names = [name for name in source.names() if name in parameters]
    wanted = {name for name in parameters if not (tied and name == "lm_head.weight")}
    missing = sorted(wanted - set(names))
    extra = sorted(set(source.names()) - set(parameters) - {"lm_head.weight"})
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
    if missing or extra:
        shown = ", ".join((missing or extra)[:3])
        kind_en, kind_zh = ("lacks", "缺少") if missing else ("has unexpected", "含有多余的")
        raise WeightsError(f"The base {kind_en} tensors: {shown}.", f"基座{kind_zh}张量：{shown}。")
    meter = Meter(progress, "load", len(names), "steps")
    linears = {f"{path}.weight": path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        for done, name in enumerate(names):
            value = torch.from_numpy(merged_weight(source, name, adapter))
            if value.shape != parameters[name].shape:
                raise WeightsError(
                    f"{name} has shape {tuple(value.shape)}, it should be {tuple(parameters[name].shape)}.",
                    f"{name} 的形状是 {tuple(value.shape)}，应为 {tuple(parameters[name].shape)}。",
                )
            if precision in QUANTISED and name in linears and not name.startswith("lm_head"):
                _replace(
                    model, linears[name], quantise_linear(model.get_submodule(linears[name]), value, precision, device)
                )
            else:
                parameters[name].copy_(value)
            meter.update(done + 1, name)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
