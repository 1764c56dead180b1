"""`Room`: what one visitor does in the Exam tab. Actions come from the card as untrusted JSON; each is checked, done by
the desk, and either changed something or raises MingError. Knows no gradio."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ming_app.errors import MingError, UsageError
from ming_app.exam.bank import Shelf
from ming_app.exam.candidate import Attempt
from ming_app.exam.desk import Choice, Desk
from ming_app.exam.sitting import PRESETS, Sitting
from ming_app.exam.statistics import result
from ming_app.exam.store import Store
from ming_app.settings import Settings
from ming_app.ui.exam.reading import Reading
from ming_app.ui.homes import Shared, home

MAX_LETTERS = 10


@dataclass(eq=False)
class Room:
    """One visitor's desk, and where they are at it."""

    desk: Desk
    bank: str = ""
    """name of the chosen bank"""
    filtered: tuple[str, str] = ("", "")
    """bank and language for which the page lists the tags"""
    preset: str = PRESETS[0].name
    """name of the chosen shape of a mock exam"""
    open: str = ""
    """id of the sitting in view, "" at home"""
    shown: tuple[str, int, bool, bool] = ("", 0, False, False)
    """the `place` for which the page around the card was drawn last"""
    seq: int = 0
    """number of the card's last action; the card ignores answers to earlier ones"""
    error: MingError | None = None
    """why the last action was refused"""
    attempts: dict[str, Attempt] = field(default_factory=dict)
    """the model's answers, by question key"""
    reading: Reading | None = None
    """a file that may be imported"""
    helper: Any = None
    """the chat.Session of the model's last help"""
    helped: tuple[str, int, bool, bool] = ("", 0, False, False)
    """the `place` that help was for"""
    case: Any = None
    """the last case_view.Case"""
    stop_case: threading.Event = field(default_factory=threading.Event)
    notice: str = ""
    """something to be said once, e.g. that the bank had too few questions"""
    account: str = ""
    """who is signed in, where progress is kept by account"""

    @property
    def in_browser(self) -> bool:
        """Whether progress is the browser's to keep."""
        return self.desk.store.path is None

    @property
    def sitting(self) -> Sitting | None:
        return self.desk.sitting(self.open) if self.open else None

    @property
    def place(self) -> tuple[str, int, bool, bool]:
        """What decides on the page around the card: the sitting, the question, whether it is over, whether the key shows."""
        sitting = self.sitting
        if sitting is None:
            return "", 0, False, False
        return self.open, sitting.position, sitting.finished is not None, sitting.revealed(sitting.position)

    def title(self, sitting: Sitting, lang: str) -> str:
        """What a sitting is called: its bank, and the shape of a mock exam."""
        plan = next((plan for plan in PRESETS if plan.name == sitting.title), None)
        try:
            bank = self.desk.bank(sitting.bank).title(lang)
        except MingError:  # removed meanwhile
            bank = sitting.bank
        return f"{plan.titles[lang]} · {bank}" if plan is not None else bank

    def act(self, event: Any) -> None:
        """One action of the card: {"do", "seq", "index", "value"}. Raises MingError when it is refused."""
        if not isinstance(event, Mapping):
            raise _unknown()
        self.error = None
        action = _ACTIONS.get(str(event.get("do")))
        sitting = self.sitting
        if action is None or sitting is None:
            raise _unknown()
        index = event.get("index", sitting.position)
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(sitting.questions):
            raise _unknown()
        action(self, sitting, index, event.get("value"))

    def seen(self, event: Any) -> None:
        """The action was taken, or refused: what the card shows from now on is later than it."""
        if isinstance(event, Mapping) and isinstance(event.get("seq"), int):
            self.seq = max(self.seq, event["seq"])

    # -- actions -------------------------------------------------------------------------------------------------

    def _choose(self, sitting: Sitting, index: int, value: Any) -> None:
        self.desk.choose(sitting.id, index, _letters(value))

    def _strike(self, sitting: Sitting, index: int, value: Any) -> None:
        self.desk.strike(sitting.id, index, _letters(value))

    def _rate(self, sitting: Sitting, index: int, value: Any) -> None:
        self.desk.rate(sitting.id, index, value if isinstance(value, str) else "")

    def _flag(self, sitting: Sitting, index: int, value: Any) -> None:
        if sitting.finished is None and sitting.paused is None:
            self.desk.flag(sitting.id, index, value is True)
        else:
            self.desk.store.set_mark(sitting.questions[index].key, sitting.bank, flagged=value is True)

    def _note(self, sitting: Sitting, index: int, value: Any) -> None:
        if isinstance(value, str):
            self.desk.store.set_mark(sitting.questions[index].key, sitting.bank, note=value)

    def _cause(self, sitting: Sitting, index: int, value: Any) -> None:
        if isinstance(value, str) and sitting.revealed(index):
            self.desk.store.set_mark(sitting.questions[index].key, sitting.bank, cause=value)

    def _submit(self, sitting: Sitting, index: int, value: Any) -> None:
        if value is not None:
            self.desk.choose(sitting.id, index, _letters(value))
        if sitting.mode == "tutor":
            self.desk.submit(sitting.id, index)

    def _go(self, sitting: Sitting, index: int, _value: Any) -> None:
        self.desk.go(sitting.id, index)

    def _pause(self, sitting: Sitting, _index: int, value: Any) -> None:
        (self.desk.pause if value is True else self.desk.resume)(sitting.id)

    def _finish(self, sitting: Sitting, _index: int, _value: Any) -> None:
        self.desk.finish(sitting.id)

    def _leave(self, sitting: Sitting, _index: int, _value: Any) -> None:
        self.desk.leave(sitting.id)
        self.open = ""

    def _look(self, sitting: Sitting, _index: int, _value: Any) -> None:
        """The clock in the browser ran out, or the page was opened again: nothing but to look."""

    # -- beginning -----------------------------------------------------------------------------------------------

    def practise(self, bank: str, choice: Choice) -> None:
        self.open = self.desk.practise(bank, choice).id

    def repeat_wrong(self) -> None:
        """A run of the questions that were wrong in the sitting in view. Raises UsageError where there are none."""
        sitting = self.sitting
        if sitting is None:
            raise _unknown()
        wrong = [sitting.questions[at].key for at in result(sitting).wrong]
        if not wrong:
            raise UsageError("Nothing was wrong in this one.", "本卷没有错题。")
        self.open = self.desk.practise(sitting.bank, Choice(keys=wrong)).id


