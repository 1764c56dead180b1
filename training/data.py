"""Reads training and evaluation rows from JSON lines, plain or gzip: chats, and exam questions in the bank format.

Streaming, one line in memory at a time. A broken line raises DataError with file and line number, or is counted and
skipped, as the caller wishes. Exam questions become chats here: `exam_turns` (letter only, or reasoning then letter).
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.chat import Turn
from training.errors import DataError

MAX_LINE_BYTES = 4 << 20


@dataclass(frozen=True)
class ChatRow:
    """One conversation; turns alternate, first user, last assistant."""

    id: str
    source: str
    lang: str
    turns: tuple[Turn, ...]
    tags: Mapping[str, Any] = field(default_factory=dict)


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

    @property
    def multiple(self) -> bool:
        return len(self.answer) > 1


@dataclass
class Damage:
    """Lines that could not be used: how many, and the first few as `file:line: reason`."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.first) < 5:
            self.first.append(where)


def read_chats(path: str | Path, damage: Damage | None = None) -> Iterator[ChatRow]:
    """Rows {"id", "source", "lang", "messages": [{"role", "content"}]}. With `damage`, broken lines are skipped."""
    return _read(Path(path), _chat_row, damage)


def read_questions(path: str | Path, damage: Damage | None = None) -> Iterator[Question]:
    """Rows {"id", "lang", "source", "stem", "options", "answer", "explanation", "tags"}."""
    return _read(Path(path), _question, damage)


def _read(path: Path, parse: Any, damage: Damage | None) -> Iterator[Any]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE_BYTES):
                number += 1
                if not line.strip():
                    continue
                try:
                    row = parse(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    where = f"{path.name}:{number}: {type(error).__name__}: {str(error)[:120]}"
                    if damage is None:
                        raise DataError(
                            f"A line cannot be used: {where}. Correct it, or allow broken lines in the recipe.",
                            f"有一行无法使用：{where}。请修正该行，或在配方中允许跳过坏行。",
                        ) from error
                    damage.add(where)
                    continue
                yield row
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path} cannot be read: {reason}.", f"无法读取 {path}：{reason}。") from error


def _chat_row(row: dict[str, Any]) -> ChatRow:
    turns = tuple(Turn(m["role"], _text(m["content"])) for m in row["messages"])
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [t.role for t in turns] != expected:
        raise ValueError("turns must alternate, first user, last assistant")
    return ChatRow(_text(row["id"]), _text(row.get("source", "")), _text(row.get("lang", "")), turns)


def _question(row: dict[str, Any]) -> Question:
    options = {_text(letter): _text(text) for letter, text in row["options"].items()}
    if list(options) != [chr(ord("A") + i) for i in range(len(options))] or not 2 <= len(options) <= 26:
        raise ValueError("options must be lettered A, B, C, ... in order")
    answer = tuple(sorted(row["answer"]))
    if not answer or not set(answer) <= set(options):
        raise ValueError("the answer must name options")
    tags = row.get("tags") or {}
    if not isinstance(tags, dict):
        raise TypeError("tags must be an object")
    explanation = row.get("explanation") or ""
    lang = _text(row.get("lang", ""))
    return Question(
        _text(row["id"]), _text(row.get("source", "")), lang, _text(row["stem"]), options, answer, explanation, tags
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text expected, found {type(value).__name__}")
    return value


# -- exam questions as chats ------------------------------------------------------------------------------------------

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
    return Question(question.id, question.source, question.lang, question.stem, options, answer, "", question.tags)


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
