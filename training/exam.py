"""Exam questions made into chats to train on: the letter only, or reasoning, then the letter.

Questions, wordings and the rule for what may be shuffled are those of the app (ming_app.exam), so that a model is asked
what it was trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ming_app.engine.inspection import ANSWER_PREFIX
from ming_app.exam.bank import REFERS
from ming_app.exam.question import Question, QuestionError, make_question
from ming_app.exam.wording import (
    ASK_LETTER,
    ASK_REASON,
    EXPLANATION_PREFIX,
    LETTER_JOIN,
    exam_prompt,
    whole_stem,
)
from training.chat import Turn
from training.readers import ChatRow
from training.records import Damage, read_rows, text_of


def read_questions(path: str | Path, damage: Damage | None = None) -> Iterator[Question]:
    """Questions of a bank. With `damage`, broken lines are skipped and counted; else DataError names the first."""
    return read_rows(path, _question, damage)


def _question(row: dict[str, Any], _where: str) -> Question:
    text_of(row["id"])  # rows are told apart, held out and matched by it
    try:
        return make_question(row)
    except QuestionError as error:
        raise ValueError(error.en) from error


def exam_answer(question: Question) -> str:
    """`答案：B` or `Answer: B`; several letters are written together."""
    return ANSWER_PREFIX[question.lang] + LETTER_JOIN[question.lang] + "".join(question.answer)


def shuffle_options(question: Question, rng: random.Random, place: str = "") -> Question:
    """The same question with its options in another order; the letters follow. The explanation is dropped, since it may
    speak of letters. Options that refer to one another ("all of the above") stay where they are. `place`: the letter that
    a single right option shall get."""
    if any(REFERS.search(text) for text in question.options.values()):
        return question
    letters = list(question.options)
    order = rng.sample(letters, len(letters))
    if place in letters and len(question.answer) == 1:
        at, wanted = order.index(question.answer[0]), letters.index(place)
        order[at], order[wanted] = order[wanted], order[at]
    moved = dict(zip(order, letters, strict=True))
    options = {letter: question.options[old] for old, letter in zip(order, letters, strict=True)}
    answer = tuple(sorted(moved[letter] for letter in question.answer))
    return replace(question, options=options, answer=answer, explanation="")


def letter_row(question: Question, rng: random.Random, place: str = "") -> ChatRow:
    """Options shuffled (see `shuffle_options`), one of the letter-only wordings, the letter as answer."""
    question = shuffle_options(question, rng, place)
    return _exam_row(question, rng.choice(ASK_LETTER[question.lang]), exam_answer(question))


def reasoning_row(question: Question, rng: random.Random) -> ChatRow:
    """Explanation, blank line, letter; options keep their order. The question must have an explanation."""
    answer = f"{EXPLANATION_PREFIX[question.lang]}{question.explanation}\n\n{exam_answer(question)}"
    return _exam_row(question, rng.choice(ASK_REASON[question.lang]), answer)


def _exam_row(question: Question, ask: str, answer: str) -> ChatRow:
    prompt = exam_prompt(ask, whole_stem(question), question.options)
    turns = (Turn("user", prompt), Turn("assistant", answer))
    return ChatRow(question.id, question.source, question.lang, turns, question.tags)
