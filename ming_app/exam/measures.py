"""Measures of right and wrong answers, as pure functions: Wilson's interval, and calibration (Guo et al. 2017, arXiv
1706.04599). People's and models' answers are measured alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927); (0, 1) where nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> dict[str, object]:
    """{"ece", "bins": [{"from", "to", "n", "confidence", "accuracy"}]}: bins of equal width, empty ones left out;
    ece is the mean gap between confidence and accuracy, weighted by n."""
    c, r = np.asarray(confidence, float), np.asarray(right, float)
    which = np.minimum((c * bins).astype(int), bins - 1)
    table, gap = [], 0.0
    for i in range(bins):
        here = which == i
        if here.any():
            row = {"from": i / bins, "to": (i + 1) / bins, "n": int(here.sum())}
            row |= {"confidence": float(c[here].mean()), "accuracy": float(r[here].mean())}
            table.append(row)
            gap += abs(row["confidence"] - row["accuracy"]) * row["n"]
    return {"ece": gap / len(c) if len(c) else math.nan, "bins": table}
