"""What a trace says about the use of its experts, as numbers. numpy only, pure; the random draws of baselines are seeded.

A choice is one (token, layer, projection, rank) cell with a weight (an intervention may leave ranks without). The share of
an expert is its part of the choices: E shares add up to 1, and 1 / E each is even use. Arrays keep the trace's axes L (layers), P (gate, up, down), E (experts).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ming_app.molora.trace import RouterTrace

DRAWS = 200  # of a baseline
DEAD = 0.01  # share below which an expert counts as dead


@dataclass(frozen=True)
class Load:
    """Use of the experts by some tokens. Float [L, P, E] unless said otherwise."""

    tokens: int
    share: np.ndarray
    low: np.ndarray
    """2.5 and (`high`) 97.5 percentile of the share when experts mean nothing (see `load`)"""
    high: np.ndarray
    gini: np.ndarray
    """[L, P]; 0: even use, 1 - 1 / E: one expert takes all"""
    entropy: np.ndarray
    """[L, P], of the shares, in units of log E: 1 is even use"""
    dead: tuple[tuple[int, int, int], ...]
    """(layer, projection, expert) of every expert with a share below DEAD"""


def choice_counts(trace: RouterTrace, rows: np.ndarray | None = None) -> np.ndarray:
    """int64 [L, P, E]: how often each expert was chosen by the tokens `rows` (bool [T]; None: all)."""
    kept = slice(None) if rows is None else rows
    return _counts(trace.experts[kept], trace.weights[kept], trace.num_experts)


def load(trace: RouterTrace, rows: np.ndarray | None = None, *, draws: int = DRAWS, seed: int = 0) -> Load:
    """Shares and how uneven they are, with a band to read them against.

    The band asks: had the experts no preferences, how uneven would the shares be by chance alone? Equal tokens route
    nearly alike, so they are not independent: in every draw, each distinct token id keeps its choices but has its
    experts relabelled at random. The band is the middle 95 % of such draws.
    """
    kept = np.arange(len(trace)) if rows is None else np.flatnonzero(rows)
    counts = _counts(trace.experts[kept], trace.weights[kept], trace.num_experts)
    share = _shares(counts)
    low, high = _band(trace, kept, draws, np.random.default_rng(seed))
    gini, entropy = gini_of(share), entropy_of(share)
    dead = tuple((int(a), int(b), int(c)) for a, b, c in np.argwhere(share < DEAD)) if len(kept) else ()
    return Load(len(kept), share, low, high, gini, entropy, dead)


def gini_of(share: np.ndarray) -> np.ndarray:
    """Gini coefficient over the last axis: mean absolute difference of all pairs over twice the mean."""
    ordered, n = np.sort(share, axis=-1), share.shape[-1]
    total = ordered.sum(-1)
    weighted = (ordered * np.arange(1, n + 1)).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        gini = 2 * weighted / (n * total) - (n + 1) / n
    return np.where(total > 0, gini, 0.0)


def entropy_of(share: np.ndarray) -> np.ndarray:
    """Entropy over the last axis in units of its largest value, log E; 1 where there is but one expert."""
    n = share.shape[-1]
    return _entropy(share) / np.log(n) if n > 1 else np.ones(share.shape[:-1])


def router_entropy(trace: RouterTrace) -> np.ndarray | None:
    """Float [T, L, P]: entropy of each router's full distribution in units of log E; None where it was not recorded."""
    return None if trace.probabilities is None else entropy_of(trace.probabilities.astype(np.float64))


def coactivation(trace: RouterTrace, rows: np.ndarray | None = None) -> np.ndarray:
    """Float [L, P, E, E]: entry [i, j] is the share of tokens that chose i which chose j too; the diagonal is 1 for
    experts in use. Rows of unused experts are 0. Were all pairs equally likely, (k - 1) / (E - 1) would stand everywhere
    else."""
    chosen = _chosen(trace, rows)
    together = np.einsum("tlpi,tlpj->lpij", chosen, chosen)
    own = np.einsum("lpii->lpi", together)[..., None]
    return np.divide(together, own, out=np.zeros_like(together), where=own > 0)


def flow(trace: RouterTrace, projection: int, rows: np.ndarray | None = None) -> np.ndarray:
    """int64 [L - 1, E, E]: tokens whose top expert is i in a layer and j in the next, of one projection."""
    top = trace.experts[:, :, projection, 0] if rows is None else trace.experts[rows][:, :, projection, 0]
    E = trace.num_experts
    step = np.arange(trace.num_layers - 1) * E * E
    pairs = top[:, :-1].astype(np.int64) * E + top[:, 1:] + step
    return np.bincount(pairs.ravel(), minlength=len(step) * E * E).reshape(-1, E, E)


def _chosen(trace: RouterTrace, rows: np.ndarray | None) -> np.ndarray:
    """float32 [T, L, P, E]: 1 where an expert was chosen."""
    kept = slice(None) if rows is None else rows
    experts, acting = trace.experts[kept], trace.weights[kept] > 0
    chosen = np.zeros((*experts.shape[:3], trace.num_experts), np.float32)
    np.put_along_axis(chosen, experts.astype(np.int64), acting.astype(np.float32), axis=-1)
    return chosen


def _counts(experts: np.ndarray, weights: np.ndarray, num_experts: int) -> np.ndarray:
    """Experts and weights [T, L, P, k] -> int64 [L, P, E]."""
    _, layers, projections, _ = experts.shape
    cell = np.arange(layers * projections).reshape(1, layers, projections, 1) * num_experts
    flat = (experts.astype(np.int64) + cell)[weights > 0]
    return np.bincount(flat, minlength=layers * projections * num_experts).reshape(layers, projections, num_experts)


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def _entropy(share: np.ndarray) -> np.ndarray:
    """Natural entropy over the last axis."""
    return -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)


def _band(trace: RouterTrace, kept: np.ndarray, draws: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shape = (trace.num_layers, len(trace.projections), trace.num_experts)
    if not len(kept):
        return np.zeros(shape), np.zeros(shape)
    ids, of = np.unique([trace.tokens[i].id for i in kept], return_inverse=True)
    order = np.argsort(of, kind="stable")
    begins = np.searchsorted(of[order], np.arange(len(ids)))
    by_id = np.add.reduceat(_chosen(trace, kept[order]), begins)  # (ids, L, P, E)
    seen = np.empty((draws, *shape), np.float32)
    for draw in range(draws):  # all experts of a cell are alike under the null: one relabelling serves all cells
        order = rng.permuted(np.tile(np.arange(shape[-1]), (len(ids), 1)), axis=1)
        seen[draw] = np.take_along_axis(by_id, order[:, None, None, :], axis=-1).sum(0)
    low, high = np.percentile(_shares(seen), [2.5, 97.5], axis=0)
    return low, high
