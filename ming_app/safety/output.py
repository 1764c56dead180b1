"""Checks of an answer: what needs a note beside it, whether it sends to emergency care, whether it only repeats itself."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ming_app.safety.rules import FOLDER, compiled
from ming_app.safety.text import plain

KNOWN_NUMBERS = frozenset(
    [
        "120",
        "110",
        "119",
        "122",
        "911",
        "999",
        "112",
        "000",
        "111",
        "108",
        "102",
        "988",
        "12356",
        "12320",
        "12345",
        "116123",
        "18111",
        "1925",
        "1955",
        "8002221222",
        "18002221222",
        "118",
        "113",
        "115",
        "101",
        "100",
        "061",
        "995",
        "1393",
        "1577",
        "0119",
    ]
)
_NUMBER = re.compile(
    r"(?:call|dial|phone|ring|tel|telephone|hotline|helpline|line|text|whatsapp|contact)\W{0,4}(?:\w+\W+){0,5}?(\+?\d[\d\s().-]{4,18}\d)"
    r"|(?:电话|拨打|热线|致电|联系|号码|专线|客服)[^\d。\n]{0,12}(\+?\d[\d\s()-]{3,18}\d)"
    r"|(\+\d{1,3}[\s-]?\d[\d\s().-]{6,16}\d|(?<!\d)(?:\d{3}[-.\s]\d{3}[-.\s]\d{4}|400-?\d{3}-?\d{4}|1[3-9]\d{9}|0\d{2,3}-\d{7,8})(?!\d))"
)


@dataclass(frozen=True)
class OutputNote:
    """`check`: what was found (dose, stop, certain, physician, phone). `matched`: the words."""

    check: str
    matched: str


@lru_cache(maxsize=1)
def _table() -> tuple[dict[str, tuple[list[re.Pattern[str]], dict[str, str]]], list[re.Pattern[str]]]:
    table = tomllib.loads((FOLDER / "output.toml").read_text(encoding="utf-8"))

    def patterns(entry: Mapping[str, list[str]], name: str) -> list[re.Pattern[str]]:
        return [compiled(entry[lang], lang, f"{name}.{lang}") for lang in ("en", "zh") if entry[lang]]

    checks = {
        entry["id"]: (patterns(entry, entry["id"]), {lang: entry[f"note_{lang}"] for lang in ("en", "zh")})
        for entry in table["check"]
    }
    return checks, patterns(table["emergency"], "emergency")


def check_answer(answer: str) -> tuple[OutputNote, ...]:
    """What in an answer needs a note; each check at most once."""
    checks, _ = _table()
    text, found = plain(answer), []
    for name, (patterns, _) in checks.items():
        hit = next(filter(None, (pattern.search(text) for pattern in patterns)), None)
        if hit is not None:
            found.append(OutputNote(name, hit[0].strip()))
    for hit in _NUMBER.finditer(plain(answer, numbers=True)):
        digits = re.sub(r"\D", "", next(filter(None, hit.groups())))
        if digits not in KNOWN_NUMBERS:
            found.append(OutputNote("phone", hit[0].strip()))
            break
    return tuple(found)


def note_text(check: str, lang: str) -> str:
    """What the page says beside an answer."""
    return _table()[0][check][1][lang]


def sends_to_emergency(answer: str) -> bool:
    """Whether an answer tells the person to seek emergency care."""
    text = plain(answer)
    return any(pattern.search(text) for pattern in _table()[1])


REPEATS, SHORTEST, LONGEST = 4, 40, 160
_COUNTER = re.compile(r"(?m)(?:(?<=^)|(?<=[\s。；;]))\d{1,2}(?=[.、．)）])")


def loop_start(text: str) -> int | None:
    """Where an answer began to repeat itself: the same 1 to LONGEST characters at its end, at least REPEATS times and
    SHORTEST characters in all, end of a sentence of the first time; None for an answer that goes on. The items of a list are
    the same whatever their numbers."""
    alike = _COUNTER.sub(lambda number: "0" * len(number[0]), text)
    for size in range(1, LONGEST + 1):
        times = max(REPEATS, -(-SHORTEST // size))
        piece = alike[-size:]
        if len(text) >= size * times and piece.strip() and alike.endswith(piece * times):
            start = len(text) - size * times
            while start >= size and alike[start - size : start] == piece:
                start -= size
            said = alike[start : start + size]
            ended = max((said.rfind(sign) for sign in "。！？!?.\n"), default=-1)
            return start + (ended + 1 if ended >= 0 else size)
    return None


def without_doses(text: str, lang: str) -> str:
    """The text with every sentence that names a dose replaced by a remark; for modes that must never order a drug."""
    patterns, _ = _table()[0]["dose"]
    gone = (
        "[a dose was left out here: ask a pharmacist or doctor]"
        if lang == "en"
        else "【此处剂量已略去，请咨询医生或药师】"
    )
    parts = re.split(r"(?<=[。！？!?\n;；])|(?<=\.)(?=\s)", text)
    return "".join(gone + _ending(part) if any(p.search(plain(part)) for p in patterns) else part for part in parts)


def _ending(part: str) -> str:
    """The line break that a sentence ended with."""
    return "\n" if part.endswith("\n") else " "
