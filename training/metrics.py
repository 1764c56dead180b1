"""Measures of answers, as pure functions on text and numbers. Each states what it counts.

Strict-match F1, ROUGE-L (Lin 2004), repetition, and whether an answer is in the language it was asked in. Wilson's interval
and calibration are ming_app.exam.measures'.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from training.readers import HAN, language_of

UNIT = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\W_]+")
NGRAM = 4  # units of a repeated sequence
LOOP = 3  # times in a row that a sequence must stand to be a loop


def tidy(text: str) -> str:
    """NFKC, without white space and a closing full stop."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text)).rstrip("。.;")


def entities(text: str) -> Counter[str]:
    """Lines "type：a、b" as a multiset of "type:a", "type:b". Other lines count whole, so that they cost precision."""
    found: Counter[str] = Counter()
    for line in filter(None, map(tidy, text.splitlines())):
        kind, colon, names = line.partition(":")
        for name in re.split("[、,]", names) if colon else ():
            found[f"{kind}:{name}"] += 1
        if not colon:
            found[line] += 1
    return found


def lines(text: str) -> Counter[str]:
    """Every line as one item ("symptom：status", "wording→term")."""
    return Counter(filter(None, map(tidy, text.splitlines())))


def strict_f1(wanted: Sequence[Counter[str]], found: Sequence[Counter[str]]) -> dict[str, float]:
    """Micro precision, recall and F1 of items that match exactly, summed over all answers."""
    hits = sum((w & f).total() for w, f in zip(wanted, found, strict=True))
    asked, given = sum(w.total() for w in wanted), sum(f.total() for f in found)
    precision, recall = hits / given if given else 0.0, hits / asked if asked else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def units(text: str) -> list[str]:
    """Han characters and words, lower case."""
    return UNIT.findall(unicodedata.normalize("NFKC", text).lower())


def rouge_l(wanted: str, found: str) -> float:
    """F1 of the longest common subsequence of units."""
    a, b = units(wanted), units(found)
    if not a or not b:
        return float(a == b)
    best = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, best[j] = best[j], before + 1 if x == y else max(best[j], best[j - 1])
    return 2 * best[-1] / (len(a) + len(b))


def repetition(text: str) -> float:
    """Share of the 4-grams of units that stood before in the same text; 0 for a short one."""
    found = units(text)
    grams = [tuple(found[i : i + NGRAM]) for i in range(len(found) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(text: str) -> bool:
    """Whether the text ends in a sequence that stands at least three times in a row and fills at least 12 units. Numbers do
    not count: a list may go on counting while it repeats itself."""
    found = [unit for unit in units(text) if not unit.isdigit()]
    for size in range(1, len(found) // LOOP + 1):
        times = max(LOOP, math.ceil(LOOP * NGRAM / size))
        tail = found[-size * times :]
        if len(tail) == size * times and tail == tail[:size] * times:
            return True
    return False


def in_language(text: str, lang: str) -> bool:
    """Whether an answer is in zh or en. English may name a thing in Han characters, Chinese a drug in Latin ones; a text
    without any letter counts as right (a number, a formula)."""
    letters = units(text)
    if not any(unit.isalpha() for unit in letters):
        return True
    return language_of(text) == lang if lang == "zh" else len(HAN.findall(text)) <= 0.1 * len(letters)
