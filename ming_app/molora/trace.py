"""`RouterTrace`: which experts fired, for every token, layer and projection. One class, one shape; needs no model.

Axes: T tokens (prompt first, then answer), L layers, P = 3 projections (gate, up, down), k chosen experts, larger
router logit first, E experts. Files (.npz, JSON) are `trace_file.py`'s; several traces become one by `merge`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ming_app.errors import TraceError
from ming_app.molora.config import MAX_EXPERTS, PROJECTIONS

ROLES = ("prompt", "answer")
LARGEST = 65504.0  # float16: a larger contribution is cut to this


@dataclass(frozen=True)
class TraceToken:
    """One model token. `text` is what it adds to the visible text: "" for all but the last token of a character that is
    split over several byte tokens, and those tokens share `piece`, the index of the text piece they form together."""

    id: int
    text: str
    role: str
    piece: int
    logprob: float | None = None
    """Natural log of the model's probability of this token (answer tokens), before temperature."""
    others: tuple[tuple[str, float], ...] = ()
    """The most likely tokens at this place with their log-probabilities, best first; the token itself may be among them."""


@dataclass(frozen=True)
class Segment:
    """One text of a trace that holds several. It goes from token `start` to the next segment."""

    start: int
    title: str
    labels: Mapping[str, str] = field(default_factory=dict)
    """what the text is, by kind: {"language": "zh", "stream": "exam"}"""


