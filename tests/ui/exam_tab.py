"""What a visitor does in the Exam tab, without a browser; updates by the name of their component."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from ming_app.ui.chat import Session
from ming_app.ui.exam.tab import ExamTab


def names(tab: ExamTab, updates: dict) -> dict[str, Any]:
    """Updates by the name of the component's attribute."""
    known = {id(c): name for part in (tab, tab.help, tab.panes) for name, c in vars(part).items() if hasattr(c, "_id")}
    return {known.get(id(component), "?"): update for component, update in updates.items()}


def do(tab: ExamTab, session: Session, action: str, value: Any = None, **more: Any) -> dict[str, Any]:
    event = SimpleNamespace(value=json.dumps({"do": action, "value": value, **more}))
    return names(tab, tab.act(session, event))  # type: ignore[arg-type]


def begin(tab: ExamTab, session: Session, mode: str = "tutor", shuffle: bool = False) -> dict[str, Any]:
    bank = session.exam.bank
    found = tab.practise(session, bank, "all", "sequential", mode, [], [], [], [], [], 0, shuffle, False)
    return names(tab, found)
