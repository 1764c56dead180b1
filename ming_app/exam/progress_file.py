"""Progress as one file: everything a Store holds, as JSON that another machine or another browser takes back.

A file that comes in is hostile: its size, its rows and the kind and length of every value are checked before anything is
kept, and rows that break a rule are counted, not guessed at. What is there already stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ming_app.database import StoreError, dumps, read_export
from ming_app.exam import schedule
from ming_app.exam.question import LETTERS, clean
from ming_app.exam.sitting import CONFIDENCE, MODES
from ming_app.exam.store import CAUSES, MAX_NOTE, TABLES, Store

MAX_BYTES = 20 << 20
MAX_ROWS = 1_000_000
FAR = 4_102_444_800.0  # 2100-01-01: no time of ours is later


def write_progress(store: Store) -> bytes:
    """The file."""
    return dumps(store.export()).encode()


@dataclass(frozen=True)
class Restored:
    """How many rows were new, and how many were not understood."""

    added: int
    refused: int


def read_progress(store: Store, data: bytes) -> Restored:
    """Adds a file's progress to the store. Raises StoreError for a file that is none of ours."""
    values = read_export(data, "ming_progress", 1, MAX_BYTES, _foreign)
    tables: dict[str, list[list[Any]]] = {}
    refused = 0
    for name, columns in TABLES.items():
        rows = values.get(name, [])
        if not isinstance(rows, list) or len(rows) > MAX_ROWS:
            raise _foreign(f"the table {name} is damaged", f"数据表 {name} 已损坏")
        rules = [_RULES[column] for column in columns]
        good = [row for row in rows if _good(row, rules)]
        refused += len(rows) - len(good)
        tables[name] = good
    return Restored(store.put_tables(tables), refused)


def _foreign(en: str, zh: str) -> StoreError:
    return StoreError(f"This file cannot be imported as progress: {en}.", f"无法作为学习进度导入：{zh}。")


Rule = Callable[[Any], bool]


def _good(row: Any, rules: list[Rule]) -> bool:
    return isinstance(row, list) and len(row) == len(rules) and all(r(v) for r, v in zip(rules, row, strict=True))


def _text(most: int) -> Rule:
    return lambda v: isinstance(v, str) and len(v) <= most and clean(v, "text", most) == v.strip()


def _number(low: float, high: float) -> Rule:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and low <= v <= high


def _whole(low: int, high: int) -> Rule:
    return lambda v: isinstance(v, int) and low <= v <= high  # true and false are 1 and 0


def _either(rule: Rule) -> Rule:
    return lambda v: v is None or rule(v)


def _one_of(*words: str) -> Rule:
    return lambda v: isinstance(v, str) and v in words


def _matches(pattern: str) -> Rule:
    return lambda v: isinstance(v, str) and re.fullmatch(pattern, v) is not None


_KEY = _matches("[0-9a-f]{16}")
_TIME = _number(0, FAR)
_LETTERS = _matches(f"[{LETTERS}]{{0,{len(LETTERS)}}}")
_RULES: Mapping[str, Rule] = {
    "key": _KEY,
    "keys": _matches("(?:[0-9a-f]{16} ?){1,100000}"),
    "bank": _text(200),
    "at": _TIME,
    "due": _TIME,
    "started": _TIME,
    "shown": _TIME,
    "deadline": _either(_TIME),
    "paused": _either(_TIME),
    "finished": _either(_TIME),
    "chosen": _LETTERS,
    "struck": _LETTERS,
    "correct": _whole(0, 1),
    "flagged": _whole(0, 1),
    "final": _whole(0, 1),
    "graded": _whole(0, 1),
    "partial": _whole(0, 1),
    "pausable": _whole(0, 1),
    "again": _whole(0, 1),
    "score": _number(0, 1),
    "pass_share": _number(0, 1),
    "seconds": _number(0, 1e7),
    "stability": _number(0, 1e6),
    "confidence": _one_of("", *CONFIDENCE),
    "kind": _one_of("practice", "mock"),
    "mode": _one_of(*MODES),
    "ending": _one_of("", "submitted", "time"),
    "cause": _one_of("", *CAUSES),
    "sitting": _matches("[0-9a-f]{8,32}"),
    "id": _matches("[0-9a-f]{8,32}"),
    "type": _text(10),
    "lang": _one_of("zh", "en"),
    "subject": _text(300),
    "difficulty": _text(300),
    "title": _text(300),
    "note": _text(MAX_NOTE),
    "right": _whole(0, 1 << 30),
    "wrong": _whole(0, 1 << 30),
    "streak": _whole(0, 1 << 30),
    "position": _whole(0, 100_000),
    "place": _whole(0, 100_000),
    "seed": _either(_whole(0, 1 << 62)),
    "state": lambda v: isinstance(v, str) and schedule.readable(v),
}
"""column -> what it may hold"""
