"""What the page, the command line and every export say about safety: the banner of a red flag, notes beside an answer,
the AI label. Texts are data (rules/actions.toml, rules/output.toml)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ming_app.safety.output import check_answer, note_text
from ming_app.safety.red_flags import Assessment, assess
from ming_app.safety.rules import FOLDER

AI_LABEL: Mapping[str, str] = {
    "en": "AI-generated; may be wrong; not medical advice.",
    "zh": "内容由人工智能生成，可能有误，不能替代医生诊疗。",
}


CRISIS = "self_harm"
"""the category that is never told without a crisis line"""


@dataclass(frozen=True)
class Banner:
    """`title`: what it may be. `action`: what to do and whom to call."""

    category: str
    title: str
    action: str

    @property
    def text(self) -> str:
        return f"{self.title} {self.action}"


@lru_cache(maxsize=1)
def _actions() -> dict[str, Any]:
    return tomllib.loads((FOLDER / "actions.toml").read_text(encoding="utf-8"))


def banner(category: str, lang: str, region: str = "auto") -> Banner:
    """What to do about a red flag of `category`, in `lang` ("zh" or "en"), with the numbers of `region`."""
    entry = _actions().get(category, _actions()["other"])
    return Banner(category, entry[f"title_{lang}"], _with_numbers(entry[f"do_{lang}"], lang, region))


def _with_numbers(text: str, lang: str, region: str) -> str:
    numbers = _actions()["numbers"][("cn" if lang == "zh" else "world") if region == "auto" else region]
    known = {name: numbers.get(f"{name}_{lang}", value) for name, value in numbers.items() if "_" not in name}
    if lang == "en":
        known = {name: value.strip() for name, value in known.items()}
    return text.format(**known)


def assessed(found: Assessment, lang: str = "", region: str = "auto") -> Banner | None:
    """The banner of an assessment; None where nothing was found. Whoever may mean to harm themselves is told where to find help,
    whatever else was found."""
    if not found.flags:
        return None
    lang = lang or found.lang
    shown = banner(found.category, lang, region)
    if found.category != CRISIS and any(flag.category == CRISIS for flag in found.flags):
        also = _with_numbers(_actions()[CRISIS][f"also_{lang}"], lang, region)
        shown = replace(shown, action=f"{shown.action} {also}")
    return shown


def warning(messages: Sequence[str], region: str = "auto") -> tuple[str, str] | None:
    """What a terminal says, in English and Chinese, about a red flag in a person's messages; None where there is none."""
    found = assess(messages)
    en, zh = (assessed(found, lang, region) for lang in ("en", "zh"))
    return (f"!! {en.text}", f"!! {zh.text}") if en is not None and zh is not None else None


def answer_notes(answer: str) -> list[tuple[str, str]]:
    """What a terminal says after an answer, in English and Chinese: a note for each thing in it that needs one."""
    return [(f"! {note_text(one.check, 'en')}", f"! {note_text(one.check, 'zh')}") for one in check_answer(answer)]


def triage(text: str, region: str = "auto", lang: str = "") -> dict[str, Any]:
    """The object of the command `triage`: {"red_flag", "category", "lang", "matched", "message"}."""
    found = assess([text])
    shown = assessed(found, lang, region)
    return {
        "red_flag": shown is not None,
        "category": found.category,
        "lang": found.lang,
        "matched": list(dict.fromkeys(word for flag in found.flags for word in flag.matched)),
        "message": shown.text if shown is not None else "",
    }
