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

MAX_ALIGNED = 160_000


@dataclass(frozen=True)
class Comparison:
    """Traces a and b. n aligned token pairs."""

    pairs: np.ndarray
    """int [n, 2]: indices into a and into b, both rising"""
    only_a: int
    """tokens of a without a partner, and (`only_b`) of b"""
    only_b: int
    overlap: np.ndarray
    """float [n, L, P]: experts that both chose, of those that the one with more chose; 1: the same set"""
    moved: np.ndarray
    """float [n, L, P]: total variation of the weights, 0 (same experts, same weights) to 1 (no expert in common)"""
    divergence: np.ndarray
    """float [L, P], bits: Jensen-Shannon divergence of the two expert distributions over all tokens, a and b weighted alike"""

    @property
    def same(self) -> float:
        """Share of aligned (token, layer, projection) cells with the same set of experts; 1 when nothing is aligned."""
        return float((self.overlap == 1).mean()) if self.overlap.size else 1.0


def compare(a: RouterTrace, b: RouterTrace) -> Comparison:
    """Raises TraceError when the traces differ in layers or experts: their cells have no common meaning."""
    if a.num_layers != b.num_layers or a.num_experts != b.num_experts:
        raise TraceError(
            "The traces differ in layers or experts, so they cannot be compared cell by cell.",
            "两条轨迹的层数或专家数不同，无法逐格比较。",
        )
    pairs = aligned(a, b)
    dense_a, dense_b = _dense(a, pairs[:, 0]), _dense(b, pairs[:, 1])
    both, most = ((dense_a > 0) & (dense_b > 0)).sum(-1), np.maximum((dense_a > 0).sum(-1), (dense_b > 0).sum(-1))
    common = both / np.maximum(most, 1)
    moved = np.abs(dense_a - dense_b).sum(-1) / 2
    counts = np.stack([choice_counts(t).reshape(-1, t.num_experts) for t in (a, b)]).astype(np.float64)
    shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    divergence = js_divergence(shares).reshape(a.num_layers, -1)
    return Comparison(pairs, len(a) - len(pairs), len(b) - len(pairs), common, moved, divergence)


def aligned(a: RouterTrace, b: RouterTrace) -> np.ndarray:
    """int [n, 2]: indices of tokens with the same id that stand in the same order in both.

    What both begin and end with is aligned first; between, the longest common runs are, unless that part is too long for it
    (MAX_ALIGNED pairs of tokens): then it stays apart.
    """
    ids_a, ids_b = ([token.id for token in trace.tokens] for trace in (a, b))
    shortest = min(len(ids_a), len(ids_b))
    head = next((i for i in range(shortest) if ids_a[i] != ids_b[i]), shortest)
    tail = next((i for i in range(shortest - head) if ids_a[-1 - i] != ids_b[-1 - i]), shortest - head)
    middle_a, middle_b = ids_a[head : len(ids_a) - tail], ids_b[head : len(ids_b) - tail]
    pairs = [(i, i) for i in range(head)]
    if 0 < len(middle_a) * len(middle_b) <= MAX_ALIGNED:
        blocks = SequenceMatcher(None, middle_a, middle_b, autojunk=False).get_matching_blocks()
        pairs += [(head + block.a + i, head + block.b + i) for block in blocks for i in range(block.size)]
    pairs += [(len(ids_a) - tail + i, len(ids_b) - tail + i) for i in range(tail)]
    return np.array(pairs, int).reshape(-1, 2)


def _dense(trace: RouterTrace, rows: np.ndarray) -> np.ndarray:
    """float32 [n, L, P, E]: weights, 0 for the experts that do not act."""
    experts, weights = trace.experts[rows].astype(np.int64), trace.weights[rows].astype(np.float32)
    dense = np.zeros((*experts.shape[:3], trace.num_experts), np.float32)
    np.put_along_axis(dense, experts, weights, axis=-1)
    return dense
