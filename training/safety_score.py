"""`python -m training.safety_score`: learns the weights of ming_app/safety/score.py from labelled sentences.

Reads tests/safety/sentences/*.jsonl: everything but the test half of the held-out set (see `split`). Logistic regression
with an L2 penalty, solved by L-BFGS in float64: the same sentences give the same weights. Thresholds are chosen on
sentences that a model of the other folds has not seen; the test half is read only to be reported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ming_app.safety import score as scoring
from ming_app.safety.red_flags import features, rules_true, scan
from ming_app.safety.rules import FOLDER

SENTENCES = Path(__file__).parents[1] / "tests" / "safety" / "sentences"
PENALTY = 1 / 30
RARE, KEPT = 2, 12_000
FOLDS = 5
MOST_FALSE = {"zh": 0.03, "en": 0.065}
"""share of harmless sentences that may raise a flag where thresholds are chosen; English is harder to tell apart"""
STEPS = [step / 100 for step in range(2, 100)]


@dataclass(frozen=True)
class Sentence:
    """One labelled line: messages of one person, and whether they tell of an emergency."""

    turns: tuple[str, ...]
    lang: str
    red_flag: bool
    category: str
    kind: str


def read(name: str) -> list[Sentence]:
    """The sentences of tests/safety/sentences/NAME.jsonl."""
    lines = (SENTENCES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [
        Sentence(tuple(row.get("turns") or [row["text"]]), row["lang"], row["red_flag"], row["category"], row["kind"])
        for row in rows
    ]


def split(sentences: Sequence[Sentence]) -> tuple[list[Sentence], list[Sentence]]:
    """(tuning half, test half), by a hash of the text: a sentence never changes sides."""

    def odd(sentence: Sentence) -> bool:
        return int(hashlib.sha256("|".join(sentence.turns).encode()).hexdigest(), 16) % 2 == 1

    return [s for s in sentences if odd(s)], [s for s in sentences if not odd(s)]


def learn(
    rows: Sequence[set[str]], labels: torch.Tensor, rarity: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """feature -> weight times rarity, and the bias. A row is the rarities of its features, scaled to length 1."""
    place = {feature: at for at, feature in enumerate(rarity)}
    at: list[int] = []
    columns: list[int] = []
    entries: list[float] = []
    for row, present in enumerate(rows):
        known = sorted(feature for feature in present if feature in place)
        length = sum(rarity[feature] ** 2 for feature in known) ** 0.5
        at += [row] * len(known)
        columns += [place[feature] for feature in known]
        entries += [rarity[feature] / length for feature in known]
    shape = (len(rows), len(rarity))
    matrix = torch.sparse_coo_tensor(torch.tensor([at, columns]), torch.tensor(entries, dtype=torch.float64), shape)
    matrix = matrix.coalesce()
    weight = torch.zeros(len(rarity), 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=400, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        logits = torch.sparse.mm(matrix, weight).squeeze(1) + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        loss = loss + PENALTY / 2 * (weight**2).sum()
        loss.backward()
        return loss

    solver.step(closure)
    learnt = dict(zip(rarity, weight.detach().squeeze(1).tolist(), strict=True))
    return {feature: value * rarity[feature] for feature, value in learnt.items()}, float(bias.detach())


def values(
    rows: Sequence[set[str]], rarity: Mapping[str, float], weights: Mapping[str, float], bias: float
) -> torch.Tensor:
    """Scores in [0, 1], as score.score gives them."""
    found = []
    for present in rows:
        known = sorted(feature for feature in present if feature in weights)
        length = sum(rarity[feature] ** 2 for feature in known) ** 0.5 or 1.0
        found.append(bias + sum(weights[feature] for feature in known) / length)
    return torch.sigmoid(torch.tensor(found, dtype=torch.float64))


def rarities(rows: Sequence[set[str]]) -> dict[str, float]:
    """feature -> log of the inverse share of rows that have it, plus 1, of the features of at least RARE rows."""
    counts = Counter(feature for row in rows for feature in row)
    return {
        feature: math.log((1 + len(rows)) / (1 + count)) + 1
        for feature, count in sorted(counts.items())
        if count >= RARE
    }


def categories(rows: Sequence[set[str]], sentences: Sequence[Sentence]) -> dict[str, tuple[str, float]]:
    """feature -> the category it mostly stands with among emergencies, and how clearly."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for present, sentence in zip(rows, sentences, strict=True):
        if sentence.red_flag:
            for feature in present:
                seen[feature][sentence.category] += 1
    found = {}
    for feature, counts in seen.items():
        (name, count), total = counts.most_common(1)[0], sum(counts.values())
        if count >= 2 and count / total >= 0.5:
            found[feature] = name, count / (total + 1)
    return found


