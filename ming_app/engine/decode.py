"""Choosing the next token, and keeping the record of what was chosen. numpy only; no text, no model."""

from __future__ import annotations

import numpy as np

from ming_app.engine.types import SamplingParams

COLDEST = 1e-4  # a lower temperature is greedy: dividing by less would overflow
NEGLIGIBLE = 30.0  # logits this far under the largest (after temperature) weigh less than 1e-13 and are left out


class Sampler:
    """Logits [V] -> next token, by temperature, top-k, top-p, min-p and repetition penalty, in that order.

    temperature 0 is greedy (ties go to the lowest id) and reproducible. The repetition penalty (Keskar et al. 2019)
    acts on tokens of the answer, not of the prompt: the words of a question must stay cheap to use.
    """

    def __init__(self, params: SamplingParams):
        self._p = params
        self._rng = np.random.default_rng(params.seed)
        self._seen: np.ndarray = np.zeros(0, np.int64)

    def choose(self, logits: np.ndarray, log_total: float | None = None) -> tuple[int, float]:
        """(token id, natural log of the model's own probability of it) from float32 logits [V]; `log_total`: the log of the
        sum of their exponentials, where it is known."""
        log_total = _logsumexp(logits) if log_total is None else log_total
        scores = self._penalised(logits)
        token = int(scores.argmax()) if self._p.temperature < COLDEST else self._draw(scores)
        if self._p.repetition_penalty != 1.0:
            self._seen = np.union1d(self._seen, [token])
        return token, float(logits[token]) - log_total

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        if self._p.repetition_penalty == 1.0 or not len(self._seen):
            return logits
        scores = logits.copy()
        seen = scores[self._seen]
        scores[self._seen] = np.where(seen > 0, seen / self._p.repetition_penalty, seen * self._p.repetition_penalty)
        return scores

    def _draw(self, scores: np.ndarray) -> int:
        p = self._p
        ids = np.flatnonzero(scores >= scores.max() - NEGLIGIBLE * p.temperature)
        if 0 < p.top_k < len(ids):
            candidates = scores[ids]
            ids = ids[candidates >= np.partition(candidates, -p.top_k)[-p.top_k]]
        kept = scores[ids].astype(np.float64) / p.temperature
        order = np.argsort(-kept, kind="stable")
        ids, kept = ids[order], kept[order]
        probabilities = np.exp(kept - kept[0])
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities) - probabilities
        keep = (before < p.top_p) & (probabilities >= p.min_p * probabilities[0])
        ids, probabilities = ids[keep], probabilities[keep]
        return int(self._rng.choice(ids, p=probabilities / probabilities.sum()))


class RoutingRecord:
    """Preallocated router rows of one request: uint8 and float16 [capacity, L, P, k], filled as tokens are read."""

    def __init__(self, capacity: int, num_layers: int, num_projections: int, top_k: int):
        self.experts = np.zeros((capacity, num_layers, num_projections, top_k), np.uint8)
        self.weights = np.zeros((capacity, num_layers, num_projections, top_k), np.float16)
        self.length = 0

    def append(self, experts: np.ndarray, weights: np.ndarray) -> None:
        """Rows [s, L, P, k] of s more tokens."""
        end = self.length + len(experts)
        self.experts[self.length : end] = experts
        self.weights[self.length : end] = weights
        self.length = end


def likeliest(logits: np.ndarray, log_total: float | None, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens under float32 logits [V], the likeliest first: (id, natural log-probability)."""
    if not count:
        return ()
    log_total = _logsumexp(logits) if log_total is None else log_total
    ids = np.argpartition(-logits, count - 1)[:count] if count < len(logits) else np.arange(len(logits))
    ids = ids[np.lexsort((ids, -logits[ids]))]
    return tuple((int(i), float(logits[i]) - log_total) for i in ids)


def log_probabilities(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """float64 [n]: log-probability of ids[i] under logits[i] (float32 [n, V])."""
    return np.array([float(row[i]) - _logsumexp(row) for row, i in zip(logits, ids, strict=True)])


def _logsumexp(logits: np.ndarray) -> float:
    top = logits.max()
    return float(top) + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
