"""How long earlier starts took on this machine, in `starts.json` of the cache folder: what a visitor may expect of this one.

Starts that fetched, built or compiled something are kept apart from those that found it done. The file may be missing,
damaged or somebody else's: then there is nothing to tell. Not being able to write it stops nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ming_app.models.store import write_json

if TYPE_CHECKING:
    from ming_app.settings import Settings

KEPT = 5  # starts of a kind
KINDS = 50  # of starts: models, backends and precisions
LARGEST = 64_000  # bytes of a file that is read
DAY = 86_400.0


class Starts:
    """The starts of what `name` stands for."""

    def __init__(self, path: Path, name: str):
        self._path, self._name = path, name

    @classmethod
    def of(cls, settings: Settings) -> Starts:
        """Those with these settings."""
        parts = (settings.model, settings.adapter, settings.backend, settings.precision, settings.device)
        return cls(settings.cache_dir.expanduser() / "starts.json", " ".join(part or "-" for part in parts)[:300])

    def usual(self, first: bool) -> float | None:
        """Seconds that the last few took, in the middle; None when none is known."""
        known = self._read().get(self._key(first))
        return median(known) if known else None

    def add(self, seconds: float, first: bool) -> None:
        """Notes a start."""
        table, key = self._read(), self._key(first)
        known = [*table.pop(key, []), max(round(seconds, 1), 0.1)][-KEPT:]
        table = {**dict(list(table.items())[-KINDS + 1 :]), key: known}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, table)

    def _key(self, first: bool) -> str:
        return f"{self._name} {'first' if first else 'again'}"

    def _read(self) -> dict[str, list[float]]:
        try:
            with self._path.open("rb") as file:
                found = json.loads(file.read(LARGEST + 1)[:LARGEST])
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict):
            return {}
        return {key[:400]: times for key, values in found.items() if (times := _times(values))}


def _times(values: Any) -> list[float]:
    """Those of the values that can be seconds."""
    if not isinstance(values, list):
        return []
    numbers = (one for one in values[-KEPT:] if isinstance(one, int | float) and not isinstance(one, bool))
    return [float(one) for one in numbers if math.isfinite(one) and 0 < one < DAY]
