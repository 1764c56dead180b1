"""The frozen base a run trains on: a transformers causal language model, its tokenizer and its fingerprint.

In float32, bf16, or quantised by bitsandbytes (nf4, int8: QLoRA, arXiv 2305.14314). From a local folder with safetensors,
or through `ming_app.models`: catalogue name -> fetched file -> tensors one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from training import attention
from training.chat import ChatTokenizer
from training.errors import TrainingError

if TYPE_CHECKING:
    from ming_app.models.progress import ProgressCallback


@dataclass
class Base:
    """`fingerprint` is the SHA-256 of the base file; `model` is in eval mode (see `set_training`) with frozen parameters."""

    name: str
    title: str
    """human name of the base"""
    fingerprint: str
    model: Any
    tokenizer: ChatTokenizer
    config: dict[str, Any]
    precision: str
    """of the linears: float32, bf16, int8 or nf4"""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def pick_device(wanted: str) -> torch.device:
    """auto: cuda where there is one, and of several processes each its own. Raises TrainingError when cuda is asked for and
    absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            "The recipe asks for cuda, but torch sees no GPU. Set device to auto or cpu.",
            "配方要求使用 cuda，但 torch 没有找到 GPU。请把 device 改为 auto 或 cpu。",
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and "LOCAL_RANK" in os.environ:  # as launchers set it
        wanted = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(wanted)


def pick_precision(wanted: str, device: torch.device) -> str:
    """auto: bf16 where the device computes in it, else float32 (a CPU without bf16 arithmetic emulates it, several times
    slower than float32). A torch too old to tell what a CPU can do counts as a CPU without."""
    if wanted != "auto":
        return wanted
    can: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = device.type != "cpu" or any(can.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))  # the last: ARM
    return "bf16" if fast else "float32"


def load_base(
    name: str,
    device: str = "auto",
    precision: str = "auto",
    progress: ProgressCallback | None = None,
    *,
    packing: bool = True,
) -> Base:
    """Loads a base by catalogue name, local folder or hub id; with `packing` it attends by attention.py, else in its own
    way. Raises MingError for whatever stands in the way."""
    from ming_app.models.catalog import find_model
    from ming_app.models.fetch import fetch
    from ming_app.models.load import load_torch_model
    from ming_app.settings import Settings

    # the bare base: the catalogue's adapter, if any, is what training is about to make
    local = fetch(find_model(name), Settings.load({"adapter": "none"}), progress)
    where = pick_device(device)
    attention.register()
    kind = attention.NAME if packing else "sdpa"
    precision = pick_precision(precision, where)
    loaded = load_torch_model(local, None, precision, str(where), progress, attention=kind)
    model = loaded.model.requires_grad_(False)
    set_training(model, False)
    tokenizer = ChatTokenizer.from_folder(local.home)
    return Base(
        local.name, _base_title(local.title), local.fingerprint, model, tokenizer, dict(loaded.config), precision
    )


def set_training(model: Any, on: bool) -> None:
    """`model.train(on)`, but linears of bitsandbytes stay in training mode (they have no dropout).

    In eval mode Linear4bit repacks its weight in place for a CPU's inference kernel at the first call, and from then on a
    training forward has no gradient, silently: one dev evaluation would end all learning. Linear8bitLt computes in another
    way there.
    """
    model.train(on)
    for module in model.modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            module.training = True


def _base_title(title: str) -> str:
    """The catalogue writes "served name (name of the base)"; a folder's title is its own name."""
    return title[title.index("(") + 1 : -1] if title.endswith(")") and "(" in title else title