@dataclass(frozen=True)
class RouterTrace:
    """Routing of one request, or of several. `experts` uint8 [T, L, P, k], `weights` float16 [T, L, P, k] (softmax over
    the chosen)."""

    experts: np.ndarray
    weights: np.ndarray
    tokens: tuple[TraceToken, ...]
    num_experts: int
    model: str = ""
    """Human name of the model that made it."""
    fingerprint: str = ""
    """SHA-256 fingerprints of base and adapter, joined by '+'."""
    config: dict[str, Any] = field(default_factory=dict)
    """MoLoRAConfig.to_dict() of the adapter, and `precision`, `backend` of the engine."""
    projections: tuple[str, ...] = PROJECTIONS
    probabilities: np.ndarray | None = None
    """float16 [T, L, P, E]: the router's softmax over all experts, where it was recorded"""
    contributions: np.ndarray | None = None
    """float16 [T, L, P, k]: |s w_i B_i A_i x| / |W0 x|, what each chosen expert adds against the base's own output"""
    segments: tuple[Segment, ...] = ()
    """empty: one text"""

    def __post_init__(self) -> None:
        e, w = np.asarray(self.experts), np.asarray(self.weights)
        if e.ndim != 4 or e.shape != w.shape:
            raise bad_trace(f"experts {e.shape} and weights {w.shape} must both be [T, L, P, k]")
        if not e.shape[1] or not 1 <= e.shape[3] <= self.num_experts:
            raise bad_trace(f"there must be a layer, and k={e.shape[3]} of {self.num_experts} experts")
        if e.dtype != np.uint8 or w.dtype != np.float16:
            raise bad_trace(f"experts must be uint8 and weights float16, got {e.dtype} and {w.dtype}")
        if len(self.tokens) != e.shape[0]:
            raise bad_trace(f"{len(self.tokens)} tokens for {e.shape[0]} rows")
        if e.shape[2] != len(self.projections) or tuple(self.projections) != PROJECTIONS:
            found = tuple(self.projections)[:8]
            raise bad_trace(f"projections must be {PROJECTIONS}, got {found} for axis of {e.shape[2]}")
        if not 1 <= self.num_experts <= MAX_EXPERTS or (e.size and int(e.max()) >= self.num_experts):
            raise bad_trace(f"expert ids must be below num_experts={self.num_experts}")
        if not np.isfinite(w).all() or (w.size and (w.min() < 0 or w.max() > 1.001)):
            raise bad_trace("weights must be finite and between 0 and 1")
        _check_measured("probabilities", self.probabilities, (*e.shape[:3], self.num_experts), 1.001)
        _check_measured("contributions", self.contributions, e.shape, LARGEST)
        starts = [segment.start for segment in self.segments]
        if starts and (starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= max(len(e), 1)):
            raise bad_trace("segments must begin at token 0 and follow one another")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_layers(self) -> int:
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts.shape[3]

    def top_expert(self, layer: int, projection: str) -> np.ndarray:
        """uint8 [T]: the expert with the larger router logit at one layer and projection."""
        return self.experts[:, layer, self.projections.index(projection), 0]

    def pieces(self) -> list[tuple[str, list[int]]]:
        """Visible text pieces in order, each with the indices of the tokens that form it."""
        grouped: dict[int, list[int]] = {}
        for i, token in enumerate(self.tokens):
            grouped.setdefault(token.piece, []).append(i)
        return [("".join(self.tokens[i].text for i in members), members) for members in grouped.values()]

    def is_answer(self) -> np.ndarray:
        """bool [T]: which tokens the model wrote."""
        return np.array([token.role == "answer" for token in self.tokens], bool)

    def segment_of(self) -> np.ndarray:
        """int [T]: index of the segment of every token; zeros where there are none."""
        starts = [segment.start for segment in self.segments] or [0]
        return np.searchsorted(starts, np.arange(len(self)), side="right") - 1

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes .npz or .json by the file's ending (see trace_file.py). Raises TraceError."""
        from ming_app.molora.trace_file import write_trace

        return write_trace(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RouterTrace:
        """Reads what `save` wrote. Raises TraceError for anything damaged, hostile, too large or of another version."""
        from ming_app.molora.trace_file import read_trace

        return read_trace(path)


def merge(traces: Sequence[tuple[RouterTrace, Segment]]) -> RouterTrace:
    """One trace of several, in order; each becomes a segment with the given title and labels (its start is set here), or
    keeps the segments that it has.

    Model and configuration are those of the first. What only some traces record is left out. Raises TraceError when
    there is none, or when they are not of one shape and fingerprint.
    """
    if not traces:
        raise bad_trace("there is nothing to merge")
    first = traces[0][0]
    tokens: list[TraceToken] = []
    segments: list[Segment] = []
    piece = 0
    for trace, segment in traces:
        alike = trace.experts.shape[1:] == first.experts.shape[1:] and trace.num_experts == first.num_experts
        if not alike or trace.fingerprint != first.fingerprint:
            raise bad_trace("traces of different models cannot be merged")
        if not len(trace):
            continue
        segments += [
            replace(own, start=own.start + len(tokens)) for own in trace.segments or (replace(segment, start=0),)
        ]
        tokens += [replace(token, piece=token.piece + piece) for token in trace.tokens]
        piece = tokens[-1].piece + 1
    parts = [trace for trace, _ in traces]
    return replace(
        first,
        experts=np.concatenate([part.experts for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        tokens=tuple(tokens),
        probabilities=_joined([part.probabilities for part in parts]),
        contributions=_joined([part.contributions for part in parts]),
        segments=tuple(segments),
    )


def bad_trace(reason: str) -> TraceError:
    """What is wrong with a trace, for a person."""
    return TraceError(f"Router trace: {reason}.", f"路由轨迹文件有问题：{reason}。")


def _check_measured(name: str, array: np.ndarray | None, shape: tuple[int, ...], largest: float) -> None:
    if array is None:
        return
    if array.shape != shape or array.dtype != np.float16:
        raise bad_trace(f"{name} must be float16 {shape}, got {array.dtype} {array.shape}")
    if not np.isfinite(array).all() or (array.size and (array.min() < 0 or array.max() > largest)):
        raise bad_trace(f"{name} must be finite and between 0 and {largest:g}")


def _joined(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if len(present) == len(arrays) else None
