"""The list of conversations beside the chat: its payload, and what its events do. The list is static/talks.js."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ming_app.conversation import consult
from ming_app.conversation.files import FILES, from_json, from_rows, to_file
from ming_app.conversation.store import ConversationStore
from ming_app.conversation.tree import Conversation
from ming_app.errors import MingError
from ming_app.reading import whole_text
from ming_app.settings import Settings
from ming_app.ui import chat
from ming_app.ui.chat import Session
from ming_app.ui.files import TempFolder
from ming_app.ui.homes import Shared, home
from ming_app.ui.text import day_text, refusal, t

MAX_EVENT = 10_000  # characters


def talk_words(lang: str) -> str:
    """The list's texts as JSON."""
    start = "talk."
    names = [
        "title",
        "new",
        "incognito",
        "search",
        "yes",
        "no",
        "import",
        "wipe",
        "rename",
        "delete",
        "pin",
        "unpin",
        "untitled",
        "none",
        "none_found",
    ]
    names += [
        "sure_delete",
        "sure_wipe",
        "export_",
        *(f"export_{kind}" for kind in (*FILES, "all", "feedback", "note")),
    ]
    return json.dumps({name: t(lang, start + name) for name in names}, ensure_ascii=False)


OVERLAP = 3
"""earlier changes that are handed out once more: of updates that come together the page keeps the last only"""