_ACTIONS: Mapping[str, Callable[[Room, Sitting, int, Any], None]] = {
    name: getattr(Room, f"_{name}")
    for name in (
        "choose",
        "strike",
        "rate",
        "flag",
        "note",
        "cause",
        "submit",
        "go",
        "pause",
        "finish",
        "leave",
        "look",
    )
}


def _letters(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_LETTERS:
        raise _unknown()
    return value


def _unknown() -> UsageError:
    return UsageError(
        "The page sent something that is no action here. Reload it.", "页面发送了无效的操作，请刷新页面。"
    )


class Rooms:
    """Makes the room of a visitor: over a desk on disk, the machine's or their account's, or over one in memory."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._desks = Shared(_desk)
        self.lock = threading.RLock()

    @property
    def on_disk(self) -> bool:
        """Whether every visitor's progress is kept on disk."""
        return self._settings.keeps_progress

    @property
    def by_account(self) -> bool:
        """Whether it is for those who have signed in."""
        return self._settings.progress == "account"

    @property
    def folder(self) -> Path:
        return self._settings.data_dir

    def new(self, account: str = "") -> Room:
        """`account`: who has signed in, "" for nobody. Raises StoreError when progress cannot be kept where it should."""
        folder = home(self._settings, account)
        return Room(self._desks.at(folder), account="" if folder in (None, self.folder) else account)


def _desk(folder: Path | None) -> Desk:
    if folder is None:
        return Desk(Store(":memory:"), Shelf(None))
    return Desk(Store(folder / "progress.sqlite"), Shelf(folder / "banks"))
