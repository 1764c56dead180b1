"""Sampling against distributions worked out by hand."""

import numpy as np
import pytest

from ming_app.engine.decode import Sampler, log_probabilities
from ming_app.engine.types import SamplingParams
from ming_app.errors import UsageError

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03])).astype(np.float32)


def frequencies(draws: int = 6000, **params) -> np.ndarray:
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": 1}
    sampler = Sampler(SamplingParams(**{**neutral, **params}))
    return np.bincount([sampler.choose(LOGITS)[0] for _ in range(draws)], minlength=5) / draws


@pytest.mark.parametrize(
    ("params", "want"),
    [
        ({}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.29}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        ({"temperature": 0.5}, np.array([0.25, 0.0625, 0.0225, 0.0049, 0.0009]) / 0.3408),
    ],
)
def test_draws_follow_the_distribution(params, want):
    assert np.abs(frequencies(**params) - np.array(want)).max() < 0.025


def test_greedy_takes_the_largest_and_reports_the_models_own_probability():
    token, logprob = Sampler(SamplingParams(temperature=0, repetition_penalty=1.0)).choose(LOGITS + 3)
    assert token == 0 and logprob == pytest.approx(np.log(0.5), abs=1e-5)


def test_a_temperature_near_zero_is_greedy():
    assert {Sampler(SamplingParams(temperature=1e-300, seed=s)).choose(LOGITS)[0] for s in range(5)} == {0}


def test_a_seed_makes_sampling_reproducible():
    runs = [[Sampler(SamplingParams(seed=s)).choose(LOGITS)[0] for _ in range(1)] for s in (7, 7)]
    assert runs[0] == runs[1]


def test_repetition_penalty_acts_on_what_was_said():
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=3.0))
    flat = np.array([1.0, 0.9, -1.0], np.float32)
    assert [sampler.choose(flat)[0] for _ in range(3)] == [0, 1, 0]


def test_log_probabilities():
    rows = np.stack([LOGITS, LOGITS[::-1]])
    assert log_probabilities(rows, np.array([1, 0])) == pytest.approx([np.log(0.25), np.log(0.03)], abs=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"max_new_tokens": 0},
        {"deadline": 0},
        {"top_k": float("nan")},
        {"min_p": "x"},
        {"seed": -1},
        {"max_new_tokens": 3.5},
    ],
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(UsageError):
        SamplingParams(**bad)
