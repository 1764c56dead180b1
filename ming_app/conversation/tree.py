"""`Conversation`: a tree of turns, of which one path is in view.

Editing a question or asking again adds a branch beside the old one; nothing is overwritten. Every turn knows its parent;
the path runs from a turn without a parent to the `leaf`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

RATINGS = (-1, 0, 1)
MODES = ("chat", "consult")
MAX_TITLE = 80


def new_id() -> str:
    return uuid.uuid4().hex[:16]


@dataclass(eq=False)
class Turn:
    """One message. `reason`: how an answer ended (Finish.reason; "" while it is written)."""

    role: str
    text: str
    reason: str = ""
    exhibit: str = ""
    """key of an answer's trace in the explorer, for as long as the page is open"""
    id: str = field(default_factory=new_id)
    parent: str = ""
    """id of the turn before it; "" for a first one"""
    at: float = field(default_factory=time.time)
    """when it was begun, seconds since 1970"""
    model: str = ""
    """what wrote an answer"""
    rating: int = 0
    """the person's: 1 helpful, -1 not"""
    comment: str = ""
    """the reason of the rating"""


@dataclass(eq=False)
class Conversation:
    """Turns by id, and what belongs to all of them. `leaf`: id of the last turn in view, "" for an empty conversation."""

    id: str = field(default_factory=new_id)
    title: str = ""
    created: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    pinned: bool = False
    mode: str = "chat"
    preset: str = ""
    """name of a system prompt of examples/system_prompts.toml, "" for the one in `system`"""
    system: str = ""
    """a system prompt of the person's own"""
    summary: str = ""
    """what a guided consultation has understood, as the person left it"""
    nodes: dict[str, Turn] = field(default_factory=dict)
    leaf: str = ""

    @classmethod
    def of(cls, turns: Iterable[Turn]) -> Conversation:
        """A conversation of one path."""
        made = cls()
        for turn in turns:
            made.add(turn)
        return made

    @property
    def path(self) -> list[Turn]:
        """The turns in view, oldest first."""
        found: list[Turn] = []
        at = self.leaf
        while at in self.nodes and len(found) <= len(self.nodes):
            found.append(self.nodes[at])
            at = self.nodes[at].parent
        return found[::-1]

    def add(self, turn: Turn) -> Turn:
        """Puts a turn after the leaf."""
        turn.parent = self.leaf
        self.nodes[turn.id] = turn
        self.leaf = turn.id
        self.updated = time.time()
        if not self.title and turn.role == "user":
            self.title = titled(turn.text)
        return turn

    def rewind(self, turn: Turn | None) -> None:
        """What is added next follows `turn` (None: begins anew); later turns stay as another branch."""
        self.leaf = turn.id if turn is not None else ""

    def drop_leaf(self) -> Turn:
        """Takes the last turn in view away; it must have none after it."""
        turn = self.nodes.pop(self.leaf)
        self.leaf = turn.parent
        return turn

    def branches(self, turn: Turn) -> list[Turn]:
        """`turn` and those beside it (same role, same parent), oldest first."""
        beside = [node for node in self.nodes.values() if node.parent == turn.parent and node.role == turn.role]
        return sorted(beside, key=lambda node: (node.at, node.id))

    def show(self, turn: Turn) -> None:
        """Brings a turn into view, and below it the newest of each branch."""
        while True:
            after = [node for node in self.nodes.values() if node.parent == turn.id]
            if not after:
                self.leaf = turn.id
                return
            turn = max(after, key=lambda node: (node.at, node.id))


def titled(text: str) -> str:
    """A title for a conversation that begins with `text`: its first line, not too long."""
    words = " ".join(text.split())
    return words if len(words) <= 40 else words[:39].rstrip() + "…"


def whole(turns: Sequence[Turn]) -> bool:
    """Whether turns form a tree: every parent is among them, none is its own ancestor, ids differ."""
    ids = {turn.id for turn in turns}
    parents = {turn.id: turn.parent for turn in turns}
    if len(ids) != len(turns) or any(parent and parent not in ids for parent in parents.values()):
        return False
    settled: set[str] = {""}
    for turn in turns:
        seen: set[str] = set()
        at = turn.id
        while at not in settled:
            if at in seen:
                return False
            seen.add(at)
            at = parents[at]
        settled |= seen
    return True
