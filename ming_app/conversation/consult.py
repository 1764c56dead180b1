"""Guided consultation (智能问诊): history first, then an explanation. The structure is data (consult.toml); the model words
the questions and explains; what was understood is the person's own words, for them to correct.

It never prescribes: requests for a drug or a dose get an explanation and the way to a professional, and doses are taken
out of what the model writes (safety.output.without_doses).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ming_app.conversation.tree import Conversation, Turn
from ming_app.engine.types import Message, SamplingParams
from ming_app.safety.notices import AI_LABEL
from ming_app.safety.text import has_chinese, plain

QUESTION = SamplingParams(max_new_tokens=60, temperature=0.3, trace=True)
"""how a question is worded"""
LONGEST = 160  # characters of a worded question

_ORDER = re.compile(
    r"\b(?:(?:can|could|will|would|please|to|just) (?:you )?prescribe|prescribe me|(?:need|want|give me|get) (?:a |the |your )?prescription|(?<!know )(?<!remember )(?<!sure )(?<!forgot )(?:what|which) (?:medicine|medication|drug|pill|tablet|antibiotic|dose)\w*|how (?:much|many) \w+ (?:should|can|do) i (?:take|give)|(?:what|which) (?:medicine|medication|drug|pill|tablet|antibiotic|dose)\w* (?:to|should|can|do i)|what(?:s| is) the (?:\w+ ){0,2}(?:dose|dosage)|(?:should|can) i (?:take|give \w+) (?:an? )?(?:antibiotic|aspirin|ibuprofen|paracetamol|tylenol|steroid|pill|tablet)\w*|give me (?:a |some )?(?:medicine|drug|pill|prescription))\b"
    r"|(?<!给我)(?<!医生)(?<!医院)开(?:点|些|个|什么|啥)药(?!了)|(?:请|帮我?|给我|能不能|可以|麻烦)(?:您|你)?(?:给我)?开(?:点|些|个|什么|啥)?药(?!了)|(?:请|帮我?|给我|能不能|可以)(?:您|你)?(?:给我)?开(?:个|张)?处方|(?<![没不未无有])(?:吃|用)(?:什么|啥)药|该吃(?:哪|什么)|(?:吃|用|打)多少(?!吐|拉|饭|东西|[^?,。]{0,4}[都也还])|多大剂量|剂量是?多少|一次(?:吃|用)几|推荐.{0,4}药|给我(?!的)(?![配买拿换吃用开]过?[的了])(?!吃药).{0,4}药"
)


@dataclass(frozen=True)
class Step:
    """A question of the structure. `titles`, `aims`, `asks` by language."""

    id: str
    titles: dict[str, str]
    aims: dict[str, str]
    asks: dict[str, str]


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "consult.toml").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def steps() -> tuple[Step, ...]:
    """The questions in order."""

    def both(entry: dict[str, str], name: str) -> dict[str, str]:
        return {lang: entry[f"{name}_{lang}"] for lang in ("en", "zh")}

    return tuple(
        Step(entry["id"], both(entry, "title"), both(entry, "aim"), both(entry, "ask")) for entry in _data()["step"]
    )


def word(name: str, lang: str, **values: str) -> str:
    """A text of consult.toml."""
    text: str = _data()["words"][f"{name}_{lang}"]
    return text.format(**values) if values else text


def answered(path: Sequence[Turn]) -> list[tuple[Step, str]]:
    """The steps that were answered, with the person's words. An order for a drug answers nothing."""
    said = [
        turn.text
        for turn, answer in zip(path, [*path[1:], None], strict=True)
        if turn.role == "user" and not refused(answer)
    ]
    return list(zip(steps(), said, strict=False))


ORDER = "order"
"""Turn.reason of the answer to a request for a drug"""


def refused(answer: Turn | None) -> bool:
    """Whether an answer is the one that a request for a drug gets."""
    return answer is not None and answer.reason == ORDER


def pending(path: Sequence[Turn]) -> Step | None:
    """The step to be asked next; None when all were."""
    done = len(answered(path))
    return steps()[done] if done < len(steps()) else None


def begin(talk: Conversation, lang: str) -> None:
    """Opens a consultation with its first question."""
    talk.mode = "consult"
    talk.add(Turn("assistant", steps()[0].asks[lang], reason="stop"))


def question_messages(path: Sequence[Turn], step: Step, lang: str) -> list[Message]:
    """What the model is asked, to word the next question."""
    said = "\n".join(f"- {known.titles[lang]}: {text}" for known, text in answered(path))
    return [Message("user", word("word", lang, said=said, aim=step.aims[lang]))]


def worded(text: str, step: Step, lang: str) -> str:
    """The model's question where it is one question in the right language, else the structure's own wording."""
    first = re.split(r"(?<=[?？])|\n", text.strip())[0].strip().strip("\"“”'")
    good = (
        first.endswith(("?", "？"))
        and 4 <= len(first) <= LONGEST
        and has_chinese(first) == (lang == "zh")
        and not asks_for_drug(first)
    )
    return first if good else step.asks[lang]


def compose(path: Sequence[Turn], lang: str) -> str:
    """The summary: every step with the person's words, for them to correct."""
    said = {step.id: text for step, text in answered(path)}
    colon = "：" if lang == "zh" else ": "
    return "\n".join(
        f"{step.titles[lang]}{colon}{' '.join(said.get(step.id, word('nothing', lang)).split())}" for step in steps()
    )


def explain_messages(summary: str, lang: str) -> list[Message]:
    """What the model is asked once the summary stands."""
    return [
        Message("system", word("explain", lang)),
        Message("user", word("request", lang, summary=summary.strip())),
    ]


SECTION_TOKENS = 220
"""longest section of an explanation"""


def sections(summary: str, lang: str) -> list[tuple[list[Message], str]]:
    """The explanation, section by section: what the model is asked, ending with the words it goes on from, and those words
    under their heading."""
    found = []
    for entry in _data()["section"]:
        start = entry[f"start_{lang}"]
        asked = Message("user", f"{summary.strip()}\n\n{entry[f'ask_{lang}']}")
        head = f"**{entry[f'title_{lang}']}**\n\n{start}"
        found.append(([Message("system", word("explain", lang)), asked, Message("assistant", start)], head))
    return found


def asks_for_drug(text: str) -> bool:
    """Whether a person asks for a drug or a dose."""
    return _ORDER.search(plain(text)) is not None


def note(talk: Conversation, lang: str, when: str) -> str:
    """The summary as a note for a visit, Markdown; marked as made with an AI and not checked."""
    label = word("note_label", lang)
    return "\n".join(
        [
            f"# {word('note_title', lang)}",
            "",
            f"{when}",
            "",
            f"> {label}",
            "",
            talk.summary.strip(),
            "",
            "---",
            AI_LABEL[lang],
            "",
        ]
    )
