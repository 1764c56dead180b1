"""A score beside the rules: how much a message reads like one of a person in danger, from 0 to 1.

A linear model over words and pairs of words, over the concepts and rules that hold, learned from labelled sentences by
`python -m training.safety_score`. Its weights are data (rules/score_zh.tsv, rules/score_en.tsv): feature, weight, rarity,
and the category it speaks for. It finds what no rule was written for, and tells a vignette from a cry for help. Deterministic.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ming_app.safety.rules import FOLDER

_TOKEN = re.compile(r"[a-z]+|\d+|[\u3400-\u9fff]|[?!]")
_FIGURE = re.compile(r"\d+(?:\.\d+)?")
CLEAR = 0.4
"""share of the votes that names a category; else it stays open"""
LONGEST = {"zh": 4, "en": 3}
"""tokens of a feature; a Chinese token is a character"""


@dataclass(frozen=True)
class Weights:
    """`high`: a score that raises a flag by itself. `low`: what a rule needs to do so."""

    bias: float
    high: float
    low: float
    weights: Mapping[str, tuple[float, float]]
    """feature -> its weight times its rarity, and its rarity squared"""
    categories: Mapping[str, tuple[str, float]]


@dataclass(frozen=True)
class Score:
    """`value` in [0, 1]; `category` that the features speak for ("" where they do not agree); `matched`: the words that weighed most."""

    value: float
    category: str
    matched: tuple[str, ...]


def text_features(text: str, lang: str) -> set[str]:
    """Words (Chinese: characters) of a plain text, runs of up to LONGEST of them, parts of English words; every figure of a
    number is a 0."""
    text = _FIGURE.sub(lambda found: "0" * len(found[0].partition(".")[0]), text)
    tokens = ["^", *_TOKEN.findall(text), "$"]
    between = "" if lang == "zh" else " "
    runs = {
        between.join(tokens[start : start + size])
        for size in range(1, LONGEST[lang] + 1)
        for start in range(len(tokens) - size + 1)
    }
    return runs if lang == "zh" else runs.union(*map(_parts, set(tokens)))


@lru_cache(maxsize=20_000)
def _parts(word: str) -> frozenset[str]:
    """Pieces of three to five letters of a longer word: endings and misspellings have most of them in common."""
    whole = f"<{word}>"
    if len(word) < 4:
        return frozenset()
    return frozenset(f"~{whole[at : at + size]}" for size in (3, 4, 5) for at in range(len(whole) - size + 1))


def name_features(names: Iterable[str], conditional: Iterable[str], rules: Iterable[str]) -> set[str]:
    """Concepts and facts that hold, those that hold under a condition, rules that are true."""
    raised = {f"#{rule}" for rule in rules}
    return (
        {f"@{name}" for name in names} | {f"?{name}" for name in conditional} | raised | {"#any" if raised else "#none"}
    )


@lru_cache(maxsize=2)
def weights(lang: str) -> Weights:
    """Read from rules/score_LANG.tsv."""
    head, *lines = (FOLDER / f"score_{lang}.tsv").read_text(encoding="utf-8").splitlines()
    bias, high, low = (float(value) for value in head.split("\t")[1:])
    table: dict[str, tuple[float, float]] = {}
    categories: dict[str, tuple[str, float]] = {}
    for line in lines:
        feature, weight, rarity, category, share = line.split("\t")
        table[feature] = float(weight), float(rarity) ** 2
        if category:
            categories[feature] = category, float(share)
    return Weights(bias, high, low, table, categories)


def score(features: set[str], lang: str) -> Score:
    """The score of a set of features."""
    model = weights(lang)
    known = sorted(feature for feature in features if feature in model.weights)
    length = math.sqrt(sum(model.weights[feature][1] for feature in known)) or 1.0
    total = model.bias + sum(model.weights[feature][0] for feature in known) / length
    return Score(1 / (1 + math.exp(-total)), _category(known, model), _strongest(known, model))


def _category(known: Sequence[str], model: Weights) -> str:
    votes: defaultdict[str, float] = defaultdict(float)
    for feature in known:
        if feature in model.categories:
            category, share = model.categories[feature]
            votes[category] += share
    first = max(sorted(votes), key=lambda name: votes[name], default="")
    return first if first and votes[first] >= sum(votes.values()) * CLEAR else ""


def _strongest(known: Sequence[str], model: Weights) -> tuple[str, ...]:
    words = [feature for feature in known if feature[0] not in "@#?^$!~" and model.weights[feature][0] > 0]
    return tuple(sorted(words, key=lambda feature: (-model.weights[feature][0], feature))[:3])
