"""Reads questions from JSON lines or one JSON array: our own and the native shapes of public question banks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from ming_app.exam.formats.columns import Numbered, to_fields, understand
from ming_app.exam.formats.reading import MAX_ROWS, BankFileError, ReadOptions, Row
from ming_app.exam.question import QuestionError
from ming_app.reading import bounded_json

MAX_LISTS = 2_000_000  # in one file
MAX_NAMES = 1_000  # different names of entries in one file
WRAPPERS = ("questions", "data", "items", "rows", "examples")


def read(text: str, options: ReadOptions) -> tuple[Iterator[Row], Mapping[str, str]]:
    """Rows of JSON lines, or of an array (alone or under one of WRAPPERS). Raises BankFileError."""
    rows = list(islice(_array(text) if _is_array(text) else _lines(text), options.rows + 1))
    names: dict[str, None] = {}
    for _, value, _ in rows:
        if isinstance(value, dict) and len(names) < MAX_NAMES:
            names |= dict.fromkeys(value)
    if not names:
        raise BankFileError("No line of the file is a JSON object.", "文件中没有 JSON 对象。")
    columns = understand(list(names), options)
    made = (Row(line, to_fields(v, columns) if isinstance(v, dict) else v, text) for line, v, text in rows)
    return Numbered(options.count_from).apply(made), columns


def _is_array(text: str) -> bool:
    start = text.lstrip()
    if start.startswith("["):
        return True
    first = start.partition("\n")[0].rstrip()
    several = not first.endswith("}")  # an object over several lines
    wrapped = any(start[1:40].lstrip().startswith(f'"{name}"') for name in WRAPPERS)
    return start.startswith("{") and (several or wrapped)


def _lines(text: str) -> Iterator[tuple[int, Any, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value: Any = bounded_json(line, MAX_LISTS)
            except (ValueError, RecursionError) as error:
                value = QuestionError(f"not JSON: {_short(error)}", f"不是有效的 JSON：{_short(error)}")
            if not isinstance(value, dict | QuestionError):
                value = QuestionError("not a JSON object", "不是 JSON 对象")
            yield number, value, "" if isinstance(value, dict) else line[:400]


def _array(text: str) -> Iterator[tuple[int, Any, str]]:
    try:
        value = bounded_json(text, MAX_LISTS)
    except (ValueError, RecursionError) as error:
        raise BankFileError(
            f"The file is not JSON: {_short(error)}.", f"文件不是有效的 JSON：{_short(error)}。"
        ) from None
    if isinstance(value, dict):
        value = next((value[name] for name in WRAPPERS if isinstance(value.get(name), list)), [value])
    if len(value) > MAX_ROWS:
        raise BankFileError(f"The file has more than {MAX_ROWS:,} rows.", f"文件超过 {MAX_ROWS:,} 行。")
    for number, item in enumerate(value, 1):
        good = isinstance(item, dict)
        yield (
            number,
            item if good else QuestionError("not a JSON object", "不是 JSON 对象"),
            "" if good else str(item)[:400],
        )


def _short(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
