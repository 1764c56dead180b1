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
SEEN = 4  # times a token must occur, and (`CONTEXTS`) after so many different tokens, before anything is said about it
CONTEXTS = 3
RATE, LIFT = 0.75, 1.5  # what makes a favourite: the expert is chosen so often, and so many times as often as for all


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
    and there are several texts, whole texts change their labels. Otherwise distinct tokens do, with all their occurrences in
    a group: equal tokens route nearly alike, whatever group they stand in.
    """
    rows = np.flatnonzero(grouping.of >= 0)
    present = [g for g, size in enumerate(grouping.sizes()) if size]
    if len(present) < 2:
        return None
    of = np.searchsorted(present, grouping.of[rows])
    cells, size = _cells(trace, rows), trace.num_layers * len(trace.projections) * trace.num_experts
    counts = _grouped(cells, of, len(present), size).reshape(len(present), -1, trace.num_experts)
    divergence = js_divergence(counts)
    unit, whole_texts = _units(trace, rows, of)
    rng = np.random.default_rng(seed)
    shuffled = np.stack(
        [
            js_divergence(_grouped(cells, _dealt(of, unit, rng), len(present), size).reshape(counts.shape))
            for _ in range(draws)
        ]
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
        whole_texts,
    )


@dataclass(frozen=True)
class Favourite:
    """A token that an expert takes more often than others do."""

    text: str
    times: int
    contexts: int
    """different tokens that it followed"""
    share: float
    """of its occurrences at which the expert was among those chosen"""
    usual: float
    """the same over all tokens"""

    @property
    def lift(self) -> float:
        """share / usual"""
        return self.share / max(self.usual, 1e-9)


def vocabulary(
    trace: RouterTrace, layer: int, projection: int, rows: np.ndarray | None = None, most: int = 12
) -> list[list[Favourite]]:
    """For every expert of one router its favourite tokens, largest lift first. A description, not a test: a token's id alone
    decides much of its route, so its occurrences are no independent evidence; that it came after different tokens is shown.

    The chat's frame and parts of characters are left out.
    """
    wanted = content_rows(trace) if rows is None else content_rows(trace) & rows
    kept = np.array([i for i in np.flatnonzero(wanted) if trace.tokens[i].text.strip()], int)
    if not len(kept):
        return [[] for _ in range(trace.num_experts)]
    texts, of = np.unique([trace.tokens[i].text.strip() for i in kept], return_inverse=True)
    chosen = np.zeros((len(kept), trace.num_experts))
    acting = trace.weights[kept, layer, projection] > 0
    np.put_along_axis(chosen, trace.experts[kept, layer, projection].astype(np.int64), acting, axis=-1)
    times = np.bincount(of)
    before = np.array([trace.tokens[i - 1].id if i else -1 for i in kept])
    contexts = np.bincount(np.unique(np.stack([of, before]), axis=1)[0], minlength=len(texts))
    share = np.stack([np.bincount(of, column) for column in chosen.T], axis=1) / times[:, None]
    usual = chosen.mean(0)
    known = (times >= SEEN) & (contexts >= CONTEXTS)
    found = []
    for expert in range(trace.num_experts):
        good = known & (share[:, expert] >= RATE) & (share[:, expert] >= LIFT * usual[expert])
        row = [
            Favourite(str(texts[i]), int(times[i]), int(contexts[i]), float(share[i, expert]), float(usual[expert]))
            for i in np.flatnonzero(good)
        ]
        found.append(sorted(row, key=lambda favourite: (-favourite.lift, -favourite.times))[:most])
    return found


def _cells(trace: RouterTrace, rows: np.ndarray) -> np.ndarray:
    """int64 [n, L P k]: index of (cell, expert) of every choice, -1 for a rank without weight."""
    experts = trace.experts[rows].reshape(len(rows), -1, trace.top_k).astype(np.int64)
    offsets = np.arange(experts.shape[1])[:, None] * trace.num_experts
    acting = trace.weights[rows].reshape(experts.shape) > 0
    return np.where(acting, experts + offsets, -1).reshape(len(rows), -1)


def _grouped(cells: np.ndarray, of: np.ndarray, groups: int, size: int) -> np.ndarray:
    """int64 [G, size]: how often each of `size` (cell, expert) pairs was chosen by each group."""
    flat = (cells + of[:, None] * size)[cells >= 0]
    return np.bincount(flat, minlength=groups * size).reshape(groups, size)


def js_divergence(counts: np.ndarray) -> np.ndarray:
    """Counts [G, M, E] -> [M], groups weighted by their choices."""
    weight = counts.sum(-1, keepdims=True) / np.maximum(counts.sum((0, -1), keepdims=True), 1)
    mixture = counts.sum(0) / np.maximum(counts.sum((0, -1), keepdims=True)[0], 1)
    return _entropy(mixture) - (weight[..., 0] * _entropy(_shares(counts))).sum(0)


def _units(trace: RouterTrace, rows: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, bool]:
    """int [n]: what changes its label together with every row, numbered from 0; and whether that is a whole text."""
    _, text = np.unique(trace.segment_of()[rows], return_inverse=True)
    whole = len({*zip(text.tolist(), of.tolist(), strict=True)}) == text.max() + 1
    if whole and text.max() > of.max():
        return text, True
    ids = np.array([trace.tokens[i].id for i in rows], np.int64)
    return np.unique(ids * (of.max() + 1) + of, return_inverse=True)[1], False


def _dealt(of: np.ndarray, unit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    labels = np.zeros(unit.max() + 1, int)
    labels[unit] = of
    return rng.permutation(labels)[unit]


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def _entropy(share: np.ndarray) -> np.ndarray:
    """Over the last axis, bits."""
    return -(share * np.log2(np.where(share > 0, share, 1.0))).sum(-1)
