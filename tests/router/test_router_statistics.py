"""Load, bands, co-activation and flow: against plain loops, and on traces whose answer is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from synthetic import even, trace_of

from ming_app.router.statistics import (
    choice_counts,
    coactivation,
    entropy_of,
    flow,
    gini_of,
    load,
    router_entropy,
)

WORDS = [f"w{i}" for i in range(400)]


def test_counts_by_loops() -> None:
    trace = trace_of(WORDS[:30], even())
    expected = np.zeros((3, 3, 4), int)
    for t, layer, p, k in itertools.product(range(30), range(3), range(3), range(2)):
        expected[layer, p, trace.experts[t, layer, p, k]] += 1
    assert np.array_equal(choice_counts(trace), expected)
    rows = np.arange(30) % 3 == 0
    some = sum(int(trace.experts[t, 1, 2, k] == 3) for t in range(0, 30, 3) for k in range(2))
    assert choice_counts(trace, rows)[1, 2, 3] == some


def test_even_use_lies_in_its_band_and_has_no_gini() -> None:
    found = load(trace_of(WORDS, even()))
    assert np.allclose(found.share.sum(-1), 1) and found.dead == ()
    inside = (found.share >= found.low) & (found.share <= found.high)
    assert inside.mean() > 0.8  # 0.95 expected; the 36 shares hang together in fours
    assert found.gini.max() < 0.1 and found.entropy.min() > 0.99
    # the band is that of a hypergeometric draw: k of E for each of n distinct tokens
    spread = 1.96 * math.sqrt(400 * 0.5 * 0.5) / 800
    assert found.high - 0.25 == pytest.approx(spread, rel=0.35)


def test_repeated_tokens_widen_the_band() -> None:
    """400 tokens of which only 4 are distinct say little more than 4."""
    once = load(trace_of(WORDS, even()))
    fixed = {i: np.random.default_rng(i).permutation(4) for i in range(4)}
    often = load(trace_of([WORDS[i % 4] for i in range(400)], lambda token, rng: fixed[token % 4]))
    assert (often.high - often.low).mean() > 5 * (once.high - once.low).mean()


def test_a_dead_expert_is_named_and_leaves_the_band() -> None:
    trace = trace_of(WORDS, lambda token, rng: rng.permutation([0, 1, 3]))
    found = load(trace)
    assert set(found.dead) == {(layer, p, 2) for layer in range(3) for p in range(3)}
    assert (found.share[..., 2] < found.low[..., 2]).all() and (found.share[..., [0, 1, 3]] > found.high.mean()).all()
    assert found.gini == pytest.approx(np.full((3, 3), 0.25), abs=0.03)  # (0, 1/3, 1/3, 1/3)


def test_gini_and_entropy_by_definition() -> None:
    share = np.array([0.5, 0.3, 0.2, 0.0])
    pairs = sum(abs(a - b) for a in share for b in share) / (2 * 16 * share.mean())
    assert gini_of(share) == pytest.approx(pairs)
    assert gini_of(np.array([0, 0, 0, 1.0])) == pytest.approx(0.75) and gini_of(np.zeros(4)) == 0
    assert entropy_of(share) == pytest.approx(-sum(s * math.log(s) for s in share if s) / math.log(4))
    assert entropy_of(np.array([[1.0]])) == 1


def test_load_of_nothing() -> None:
    found = load(trace_of([], even()))
    assert found.tokens == 0 and not found.share.any() and found.dead == ()


def test_coactivation_by_loops() -> None:
    trace = trace_of(WORDS[:60], lambda token, rng: [0, 1, 2, 3] if token % 3 else rng.permutation(4))
    found = coactivation(trace)
    for layer, p, i, j in itertools.product(range(3), range(3), range(4), range(4)):
        with_i = [set(row) for row in trace.experts[:, layer, p].tolist() if i in row]
        assert found[layer, p, i, j] == pytest.approx(sum(j in row for row in with_i) / len(with_i))


def test_flow_by_loops() -> None:
    trace = trace_of(WORDS[:40], even())
    found = flow(trace, 1)
    assert found.shape == (2, 4, 4) and (found.sum((1, 2)) == 40).all()
    top = trace.experts[:, :, 1, 0]
    assert found[1, 2, 3] == sum(int(a == 2 and b == 3) for a, b in zip(top[:, 1], top[:, 2], strict=True))
    assert flow(trace_of(WORDS[:5], even(), layers=1), 0).shape == (0, 4, 4)


def test_router_entropy_needs_probabilities() -> None:
    import dataclasses

    trace = trace_of(WORDS[:5], even())
    assert router_entropy(trace) is None
    even_odds = np.full((5, 3, 3, 4), 0.25, np.float16)
    assert router_entropy(dataclasses.replace(trace, probabilities=even_odds)) == pytest.approx(np.ones((5, 3, 3)))
