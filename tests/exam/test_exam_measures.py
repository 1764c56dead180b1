"""Wilson's interval and calibration, against values worked out by hand."""

from __future__ import annotations

import pytest

from ming_app.exam.measures import calibration, wilson


def test_wilson_interval() -> None:
    low, high = wilson(40, 100)  # values from the published formula
    assert (low, high) == (pytest.approx(0.3094, abs=1e-4), pytest.approx(0.4980, abs=1e-4))
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1)


def test_calibration_by_hand() -> None:
    found = calibration([0.95, 0.95, 0.15, 1.0], [True, False, False, True])
    top = {"from": 0.9, "to": 1.0, "n": 3, "confidence": pytest.approx(2.9 / 3), "accuracy": pytest.approx(2 / 3)}
    assert found["bins"] == [
        {"from": 0.1, "to": 0.2, "n": 1, "confidence": pytest.approx(0.15), "accuracy": 0.0},
        top,
    ]
    assert found["ece"] == pytest.approx((0.15 + 3 * (2.9 / 3 - 2 / 3)) / 4)
