"""`ConversationStore`: conversations and their turns, kept by the rules of database.py. Two windows may work on the same
conversation: each writes the turns it made, and they become branches."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ming_app.conversation.tree import MAX_TITLE, Conversation, Turn
from ming_app.database import Database, Schema, StoreError, Words, execute_all


def m001_conversations(db: sqlite3.Connection) -> None:
    """Conversations and turns."""
    execute_all(
        db,
        """
        CREATE TABLE conversations (
            id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL,
            pinned INTEGER NOT NULL, preset TEXT NOT NULL, system TEXT NOT NULL, leaf TEXT NOT NULL) WITHOUT ROWID;
        CREATE INDEX conversations_updated ON conversations (pinned, updated);
        CREATE TABLE turns (
            conversation TEXT NOT NULL, id TEXT NOT NULL, parent TEXT NOT NULL, role TEXT NOT NULL, text TEXT NOT NULL,
            reason TEXT NOT NULL, at REAL NOT NULL, model TEXT NOT NULL, PRIMARY KEY (conversation, id)) WITHOUT ROWID
        """,
    )


def m002_consultation_and_feedback(db: sqlite3.Connection) -> None:
    """The mode and summary of a guided consultation; ratings of answers."""
    execute_all(
        db,
        """
        ALTER TABLE conversations ADD COLUMN mode TEXT NOT NULL DEFAULT 'chat';
        ALTER TABLE conversations ADD COLUMN summary TEXT NOT NULL DEFAULT '';
        ALTER TABLE turns ADD COLUMN rating INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE turns ADD COLUMN comment TEXT NOT NULL DEFAULT ''
        """,
    )


CONVERSATION = ("id", "title", "created", "updated", "pinned", "preset", "system", "leaf", "mode", "summary")
TURN = ("id", "parent", "role", "text", "reason", "at", "model", "rating", "comment")
WRITTEN = ("updated", "preset", "system", "leaf", "mode", "summary")
"""what `save` changes of a conversation that is kept already"""
SCHEMA = Schema(
    tables={"conversations": CONVERSATION, "turns": ("conversation", *TURN)},
    keys={"conversations": ("id",), "turns": ("conversation", "id")},
    migrations=(m001_conversations, m002_consultation_and_feedback),
    used="turns",
    what=Words("your conversations", "对话记录"),
    refused=Words("The conversation could not be kept", "对话未能保存"),
)
FOUND = 200
"""conversations that a list shows"""


@dataclass(frozen=True)
class Entry:
    """A conversation in the list."""

    id: str
    title: str
    updated: float
    pinned: bool
    turns: int


class ConversationStore(Database):
    """Open one with a path, or ":memory:". Every method may be called from any thread."""

    def __init__(self, path: Path | str, now: Callable[[], float] = time.time):
        super().__init__(path, SCHEMA, now)

    def entries(self, search: str = "") -> list[Entry]:
        """Pinned ones first, then the latest. `search`: words that title or turns must contain, in any case."""
        sql = "SELECT id, title, updated, pinned, (SELECT count(*) FROM turns WHERE conversation=c.id) FROM conversations c"
        values: list[str] = []
        for word in search.split()[:8]:
            like = "%" + word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
            sql += " AND " if values else " WHERE "
            sql += "(title LIKE ? ESCAPE '\\' OR EXISTS (SELECT 1 FROM turns WHERE conversation=c.id AND text LIKE ? ESCAPE '\\'))"
            values += [like, like]
        found = self.rows(f"{sql} ORDER BY pinned DESC, updated DESC LIMIT {FOUND}", values)
        return [Entry(row[0], row[1], row[2], bool(row[3]), row[4]) for row in found]

    def ids(self) -> list[str]:
        """Of all conversations, oldest first."""
        return [name for (name,) in self.rows("SELECT id FROM conversations ORDER BY created")]

    def load(self, name: str) -> Conversation:
        """Raises StoreError for one that is not there."""
        found = self.rows(f"SELECT {', '.join(CONVERSATION)} FROM conversations WHERE id=?", [name])
        if not found:
            raise StoreError("This conversation is not there any more.", "该对话已不存在。")
        values: Mapping[str, Any] = dict(zip(CONVERSATION, found[0], strict=True))
        made = Conversation(**{**values, "pinned": bool(values["pinned"])})
        for row in self.rows(f"SELECT {', '.join(TURN)} FROM turns WHERE conversation=? ORDER BY at", [name]):
            turn = Turn(**dict(zip(TURN, row, strict=True)))
            made.nodes[turn.id] = turn
        for turn in made.nodes.values():
            turn.parent = turn.parent if turn.parent in made.nodes else ""  # taken back by another window
        if made.leaf not in made.nodes:
            made.leaf = max(made.nodes.values(), key=lambda turn: turn.at).id if made.nodes else ""
        return made

    def save(self, talk: Conversation, *turns: Turn) -> None:
        """The conversation's head, and these turns of it. Title and pin of one that is kept already stay: another window
        may have changed them (`rename`, `pin`)."""
        self._touch("conversations", talk.id)
        with self._write() as db:
            head = [getattr(talk, name) for name in CONVERSATION]
            changes = ", ".join(f"{name}=excluded.{name}" for name in WRITTEN)
            db.execute(f"{self.insert('conversations')} ON CONFLICT DO UPDATE SET {changes}", head)
            for turn in turns:
                self._touch("turns", talk.id, turn.id)
                row = [talk.id, *(getattr(turn, name) for name in TURN)]
                changes = ", ".join(f"{name}=excluded.{name}" for name in TURN[1:])
                db.execute(f"{self.insert('turns')} ON CONFLICT DO UPDATE SET {changes}", row)

    def drop_turn(self, talk: Conversation, turn: Turn) -> None:
        """A turn that was taken back; the conversation too when nobody has said anything in it then. One that another window
        has answered meanwhile stays."""
        where = [talk.id, turn.id]
        if self.rows("SELECT 1 FROM turns WHERE conversation=? AND parent=? LIMIT 1", where):
            return
        self._touch("turns", *where)
        with self._write() as db:
            db.execute("DELETE FROM turns WHERE conversation=? AND id=?", where)
        if not self.rows("SELECT 1 FROM turns WHERE conversation=? AND role='user' LIMIT 1", where[:1]):
            self.delete(talk.id)

    def rename(self, name: str, title: str) -> None:
        title = " ".join(title.split())[:MAX_TITLE]
        if title:
            self._change(name, "title", title)

    def pin(self, name: str, pinned: bool) -> None:
        self._change(name, "pinned", pinned)

    def _change(self, name: str, column: str, value: Any) -> None:
        self._touch("conversations", name)
        with self._write() as db:
            db.execute(f"UPDATE conversations SET {column}=? WHERE id=?", [value, name])

    def delete(self, name: str) -> None:
        """The conversation and all its turns."""
        for (turn,) in self.rows("SELECT id FROM turns WHERE conversation=?", [name]):
            self._touch("turns", name, turn)
        self._touch("conversations", name)
        with self._write() as db:
            db.execute("DELETE FROM turns WHERE conversation=?", [name])
            db.execute("DELETE FROM conversations WHERE id=?", [name])
        self.back_up_now()  # what was deleted is not to stay in the backup

    def feedback(self) -> list[dict[str, Any]]:
        """Every rated answer with its question, oldest first."""
        sql = (
            "SELECT t.at, t.model, t.rating, t.comment, q.text, t.text FROM turns t LEFT JOIN turns q "
            "ON q.conversation=t.conversation AND q.id=t.parent WHERE t.rating<>0 ORDER BY t.at"
        )
        names = ("at", "model", "rating", "comment", "question", "answer")
        return [dict(zip(names, row, strict=True)) for row in self.rows(sql)]
