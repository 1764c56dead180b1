"""Conversations from the formats that training data comes in. Each format is one function from a JSON value to a `ChatRow`.

    chat           {"id", "source", "lang", "messages": [{"role": "user" | "assistant" | "system", "content"}]}
    conversations  {"conversations": [{"from": "human" | "gpt" | "system", "value"}]}: the official MING data, and ShareGPT
    alpaca         {"instruction", "input", "output", "system", "history": [[user, assistant], ...]}

A conversation begins with the user and ends with the assistant: what an assistant says first, or a user last, is left
out, since nothing is learnt there. Where a row carries no id its place in the file is its id; where it names no language,
its script decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.chat import Turn
from training.records import Damage, read_rows, text_of

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
LETTER = re.compile(r"[^\W\d_]")
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class ChatRow:
    """One conversation; turns alternate, first user, last assistant. `system` None: the recipe's."""

    id: str
    source: str
    lang: str
    turns: tuple[Turn, ...]
    tags: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None


def read_chats(path: str | Path, damage: Damage | None = None, format: str = "chat") -> Iterator[ChatRow]:
    """Conversations of a file (JSON lines or one array, plain or gzip) in one of FORMATS.

    With `damage`, rows that cannot be used are skipped and counted; else DataError names the first by file and line.
    """
    return read_rows(path, FORMATS[format], damage)


def language_of(text: str) -> str:
    """ "zh" when a fifth of the letters are Han characters, else "en"."""
    letters = len(LETTER.findall(text))
    return "zh" if letters and len(HAN.findall(text)) >= 0.2 * letters else "en"


def _chat(row: Any, where: str) -> ChatRow:
    return _conversation(row, where, [(m["role"], m["content"]) for m in row["messages"]])


def _conversations(row: Any, where: str) -> ChatRow:
    said = [(m["from"], m["value"]) for m in row["conversations"]]
    if row.get("system"):
        said.insert(0, ("system", row["system"]))
    return _conversation(row, where, said)


def _alpaca(row: Any, where: str) -> ChatRow:
    said = [("system", row["system"])] if row.get("system") else []
    for asked, answered in row.get("history") or ():
        said += [("user", asked), ("assistant", answered)]
    extra = text_of(row.get("input") or "")
    asked = text_of(row["instruction"]) + ("\n" + extra if extra else "")
    return _conversation(row, where, [*said, ("user", asked), ("assistant", row["output"])])


def _conversation(row: Mapping[str, Any], where: str, said: list[tuple[Any, Any]]) -> ChatRow:
    turns = [Turn(ROLES[text_of(role)], text_of(content)) for role, content in said]
    system = turns.pop(0).content if turns and turns[0].role == "system" else None
    if turns and turns[0].role == "assistant":
        turns.pop(0)
    if turns and turns[-1].role == "user":
        turns.pop()
    if not turns or [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("turns must alternate between user and assistant")
    if not all(turn.content.strip() for turn in turns):
        raise ValueError("a turn is empty")
    lang = text_of(row.get("lang") or "") or language_of("".join(turn.content for turn in turns))
    row_id = row.get("id", where)
    tags = row.get("tags") or {}
    if not isinstance(row_id, str | int) or not isinstance(tags, dict):
        raise TypeError("id must be text or a number, tags an object")
    return ChatRow(str(row_id), text_of(row.get("source") or ""), lang, tuple(turns), tags, system)


FORMATS: dict[str, Callable[[Any, str], ChatRow]] = {
    "chat": _chat,
    "conversations": _conversations,
    "sharegpt": _conversations,
    "alpaca": _alpaca,
}
