"""4-bit and 8-bit linears by bitsandbytes, made one at a time while a base is loaded. Serving only.

Inference on a CPU repacks nf4 weights in place after the first call, after which training would silently get no
gradient; training therefore never uses what is made here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ming_app.errors import UsageError

QUANTISED = ("nf4", "int8")


def quantise_linear(linear: nn.Module, weight: Tensor, precision: str, device: torch.device) -> nn.Module:
    """A bitsandbytes linear holding `weight` [out, in] (float32) on `device` in nf4 or int8, compute in bf16.

    `linear` gives the bias, taken over as the same parameter, so that filling it later still counts. Raises UsageError when
    bitsandbytes is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise UsageError(
            f"Precision {precision} needs the package bitsandbytes: pip install bitsandbytes.",
            f"精度 {precision} 需要安装 bitsandbytes：pip install bitsandbytes。",
        ) from error
    n_out, n_in = weight.shape
    half = weight.to(torch.bfloat16)
    made: Any
    packed: Any
    if precision == "nf4":
        made = bnb.nn.Linear4bit(n_in, n_out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
        packed = bnb.nn.Params4bit(half, requires_grad=False, quant_type="nf4")
    else:
        made = bnb.nn.Linear8bitLt(n_in, n_out, bias=False, has_fp16_weights=False, device="meta")
        packed = bnb.nn.Int8Params(half, requires_grad=False, has_fp16_weights=False)
    made.weight = packed.to(device)  # moving is what quantises
    made.bias = getattr(linear, "bias", None)
    return made
