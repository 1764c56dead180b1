"""The model as a candidate: it answers a question by scoring the letters (nothing is read out of free text), and a whole
bank with a report that can be stopped and resumed.

Single answers: after the answer prefix the next-token probabilities of the letters are compared. Several answers cannot
be scored so: the few tokens after the prefix are decoded greedily and their letters read.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ming_app.engine.inspection import ANSWER_PREFIX
from ming_app.engine.types import EngineInfo, Intervention, Message, SamplingParams, Token
from ming_app.errors import MingError, PromptTooLongError, StoppedError
from ming_app.exam.bank import option_order
from ming_app.exam.grade import grade
from ming_app.exam.measures import calibration, wilson
from ming_app.exam.question import Question
from ming_app.exam.wording import LETTER_JOIN, ask_for_letter

BASE = (Intervention("base"),)
"""the model without its experts and its attention LoRA"""
AT_A_TIME = 8
LETTER_TOKENS = 12  # enough for ten letters


class Scores(Protocol):
    """The part of the Engine that a candidate needs."""

    info: EngineInfo

    def score(
        self, prefix: Sequence[Message], continuations: Sequence[str], interventions: Sequence[Intervention] = ()
    ) -> list[float]:
        """Natural log-probability of each continuation."""

    def stream(self, messages: Sequence[Message], params: SamplingParams, cancel: threading.Event | None = None) -> Any:
        """Start, Tokens, Finish."""


@dataclass(frozen=True)
class Attempt:
    """How the model answered one question. Letters are those of the bank."""

    key: str
    id: str
    type: str
    lang: str
    subject: str
    answer: str
    choice: str
    correct: bool
    probabilities: dict[str, float] = field(default_factory=dict)
    """letter -> probability among the letters; empty where several may be right"""
    consistency: float | None = None
    """share of other orders of the options in which the same option was chosen"""


def probabilities(
    engine: Scores,
    question: Question,
    order: Sequence[str],
    earlier: Sequence[Question] = (),
    changes: Sequence[Intervention] = (),
) -> dict[str, float]:
    """Probability of every option, by its letter in the bank, with the options shown in `order`; they sum to 1."""
    lang = question.lang
    prefix = [*ask_for_letter(question, order, earlier), Message("assistant", ANSWER_PREFIX[lang])]
    letters = [LETTER_JOIN[lang] + chr(ord("A") + at) for at in range(len(order))]
    logs = np.array(engine.score(prefix, letters, changes) if changes else engine.score(prefix, letters))
    odds = np.exp(logs - logs.max())
    found = dict(zip(order, (odds / odds.sum()).tolist(), strict=True))
    return {letter: found[letter] for letter in question.options}


def attempt(
    engine: Scores,
    question: Question,
    earlier: Sequence[Question] = (),
    *,
    shuffles: int = 0,
    changes: Sequence[Intervention] = (),
) -> Attempt:
    """Lets the model answer; `shuffles`: in so many other orders of the options too. Raises as the engine does."""
    chances: dict[str, float] = {}
    consistency: float | None = None
    if question.kind.multiple:
        choice = _written(engine, question, earlier, changes)
    else:
        chances = probabilities(engine, question, list(question.options), earlier, changes)
        choice = max(chances, key=lambda letter: chances[letter])
        consistency = _consistency(engine, question, choice, earlier, shuffles, changes)
    return Attempt(
        question.key,
        question.id,
        question.type,
        question.lang,
        question.tags.get("subject", ""),
        "".join(question.answer),
        choice,
        grade(question, choice).correct,
        {letter: round(chance, 5) for letter, chance in chances.items()},
        consistency,
    )


def _consistency(
    engine: Scores,
    question: Question,
    choice: str,
    earlier: Sequence[Question],
    shuffles: int,
    changes: Sequence[Intervention],
) -> float | None:
    orders = {option_order(question, seed) for seed in range(4 * shuffles)} - {tuple(question.options)}
    asked = sorted(orders)[:shuffles]
    if not asked:
        return None
    found = (probabilities(engine, question, order, earlier, changes) for order in asked)
    return sum(max(chances, key=lambda x: chances[x]) == choice for chances in found) / len(asked)


def _written(engine: Scores, question: Question, earlier: Sequence[Question], changes: Sequence[Intervention]) -> str:
    """The letters that the model writes after the prefix; "" for none."""
    prefix = [*ask_for_letter(question, (), earlier), Message("assistant", ANSWER_PREFIX[question.lang])]
    params = SamplingParams(
        LETTER_TOKENS, temperature=0, repetition_penalty=1.0, trace=False, interventions=tuple(changes)
    )
    text = "".join(event.text for event in engine.stream(prefix, params) if isinstance(event, Token))
    letters = re.match(r"[\sA-J、,，]*", text)
    return "".join(sorted(set(re.findall("[A-J]", letters[0] if letters else "")) & set(question.options)))


# -- a whole bank -----------------------------------------------------------------------------------------------------


def with_earlier(questions: Sequence[Question]) -> Iterator[tuple[Question, list[Question]]]:
    """Each question with the ones of its group before it."""
    told: list[Question] = []
    for question in questions:
        if not question.group_id or not told or told[-1].group_id != question.group_id:
            told = []
        yield question, list(told)
        told.append(question)


def spread(questions: Sequence[Question], limit: int) -> list[tuple[Question, list[Question]]]:
    """With a limit, so many spread evenly over the bank (banks are often sorted); 0: all."""
    everything = list(with_earlier(questions))
    if not 0 < limit < len(everything):
        return everything
    return [everything[i * len(everything) // limit] for i in range(limit)]


def sit_exam(
    engine: Scores,
    asked: Sequence[tuple[Question, Sequence[Question]]],
    *,
    shuffles: int = 0,
    changes: Sequence[Intervention] = (),
    done: Mapping[str, Attempt] | None = None,
    tick: Callable[[Attempt, int, int], None] = lambda attempt, number, total: None,
    cancel: threading.Event | None = None,
) -> tuple[list[Attempt], int]:
    """Attempts at all questions, in order, and how many were too long for the model's context. Several are under way at a
    time: the engine reads them together, and what they have in common once. What is in `done` (by key) is not asked again.
    Raises StoppedError when cancelled; `tick` has seen every attempt until then."""

    def sit(question: Question, earlier: Sequence[Question]) -> Attempt | None:
        if cancel is not None and cancel.is_set():
            raise StoppedError("Stopped.", "已停止。")
        one = (done or {}).get(question.key)
        if one is not None:  # the key may have been corrected meanwhile
            return replace(one, answer="".join(question.answer), correct=grade(question, one.choice).correct)
        try:
            return attempt(engine, question, earlier, shuffles=shuffles, changes=changes)
        except PromptTooLongError:
            return None

    made: list[Attempt] = []
    too_long = 0
    with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="exam") as pool:
        try:
            for number, one in enumerate(pool.map(sit, *zip(*asked, strict=True)) if asked else (), 1):
                if one is None:
                    too_long += 1
                    continue
                made.append(one)
                tick(one, number, len(asked))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return made, too_long


def report(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """{"accuracy", "n", "confidence95", "by_type", "by_lang", "by_subject", "calibration", "consistency"}: shares of
    right answers with Wilson's 95 % interval. JSON-ready; accuracy is None where nothing was asked."""
    scored = [one for one in attempts if one.probabilities]
    chances = [one.probabilities[one.choice] for one in scored]
    moved = [one.consistency for one in attempts if one.consistency is not None]
    return {
        **_share(attempts),
        "by_type": _by(attempts, "type"),
        "by_lang": _by(attempts, "lang"),
        "by_subject": _by(attempts, "subject"),
        "calibration": calibration(chances, [one.correct for one in scored]) if scored else None,
        "consistency": sum(moved) / len(moved) if moved else None,
    }


