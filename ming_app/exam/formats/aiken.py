"""Reads Aiken: a question on one or more lines, options `A. ...` or `A) ...`, then `ANSWER: D`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ming_app.exam.formats.reading import ReadOptions, Row, first_lines
from ming_app.exam.question import QuestionError

OPTION = re.compile(r"\s*([A-J])[.)]\s+(.*)")
ANSWER = re.compile(r"\s*ANSWER\s*:\s*(.*)", re.I)
EXPLAIN = re.compile(r"\s*(?:EXPLANATION|FEEDBACK)\s*:\s*(.*)", re.I)  # what some programs add


def looks_like(text: str) -> bool:
    """Whether a text has Aiken's lines: nothing else writes ANSWER: alone on a line after such options."""
    return bool(re.search(r"^\s*A[.)]\s+\S.*(?:\n\s*[B-J][.)]\s+\S.*)+\n\s*ANSWER\s*:\s*[A-J]\s*$", text, re.M))


def read(text: str, _options: ReadOptions) -> tuple[Iterator[Row], Mapping[str, str]]:
    """Rows, each closed by its ANSWER line; what stands between is named as a row without one."""
    return _rows(text), {}


def _rows(text: str) -> Iterator[Row]:
    stem: list[str] = []
    options: dict[str, Any] = {}
    start, done = 0, None
    for number, line in enumerate([*text.split("\n"), ""], 1):
        option, answer, note = OPTION.match(line), ANSWER.match(line), EXPLAIN.match(line)
        if answer:
            if done:
                yield done
            done = Row(start or number, {"stem": "\n".join(stem), "options": options, "answer": answer[1].strip()})
            stem, options, start = [], {}, 0
        elif note and done and not stem:
            done = Row(done.line, {**done.fields, "explanation": note[1].strip()})  # type: ignore[dict-item]
        elif option and stem:
            options[option[1]] = option[2].strip()
        elif line.strip():
            if done:
                yield done
                done = None
            if options:  # a new question began: the one before has no answer
                yield _unanswered(start, stem)
                stem, options, start = [], {}, 0
            start = start or number
            stem.append(line.strip())
    if done:
        yield done
    if stem:
        yield _unanswered(start, stem)


def _unanswered(line: int, stem: list[str]) -> Row:
    return Row(line, QuestionError("no ANSWER: line follows", "缺少 ANSWER: 行"), first_lines(stem))