def merged(changes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several of Database.take_changes as one; what came later counts."""
    found: dict[str, Any] = dict(changes[-1])
    tables: dict[str, dict[tuple[Any, ...], Any]] = {}
    for change in changes:
        if "rows" not in change:
            continue
        found |= {"columns": change["columns"], "keys": change["keys"]}
        for table, rows in change["rows"].items():
            at = [change["columns"][table].index(name) for name in change["keys"][table]]
            tables.setdefault(table, {}).update({tuple(row[i] for i in at): row for row in rows})
        for table, keys in change["gone"].items():
            tables.setdefault(table, {}).update({tuple(key): None for key in keys})
    if tables:
        found["rows"] = {table: [row for row in rows.values() if row is not None] for table, rows in tables.items()}
        found["gone"] = {table: [key for key, row in rows.items() if row is None] for table, rows in tables.items()}
    return found


class Talks:
    """Opens the store of a visitor, and does what the list asks for. `files`: where exports are written."""

    def __init__(self, settings: Settings, files: TempFolder):
        self._settings, self._files = settings, files
        self._stores = Shared(_store)

    def enter(self, session: Session) -> None:
        """The visitor's store, once it is known who they are. What stands in the way is told; the chat works without."""
        if not session.talk.nodes:
            # Gradio copies one session for every visitor: each needs ids of its own
            session.talk = Conversation(preset=session.preset, system=session.own)
        if session.store is None:
            try:
                session.store = self._stores.at(home(self._settings, session.account))
            except MingError as error:
                session.error = error
            else:
                if session.store.notice is not None:  # the file was damaged: said once
                    session.error, session.store.notice = session.store.notice, None

    def payload(self, session: Session) -> dict[str, Any]:
        """What the list shows."""
        items = []
        for entry in session.store.entries(session.search) if session.store is not None else []:
            when = day_text(entry.updated, session.east)
            here = entry.id == session.talk.id
            items.append({"id": entry.id, "title": entry.title, "when": when, "pinned": entry.pinned, "here": here})
        return {
            "items": items,
            "search": session.search,
            "incognito": session.incognito,
            "consult": session.talk.mode == "consult" and bool(session.talk.summary),
            "here": "-" if session.incognito or not session.talk.nodes else session.talk.id,
            "note": t(session.lang, "talk.incognito_note") if session.incognito else "",
        }

    def kept(self, session: Session) -> str:
        """What the visitor's browser has to keep, as JSON; "" where it keeps nothing."""
        store = session.store
        if store is None or store.path is not None:
            return ""
        session.changes = [*session.changes[-OVERLAP:], store.take_changes()]
        return json.dumps(merged(session.changes), ensure_ascii=False)

    def restore(self, session: Session, kept: str, last: str) -> None:
        """A page was opened: takes back what the browser kept, and opens the conversation that was in view."""
        self.enter(session)
        store = session.store
        if store is None:
            return
        if kept and store.path is None:
            try:
                values = json.loads(kept[: 20 << 20])
            except (ValueError, RecursionError):
                values = None
            for talk in from_rows(values):
                store.save(talk, *talk.nodes.values())
            store.take_changes()
        if last and not session.turns:
            try:
                chat.open_talk(session, store.load(last[:40]))
            except MingError:
                return  # deleted meanwhile

    def act(self, session: Session, text: Any) -> str | None:
        """One event of the list, untrusted JSON: {"do", "id", "value"}. Gives the path of a file to download, if any.

        Raises MingError when it is refused.
        """
        try:
            said = whole_text(json.loads(text)) if isinstance(text, str) and len(text) < MAX_EVENT else None
        except (ValueError, RecursionError):
            said = None
        action = _ACTIONS.get(str(said.get("do"))) if isinstance(said, dict) else None
        if action is None or not isinstance(said, dict):
            raise _unknown()
        name, value = said.get("id", ""), said.get("value")
        if not isinstance(name, str) or len(name) > 40:
            raise _unknown()
        session.error = None
        return action(self, session, name, value)

    def load_file(self, session: Session, path: str) -> int:
        """Adds the conversations of an exported file; how many. Raises MingError."""
        store = _needed(session)
        talks = from_json(Path(path).read_bytes())
        for talk in talks:
            store.save(talk, *talk.nodes.values())
        return len(talks)

    # -- actions -------------------------------------------------------------------------------------------------

    def _new(self, session: Session, _name: str, _value: Any) -> None:
        chat.clear(session)

    def _open(self, session: Session, name: str, _value: Any) -> None:
        talk = _needed(session).load(name)
        chat.open_talk(session, talk)

    def _rename(self, session: Session, name: str, value: Any) -> None:
        if isinstance(value, str):
            _needed(session).rename(name, value)
            if session.talk.id == name and value.strip():
                session.talk.title = _needed(session).load(name).title

    def _pin(self, session: Session, name: str, value: Any) -> None:
        _needed(session).pin(name, value is True)
        if session.talk.id == name:
            session.talk.pinned = value is True

    def _delete(self, session: Session, name: str, _value: Any) -> None:
        if session.talk.id == name:
            chat.clear(session)  # first: an answer that is being written keeps itself when it is stopped
        _needed(session).delete(name)

    def _wipe(self, session: Session, _name: str, _value: Any) -> None:
        chat.clear(session)
        _needed(session).wipe()
        session.changes = []

    def _search(self, session: Session, _name: str, value: Any) -> None:
        session.search = value[:200] if isinstance(value, str) else ""

    def _incognito(self, session: Session, _name: str, value: Any) -> None:
        if (value is True) != session.incognito:  # what is there stays as it is: the other kind begins anew
            chat.clear(session)
            session.incognito = value is True

    def _export(self, session: Session, _name: str, value: Any) -> str:
        lang, store = session.lang, session.store
        folder = self._files.new()
        stamp = time.strftime("%Y%m%d-%H%M%S")
        if value == "feedback":
            path = folder / f"ming-feedback-{stamp}.json"
            rated = store.feedback() if store is not None else []
            path.write_text(json.dumps(rated, ensure_ascii=False, indent=1), encoding="utf-8")
        elif value == "note":
            path = folder / f"ming-visit-{stamp}.md"
            when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(time.time() + session.east))
            path.write_text(consult.note(session.talk, lang, when), encoding="utf-8")
        elif value == "all":
            path = folder / f"ming-conversations-{stamp}.json"
            path.write_bytes(to_file("json", [_needed(session).load(name) for name in _needed(session).ids()], lang))
        elif value in FILES:
            if not session.turns:
                raise refusal("talk.nothing")
            path = folder / f"ming-conversation-{stamp}.{FILES[value]}"
            path.write_bytes(to_file(value, [session.talk], lang))
        else:
            raise _unknown()
        return str(path)


Action = Callable[[Talks, Session, str, Any], str | None]
_ACTIONS: Mapping[str, Action] = {
    name: getattr(Talks, f"_{name}")
    for name in ("new", "open", "rename", "pin", "delete", "wipe", "search", "incognito", "export")
}


def _store(folder: Path | None) -> ConversationStore:
    return ConversationStore(":memory:" if folder is None else folder / "conversations.sqlite")


def _needed(session: Session) -> ConversationStore:
    if session.store is None:
        raise refusal("talk.no_store")
    return session.store


def _unknown() -> MingError:
    return refusal("talk.unknown")


def system_choices(lang: str) -> list[tuple[str, str]]:
    """System prompts as choices of a dropdown."""
    from ming_app.conversation.presets import OWN, presets

    return [(preset.titles[lang], name) for name, preset in presets().items()] + [(t(lang, "talk.own"), OWN)]


def begin_consultation(session: Session, on: bool) -> None:
    """Switches between chat and guided consultation; what is there stays as it is, a new conversation begins."""
    if on == (session.talk.mode == "consult"):
        return
    chat.clear(session)
    if on:
        consult.begin(session.talk, session.lang)
