"""The MoLoRA linear: a frozen base linear plus a sparse mixture of LoRA experts (arXiv 2404.09027, section 3).

    l = W_s x + b_s            router, with bias, always float32
    S = top-k of l             (or k draws from softmax(l))
    w = softmax(l_S)           over the k chosen only, float32
    y = W0 x + s * sum_{i in S} w_i B_i A_i x

A `MoLoRALinear` WRAPS its base layer, so any linear (nn.Linear, bitsandbytes nf4/int8, packed) slots in. Everything is
token-wise: a row gives the same result alone or in a batch. No loop over experts, no [T, E, out] tensor:

  many tokens: one GEMM gives h [T, E r] and one the logits; h is scaled in rank space by the sparse gate; one GEMM by B.
  few tokens:  only the k chosen slices of B [r, out] are read.

gate_proj and up_proj see the same input and share one `RankRouter`, hence one GEMM for both (down_proj has its own).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ming_app.molora.autograd import AddExperts, AddLoRA, RankAndRoute, rank_and_route
from ming_app.molora.config import PROJECTIONS, MoLoRAConfig

GATHER_TOKENS = 4  # up to here reading k slices of B beats the dense GEMM over all E (measured on two cores)


@dataclass(frozen=True)
class GateTensors:
    """Changes to how B rows mix their experts; see engine.types.Gates."""

    top_k: Tensor
    """int64 [B, L, P]"""
    uniform: Tensor
    """bool [B, L, P]"""
    strength: Tensor
    """float32 [B, L, P]"""
    attention: Tensor
    """float32 [B, L]"""
    largest_k: int


@dataclass
class RoutingState:
    """What all MoLoRA linears of one model share during a forward: the bias they add and the record they keep.

    Filled by the owner of the model (backend, trainer); a layer only reads and writes its own [layer, projection] cell.
    """

    capture: bool = False
    """write the chosen experts and weights of each forward into `experts` and `weights`"""
    bias: Tensor | None = None
    """float32 [B, L, P, E], added to the router logits of row b of the batch"""
    gates: GateTensors | None = None
    """None: k, weights and strength as trained"""
    measure: bool = False
    """write `probabilities` and `contributions` too"""
    generator: torch.Generator | None = None
    """for expert_selection="sampling" """
    experts: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(layer, projection) -> int64 [..., k] of the last forward"""
    weights: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(layer, projection) -> float32 [..., k]"""
    probabilities: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(layer, projection) -> float32 [..., E]"""
    contributions: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(layer, projection) -> float32 [..., k]: norm of what each chosen expert adds over that of the base's output"""
    collect_logits: bool = False
    """append (layer, projection, logits float32 [..., E]) with their graph to `logits`: for router losses"""
    logits: list[tuple[int, int, Tensor]] = field(default_factory=list)

    def clear(self) -> None:
        """Forgets what the last forward recorded."""
        for record in (self.experts, self.weights, self.probabilities, self.contributions):
            record.clear()
        self.logits.clear()


