"""Tables of a trace: load per expert, and one token in every layer and projection. Plain rows, ready for text or HTML.

Load of an expert is its share of the choices made (k per token, layer and projection); E loads add up to 1 and an even
use of all experts would give each 1 / E (the "uniform" line of the page).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ming_app.molora.trace import RouterTrace


@dataclass(frozen=True)
class ExpertLoad:
    """One expert's part in a selection of tokens, layers and projections."""

    expert: int
    share: float
    """of all choices; shares of all experts add up to 1"""
    first: float
    """of the places where it was the top choice; adds up to 1 too"""
    weight: float
    """of the summed routing weight; adds up to 1"""


def load_table(
    trace: RouterTrace, *, layer: int | None = None, projection: str | None = None, role: str | None = None
) -> list[ExpertLoad]:
    """Load of every expert, for all layers, projections and roles or one of each. Zeros when nothing is selected."""
    rows = np.array([role is None or token.role == role for token in trace.tokens], bool)
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    p = slice(None) if projection is None else slice(i := trace.projections.index(projection), i + 1)
    experts, weights = trace.experts[rows, layers, p], trace.weights[rows, layers, p].astype(np.float64)
    E = trace.num_experts
    share = _normal(np.bincount(experts.ravel(), minlength=E))
    first = _normal(np.bincount(experts[..., 0].ravel(), minlength=E))
    weight = _normal(np.bincount(experts.ravel(), weights.ravel(), minlength=E))
    return [ExpertLoad(e, float(share[e]), float(first[e]), float(weight[e])) for e in range(E)]


def token_table(trace: RouterTrace, index: int) -> list[list[list[tuple[int, float]]]]:
    """[layer][projection] -> chosen (expert, weight) pairs of one token, larger router logit first."""
    experts, weights = trace.experts[index].tolist(), trace.weights[index].astype(float).tolist()
    return [
        [list(zip(ids, shares, strict=True)) for ids, shares in zip(*layer, strict=True)]
        for layer in zip(experts, weights, strict=True)
    ]


def _normal(counts: np.ndarray) -> np.ndarray:
    return counts / max(float(counts.sum()), 1e-12)
