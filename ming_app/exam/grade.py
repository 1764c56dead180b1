"""Grading: the chosen letters of a question against its key."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ming_app.exam.question import Question


@dataclass(frozen=True)
class Grade:
    """`correct`: exactly the key. `score`: 0..1, what the answer is worth."""

    correct: bool
    score: float


def grade(question: Question, chosen: Collection[str], partial: bool = False) -> Grade:
    """All or nothing; with `partial`, a question with several right answers is worth the share of them that was chosen,
    as long as nothing wrong was (the rule of several Chinese title exams). No answer is worth nothing."""
    picked, key = set(chosen), set(question.answer)
    if picked == key:
        return Grade(True, 1.0)
    if partial and question.kind.multiple and picked and picked < key:
        return Grade(False, len(picked) / len(key))
    return Grade(False, 0.0)
