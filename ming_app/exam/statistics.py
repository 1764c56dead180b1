"""What the answers say: a person's statistics over all answers, and the result of one sitting. Pure reading.

Days are those of the reader's clock (`offset`: seconds east of UTC). 100,000 answers take a few hundred milliseconds:
the database counts, Python does not.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ming_app.exam import schedule
from ming_app.exam.bank import tag_of
from ming_app.exam.measures import wilson
from ming_app.exam.sitting import CONFIDENCE, Sitting
from ming_app.exam.store import CAUSES, Store

DAY = schedule.DAY
FORECAST_DAYS = 14
RECALL_CARDS = 5_000  # cards whose recall is worked out; more are sampled


@dataclass(frozen=True)
class Share:
    """How many of `total` were right. `low`, `high`: 95 % interval (Wilson)."""

    name: str
    right: int
    total: int
    seconds: float = 0.0
    """mean time per question"""

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.total)


@dataclass(frozen=True)
class Statistics:
    """All answers of one person."""

    total: Share
    days: tuple[Share, ...]
    """one for each day with answers, oldest first; `name` is the ISO date"""
    subjects: tuple[Share, ...]
    difficulties: tuple[Share, ...]
    types: tuple[Share, ...]
    confidence: tuple[Share, ...]
    causes: tuple[tuple[str, int], ...]
    streak: int
    """days in a row with answers, up to today or yesterday"""
    forecast: tuple[int, ...]
    """cards due by the end of today, and on each of the next days"""
    cards: int
    recall: float | None
    """mean probability that a card would be recalled now"""
    retention: float | None
    """share of right answers to questions seen before"""


def statistics(store: Store, offset: float = 0.0) -> Statistics:
    """Reads a store. `offset`: seconds that the reader's clock is ahead of UTC."""
    today = int((store.now() + offset) // DAY)
    days = store.rows(
        f"SELECT CAST((at+?)/{DAY} AS INTEGER) AS day, SUM(correct), COUNT(*), AVG(seconds), SUM(again), "
        "SUM(again*correct) FROM answers GROUP BY day ORDER BY day",
        [offset],
    )
    right, total = sum(row[1] for row in days), sum(row[2] for row in days)
    seconds = sum(row[3] * row[2] for row in days) / total if total else 0.0
    seen, seen_right = sum(row[4] for row in days), sum(row[5] for row in days)
    states = store.rows("SELECT state FROM cards ORDER BY key LIMIT ?", [RECALL_CARDS])
    recall = schedule.recall((state for (state,) in states), store.now()) if states else []
    causes = dict(store.rows("SELECT cause, COUNT(*) FROM marks WHERE cause<>'' GROUP BY cause"))
    return Statistics(
        Share("", right, total, seconds),
        tuple(Share(_date(row[0]), row[1], row[2], row[3]) for row in days),
        _by(store, "subject"),
        _by(store, "difficulty"),
        _by(store, "type"),
        tuple(sorted(_by(store, "confidence"), key=lambda share: [*CONFIDENCE, share.name].index(share.name))),
        tuple((cause, causes[cause]) for cause in CAUSES if cause in causes),
        _streak([row[0] for row in days], today),
        _forecast(store, today, offset),
        store.rows("SELECT COUNT(*) FROM cards")[0][0],
        sum(recall) / len(recall) if recall else None,
        seen_right / seen if seen else None,
    )


def _by(store: Store, column: str) -> tuple[Share, ...]:
    sql = f"SELECT {column}, SUM(correct), COUNT(*), AVG(seconds) FROM answers WHERE {column}<>'' GROUP BY {column}"
    return tuple(Share(*row) for row in sorted(store.rows(sql), key=lambda row: (-row[2], row[0])))


def _date(day: int) -> str:
    from datetime import date, timedelta

    return (date(1970, 1, 1) + timedelta(days=day)).isoformat()


def _streak(days: list[int], today: int) -> int:
    """Consecutive days up to today; a day that has only begun does not break it."""
    found = set(days)
    at = today if today in found else today - 1
    length = 0
    while at - length in found:
        length += 1
    return length


def _forecast(store: Store, today: int, offset: float) -> tuple[int, ...]:
    ends = [(today + 1 + ahead) * DAY - offset for ahead in range(FORECAST_DAYS)]
    sql = "SELECT COUNT(*) FROM cards WHERE due<?"
    up_to = [store.rows(sql, [end])[0][0] for end in ends]
    return tuple(b - a for a, b in zip([0, *up_to], up_to, strict=False))


@dataclass(frozen=True)
class Result:
    """One finished sitting."""

    score: float
    """points; one per question, parts where partial credit is given"""
    total: int
    """questions that count: all of a mock exam, the answered ones of a practice"""
    right: int
    unanswered: int
    seconds: float
    """time spent at the questions"""
    passed: bool
    subjects: tuple[Share, ...]
    types: tuple[Share, ...]
    confidence: tuple[Share, ...]
    wrong: tuple[int, ...]
    """places of those that were not right"""


def result(sitting: Sitting) -> Result:
    """What a sitting came to. Unanswered questions of a mock exam count as wrong; of a practice they do not count."""
    grades = sitting.grades()
    counted = [at for at in range(len(grades)) if sitting.kind == "mock" or sitting.response(at).chosen]
    counts: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for at in counted:
        question, given, response = sitting.questions[at], grades[at], sitting.response(at)
        names = (("subject", tag_of(question, "subject")), ("type", question.type), ("confidence", response.confidence))
        for group in names:
            count = counts[group]
            count[0] += given.correct
            count[1] += 1
            count[2] += response.seconds
    shares = {
        kind: tuple(
            Share(name, int(c[0]), int(c[1]), c[2] / c[1])
            for (k, name), c in sorted(counts.items(), key=lambda item: -item[1][1])
            if k == kind and name
        )
        for kind in ("subject", "type", "confidence")
    }
    score = sum(grades[at].score for at in counted)
    return Result(
        score,
        len(counted),
        sum(grades[at].correct for at in counted),
        sum(1 for at in range(len(grades)) if not sitting.response(at).chosen),
        sum(sitting.response(at).seconds for at in counted),
        score >= sitting.pass_share * len(counted) - 1e-9,
        shares["subject"],
        shares["type"],
        tuple(sorted(shares["confidence"], key=lambda share: CONFIDENCE.index(share.name))),
        tuple(at for at in counted if not grades[at].correct),
    )
