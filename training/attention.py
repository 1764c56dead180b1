"""Causal attention inside each sample of a packed row; samples may share what they begin with.

A micro-batch is one row of tokens, cut into parts. A part is a `shared` beginning, then `rows` samples padded on the right
to one length; each sample attends to the shared beginning and to itself:

    | shared (P) | sample 0 (n) | sample 1 (n) | ...      | next part ...

The numbers are those of every sample alone (keys and values of the beginning are the same in all of them), so what many
samples begin with (system message, wording of a task) is read once. Registered with transformers under the name
`NAME`; the layout travels as the keyword `parts` of the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.errors import TrainingError

NAME = "ming_packed"


class Part(NamedTuple):
    """`shared` tokens that all samples begin with (may be 0), then `rows` samples of `length` tokens each."""

    shared: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of the part, padding counted."""
        return self.shared + self.rows * self.length


def register() -> None:
    """Makes `attn_implementation=NAME` known to transformers. Calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    parts: Sequence[Part] = (),
    **options: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D]. Without `parts` the row is one sample.

    Raises TrainingError for a layer that attends in another way than plain causal attention.
    """
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise TrainingError(
                f"This base's attention uses {name}, which packed rows do not know. Set packing = false in the recipe.",
                f"该基座的注意力使用 {name}，打包训练不支持。请在配方中设置 packing = false。",
            )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    parts = parts or (Part(0, 1, query.shape[2]),)
    sizes = [size for part in parts for size in (part.shared, part.rows * part.length)]
    cut = [tensor[0].split(sizes, dim=1) for tensor in (query, key, value)]  # (heads, tokens, D) each
    out = []
    for i, part in enumerate(parts):
        (q0, q), (k0, k), (v0, v) = (pieces[2 * i : 2 * i + 2] for pieces in cut)
        if part.shared:
            out.append(_attend(q0[:, None], k0[:, None], v0[:, None], None, None, scale, dropout))
        q, k, v = (t.unflatten(1, (part.rows, part.length)) for t in (q, k, v))  # (heads, rows, length, D)
        shared = (k0, v0) if part.shared else (None, None)
        out.append(_attend(q, k, v, shared[0], shared[1], scale, dropout))
    return torch.cat(out).unsqueeze(0), None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, k0: Tensor | None, v0: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """q [H, rows, n, D], k and v [H_kv, rows, n, D], shared k0 and v0 [H_kv, P, D] -> [rows n, H, D]."""
    heads, rows, n, width = q.shape
    attend = _by_kernel if q.is_cuda else _by_products
    q = q.unflatten(0, (k.shape[0], -1))  # (H_kv, group, rows, n, D)
    return attend(q, k, v, k0, v0, scale, dropout).permute(2, 3, 0, 1, 4).reshape(rows * n, heads, width)


def _by_products(
    q: Tensor, k: Tensor, v: Tensor, k0: Tensor | None, v0: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Plain products: on a CPU the fused kernel's backward is slow for short rows, and these never copy k0 and v0.

    Scores and softmax are float32, as inside the fused kernels: Qwen's keys have large biases, and scores rounded to bf16 blur
    what is attended to."""
    kv, group, rows, n, width = q.shape
    own = q.transpose(1, 2).reshape(kv, rows, group * n, width).float() * scale
    scores = own @ k.float().transpose(-1, -2)  # (H_kv, rows, group n, n)
    future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1).repeat(group, 1)
    scores = scores.masked_fill(future, -torch.inf)
    if k0 is not None:
        before = (own.flatten(1, 2) @ k0.float().transpose(-1, -2)).unflatten(1, (rows, group * n))
        scores = torch.cat([before, scores], dim=-1)
    weights = scores.softmax(-1).to(v.dtype)
    weights = F.dropout(weights, dropout) if dropout else weights
    out = weights[..., -n:] @ v
    if v0 is not None:
        out = out + (weights[..., :-n].flatten(1, 2) @ v0).unflatten(1, (rows, group * n))
    return out.unflatten(2, (group, n)).transpose(1, 2)


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, k0: Tensor | None, v0: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """torch's fused attention: on a GPU nothing of size n x n is kept."""
    kv, group, rows, n, width = q.shape
    queries = q.permute(2, 0, 1, 3, 4).flatten(1, 2)  # (rows, H, n, D)
    mask = None
    if k0 is not None and v0 is not None:
        k, v = (torch.cat([t0[:, None].expand(-1, rows, -1, -1), t], 2) for t0, t in ((k0, k), (v0, v)))
        mask = torch.ones(n, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - n)
    keys, values = (t.transpose(0, 1).repeat_interleave(group, dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, is_causal=mask is None, scale=scale)
    return out.unflatten(1, (kv, group)).permute(1, 2, 0, 3, 4)
