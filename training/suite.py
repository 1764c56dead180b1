"""Evaluation suites: what to measure, as TOML, and the measuring, base against adapter.

    exam         letters of a bank by log-probability: accuracy by type, subject and language, calibration, and whether the
                 same option is chosen when the options stand in another order
    nlp          greedy answers to tasks with a reference: strict F1, accuracy or ROUGE-L as tasks.toml says
    generation   greedy answers to first questions: do they end, in the language asked, without loops, how long
    perplexity   loss per answer token on the held-out rows of a recipe, by stream

Exams and perplexity are measured on the training form of the model or on the engine that serves, the others always on the
engine. Results are plain dicts, ready for JSON.
"""

from __future__ import annotations

import random
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ming_app.exam.measures import calibration, wilson
from ming_app.exam.question import Question
from training.answers import Answerer, Generated
from training.chat import DEFAULT_SYSTEM, ChatTokenizer
from training.errors import DataError
from training.exam import shuffle_options
from training.letters import Scorer, letter_task, read_exam
from training.metrics import (
    entities,
    in_language,
    lines,
    loops,
    repetition,
    rouge_l,
    strict_f1,
    tidy,
)
from training.mix import is_held_out
from training.readers import ChatRow, read_chats
from training.recipe import read_toml

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Exam:
    """One bank."""

    file: str
    limit: int = 0
    """so many questions, spread evenly over the file; 0: all"""
    shuffles: int = 0
    """further orders of the options that each question is put in"""


@dataclass(frozen=True)
class Nlp:
    """One file of conversations whose last answers are references."""

    file: str
    limit: int = 0
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Generation:
    """One file of conversations whose first questions are asked."""

    file: str
    limit: int = 100
    max_new_tokens: int = 512
    held_out: float = 0.0
    """ask only rows that a recipe with this `held_out` keeps from training; 0: any"""


@dataclass(frozen=True)
class Suite:
    """What to measure. Paths are relative to the suite's file."""

    name: str
    folder: str = "."
    """where the files lie"""
    system: str = DEFAULT_SYSTEM
    exam: tuple[Exam, ...] = ()
    nlp: tuple[Nlp, ...] = ()
    generation: tuple[Generation, ...] = ()
    home: Path = Path(".")
    """folder of the suite's file, set when read"""

    def data(self, name: str) -> Path:
        """A file of the suite."""
        return (self.home / self.folder / name).resolve()


def read_suite(path: str | Path) -> Suite:
    """Reads and checks a suite file. Raises RecipeError that names the entry at fault."""
    suite: Suite = read_toml(Suite, path, "suite", leave_out=("home",))
    return replace(suite, home=Path(path).resolve().parent)


# -- exams -------------------------------------------------------------------------------------------------------------


