"""The exam trainer's figures: opening a large bank, statistics over many answers, in seconds. Needs no model.

Questions are those of examples/banks, each many times with another number in its stem; answers are made up by a fixed
seed. Both are made once, outside what is measured.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ming_app.bench.peers import Setup
from ming_app.exam import schedule
from ming_app.exam.bank import Shelf
from ming_app.exam.question import Question
from ming_app.exam.statistics import statistics
from ming_app.exam.store import Store

QUESTIONS, ANSWERS, CARDS = 60_000, 100_000, 30_000
DAY = 86_400.0


def exam_peer(_setup: Setup) -> Callable[[str], float]:
    """Measures "open-bank" (a new shelf, as after a start) and "statistics"."""
    folder = tempfile.TemporaryDirectory(prefix="ming-bench-")
    bank = Shelf(Path(folder.name)).add("many questions", many_questions(QUESTIONS)).name
    store = many_answers(ANSWERS, CARDS)

    def measure(name: str) -> float:
        start = time.perf_counter()
        if name == "open-bank":
            size = len(Shelf(Path(folder.name)).open(bank).questions)
            assert size == QUESTIONS
        else:
            assert statistics(store).total.total == ANSWERS
        return time.perf_counter() - start

    return measure


def many_questions(count: int) -> list[Question]:
    """`count` questions: ours, again and again, each copy with its number in the stem and in the group."""
    shelf = Shelf()
    ours = [question for listed in shelf.list() for question in shelf.open(listed.name).questions]
    return [
        replace(q, stem=f"{q.stem} [{at // len(ours)}]", group_id=q.group_id and f"{q.group_id}-{at // len(ours)}")
        for at, q in ((at, ours[at % len(ours)]) for at in range(count))
    ]


def many_answers(answers: int, cards: int) -> Store:
    """A store in memory with answers of 200 days to `cards` questions of 30 subjects."""
    store, rng = Store(":memory:"), random.Random(1)
    now = store.now()
    rows = [
        [f"{i % cards:016x}", "bank", now - rng.random() * 200 * DAY, "A", i % 3 > 0, 1.0, 30.0]
        + [("sure", "guess", "")[i % 3], "practice", f"{i:08x}", "A1", "zh", f"subject {i % 30}"]
        + [("easy", "hard")[i % 2], i % 2]
        for i in range(answers)
    ]
    state = schedule.review(None, schedule.rating(True, 10, "", "A1"), now).state
    store.put_tables({"answers": rows, "cards": [[f"{i:016x}", "bank", state, now + i, 3.0] for i in range(cards)]})
    store.take_changes()
    return store
