"""Which source may be trained on: a table as data (`licences.toml`) and one question asked of it.

Filters, strictest last: "any", "stated" (the source states a licence), "open" (and adds no research-only clause).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILTERS = ("any", "stated", "open")
TABLE = Path(__file__).with_name("licences.toml")


@dataclass(frozen=True)
class Licence:
    """`licence` "" means none is stated; `use` is open or research; `origin` is the public repository."""

    licence: str = ""
    use: str = ""
    origin: str = "unknown"

    def passes(self, wanted: str) -> bool:
        """Whether rows under this licence may be used with filter `wanted` (one of FILTERS)."""
        return wanted == "any" or bool(self.licence) and (wanted == "stated" or self.use == "open")


@dataclass(frozen=True)
class _Entry:
    licence: Licence
    parts: tuple[tuple[Mapping[str, Any], Licence], ...]


@cache
def _table() -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for source in tomllib.loads(TABLE.read_text(encoding="utf-8"))["source"]:
        parts = tuple((part["tags"], _licence(part)) for part in source.get("part", ()))
        for name in source["names"]:
            entries[name] = _Entry(_licence(source), parts)
    return entries


def licence_of(source: str, tags: Mapping[str, Any] | None = None, stated: str = "") -> Licence:
    """Licence of a row by its source and exam-bank tags. A source that the table does not know has the licence `stated`
    by the recipe (for open use), or none."""
    entry = _table().get(source)
    if entry is None:
        return Licence(stated, "open" if stated else "", "as stated in the recipe" if stated else "unknown")
    for wanted, licence in entry.parts:
        if tags and all(tags.get(key) == value for key, value in wanted.items()):
            return licence
    return entry.licence


def needs_tags(source: str) -> bool:
    """True when rows of this source have different licences, told apart by their exam-bank tags."""
    entry = _table().get(source)
    return entry is not None and bool(entry.parts)


def _licence(entry: Mapping[str, Any]) -> Licence:
    return Licence(entry["licence"], entry.get("use", ""), entry["origin"])
