"""System prompts to choose from (presets.toml), and the one that a conversation is answered with."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ming_app.conversation.tree import Conversation

OWN = "own"
"""the name under which a person's own system prompt is chosen"""
MAX_SYSTEM = 4_000


@dataclass(frozen=True)
class Preset:
    """`titles` and `prompts` by language."""

    name: str
    titles: dict[str, str]
    prompts: dict[str, str]


@lru_cache(maxsize=1)
def presets() -> dict[str, Preset]:
    """By name, in the order of the file; the first is the default."""
    table = tomllib.loads((Path(__file__).parent / "presets.toml").read_text(encoding="utf-8"))
    return {
        name: Preset(
            name,
            {lang: entry[f"title_{lang}"] for lang in ("en", "zh")},
            {lang: entry[f"prompt_{lang}"] for lang in ("en", "zh")},
        )
        for name, entry in table.items()
    }


def chosen(talk: Conversation) -> str:
    """The name under which the conversation's role is chosen; the first for one that there is not."""
    return talk.preset if talk.preset == OWN or talk.preset in presets() else next(iter(presets()))


def system_of(talk: Conversation, lang: str) -> str:
    """What the model is told first; "" for its own default."""
    if talk.preset == OWN:
        return talk.system[:MAX_SYSTEM]
    preset = presets().get(talk.preset)
    return preset.prompts[lang] if preset is not None else ""
