"""Exam questions: read from banks (JSON lines), and made into chats: the letter only, or reasoning, then the letter.

{"id", "lang", "source", "stem", "options": {"A": ...}, "answer": ["B"], "explanation", "tags"}
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training.chat import Turn
from training.readers import ChatRow
from training.records import Damage, read_rows, text_of


@dataclass(frozen=True)
class Question:
    """One exam question. `options` in order of their letters; `answer` is the set of right letters, sorted."""

    id: str
    source: str
    lang: str
    stem: str
    options: dict[str, str]
    answer: tuple[str, ...]
    explanation: str
    tags: Mapping[str, Any] = field(default_factory=dict)
    type: str = ""
    """as the bank says: single, multiple, A1, A2, B1, X, ..."""

    @property
    def multiple(self) -> bool:
        return len(self.answer) > 1


def read_questions(path: str | Path, damage: Damage | None = None) -> Iterator[Question]:
    """Questions of a bank. With `damage`, broken lines are skipped and counted; else DataError names the first."""
    return read_rows(path, _question, damage)


def _question(row: dict[str, Any], _where: str) -> Question:
    options = {text_of(letter): text_of(text) for letter, text in row["options"].items()}
    if list(options) != [chr(ord("A") + i) for i in range(len(options))] or not 2 <= len(options) <= 26:
        raise ValueError("options must be lettered A, B, C, ... in order")
    answer = tuple(sorted(row["answer"]))
    if not answer or not set(answer) <= set(options):
        raise ValueError("the answer must name options")
    tags = row.get("tags") or {}
    if not isinstance(tags, dict):
        raise TypeError("tags must be an object")
    explanation = row.get("explanation") or ""
    lang = text_of(row.get("lang", ""))
    text = {name: text_of(row.get(name, "")) for name in ("source", "type")}
    return Question(
        text_of(row["id"]), text["source"], lang, text_of(row["stem"]), options, answer, explanation, tags, text["type"]
    )


ANSWER_PREFIX = {"zh": "答案：", "en": "Answer:"}
"""What the answer starts with; the letter follows, in English after a space (" C" is one token, a bare "C" is not)."""
LETTER_JOIN = {"zh": "", "en": " "}
EXPLANATION_PREFIX = {"zh": "解析：", "en": "Explanation: "}

ASK_LETTER = {
    "zh": (
        "请回答这道医学选择题，只写出正确选项的字母。",
        "请从下列选项中选出正确答案，只需给出字母，不必解释。",
        "医学考试题：直接写出正确选项的字母即可。",
    ),
    "en": (
        "Answer this medical exam question with the letter of the correct option only.",
        "Choose the correct option of this medical question. Write just its letter.",
        "Medical exam question: reply with the letter of the right option and nothing else.",
    ),
}
ASK_REASON = {
    "zh": ("请分析这道医学选择题，先写解析，再写出正确选项的字母。",),
    "en": ("Work through this medical exam question: explain first, then give the letter of the correct option.",),
}


REFERS_TO_OTHERS = re.compile(
    r"以上|上述|均|[A-F]\s*[+、和与]\s*[A-F]|\b(above|both|all of|none of|[a-f] (and|&|or) [a-f])\b", re.I
)


def exam_prompt(question: Question, ask: str) -> str:
    """The user's message: what is asked, a blank line, the stem and the lettered options."""
    options = "\n".join(f"{letter}. {text}" for letter, text in question.options.items())
    return f"{ask}\n\n{question.stem}\n{options}"


def exam_answer(question: Question) -> str:
    """`答案：B` or `Answer: B`; several letters are written together."""
    return ANSWER_PREFIX[question.lang] + LETTER_JOIN[question.lang] + "".join(question.answer)


def shuffle_options(question: Question, rng: random.Random, place: str = "") -> Question:
    """The same question with its options in another order; the letters follow. The explanation is dropped, since it may
    speak of letters. Options that refer to one another ("all of the above") stay where they are. `place`: the letter that
    a single right option shall get."""
    if any(REFERS_TO_OTHERS.search(text) for text in question.options.values()):
        return question
    letters = list(question.options)
    order = rng.sample(letters, len(letters))
    if place in letters and not question.multiple:
        at, wanted = order.index(question.answer[0]), letters.index(place)
        order[at], order[wanted] = order[wanted], order[at]
    moved = dict(zip(order, letters, strict=True))
    options = {letter: question.options[old] for old, letter in zip(order, letters, strict=True)}
    answer = tuple(sorted(moved[letter] for letter in question.answer))
    return replace(question, options=options, answer=answer, explanation="")


def letter_row(question: Question, rng: random.Random, place: str = "") -> ChatRow:
    """Options shuffled (see `shuffle_options`), one of the letter-only wordings, the letter as answer."""
    question = shuffle_options(question, rng, place)
    ask = rng.choice(ASK_LETTER[question.lang])
    return _exam_row(question, exam_prompt(question, ask), exam_answer(question))


def reasoning_row(question: Question, rng: random.Random) -> ChatRow:
    """Explanation, blank line, letter; options keep their order. The question must have an explanation."""
    ask = rng.choice(ASK_REASON[question.lang])
    answer = f"{EXPLANATION_PREFIX[question.lang]}{question.explanation}\n\n{exam_answer(question)}"
    return _exam_row(question, exam_prompt(question, ask), answer)


def _exam_row(question: Question, prompt: str, answer: str) -> ChatRow:
    turns = (Turn("user", prompt), Turn("assistant", answer))
    return ChatRow(question.id, question.source, question.lang, turns, question.tags)
