"""What comes from elsewhere, made safe to hold: bytes of files that somebody else may have made, text that UTF-8 can carry."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

PIECE = 1 << 20
_SURROGATES = re.compile("[\ud800-\udfff]")  # halves of characters that JSON can carry and UTF-8 cannot


class TooLargeError(ValueError):
    """A file has more bytes than are read of its kind."""


def read_bounded(path: Path, limit: int, *, named: bool = False) -> bytes:
    """The bytes of a file, at most `limit`. `named`: by the person, who may name a pipe too; else it must be a regular file.
    Raises OSError, TooLargeError."""
    if not named:
        require_regular(path)
    regular = path.is_file()
    data = bytearray()
    with path.open("rb") as file:
        room = os.fstat(file.fileno()).st_size if regular else 0
        if room > limit:
            raise TooLargeError(f"it has more than {limit} bytes")
        while piece := file.read(max(room - len(data), 0) + PIECE):  # of a regular file one piece
            data += piece
            if len(data) > limit:
                raise TooLargeError(f"it has more than {limit} bytes")
    return bytes(data)


def bounded_json(data: str | bytes, most: int) -> Any:
    """`json.loads` of a text with at most `most` lists and tables: "[]," are three bytes in a file and seventy in memory.
    Raises ValueError, RecursionError."""
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
    if text.count("[") + text.count("{") > most:
        raise ValueError(f"it holds more than {most} lists")
    return json.loads(text.removeprefix("\ufeff"))


def require_regular(path: Path) -> None:
    """Raises OSError unless there is a regular file at `path`. A link to one will do; from a device or a pipe, to which a
    link in somebody's folder may lead, reading never ends."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def whole_text(value: Any) -> Any:
    """`value` with U+FFFD for every lone surrogate in its texts, in lists and dicts too: they can be neither kept nor sent."""
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [whole_text(item) for item in value]
    if isinstance(value, dict):
        return {whole_text(key): whole_text(item) for key, item in value.items()}
    return value
