"""Load and token tables against hand computation."""

from __future__ import annotations

import numpy as np
import pytest

from ming_app.molora.trace import RouterTrace, TraceToken
from ming_app.router.tables import load_table, token_table


def hand_trace() -> RouterTrace:
    """Two tokens, one layer; gate: (0,1) and (0,2), up: (3,0) twice, down: (1,2) and (2,1); weights 0.75 and 0.25."""
    experts = np.array([[[[0, 1], [3, 0], [1, 2]]], [[[0, 2], [3, 0], [2, 1]]]], np.uint8)
    weights = np.broadcast_to(np.array([0.75, 0.25], np.float16), experts.shape).copy()
    tokens = (TraceToken(5, "a", "prompt", 0), TraceToken(6, "b", "answer", 1, -0.1))
    return RouterTrace(experts, weights, tokens, num_experts=5)


def test_load_by_hand() -> None:
    rows = load_table(hand_trace(), layer=0, projection="gate")
    assert [r.share for r in rows] == pytest.approx([0.5, 0.25, 0.25, 0, 0])
    assert [r.first for r in rows] == pytest.approx([1, 0, 0, 0, 0])
    assert [r.weight for r in rows] == pytest.approx([0.75, 0.125, 0.125, 0, 0])
    everything = load_table(hand_trace())
    assert [r.share for r in everything] == pytest.approx([4 / 12, 3 / 12, 3 / 12, 2 / 12, 0])
    assert sum(r.weight for r in everything) == pytest.approx(1)


def test_load_by_role() -> None:
    rows = load_table(hand_trace(), projection="down", role="answer")
    assert [r.first for r in rows] == pytest.approx([0, 0, 1, 0, 0])


def test_load_of_nothing_is_zero() -> None:
    trace = hand_trace()
    empty = RouterTrace(trace.experts[:0], trace.weights[:0], (), num_experts=5)
    assert all(r.share == r.first == r.weight == 0 for r in load_table(empty))


def test_token_table_by_hand() -> None:
    assert token_table(hand_trace(), 1) == [[[(0, 0.75), (2, 0.25)], [(3, 0.75), (0, 0.25)], [(2, 0.75), (1, 0.25)]]]
