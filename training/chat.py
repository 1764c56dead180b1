"""Chats to token ids and a loss mask, over the engine's own tokenizer and chat format.

The loss looks at the assistant's content and its end token, and at nothing else (the original MING also trained control
tokens of user turns; this one does not). Text can never become a control token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ming_app.engine.prompt import DEFAULT_SYSTEM
from ming_app.engine.prompt import ChatTokenizer as PromptTokenizer
from ming_app.engine.types import Message as Turn

__all__ = ["DEFAULT_SYSTEM", "ChatTokenizer", "Encoded", "Turn"]


@dataclass(frozen=True)
class Encoded:
    """`ids` int32 [S]; `mask` bool [S], True where the token is one the model must learn to write."""

    ids: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class ChatTokenizer(PromptTokenizer):
    """The engine's tokenizer, with whole conversations and their loss mask."""

    @property
    def start_id(self) -> int:
        """The control token that opens a turn."""
        return self.control_id(self.format.turn)

    @property
    def end_id(self) -> int:
        """The control token that ends a turn; the model learns to write it."""
        return self.control_id(self.format.end)

    def encode_chat(self, turns: Sequence[Turn], system: str = DEFAULT_SYSTEM) -> Encoded:
        """A whole conversation, the system message first (left out when empty)."""
        if system:
            turns = [Turn("system", system), *turns]
        ids, mask = self.opening_ids(), [False] * len(self.opening_ids())
        for turn in turns:
            whole = self.turn_ids(turn)
            head = len(self.turn_ids(Turn(turn.role, ""), closed=False))
            end = len(self.turn_ids(turn, closed=False)) + 1
            ids += whole
            learnt = turn.role == "assistant"
            mask += [learnt and head <= i < end for i in range(len(whole))]
        if turns and turns[-1].role == "assistant":  # what follows the last end token is never needed
            surplus = len(whole) - end
            ids, mask = ids[: len(ids) - surplus], mask[: len(mask) - surplus]
        return Encoded(np.asarray(ids, np.int32), np.asarray(mask, bool))

    def encode_prompt(self, turns: Sequence[Turn], answer: str = "", system: str = DEFAULT_SYSTEM) -> list[int]:
        """Ids up to where the assistant writes on, after `answer` if it has begun already."""
        closed = self.encode_chat(turns, system).ids.tolist()
        return [*closed, *self.turn_ids(Turn("assistant", answer), closed=False)]
