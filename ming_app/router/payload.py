"""The compact, append-only form of a trace that the page's expert panel draws from, whole or while it streams.

Everything is a flat string that only ever grows at its end, so that a streaming update costs what is new:
`tokens` one JSON array per line, `experts` and `weights` base64 of uint8 rows [L, P, k] (weights scaled to 0..255).
A row has L * 3 * k bytes, a multiple of three, so base64 chunks of whole rows join without padding.

A finished trace that was measured has two more: `c` rows [L, P, k] of contributions (4 (c / 255)^2, so that small ones stay
apart), `h` rows [L, P] of the routers' entropy (h / 255 of log E); its tokens then end with their likeliest alternatives.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ming_app.molora.trace import RouterTrace, TraceToken
from ming_app.router.statistics import router_entropy

VERSION = 1
LARGEST_CONTRIBUTION = 4.0
STATES = ("empty", "live", "done", "no_adapter")


def empty_payload(state: str = "empty") -> dict[str, Any]:
    """What the panel shows before the first answer ("empty"), or when there is no router to show ("no_adapter")."""
    return {
        "v": VERSION,
        "key": "",
        "state": state,
        "layers": 0,
        "experts": 0,
        "k": 0,
        "model": "",
        "tokens": "",
        "e": "",
        "w": "",
        "c": "",
        "h": "",
    }


class LivePayload:
    """Collects routed tokens of one answer. `key` tells answers apart: the panel starts anew when it changes."""

    def __init__(self, key: str, num_experts: int, model: str = ""):
        self._head = {"v": VERSION, "key": key, "state": "live", "experts": num_experts, "model": model}
        self._layers = self._k = 0
        self._tokens: list[str] = []
        self._experts: list[str] = []
        self._weights: list[str] = []

    def extend(self, tokens: Sequence[TraceToken], experts: np.ndarray, weights: np.ndarray) -> None:
        """Appends tokens with `experts` uint8 [n, L, 3, k] and `weights` float [n, L, 3, k] in 0..1."""
        n, self._layers, projections, self._k = experts.shape
        if projections != 3 or n != len(tokens) or weights.shape != experts.shape:
            raise ValueError(f"experts {experts.shape} and weights {weights.shape} do not fit {len(tokens)} tokens")
        self._tokens.extend(_token_line(token) for token in tokens)
        self._experts.append(_base64(experts))
        scaled = np.rint(np.clip(weights.astype(np.float32), 0.0, 1.0) * 255).astype(np.uint8)
        self._weights.append(_base64(scaled))

    def to_dict(self, done: bool = False) -> dict[str, Any]:
        """JSON-ready; the strings of a later call start with those of an earlier one."""
        for chunks in (self._tokens, self._experts, self._weights):
            chunks[:] = ["".join(chunks)]  # joined once, so that the next call only adds what is new
        return {
            **self._head,
            "state": "done" if done else "live",
            "layers": self._layers,
            "k": self._k,
            "tokens": self._tokens[0],
            "e": self._experts[0],
            "w": self._weights[0],
            "c": "",
            "h": "",
        }


def trace_payload(trace: RouterTrace, key: str) -> dict[str, Any]:
    """Payload of a finished trace."""
    live = LivePayload(key, trace.num_experts, trace.model)
    live.extend(trace.tokens, trace.experts, trace.weights)
    payload = live.to_dict(done=True)
    if trace.contributions is not None:
        share = np.clip(trace.contributions.astype(np.float32) / LARGEST_CONTRIBUTION, 0.0, 1.0)
        payload["c"] = _base64(np.rint(np.sqrt(share) * 255).astype(np.uint8))
    entropy = router_entropy(trace)
    if entropy is not None:
        payload["h"] = _base64(np.rint(np.clip(entropy, 0.0, 1.0) * 255).astype(np.uint8))
    return payload


def _token_line(token: TraceToken) -> str:
    logprob = None if token.logprob is None else round(token.logprob, 4)
    row: list[Any] = [token.id, token.text, int(token.role == "answer"), token.piece, logprob]
    if token.others:
        row.append([[text, round(value, 4)] for text, value in token.others])
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
