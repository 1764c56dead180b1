"""Rows from files, plain or gzip, one in memory at a time: JSON lines, or one JSON array (as the official data is kept).

A row that cannot be used raises DataError with file and line number, or is counted and skipped, as the caller wishes. An
array that breaks off cannot be resumed after the break: that is an error either way.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from training.errors import DataError

MAX_ROW = 4 << 20  # characters
CHUNK = 1 << 16

Row = TypeVar("Row")


@dataclass
class Damage:
    """Rows that could not be used: how many, and the first few as `file:line: reason`."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.first) < 5:
            self.first.append(where)


def read_rows(path: str | Path, parse: Callable[[Any, str], Row], damage: Damage | None = None) -> Iterator[Row]:
    """`parse(value, "file:line")` of every row. With `damage`, rows that cannot be parsed are skipped and counted.

    Raises DataError for a file that cannot be read, and for a row that cannot be used when `damage` is None.
    """
    path = Path(path)
    try:
        with _open(path) as file:
            for line, value in _values(file):
                try:
                    if isinstance(value, ValueError):
                        raise value
                    row = parse(value, f"{path.name}:{line}")
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    where = f"{path.name}:{line}: {type(error).__name__}: {str(error)[:120]}"
                    if damage is None:
                        raise _broken(where) from error
                    damage.add(where)
                    continue
                yield row
    except _Cut as error:
        raise _broken(f"{path.name}:{error.line}: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path} cannot be read: {reason}.", f"无法读取 {path}：{reason}。") from error


class _Cut(Exception):
    """A JSON array that cannot be read on."""

    def __init__(self, line: int, reason: str):
        super().__init__(reason)
        self.line = line


def _broken(where: str) -> DataError:
    return DataError(
        f"A line cannot be used: {where}. Correct it, or allow broken lines in the recipe.",
        f"有一行无法使用：{where}。请修正该行，或在配方中允许跳过坏行。",
    )


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="surrogateescape", newline="\n")  # type: ignore[return-value]  # a text wrapper
    return path.open(encoding="utf-8", errors="surrogateescape", newline="\n")


def _values(file: TextIO) -> Iterator[tuple[int, Any]]:
    """(line number, JSON value, or the ValueError it gave)."""
    number, text = 0, ""
    while not text.strip():
        text = file.readline(MAX_ROW)
        number += 1
        if not text:
            return
    if text.lstrip().startswith("["):
        yield from _array(file, text.lstrip()[1:], number)
        return
    while text:
        if text.strip():
            yield number, _decode(text)
        text = file.readline(MAX_ROW)
        number += 1


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error if isinstance(error, ValueError) else ValueError("nested too deeply")


def _array(file: TextIO, text: str, line: int) -> Iterator[tuple[int, Any]]:
    """Items of a JSON array whose text after the opening bracket begins with `text`."""
    decoder = json.JSONDecoder()
    ended, between = False, False  # at the end of the file; after an item, before its comma
    while True:
        stripped = text.lstrip(" \t\r\n")
        line += text.count("\n", 0, len(text) - len(stripped))
        text = stripped
        if text.startswith("]"):
            return
        if between and text:
            if not text.startswith(","):
                raise _Cut(line, "a comma or ] is expected after an item")
            text, between = text[1:], False
            continue
        value, end, problem = None, 0, "the array is not closed"
        try:
            value, end = decoder.raw_decode(text) if text else (None, 0)
        except (ValueError, RecursionError) as error:  # broken, or not read to its end yet
            problem = str(error)
        if end and (end < len(text) or ended):
            yield line, value
            line += text.count("\n", 0, end)
            text, between = text[end:], True
            continue
        if ended:
            raise _Cut(line, problem)
        if len(text) > MAX_ROW:
            raise _Cut(line, f"an item is longer than {MAX_ROW} characters, or broken: {problem}")
        more = file.read(max(CHUNK, len(text)))  # doubling: a long item is not decoded anew for every chunk
        ended = not more
        text += more


def text_of(value: Any) -> str:
    """`value`, if it is a string of whole characters. Raises TypeError or ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"text expected, found {type(value).__name__}")
    value.encode()  # bytes that were not UTF-8 stand in it as lone surrogates: UnicodeEncodeError is a ValueError
    return value
