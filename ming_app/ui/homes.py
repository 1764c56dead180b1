"""Where what belongs to a visitor is kept: the machine's data folder, their account's folder in it, or memory (then their
browser keeps it). One object for each folder, for as long as somebody holds it: two windows that are open at once share it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

from ming_app.settings import Settings

T = TypeVar("T")


def home(settings: Settings, account: str) -> Path | None:
    """The folder of a visitor who has signed in as `account` ("" for nobody); None: nothing of theirs is kept here."""
    if settings.keeps_progress:
        return settings.data_dir
    if account and settings.progress == "account":
        name = hashlib.sha256(account.encode()).hexdigest()[:32]  # no name can lead elsewhere
        return settings.data_dir / "accounts" / name
    return None


class Shared(Generic[T]):
    """`make(folder)` once for every folder, and anew for None."""

    def __init__(self, make: Callable[[Path | None], T]):
        self._make = make
        self._made: WeakValueDictionary[Path, T] = WeakValueDictionary()  # type: ignore[type-var]
        self._lock = threading.Lock()

    def at(self, folder: Path | None) -> T:
        """Raises what `make` raises."""
        if folder is None:
            return self._make(None)
        with self._lock:
            found = self._made.get(folder)
            if found is None:
                found = self._made[folder] = self._make(folder)
            return found