def fit(lang: str) -> None:
    """Learns, chooses thresholds, writes the weights of one language, prints what was measured."""
    tune, test = split([s for s in read("labelled") if s.lang == lang])
    sentences = tune + [s for s in read("more") if s.lang == lang]
    rows = [features([scan(text) for text in s.turns], lang) for s in sentences]
    raised = torch.tensor([strongest(s) for s in sentences])
    labels = torch.tensor([float(s.red_flag) for s in sentences], dtype=torch.float64)
    unseen = torch.zeros(len(rows), dtype=torch.float64)
    for fold in range(FOLDS):
        inside = [i for i in range(len(rows)) if i % FOLDS != fold]
        outside = [i for i in range(len(rows)) if i % FOLDS == fold]
        rarity = rarities([rows[i] for i in inside])
        weights, bias = learn([rows[i] for i in inside], labels[inside], rarity)
        unseen[outside] = values([rows[i] for i in outside], rarity, weights, bias)
    danger = labels > 0.5
    low, high = thresholds(unseen, raised, danger, MOST_FALSE[lang])
    rarity = rarities(rows)
    weights, bias = learn(rows, labels, rarity)
    kept = sorted(sorted(weights, key=lambda feature: -abs(weights[feature]))[:KEPT])
    rarity = {feature: rarity[feature] for feature in kept}
    weights, bias = learn(rows, labels, rarity)
    spoken = categories(rows, sentences)
    lines = [f"# bias, high, low\t{bias:.4f}\t{high}\t{low}"]
    for feature, weight in weights.items():
        name, share = spoken.get(feature, ("", 0.0))
        lines.append(f"{feature}\t{weight:.3f}\t{rarity[feature]:.2f}\t{name}\t{share:.2f}")
    (FOLDER / f"score_{lang}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    scoring.weights.cache_clear()
    report(f"{lang} unseen folds of {len(rows)}", _flagged(unseen, raised, low, high), danger)
    held = [features([scan(text) for text in s.turns], lang) for s in test]
    held_raised = torch.tensor([strongest(s) for s in test])
    held_danger = torch.tensor([s.red_flag for s in test])
    report(
        f"{lang} test half of {len(test)}",
        _flagged(values(held, rarity, weights, bias), held_raised, low, high),
        held_danger,
    )


def strongest(sentence: Sentence) -> int:
    """2 where a certain rule is true, 1 where another is, else 0."""
    true = rules_true([scan(text) for text in sentence.turns])
    return 2 if any(rule.certain for rule in true) else int(bool(true))


def thresholds(value: torch.Tensor, raised: torch.Tensor, danger: torch.Tensor, most: float) -> tuple[float, float]:
    """(low, high) that find most while at most a share of `most` of the harmless sentences raise a flag; the lowest low of equals."""
    best = (-1.0, 0.0, 0.0)
    for low in STEPS:
        for high in STEPS:
            flagged = _flagged(value, raised, low, high)
            if low <= high and float(flagged[~danger].double().mean()) <= most:
                best = max(best, (float(flagged[danger].double().mean()), -low, high))
    return -best[1], best[2]


def _flagged(value: torch.Tensor, raised: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return (value >= high) | ((raised == 1) & (value >= low)) | (raised == 2)


def report(name: str, flagged: torch.Tensor, danger: torch.Tensor) -> None:
    recall, false = float(flagged[danger].double().mean()), float(flagged[~danger].double().mean())
    print(f"{name}: recall {recall:.1%} of {int(danger.sum())}, false alarms {false:.1%} of {int((~danger).sum())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    for lang in ("zh", "en"):
        fit(lang)


if __name__ == "__main__":
    main()
