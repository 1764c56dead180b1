"""Conversations as files: Markdown and printable HTML for people, JSON to be read back. Each carries the AI label.

A JSON file that comes in is hostile: size, shape, kinds and lengths are checked, the tree too, ids are given anew; what
breaks a rule refuses the file with a reason. Nothing in it is ever shown as markup.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from typing import Any

from ming_app import __version__
from ming_app.conversation.tree import MAX_TITLE, MODES, RATINGS, Conversation, Turn, new_id, whole
from ming_app.database import StoreError, read_export
from ming_app.safety.notices import AI_LABEL

MAX_BYTES = 20 << 20
MAX_CONVERSATIONS = 500
MAX_TURNS = 2_000
MAX_TEXT = 60_000
FORMAT = 1
LABEL = {
    "ai_generated": True,
    "label": {"zh": AI_LABEL["zh"], "en": AI_LABEL["en"]},
    "producer": f"ming-app {__version__}",
}
ROLE = {"en": {"user": "You", "assistant": "MING-MOE (AI)"}, "zh": {"user": "我", "assistant": "MING-MOE（人工智能）"}}
FAR = 4_102_444_800.0  # 2100-01-01
_ID = re.compile("[0-9a-f]{8,32}")


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


def to_json(talks: Sequence[Conversation]) -> bytes:
    """Every branch of the conversations; `from_json` reads it."""
    values = [
        {
            "id": talk.id,
            "title": talk.title,
            "created": talk.created,
            "updated": talk.updated,
            "pinned": talk.pinned,
            "mode": talk.mode,
            "preset": talk.preset,
            "system": talk.system,
            "summary": talk.summary,
            "leaf": talk.leaf,
            "turns": [
                {
                    "id": turn.id,
                    "parent": turn.parent,
                    "role": turn.role,
                    "text": turn.text,
                    "reason": turn.reason,
                    "at": turn.at,
                    "model": turn.model,
                    "rating": turn.rating,
                    "comment": turn.comment,
                    **({"ai_generated": True} if turn.role == "assistant" else {}),
                }
                for turn in talk.nodes.values()
            ],
        }
        for talk in talks
    ]
    made = {"ming_conversations": FORMAT, "metadata": LABEL, "conversations": values}
    return json.dumps(made, ensure_ascii=False, indent=1).encode()


def to_markdown(talk: Conversation, lang: str) -> str:
    """The path in view; no text of it can pass for a heading or open a tag."""
    lines = [f"# {in_markdown(_plain_line(talk.title))}", "", f"> {AI_LABEL[lang]}", ""]
    for turn in talk.path:
        lines += [f"## {ROLE[lang][turn.role]} · {_when(turn.at)}", "", in_markdown(turn.text), ""]
    if talk.summary:
        lines += ["## Summary" if lang == "en" else "## 摘要", "", in_markdown(talk.summary), ""]
    lines += [
        "---",
        f"{AI_LABEL[lang]} ming-app {__version__}",
        f"<!-- AIGC: {json.dumps(LABEL, ensure_ascii=False)} -->",
        "",
    ]
    return "\n".join(lines)


def in_markdown(text: str) -> str:
    """Text within Markdown: headings of its own are none, and no tag opens."""
    text = re.sub(r"^(\s*)(#{1,6}\s|---|===)", r"\1\\\2", text.rstrip(), flags=re.M)
    return re.sub(r"<(?=[A-Za-z/!?])", r"\<", text)


def to_html(talk: Conversation, lang: str) -> str:
    """A page to print: the path in view, everything escaped, no script, nothing from elsewhere."""
    parts = [
        f'<section class="{escape(turn.role)}"><h2>{escape(ROLE[lang][turn.role])} <small>{_when(turn.at)}</small></h2>'
        f"<p>{escape(turn.text)}</p></section>"
        for turn in talk.path
    ]
    if talk.summary:
        title = "Summary" if lang == "en" else "摘要"
        parts.append(f"<section><h2>{title}</h2><p>{escape(talk.summary)}</p></section>")
    label = escape(AI_LABEL[lang])
    return (
        f'<!doctype html><html lang="{"zh-CN" if lang == "zh" else "en"}"><head><meta charset="utf-8">'
        f'<meta name="generator" content="ming-app {__version__}"><meta name="ai-generated" content="true">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(talk.title)}</title><style>{_STYLE}</style></head><body><h1>{escape(talk.title)}</h1>"
        f'<p class="label">{label}</p>{"".join(parts)}<footer>{label}</footer></body></html>'
    )


_STYLE = (
    "body{font:16px/1.6 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#16201f}"
    "p{white-space:pre-wrap;overflow-wrap:anywhere}h2{font-size:1rem;margin:1.4rem 0 .2rem}small{font-weight:400;color:#56635f}"
    ".assistant{border-left:3px solid #0c6b6b;padding-left:.8rem}.label,footer{background:#fff4d6;padding:.4rem .7rem;"
    "border-radius:6px;font-size:.9rem}@media print{body{margin:0}section{break-inside:avoid-page}}"
)


FILES = {"markdown": "md", "html": "html", "json": "json"}
"""kind of file -> its ending"""


def to_file(kind: str, talks: Sequence[Conversation], lang: str) -> bytes:
    """Conversations as a file of `kind`; Markdown and HTML hold the first one."""
    if kind == "json":
        return to_json(talks)
    return (to_markdown if kind == "markdown" else to_html)(talks[0], lang).encode()


def _plain_line(text: str) -> str:
    return " ".join(text.split()).lstrip("#> ") or "…"


def from_json(data: bytes) -> list[Conversation]:
    """The conversations of an export, with new ids. Raises StoreError with the reason for a file that is none of ours."""
    values = read_export(data, "ming_conversations", FORMAT, MAX_BYTES, _foreign)
    found = values.get("conversations")
    if not isinstance(found, list) or len(found) > MAX_CONVERSATIONS:
        raise _foreign("the list of conversations is damaged", "对话列表已损坏")
    return [_conversation(value, at) for at, value in enumerate(found, 1)]


def _rooted(turns: list[Turn]) -> list[Turn]:
    """Turns whose parent is not among them begin anew."""
    ids = {turn.id for turn in turns}
    for turn in turns:
        turn.parent = turn.parent if turn.parent in ids else ""
    return turns


def from_rows(tables: Any) -> list[Conversation]:
    """The conversations that a browser kept as rows (database.py), with their own ids; what breaks a rule is left out."""
    if not isinstance(tables, dict):
        return []

    def dicts(name: str) -> list[dict[str, Any]]:
        columns, rows = tables.get("columns"), tables.get(name)
        names = columns.get(name) if isinstance(columns, dict) else None
        if not isinstance(names, list) or not isinstance(rows, list) or not all(isinstance(n, str) for n in names):
            return []
        return [dict(zip(names, row, strict=False)) for row in rows[: MAX_CONVERSATIONS * 50] if isinstance(row, list)]

    turns: dict[str, list[dict[str, Any]]] = {}
    for turn in dicts("turns"):
        turns.setdefault(str(turn.get("conversation")), []).append(turn)
    found = []
    for value in dicts("conversations")[:MAX_CONVERSATIONS]:
        name = value.get("id")
        if isinstance(name, str) and _ID.fullmatch(name):
            with suppress(StoreError):
                value["pinned"] = value.get("pinned") == 1
                found.append(_conversation({**value, "turns": turns.get(name, [])}, 1, name))
    return found


def _conversation(value: Any, at: int, name: str = "") -> Conversation:
    """`name`: its own id, and then those of its turns stay too."""
    where = f"conversation {at}", f"第 {at} 个对话"
    if not isinstance(value, dict) or not isinstance(value.get("turns"), list) or len(value["turns"]) > MAX_TURNS:
        raise _foreign(f"{where[0]} is damaged", f"{where[1]}已损坏")
    turns = _rooted([_turn(turn, where) for turn in value["turns"]])
    if not whole(turns):
        raise _foreign(f"the turns of {where[0]} form no tree", f"{where[1]}的消息结构无效")
    if name and not all(_ID.fullmatch(turn.id) for turn in turns):
        raise _foreign("its ids are none", "标识无效")
    ids = {"": "", **{turn.id: turn.id if name else new_id() for turn in turns}}
    leaf = value.get("leaf")
    made = Conversation(
        id=name or new_id(),
        title=" ".join(_text(value.get("title"), MAX_TEXT).split())[:MAX_TITLE],
        created=_time(value.get("created")),
        updated=_time(value.get("updated")),
        pinned=value.get("pinned") is True,
        mode=value["mode"] if value.get("mode") in MODES else "chat",
        preset=_text(value.get("preset"), 40),
        system=_text(value.get("system"), MAX_TEXT),
        summary=_text(value.get("summary"), MAX_TEXT),
    )
    for turn in turns:
        turn.id, turn.parent = ids[turn.id], ids[turn.parent]
        made.nodes[turn.id] = turn
    known = ids.get(leaf) if isinstance(leaf, str) else None
    latest = max(turns, key=lambda turn: turn.at).id if turns else ""
    made.leaf = latest if known is None else known
    return made


def _turn(value: Any, where: tuple[str, str]) -> Turn:
    if not isinstance(value, dict) or value.get("role") not in ("user", "assistant"):
        raise _foreign(f"{where[0]} has a turn that is none", f"{where[1]}含有无效的消息")
    text, name, parent = value.get("text"), value.get("id"), value.get("parent")
    if not isinstance(text, str) or len(text) > MAX_TEXT or not isinstance(name, str) or not 0 < len(name) <= 64:
        raise _foreign(f"{where[0]} has a turn that is none", f"{where[1]}含有无效的消息")
    rating = value.get("rating")
    return Turn(
        value["role"],
        _clean(text),
        reason=_text(value.get("reason"), 20),
        id=name,
        parent=parent if isinstance(parent, str) else "",
        at=_time(value.get("at")),
        model=_text(value.get("model"), 100),
        rating=rating if rating in RATINGS and not isinstance(rating, bool) else 0,
        comment=_text(value.get("comment"), 500),
    )


def _clean(text: str) -> str:
    """No lone surrogates and no control characters but line breaks and tabs."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(sign for sign in text if sign in "\n\t" or ord(sign) >= 32 and ord(sign) != 127)


def _text(value: Any, most: int) -> str:
    return _clean(value)[:most] if isinstance(value, str) else ""


def _time(value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < FAR  # not with NaN
    return float(value) if good else time.time()


def _foreign(en: str, zh: str) -> StoreError:
    return StoreError(f"This file cannot be imported as conversations: {en}.", f"无法作为对话导入：{zh}。")
