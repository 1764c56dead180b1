"""When a question comes back: spaced repetition by FSRS (the `fsrs` package, Ye 2022-2026), and our rule for the rating.

A multiple-choice answer says less than a flash card's four buttons; we rate it

    wrong                                                 Again
    right, but guessed, unsure, or slow (over 2 x usual)  Hard
    right, sure, and fast (under 0.6 x usual)             Easy
    right otherwise                                       Good

where "usual" is the time of its type in USUAL. Partly right counts as wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from fsrs import Card, Rating, Scheduler

from ming_app.errors import UsageError

USUAL = {"A1": 45.0, "A2": 75.0, "A3": 75.0, "A4": 75.0, "B1": 30.0, "X": 60.0, "TF": 20.0}
"""type -> seconds that an answer usually takes"""
SLOW, FAST = 2.0, 0.6
RETENTION = 0.9
DAY = 86_400.0


def rating(correct: bool, seconds: float, confidence: str, kind: str) -> Rating:
    """The rule above. `seconds` 0 means not measured; `kind`: the question's type."""
    if not correct:
        return Rating.Again
    usual = USUAL.get(kind, 60.0)
    if confidence in ("guess", "unsure") or seconds > SLOW * usual:
        return Rating.Hard
    if confidence == "sure" and 0 < seconds < FAST * usual:
        return Rating.Easy
    return Rating.Good


@dataclass(frozen=True)
class Reviewed:
    """A card after a review: what to keep."""

    state: str
    """the card as JSON"""
    due: float
    """seconds since the epoch"""
    stability: float
    """days until recall falls to 90 %"""


@lru_cache(maxsize=4)
def scheduler(retention: float = RETENTION) -> Scheduler:
    """Intervals are spread a little (fuzz), so that what was learnt together does not all come back on one day."""
    if not 0.7 <= retention <= 0.97:
        raise UsageError("Retention must be between 0.7 and 0.97.", "目标记忆保持率应在 0.7 到 0.97 之间。")
    return Scheduler(desired_retention=retention)


def review(state: str | None, given: Rating, now: float, retention: float = RETENTION) -> Reviewed:
    """The card after an answer at `now`; `state` None is a new card."""
    at = datetime.fromtimestamp(now, UTC)
    card = Card.from_json(state) if state else Card(card_id=0, due=at)
    card, _ = scheduler(retention).review_card(card, given, at)
    return Reviewed(card.to_json(), card.due.timestamp(), card.stability or 0.0)


def recall(states: Iterable[str], now: float) -> list[float]:
    """Probability that each card would be recalled at `now`."""
    at = datetime.fromtimestamp(now, UTC)
    return [scheduler().get_card_retrievability(Card.from_json(state), at) for state in states]


def readable(state: str) -> bool:
    """Whether a card from a foreign file is one."""
    try:
        values = json.loads(state, parse_constant=lambda _: None)
        if len(state) > 1000 or not isinstance(values, dict) or type(values.get("card_id")) is not int:
            return False
        card = Card.from_json(state)
        if any(at is not None and at.tzinfo is None for at in (card.due, card.last_review)):
            return False
        at = datetime.now(UTC)
        review(state, Rating.Good, at.timestamp())  # what is done with it later must not fail
        return 0 <= recall([state], at.timestamp())[0] <= 1
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, OverflowError, ArithmeticError):
        return False
