"""Samples packed into micro-batches: one row of tokens with attention kept inside each sample (see attention.py).

Samples that begin alike (the wording of a task, or at least the system message) form families; a family's samples, sorted
by length, are cut into parts with little padding, and parts fill micro-batches of `batch_tokens`. What a part's samples
begin with is read once. Packing is a pure function of the samples, their order and the seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from training.attention import Part
from training.chat import Encoded

WORTH_SHARING = 8  # tokens beyond what all samples share that make a family of its own
PADDING = 0.08  # of a part's tokens; more starts a new part


@dataclass(frozen=True)
class Sample:
    """One encoded conversation and the stream it came from."""

    encoded: Encoded
    stream: str
    source: str
    loss_weight: float = 1.0

    @property
    def shareable(self) -> int:
        """How many leading tokens may be read in common: the loss must find the state before its first token in the
        sample's own part of the row."""
        return max(0, int(self.encoded.mask.argmax()) - 1) if self.encoded.mask.any() else len(self.encoded) - 1


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a row of T tokens in `parts`, N of which the loss looks at."""

    ids: np.ndarray
    """int64 [T]"""
    positions: np.ndarray
    """int64 [T], place of each token in its own sample"""
    real: np.ndarray
    """bool [T], not padding"""
    parts: tuple[Part, ...]
    learn_at: np.ndarray
    """int64 [N], where in the row the state stands that must predict a learnt token"""
    targets: np.ndarray
    """int64 [N], those tokens"""
    weights: np.ndarray
    """float32 [N], what each one's loss counts"""
    samples: tuple[Sample, ...]
    sample_of: np.ndarray
    """int64 [T], index into `samples` of a sample's own tokens; -1 for padding and for what several share"""

    @property
    def tokens(self) -> int:
        """Tokens of all samples, each counted whole."""
        return sum(len(sample.encoded) for sample in self.samples)


@dataclass(frozen=True)
class _Group:
    """Samples that will be one part, and how many leading tokens they share."""

    samples: tuple[Sample, ...]
    shared: int

    @property
    def part(self) -> Part:
        return Part(self.shared, len(self.samples), max(len(s.encoded) for s in self.samples) - self.shared)


def pack(samples: Sequence[Sample], batch_tokens: int, seed: str = "", *, share: bool = True) -> list[Batch]:
    """Micro-batches of at most `batch_tokens` tokens, padding counted (a longer sample stands alone), in an order drawn
    from `seed`. With `share` False each is a single part without a shared beginning: plain right-padded rows."""
    groups = [g for family, shared in _families(samples, share) for g in _cut(family, shared, batch_tokens)]
    rng = random.Random(f"{seed} parts")
    rng.shuffle(groups)
    bins: list[list[_Group]] = []
    for group in groups:
        room = (b for b in bins if sum(g.part.tokens for g in b) + group.part.tokens <= batch_tokens)
        fitting = next(room, None) if share else None
        if fitting is None:
            bins.append([group])
        else:
            fitting.append(group)
    rng.shuffle(bins)
    return [make_batch(groups) for groups in bins]


def _families(samples: Sequence[Sample], share: bool) -> Iterable[tuple[list[Sample], int]]:
    """(samples, leading tokens they share): runs of neighbours in lexicographic order."""
    if not share or len(samples) < 2:
        return [(list(samples), 0)] if samples else []
    order = sorted(samples, key=lambda s: s.encoded.ids.astype(">u4").tobytes())
    alike = [_alike(a, b) for a, b in zip(order, order[1:], strict=False)]
    common = min(alike)
    families: list[tuple[list[Sample], int]] = []
    rest: list[Sample] = []
    start = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and alike[end - 1] >= common + WORTH_SHARING:
            continue
        if end - start > 1:
            families.append((order[start:end], min(alike[start : end - 1])))
        else:
            rest.append(order[start])
        start = end
    return [*families, (rest, common if len(rest) > 1 else 0)] if rest else families


def _alike(a: Sample, b: Sample) -> int:
    size = min(a.shareable, b.shareable)
    different = np.flatnonzero(a.encoded.ids[:size] != b.encoded.ids[:size])
    return int(different[0]) if len(different) else size


def _cut(samples: list[Sample], shared: int, batch_tokens: int) -> Iterable[_Group]:
    group: list[Sample] = []
    padding = 0
    for sample in sorted(samples, key=lambda s: len(s.encoded)):
        length = len(sample.encoded) - shared
        grown = padding + len(group) * (length - len(group[-1].encoded) + shared) if group else 0
        tokens = shared + (len(group) + 1) * length
        if group and (tokens > batch_tokens or grown > max(shared, PADDING * tokens)):
            yield _Group(tuple(group), shared)
            group, grown = [], 0
        group.append(sample)
        padding = grown
    if group:
        yield _Group(tuple(group), shared)


def make_batch(groups: Sequence[_Group]) -> Batch:
    """Lays groups out one after the other."""
    parts = tuple(group.part for group in groups)
    total = sum(part.tokens for part in parts)
    ids, positions = np.zeros(total, np.int64), np.zeros(total, np.int64)
    real = np.zeros(total, bool)
    sample_of = np.full(total, -1, np.int64)
    learn_at, targets, weights = [], [], []
    at = count = 0
    for group, part in zip(groups, parts, strict=True):
        first = group.samples[0]
        ids[at : at + part.shared] = first.encoded.ids[: part.shared]
        positions[at : at + part.shared] = np.arange(part.shared)
        real[at : at + part.shared] = True
        at += part.shared
        for sample in group.samples:
            own, mask = sample.encoded.ids[part.shared :], sample.encoded.mask[part.shared :]
            ids[at : at + len(own)] = own
            real[at : at + len(own)] = True
            sample_of[at : at + len(own)] = count
            count += 1
            positions[at : at + part.length] = part.shared + np.arange(part.length)
            learnt = np.flatnonzero(mask[1:]) + 1  # the very first token of all has no state before it
            learn_at.append(at + learnt - 1)
            targets.append(own[learnt])
            weights.append(np.full(len(learnt), sample.loss_weight, np.float32))
            at += part.length
    return Batch(
        ids,
        positions,
        real,
        parts,
        np.concatenate(learn_at),
        np.concatenate(targets).astype(np.int64),
        np.concatenate(weights),
        tuple(s for group in groups for s in group.samples),
        sample_of,
    )