class RankRouter(nn.Module):
    """The A matrices and routers of `slots` linears that share their input x [..., in].

    Parameters, per slot p: `A` [p, R, in] with R = (E + shared) r rank rows, routed ones first, expert-major;
    `router_weight` [p, E, in]; `router_bias` [p, E]. Init follows the original: Kaiming-uniform(a = sqrt 5).
    """

    def __init__(self, in_features: int, slots: int, config: MoLoRAConfig, device: torch.device | None = None):
        super().__init__()
        self.config = config
        self.slots = slots
        rank_rows = (config.num_experts + config.num_shared_experts) * config.rank
        self.A = _parameter((slots, rank_rows, in_features), device)
        self.router_weight = _parameter((slots, config.num_experts, in_features), device)
        self.router_bias = _parameter((slots, config.num_experts), device)
        self.dropout = nn.Dropout(config.expert_dropout)
        self._memo: tuple[Tensor, Tensor, Tensor] | None = None
        bound = 1 / math.sqrt(in_features)  # what kaiming_uniform_(a=sqrt(5)) gives for a matrix of this fan-in
        for parameter in (self.A, self.router_weight, self.router_bias):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., in] -> h [..., slots, R] in x's dtype, logits float32 [..., slots, E]."""
        lead = x.shape[:-1]
        a, router = self.A.flatten(0, 1), self.router_weight.flatten(0, 1)
        bias = self.router_bias.flatten()
        if self.training and self.dropout.p:
            h = F.linear(self.dropout(x), a.to(x.dtype))
            logits = F.linear(x.float(), router.float(), bias.float())
        elif torch.is_grad_enabled():
            h, logits = RankAndRoute.apply(x.flatten(0, -2), a, router, bias)
        else:
            h, logits = rank_and_route(x, a, router, bias)
        return h.view(*lead, self.slots, -1), logits.view(*lead, self.slots, -1)

    def for_slot(self, x: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """h [..., R] and logits [..., E] of one slot; one GEMM serves all slots called in turn with the same x."""
        if self.slots == 1:
            h, logits = self(x)
            return h[..., 0, :], logits[..., 0, :]
        memo = self._memo
        if memo is None or memo[0] is not x:
            memo = (x, *self(x))
            self._memo = memo
        if slot == self.slots - 1:
            self._memo = None  # the last user frees it: nothing outlives the FFN
        return memo[1][..., slot, :], memo[2][..., slot, :]


class MoLoRALinear(nn.Module):
    """One wrapped linear: `base_layer(x)` plus the scaled sum of the chosen experts.

    `B` [R, out] holds B_i^T stacked expert-major, so that one expert is a contiguous [r, out] slice. B starts at zero:
    a fresh adapter leaves the base unchanged.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        rank_router: RankRouter,
        slot: int,
        layer: int,
        projection: str,
        state: RoutingState,
    ):
        super().__init__()
        config = rank_router.config
        self.base_layer = base_layer
        self.rank_router = rank_router
        self.config = config
        self.slot = slot
        self.layer = layer
        self.projection = projection
        self._cell = (layer, PROJECTIONS.index(projection))
        self._state = state
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]  # declared by every linear
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        device = rank_router.A.device
        self.B = nn.Parameter(torch.zeros(rank_router.A.shape[1], self.out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the base layer's output dtype."""
        y = self.base_layer(x)
        h, logits = self.rank_router.for_slot(x, self.slot)
        if self._state.bias is not None:
            logits = logits + _broadcast_rows(self._state.bias[:, self._cell[0], self._cell[1]], logits)
        gates = self._state.gates
        experts, weights = select_experts(logits, self.config, self._state.generator, gates, self._cell)
        if self._state.capture:
            self._state.experts[self._cell] = experts
            self._state.weights[self._cell] = weights
        if gates is not None:
            h = h * _broadcast_rows(gates.strength[:, self._cell[0], self._cell[1], None], h).to(h.dtype)
        if self._state.measure:
            self._state.probabilities[self._cell] = logits.softmax(-1)
            self._state.contributions[self._cell] = self._contributions(y, h, experts, weights)
        if self._state.collect_logits:
            self._state.logits.append((*self._cell, logits))
        if self._few_tokens(h):
            return y + self._gathered(h, experts, weights).to(y.dtype)
        return AddExperts.apply(_owned(y), h.flatten(0, -2), self._gate(experts, weights).flatten(0, -2), self.B)

    def _contributions(self, y: Tensor, h: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """|s w_i B_i A_i x| / |W0 x| of the chosen, float32 [..., k], by r x r Gram matrices; y is W0 x still."""
        c = self.config
        slices = self.B.float().unflatten(0, (-1, c.rank))[: c.num_experts]  # (E, r, out)
        gram = slices @ slices.mT
        ranks = torch.take_along_dim(h.float().unflatten(-1, (-1, c.rank)), experts.unsqueeze(-1), dim=-2)
        squared = (torch.einsum("...kr,...krs->...ks", ranks, gram[experts]) * ranks).sum(-1)
        base = torch.linalg.vector_norm(y.float(), dim=-1, keepdim=True).clamp_min(1e-12)
        return c.scale * weights * squared.clamp_min(0).sqrt() / base

    def _few_tokens(self, h: Tensor) -> bool:
        return not torch.is_grad_enabled() and h.numel() <= GATHER_TOKENS * h.shape[-1]

    def _gate(self, experts: Tensor, weights: Tensor) -> Tensor:
        """s times the weight of every expert, zero for those not chosen; shared experts last: float32 [..., E + shared]."""
        c = self.config
        gate = torch.zeros(*weights.shape[:-1], c.num_experts, dtype=weights.dtype, device=weights.device)
        gate = gate.scatter(-1, experts, weights * c.scale)
        if c.num_shared_experts:
            gate = torch.cat([gate, gate.new_full((*gate.shape[:-1], c.num_shared_experts), c.scale)], dim=-1)
        return gate

    def _gathered(self, h: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """The same sum from only the k chosen slices: h [..., R] -> [..., out]."""
        c = self.config
        slices = self.B.unflatten(0, (-1, c.rank))  # (E + shared, r, out)
        ranks = h.unflatten(-1, (-1, c.rank))  # (..., E + shared, r)
        index = experts
        gate = weights * c.scale
        if c.num_shared_experts:
            shared = torch.arange(c.num_experts, slices.shape[0], device=h.device).expand(*h.shape[:-1], -1)
            index = torch.cat([index, shared], dim=-1)
            gate = torch.cat([gate, torch.full_like(shared, c.scale, dtype=gate.dtype)], dim=-1)
        chosen = torch.take_along_dim(ranks, index.unsqueeze(-1), dim=-2) * gate.to(h.dtype).unsqueeze(-1)
        picked = slices[index].to(h.dtype)  # (..., k, r, out)
        return torch.matmul(chosen.flatten(-2).unsqueeze(-2), picked.flatten(-3, -2)).squeeze(-2)

    def extra_repr(self) -> str:
        c = self.config
        return f"layer={self.layer}, projection={self.projection}, E={c.num_experts}, k={c.top_k}, r={c.rank}"


class LoRALinear(nn.Module):
    """Ordinary LoRA around a frozen linear, for the attention projections: y = W0 x + s B A dropout(x).

    `A` [r, in] Kaiming-uniform, `B` [out, r] zero. Serving merges it into the base weight: a `merged` one adds nothing, and
    takes away what a request switches off.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        config: MoLoRAConfig,
        device: torch.device | None = None,
        layer: int = 0,
        state: RoutingState | None = None,
        *,
        merged: bool = False,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.layer = layer
        self.merged = merged
        self._state = state or RoutingState()
        self.scale = config.scale
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]  # declared by every linear
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.lora_dropout)
        self.A = nn.Parameter(torch.empty(config.rank, self.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(self.out_features, config.rank, device=device))
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.A, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the base layer's output dtype."""
        y = self.base_layer(x)
        gates = self._state.gates
        if gates is None and self.merged:
            return y
        x = self.dropout(x)
        if gates is not None:
            strength = gates.attention[:, self.layer, None] - float(self.merged)
            x = x * _broadcast_rows(strength, x).to(x.dtype)
        return AddLoRA.apply(_owned(y), x.flatten(0, -2), self.A, self.B, self.scale)


def select_experts(
    logits: Tensor,
    config: MoLoRAConfig,
    generator: torch.Generator | None = None,
    gates: GateTensors | None = None,
    cell: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """Router logits float32 [..., E] -> experts int64 [..., k] (larger logit first) and weights float32 [..., k].

    With `gates`, k is their largest, and the experts beyond a row's own k weigh 0.
    """
    if gates is not None:
        values, experts = logits.topk(min(gates.largest_k, logits.shape[-1]), dim=-1, sorted=True)
        rows = (gates.top_k[:, cell[0], cell[1], None], gates.uniform[:, cell[0], cell[1], None])
        own_k, uniform = (_broadcast_rows(row, values) for row in rows)
        values = torch.where(uniform, 0.0, values)
        beyond = torch.arange(values.shape[-1], device=values.device) >= own_k
        return experts, values.masked_fill(beyond, -torch.inf).softmax(-1)
    if config.expert_selection == "sampling":
        # Gumbel top-k (Kool et al. 2019): draws without replacement from the softmax, and never a banned expert
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp_min(1e-30)
        drawn = (logits - (-uniform.log()).log()).topk(config.top_k, dim=-1).indices
        values, order = torch.take_along_dim(logits, drawn, dim=-1).sort(-1, descending=True)
        return torch.take_along_dim(drawn, order, dim=-1), values.softmax(-1)
    values, experts = logits.topk(config.top_k, dim=-1, sorted=True)
    return experts, values.softmax(-1)


def _owned(y: Tensor) -> Tensor:
    """A base layer's output that may be added to in place: bitsandbytes gives views of something of its own."""
    return y.clone() if y._is_view() else y


def _parameter(shape: tuple[int, ...], device: torch.device | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))


def _broadcast_rows(bias: Tensor, logits: Tensor) -> Tensor:
    """[B, n] -> [B, 1, ..., n] beside logits [B, ..., n] (n may be 1): one value or vector per row of the batch."""
    return bias.view(bias.shape[0], *[1] * (logits.dim() - 2), bias.shape[-1])
