"""What the card (static/exam.js) shows, as JSON: one question, the answer sheet, the clock. Nothing that the person may
not know yet is in it: no key before it is revealed, no later part of an unfolding case.

Letters: `letter` is the one of the bank, which actions name; options are listed in the order they are shown in.
"""

from __future__ import annotations

import json
from typing import Any

from ming_app.exam.bank import letters_shown
from ming_app.exam.grade import grade
from ming_app.exam.question import Question
from ming_app.exam.sitting import Sitting
from ming_app.ui.exam.pages import name_of
from ming_app.ui.exam.room import Room
from ming_app.ui.exam.words import EXAM_TEXTS
from ming_app.ui.text import t


def card_words(lang: str) -> str:
    """The card's texts as JSON."""
    start = "exam.card."
    return json.dumps(
        {key.removeprefix(start): t(lang, key) for key in EXAM_TEXTS if key.startswith(start)}, ensure_ascii=False
    )


def card(room: Room, lang: str) -> dict[str, Any]:
    """The payload; {"open": False, ...} at home."""
    sitting = room.sitting
    base = {"seq": room.seq, "error": room.error.message(lang) if room.error else "", "notice": room.notice}
    if sitting is None:
        return {"open": False, **base}
    now = room.desk.store.now()
    index = sitting.position
    shown = sitting.paused is None and not sitting.hidden(index)
    return {
        "open": True,
        **base,
        "id": sitting.id,
        "kind": sitting.kind,
        "mode": sitting.mode,
        "title": room.title(sitting, lang),
        "index": index,
        "count": len(sitting.questions),
        "answered": sitting.answered(),
        "left": None if sitting.finished is not None else sitting.remaining(now),
        "paused": sitting.paused is not None,
        "pausable": sitting.pausable,
        "finished": sitting.finished is not None,
        "sheet": "".join(_state(sitting, at) for at in range(len(sitting.questions))),
        "flags": [at for at, response in sitting.responses.items() if response.flagged],
        "question": _question(room, sitting, index, lang) if shown else None,
    }


def _state(sitting: Sitting, at: int) -> str:
    """One figure of the answer sheet: 0 not answered, 1 answered, 2 right, 3 wrong, 4 not open yet."""
    response = sitting.response(at)
    if sitting.revealed(at) and response.chosen:
        return "2" if grade(sitting.questions[at], response.chosen, sitting.partial).correct else "3"
    return "4" if sitting.hidden(at) else "1" if response.chosen else "0"


def _question(room: Room, sitting: Sitting, index: int, lang: str) -> dict[str, Any]:
    question, response = sitting.questions[index], sitting.response(index)
    order = sitting.order(index)
    mark = room.desk.store.mark(question.key)
    part, parts = _part(sitting, index)
    return {
        "key": question.key,
        "lang": question.lang,
        "type": question.type,
        "kind": getattr(question.kind, lang),
        "multiple": question.kind.multiple,
        "locks": question.kind.locks and part < parts and not response.final and sitting.finished is None,
        "shared": parts if question.shared_options else 0,
        "part": [part, parts] if parts > 1 else None,
        "case": question.shared_stem,
        "told": [q.stem for q in earlier_parts(sitting, index)] if question.kind.locks else [],
        "stem": question.stem,
        "image": question.image,
        "tags": [
            name_of(lang, tag, question.tags[tag])
            for tag in ("subject", "difficulty")
            if tag in question.tags
            and (sitting.mode == "tutor" or sitting.finished is not None)  # a real paper has none
        ],
        "options": [{"letter": letter, "text": question.options[letter]} for letter in order],
        "chosen": "".join(response.chosen),
        "struck": "".join(response.struck),
        "confidence": response.confidence,
        "flagged": response.flagged or mark.flagged,
        "final": response.final or sitting.finished is not None,
        "note": mark.note,
        "cause": mark.cause,
        "revealed": _revealed(room, sitting, index, lang) if sitting.revealed(index) else None,
    }


def _revealed(room: Room, sitting: Sitting, index: int, lang: str) -> dict[str, Any]:
    question, response = sitting.questions[index], sitting.response(index)
    given = grade(question, response.chosen, sitting.partial)
    attempt = room.attempts.get(question.key)
    return {
        "key": "".join(question.answer),
        "shown": letters_shown(sitting.order(index), question.answer),
        "correct": given.correct,
        "score": given.score,
        "explanation": question.explanation,
        "reference": question.reference,
        "source": " · ".join(filter(None, [question.source, question.licence])),
        "due": _due(room, question, lang),
        "model": attempt and {"choice": attempt.choice, "chances": attempt.probabilities},
    }


def _due(room: Room, question: Question, lang: str) -> str:
    found = room.desk.store.rows("SELECT due FROM cards WHERE key=?", [question.key])
    if not found:
        return ""
    seconds = max(0.0, found[0][0] - room.desk.store.now())
    for key, unit, most in (("minutes", 60, 90), ("hours", 3600, 36), ("days", 86_400, 1e9)):
        if seconds / unit < most:
            return t(lang, f"exam.when_{key}", n=max(1, round(seconds / unit)))
    return ""


def earlier_parts(sitting: Sitting, index: int) -> list[Question]:
    """The questions of the same group before this one."""
    return [sitting.questions[at] for at in sitting.group(index) if at < index]


def _part(sitting: Sitting, index: int) -> tuple[int, int]:
    """(place in its group from 1, size of the group)."""
    group = sitting.group(index)
    return index - group.start + 1, len(group)
