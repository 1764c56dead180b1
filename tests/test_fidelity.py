"""Fidelity: nothing between a backend and itself, and figures worked out by hand between two."""

import numpy as np
import pytest

from ming_app.bench.fidelity import compare, example_questions
from ming_app.engine.backends.torch import TorchBackend
from ming_app.engine.types import Step
from ming_app.models.load import load_torch_model
from tests.tiny import make_adapter, write_base


class Fixed:
    """A backend that gives the same logits and experts at every position."""

    def __init__(self, probabilities: list[float], experts: list[int]):
        self.logits = np.log(np.array(probabilities, np.float32))
        self.experts = np.array(experts, np.uint8)

    def new_cache(self, batch: int, capacity: int) -> None:
        return None

    def forward(self, ids, cache, *, router_bias=None, gates=None, all_logits=False, measure=False) -> Step:
        n = len(ids[0])
        chosen = np.broadcast_to(self.experts, (n, 1, 3, 2))
        return Step([np.tile(self.logits, (n, 1))], [chosen], [np.zeros(chosen.shape, np.float16)])


def test_figures_by_hand():
    p, q = [0.5, 0.3, 0.2], [0.25, 0.5, 0.25]
    closeness = compare(Fixed(p, [0, 1]), Fixed(q, [1, 0]), [np.arange(4), np.arange(2)])
    want = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    assert closeness.kl == pytest.approx(want, abs=1e-6)
    assert closeness.same_token == 0.0
    assert closeness.same_experts == 1.0  # a set: the order does not matter
    assert compare(Fixed(p, [0, 1]), Fixed(p, [0, 2]), [np.arange(3)]).same_experts == 0.0


def test_a_backend_equals_itself(tmp_path):
    base = write_base(tmp_path)
    backend = TorchBackend(load_torch_model(base, make_adapter(base)))
    closeness = compare(backend, backend, [np.arange(20), np.arange(7)])
    assert closeness.kl == pytest.approx(0, abs=1e-7)
    assert (closeness.same_token, closeness.same_experts) == (1.0, 1.0)


def test_questions_are_our_own_in_both_languages():
    questions = example_questions()
    assert len(questions) >= 8
    assert any("？" in q for q in questions) and any("?" in q for q in questions)
