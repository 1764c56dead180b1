"""Traces with a known answer: even use, one dead expert, planted specialisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ming_app.molora.trace import RouterTrace, Segment, TraceToken

Route = Callable[[int, np.random.Generator], Sequence[int]]


def trace_of(
    texts: Sequence[str],
    route: Route,
    *,
    layers: int = 3,
    experts: int = 4,
    k: int = 2,
    answer_from: int | None = None,
    segments: Sequence[Segment] = (),
    seed: int = 0,
) -> RouterTrace:
    """One token per text, equal texts with equal ids; `route(token, rng)` orders all experts for a cell, the first k are
    chosen. Weights 0.75, 0.25 for k = 2."""
    rng = np.random.default_rng(seed)
    ids = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    rows = [[[list(route(i, rng))[:k] for _ in range(3)] for _ in range(layers)] for i in range(len(texts))]
    chosen = np.array(rows, np.uint8).reshape(len(texts), layers, 3, k)
    weights = np.broadcast_to(np.array([0.75, 0.25] if k == 2 else [1 / k] * k, np.float16), chosen.shape).copy()
    end = len(texts) if answer_from is None else answer_from
    tokens = tuple(TraceToken(ids[t], t, "prompt" if i < end else "answer", i) for i, t in enumerate(texts))
    return RouterTrace(chosen, weights, tokens, experts, "synthetic", "f", segments=tuple(segments))


def even(experts: int = 4) -> Route:
    """Every order of the experts is equally likely."""
    return lambda token, rng: rng.permutation(experts)
