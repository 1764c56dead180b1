"""Similarity of experts against the matrices B A themselves."""

import numpy as np
import pytest

from ming_app.molora.similarity import expert_similarity
from tests.tiny import make_adapter, write_base


def test_cosines_by_the_whole_matrices(tmp_path):
    adapter = make_adapter(write_base(tmp_path))
    found = expert_similarity(adapter)
    assert found.shape == (2, 3, 4, 4)
    for layer, p, name in ((0, 0, "gate"), (1, 2, "down")):
        weights = adapter.projection(layer, name)
        whole = [(b @ a).ravel() for a, b in zip(weights.A.astype(float), weights.B.astype(float), strict=True)]
        for i in range(4):
            for j in range(4):
                cosine = whole[i] @ whole[j] / np.linalg.norm(whole[i]) / np.linalg.norm(whole[j])
                assert found[layer, p, i, j] == pytest.approx(cosine, abs=1e-5)