def _share(attempts: Sequence[Attempt]) -> dict[str, Any]:
    right, n = sum(one.correct for one in attempts), len(attempts)
    return {"accuracy": right / n if n else None, "n": n, "confidence95": list(wilson(right, n))}


def _by(attempts: Sequence[Attempt], name: str) -> dict[str, Any]:
    groups: dict[str, list[Attempt]] = {}
    for one in attempts:
        groups.setdefault(getattr(one, name), []).append(one)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {value: _share(members) for value, members in ordered if value}


# -- attempts on disk -------------------------------------------------------------------------------------------------


def write_attempt(path: Path, mark: str, one: Attempt) -> None:
    """Appends an attempt to a file of JSON lines; `mark` says which model and settings made it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"by": mark, **asdict(one)}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise MingError(
            f"{path} cannot be written: {error.strerror}.", f"无法写入 {path}：{error.strerror}。"
        ) from error


def read_attempts(path: Path, mark: str) -> dict[str, Attempt]:
    """The attempts of a file that bear this mark, by question key; a line that was cut off is left out."""
    try:
        lines: Iterable[str] = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, Attempt] = {}
    for line in lines:
        try:
            values = json.loads(line)
            if values.pop("by") == mark:
                one = Attempt(**values)
                found[one.key] = one
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found