def measure_exam(suite: Suite, exam: Exam, scorer: Scorer, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Accuracy with its interval, parts of it, calibration and consistency of one bank."""
    questions, left_out = read_exam(suite.data(exam.file), exam.limit)
    scores = scorer([letter_task(question, tokenizer, suite.system) for question in questions])
    picks = [int(score.argmax()) for score in scores]
    right = [_letter(pick) == question.answer[0] for pick, question in zip(picks, questions, strict=True)]
    confidence = [float(np.exp(score.max())) for score in scores]
    result = {
        **accuracy(right),
        "left_out": left_out,
        "chosen": dict(sorted(Counter(map(_letter, picks)).items())),
        "by_type": _parts(right, [question.type for question in questions]),
        "by_subject": _parts(right, [_subject(question) for question in questions]),
        "by_lang": _parts(right, [question.lang for question in questions]),
        "calibration": calibration(confidence, right),
    }
    if exam.shuffles:
        result["shuffled"] = _consistency(suite, exam, scorer, tokenizer, questions, picks)
    return result


def _consistency(
    suite: Suite,
    exam: Exam,
    scorer: Scorer,
    tokenizer: ChatTokenizer,
    questions: Sequence[Question],
    picks: Sequence[int],
) -> dict[str, Any]:
    """Orders beyond the first: their accuracy, and the share of questions with the same option chosen in every order.
    Questions whose options refer to one another keep their order and are left out."""
    chosen = {q.id: {list(q.options.values())[pick]} for q, pick in zip(questions, picks, strict=True)}
    moved: list[Question] = []
    for turn in range(exam.shuffles):
        for question in questions:
            shuffled = shuffle_options(question, random.Random(f"order {turn} {question.id}"))
            if shuffled is not question:
                moved.append(shuffled)
    scores = scorer([letter_task(question, tokenizer, suite.system) for question in moved])
    right = []
    for question, score in zip(moved, scores, strict=True):
        pick = int(score.argmax())
        chosen[question.id].add(list(question.options.values())[pick])
        right.append(_letter(pick) == question.answer[0])
    asked = {question.id for question in moved}
    same = [len(chosen[question_id]) == 1 for question_id in asked]
    return {"orders": exam.shuffles + 1, "consistent": accuracy(same), "accuracy": accuracy(right)}


def accuracy(right: Sequence[bool]) -> dict[str, Any]:
    """{"accuracy", "right", "n", "confidence95"}; the interval is Wilson's."""
    low, high = wilson(sum(right), len(right))
    share = sum(right) / len(right) if right else float("nan")
    return {"accuracy": share, "right": sum(right), "n": len(right), "confidence95": [low, high]}


def _parts(right: Sequence[bool], keys: Sequence[str]) -> dict[str, Any]:
    parts: dict[str, list[bool]] = defaultdict(list)
    for value, key in zip(right, keys, strict=True):
        if key:
            parts[key].append(value)
    return {key: accuracy(values) for key, values in sorted(parts.items())}


def _subject(question: Question) -> str:
    found = question.tags.get("subject") or question.tags.get("specialty") or ""
    return found if isinstance(found, str) else ""


def _letter(index: int) -> str:
    return chr(ord("A") + index)


# -- answers -----------------------------------------------------------------------------------------------------------


def measure_nlp(
    suite: Suite, nlp: Nlp, answerer: Answerer, tokenizer: ChatTokenizer, tick: Tick | None
) -> dict[str, Any]:
    """{source: {"metric", "n", and its figures}}, and "ended": the share of answers that ended by themselves."""
    rows = spread(list(read_chats(suite.data(nlp.file))), nlp.limit)
    prompts = [_prompt(suite, row, tokenizer, len(row.turns) - 1) for row in rows]
    answers = answerer(prompts, tokenizer.stop_ids, nlp.max_new_tokens, tick=tick)
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        pairs[row.source].append((row.turns[-1].content, tokenizer.decode(answer.ids)))
    tasks = {source: {"n": len(of), **measure_task(task_metric(source), of)} for source, of in sorted(pairs.items())}
    return {"tasks": tasks, "ended": accuracy([answer.ended for answer in answers])}


def measure_task(metric: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Figures of (reference, answer) pairs; "score" is the one that stands for the task."""
    if metric in ("entities", "lines"):
        items = entities if metric == "entities" else lines
        figures = strict_f1([items(wanted) for wanted, _ in pairs], [items(found) for _, found in pairs])
        return {"metric": f"strict F1 of {metric}", "score": figures["f1"], **figures}
    if metric == "label":
        return {"metric": "accuracy", **(a := accuracy([tidy(w) == tidy(f) for w, f in pairs])), "score": a["accuracy"]}
    score = float(np.mean([rouge_l(wanted, found) for wanted, found in pairs]))
    return {"metric": "ROUGE-L", "score": score}


@cache
def _task_table() -> dict[str, str]:
    tasks = tomllib.loads(Path(__file__).with_name("tasks.toml").read_text(encoding="utf-8"))["task"]
    return {source: task["metric"] for task in tasks for source in task["sources"]}


def task_metric(source: str) -> str:
    """entities, lines, label or rouge (see tasks.toml)."""
    return _task_table().get(source, "rouge")


def measure_generation(
    suite: Suite, generation: Generation, answerer: Answerer, tokenizer: ChatTokenizer, tick: Tick | None
) -> dict[str, Any]:
    """{lang: {"ended", "in_language", "loops", "repetition", "tokens"}} of greedy answers to first questions."""
    rows = list(read_chats(suite.data(generation.file)))
    if generation.held_out:
        rows = [row for row in rows if is_held_out(row.id, generation.held_out)]
    rows = spread(rows, generation.limit)
    prompts = [_prompt(suite, row, tokenizer, 1) for row in rows]
    answers = answerer(prompts, tokenizer.stop_ids, generation.max_new_tokens, tick=tick)
    result = {}
    for lang in sorted({row.lang for row in rows}):
        of = [(row, a, tokenizer.decode(a.ids)) for row, a in zip(rows, answers, strict=True) if row.lang == lang]
        result[lang] = answer_figures(lang, of)
    return result


def answer_figures(lang: str, answers: Sequence[tuple[ChatRow, Generated, str]]) -> dict[str, Any]:
    """Figures of (row, generated, text); the ids of rows that fail are listed, their text is not."""
    counts = [len(generated.ids) for _, generated, _ in answers]
    checks: dict[str, list[bool]] = {
        "ended": [generated.ended for _, generated, _ in answers],
        "in_language": [in_language(text, lang) for _, _, text in answers],
        "without_loops": [not loops(text) for _, _, text in answers],
    }
    return {
        **{name: accuracy(values) for name, values in checks.items()},
        "repetition": float(np.mean([repetition(text) for _, _, text in answers])),
        "tokens": {"mean": float(np.mean(counts)), "p95": float(np.percentile(counts, 95)), "max": max(counts)},
        "failed": {
            name: [row.id for (row, _, _), good in zip(answers, values, strict=True) if not good]
            for name, values in checks.items()
        },
    }


def _prompt(suite: Suite, row: ChatRow, tokenizer: ChatTokenizer, turns: int) -> list[int]:
    system = suite.system if row.system is None else row.system
    return tokenizer.encode_prompt(row.turns[:turns], "", system)


def spread(rows: list[Any], limit: int) -> list[Any]:
    """`limit` rows spread evenly over all; 0: all. Raises DataError when there is none."""
    if not rows:
        raise DataError("An evaluation file holds no rows.", "评测文件中没有数据。")
    return [rows[i * len(rows) // limit] for i in range(limit)] if 0 < limit < len(rows) else rows
