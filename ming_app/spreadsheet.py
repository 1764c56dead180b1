"""Cells of a table that a spreadsheet program would take for formulas: kept from it by an apostrophe, in every CSV we write."""

from __future__ import annotations

import re
from typing import Any

_STARTS = r"[=+\-@\t\r＝＋－＠]"  # the wide ones count as well where a program is set to Chinese or Japanese
_FORMULA = re.compile(f"'*{_STARTS}")
_KEPT = re.compile(f"'+{_STARTS}")


def safe_cell(value: Any) -> Any:
    """A cell that no spreadsheet program takes for a formula; numbers stay as they are."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def plain_cell(value: str) -> str:
    """What `safe_cell` was given."""
    return value[1:] if _KEPT.match(value) else value
