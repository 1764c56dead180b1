"""Do groups of tokens use different experts? Distances between groups, against labels shuffled at random; and the tokens
that each expert takes far above chance. numpy only, pure, seeded.

The measure is the Jensen-Shannon divergence of the groups' expert distributions, weighted by their size, in bits (Lin 1991):
H(sum_g p_g P_g) - sum_g p_g H(P_g). It is 0 when all groups route alike and H(p) when they share no expert; it equals the
information that a choice carries about the group. Finite samples give more than 0 by chance: hence the baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ming_app.molora.trace import RouterTrace
from ming_app.router.groups import Grouping, content_rows

DRAWS = 100
SEEN = 4  # times a token must occur before anything is said about it


@dataclass(frozen=True)
class Specialisation:
    """Float arrays; G groups with tokens, in the order of `names`."""

    kind: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    share: np.ndarray
    """[G, L, P, E]"""
    divergence: np.ndarray
    """[L, P], bits"""
    chance: np.ndarray
    """[L, P]: mean divergence of shuffled labels, and (`chance_high`) its 95th percentile"""
    chance_high: np.ndarray
    largest: float
    """H(p): what groups that share no expert would have"""
    pairs: np.ndarray
    """[G, G]: divergence of two groups weighted alike, mean over layers and projections"""
    whole_texts: bool
    """chance dealt out the labels of whole texts, not of tokens"""

    @property
    def beyond_chance(self) -> float:
        """Share of the (layer, projection) cells whose divergence exceeds the 95th percentile of chance; 0.05 means nothing."""
        return float((self.divergence > self.chance_high).mean())


def specialisation(
    trace: RouterTrace, grouping: Grouping, *, draws: int = DRAWS, seed: int = 0
) -> Specialisation | None:
    """Divergence of the groups of `grouping`; None when fewer than two have tokens.

    The baseline deals the labels out anew. Tokens of one text are not independent, so where every text lies in one group
    and there are several texts, whole texts change their labels; otherwise single tokens do.
    """
    rows = np.flatnonzero(grouping.of >= 0)
    present = [g for g, size in enumerate(grouping.sizes()) if size]
    if len(present) < 2:
        return None
    of = np.searchsorted(present, grouping.of[rows])
    cells = _cells(trace, rows)
    counts = _grouped(cells, of, len(present), trace.num_experts)
    divergence = js_divergence(counts)
    unit = _units(trace, rows, of)
    rng = np.random.default_rng(seed)
    shuffled = np.stack(
        [js_divergence(_grouped(cells, _dealt(of, unit, rng), len(present), trace.num_experts)) for _ in range(draws)]
    )
    shape = (trace.num_layers, len(trace.projections))
    sizes = np.bincount(of, minlength=len(present))
    shares = _shares(counts)
    return Specialisation(
        grouping.kind,
        tuple(grouping.names[g] for g in present),
        tuple(sizes.tolist()),
        shares.reshape(len(present), *shape, -1),
        divergence.reshape(shape),
        shuffled.mean(0).reshape(shape),
        np.percentile(shuffled, 95, axis=0).reshape(shape),
        float(_entropy(sizes / sizes.sum())),
        _pairwise(shares),
        unit is not None,
    )


@dataclass(frozen=True)
class Favourite:
    """A token that an expert takes more often than others do."""

    text: str
    times: int
    share: float
    """of its occurrences (and layers, projections) at which the expert was among those chosen"""
    usual: float
    """the same over all tokens"""
    z: float
    """their difference in standard errors, one independent choice per occurrence"""


def vocabulary(
    trace: RouterTrace,
    rows: np.ndarray | None = None,
    *,
    layer: int | None = None,
    projection: int | None = None,
    most: int = 12,
    least: float = 3.0,
) -> list[list[Favourite]]:
    """For every expert its favourite tokens, strongest first: at least `least` standard errors above its usual share.

    Over one layer and projection, or over all (None). The chat's frame and parts of characters are left out.
    """
    wanted = content_rows(trace) if rows is None else content_rows(trace) & rows
    kept = np.array([i for i in np.flatnonzero(wanted) if trace.tokens[i].text.strip()], int)
    if not len(kept):
        return [[] for _ in range(trace.num_experts)]
    where = slice(None) if layer is None else slice(layer, layer + 1)
    which = slice(None) if projection is None else slice(projection, projection + 1)
    texts, of = np.unique([trace.tokens[i].text.strip() for i in kept], return_inverse=True)
    experts = trace.experts[kept][:, where, which].reshape(len(kept), -1).astype(np.int64)
    E = trace.num_experts
    counts = np.bincount((of[:, None] * E + experts).ravel(), minlength=len(texts) * E).reshape(-1, E)
    times = np.bincount(of)
    cells = experts.shape[1] // trace.top_k
    usual = counts.sum(0) / (len(kept) * cells)
    share = counts / (times[:, None] * cells)
    error = np.sqrt(np.maximum(usual * (1 - usual), 1e-12) / times[:, None])
    z = np.where(times[:, None] >= SEEN, (share - usual) / error, 0.0)
    found = []
    for expert in range(E):
        order = np.argsort(-z[:, expert], kind="stable")[:most]
        found.append(
            [
                Favourite(
                    str(texts[i]), int(times[i]), float(share[i, expert]), float(usual[expert]), float(z[i, expert])
                )
                for i in order
                if z[i, expert] >= least
            ]
        )
    return found


def _cells(trace: RouterTrace, rows: np.ndarray) -> np.ndarray:
    """int64 [n, L P k]: index of (cell, expert) of every choice."""
    experts = trace.experts[rows].reshape(len(rows), -1, trace.top_k).astype(np.int64)
    offsets = np.arange(experts.shape[1])[:, None] * trace.num_experts
    return (experts + offsets).reshape(len(rows), -1)


def _grouped(cells: np.ndarray, of: np.ndarray, groups: int, num_experts: int) -> np.ndarray:
    """int64 [G, L P, E]."""
    size = int(cells.max()) // num_experts * num_experts + num_experts
    flat = (cells + of[:, None] * size).ravel()
    return np.bincount(flat, minlength=groups * size).reshape(groups, -1, num_experts)


def js_divergence(counts: np.ndarray) -> np.ndarray:
    """Counts [G, M, E] -> [M], groups weighted by their choices."""
    weight = counts.sum(-1, keepdims=True) / np.maximum(counts.sum((0, -1), keepdims=True), 1)
    mixture = counts.sum(0) / np.maximum(counts.sum((0, -1), keepdims=True)[0], 1)
    return _entropy(mixture) - (weight[..., 0] * _entropy(_shares(counts))).sum(0)


def _pairwise(share: np.ndarray) -> np.ndarray:
    """Shares [G, M, E] -> [G, G], mean over M of the divergence of two equal groups."""
    middle = (share[:, None] + share[None]) / 2
    own = _entropy(share)
    return (_entropy(middle) - (own[:, None] + own[None]) / 2).mean(-1)


def _units(trace: RouterTrace, rows: np.ndarray, of: np.ndarray) -> np.ndarray | None:
    """int [n]: the text of every row, when texts can change labels as a whole; None when tokens must."""
    _, unit = np.unique(trace.segment_of()[rows], return_inverse=True)
    whole = len({*zip(unit.tolist(), of.tolist(), strict=True)}) == unit.max() + 1
    return unit if whole and unit.max() > of.max() else None


def _dealt(of: np.ndarray, unit: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    if unit is None:
        return rng.permutation(of)
    labels = np.zeros(unit.max() + 1, int)
    labels[unit] = of
    return rng.permutation(labels)[unit]


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def _entropy(share: np.ndarray) -> np.ndarray:
    """Over the last axis, bits."""
    return -(share * np.log2(np.where(share > 0, share, 1.0))).sum(-1)
