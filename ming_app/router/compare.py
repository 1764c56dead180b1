"""Two traces side by side: tokens aligned, and where they were routed differently. numpy only, pure.

The same question in two languages, a right and a wrong answer, the base precision against 4 bits, two adapters: either the
tokens are the same, or the longest common runs of token ids are aligned and the rest stays apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from ming_app.errors import TraceError
from ming_app.molora.trace import RouterTrace
from ming_app.router.specialisation import js_divergence
from ming_app.router.statistics import choice_counts


@dataclass(frozen=True)
class Comparison:
    """Traces a and b. n aligned token pairs."""

    pairs: np.ndarray
    """int [n, 2]: indices into a and into b, both rising"""
    only_a: int
    """tokens of a without a partner, and (`only_b`) of b"""
    only_b: int
    overlap: np.ndarray
    """float [n, L, P]: share of a's chosen experts that b chose too; 1: the same set"""
    moved: np.ndarray
    """float [n, L, P]: total variation of the weights, 0 (same experts, same weights) to 1 (no expert in common)"""
    divergence: np.ndarray
    """float [L, P], bits: Jensen-Shannon divergence of the two expert distributions over all tokens, a and b weighted alike"""

    @property
    def same(self) -> float:
        """Share of aligned (token, layer, projection) cells with the same set of experts; 1 when nothing is aligned."""
        return float((self.overlap == 1).mean()) if self.overlap.size else 1.0


def compare(a: RouterTrace, b: RouterTrace) -> Comparison:
    """Raises TraceError when the traces differ in layers, experts or k: their cells have no common meaning."""
    if a.experts.shape[1:] != b.experts.shape[1:] or a.num_experts != b.num_experts:
        raise TraceError(
            "The traces differ in layers, experts or k, so they cannot be compared cell by cell.",
            "两条轨迹的层数、专家数或 k 不同，无法逐格比较。",
        )
    pairs = aligned(a, b)
    dense_a, dense_b = _dense(a, pairs[:, 0]), _dense(b, pairs[:, 1])
    common = ((dense_a > 0) & (dense_b > 0)).sum(-1) / a.top_k
    moved = np.abs(dense_a - dense_b).sum(-1) / 2
    counts = np.stack([choice_counts(t).reshape(-1, t.num_experts) for t in (a, b)]).astype(np.float64)
    shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    divergence = js_divergence(shares).reshape(a.num_layers, -1)
    return Comparison(pairs, len(a) - len(pairs), len(b) - len(pairs), common, moved, divergence)


def aligned(a: RouterTrace, b: RouterTrace) -> np.ndarray:
    """int [n, 2]: indices of tokens with the same id that stand in the same order in both."""
    ids_a, ids_b = ([token.id for token in trace.tokens] for trace in (a, b))
    if ids_a == ids_b:
        return np.repeat(np.arange(len(ids_a))[:, None], 2, axis=1)
    blocks = SequenceMatcher(None, ids_a, ids_b, autojunk=False).get_matching_blocks()
    pairs = [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]
    return np.array(pairs, int).reshape(-1, 2)


def _dense(trace: RouterTrace, rows: np.ndarray) -> np.ndarray:
    """float32 [n, L, P, E]: weights, a tiny positive number where a chosen expert's is 0."""
    experts, weights = trace.experts[rows].astype(np.int64), trace.weights[rows].astype(np.float32)
    dense = np.zeros((*experts.shape[:3], trace.num_experts), np.float32)
    np.put_along_axis(dense, experts, np.maximum(weights, 1e-7), axis=-1)
    return dense
