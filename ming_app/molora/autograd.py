"""MoLoRA and LoRA with gradients written out: what autograd would do in a dozen passes over [T, in] and [T, out].

The same numbers as the plain formulas (tests hold them together), in fewer and in-place passes: adapter weights are
cast to the activations' dtype once, nothing of width in or out is kept but the input itself, and the delta is added into
the base layer's own output. Used while gradients are on; inference has its own forms in `layer.py`.

Shapes: T tokens (all leading dimensions flattened), R rank rows, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_CHUNK, GPU_CHUNK = 1 << 20, 1 << 26  # elements of x in float32 at a time: what a cache holds; 256 MB


def rank_and_route(x: Tensor, a: Tensor, router: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., in], A [R, in], router [E, in], bias [E] -> h [..., R] in x's dtype, logits float32 [..., E]."""
    if x.dtype == a.dtype == torch.float32:
        h, logits = F.linear(x, torch.cat([a, router])).split([a.shape[0], router.shape[0]], dim=-1)
        return h, logits + bias
    h, router, bias = F.linear(x, a.to(x.dtype)), router.float(), bias.float()
    rows = max(1, (GPU_CHUNK if x.is_cuda else CPU_CHUNK) // x.shape[-1])
    chunks = x.flatten(0, -2).split(rows)
    logits = torch.cat([F.linear(chunk.float(), router, bias) for chunk in chunks])
    return h, logits.view(*x.shape[:-1], -1)


class RankAndRoute(torch.autograd.Function):
    """`rank_and_route` of x [T, in] with one GEMM each way in its backward; weights are float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, router: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, a, router)
        return rank_and_route(x, a, router, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        x, a, router = ctx.saved_tensors
        dh, dlogits = grads
        both = torch.cat([dh, dlogits.to(dh.dtype)], dim=-1)  # (T, R + E): one GEMM each way
        dx = both @ torch.cat([a, router]).to(both.dtype) if ctx.needs_input_grad[0] else None
        dweights = (both.T @ x).to(a.dtype)
        return dx, dweights[: a.shape[0]], dweights[a.shape[0] :], dlogits.sum(0)


class AddExperts(torch.autograd.Function):
    """y [..., out] += (h scaled by gate in rank space) B; h [T, n r], gate float32 [T, n], B [n r, out]. In place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, gate: Tensor, b: Tensor) -> Tensor:
        scaled = _scale(h, gate).to(y.dtype)
        y.view(-1, y.shape[-1]).addmm_(scaled, b.to(y.dtype))  # the view is taken in here: autograd sees y itself
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, gate, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, gate, b = ctx.saved_tensors
        g = grads[0].flatten(0, -2)
        scaled = _scale(h, gate).to(g.dtype)
        dscaled = (g @ b.to(g.dtype).T).to(h.dtype)
        dgate = (dscaled * h).unflatten(-1, (gate.shape[-1], -1)).sum(-1, dtype=gate.dtype)
        return grads[0], _scale(dscaled, gate), dgate, (scaled.T @ g).to(b.dtype)


class AddLoRA(torch.autograd.Function):
    """y [..., out] += s (x A^T) B^T; x [T, in], A [r, in], B [out, r]. In place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        h = F.linear(x, a.to(x.dtype))
        y.view(-1, y.shape[-1]).addmm_(h.to(y.dtype), b.to(y.dtype).T, alpha=scale)
        ctx.mark_dirty(y)
        ctx.scale = scale
        ctx.save_for_backward(x, h, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        x, h, a, b = ctx.saved_tensors
        g = grads[0].flatten(0, -2)
        dh = ((g @ b.to(g.dtype)) * ctx.scale).to(x.dtype)
        dx = dh @ a.to(dh.dtype) if ctx.needs_input_grad[1] else None
        db = (g.T @ h.to(g.dtype)).to(b.dtype).mul_(ctx.scale)
        return grads[0], dx, (dh.T @ x).to(a.dtype), db, None


def _scale(h: Tensor, gate: Tensor) -> Tensor:
    """h [T, n r] times gate [T, n], each gate over its r columns, in h's dtype."""
    return (h.unflatten(-1, (gate.shape[-1], -1)) * gate.to(h.dtype).unsqueeze(-1)).flatten(-2)
