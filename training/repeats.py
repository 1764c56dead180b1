"""Rows that teach a model to leave a repetition: an answer that has begun to repeat itself, and ends there.

A small model that decodes greedily falls into loops: each repetition makes the next one likelier. The cure is to train on
made-up repetitions (DITTO, arXiv 2206.02369). That paper lowers the probability of what is repeated; here the repetition is
only read, and what is learnt is to end the answer after it. Sentences, list items (numbers go on counting) and pairs of them
are repeated.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np

from training.chat import Encoded, Turn
from training.readers import ChatRow

COPIES = 3
"""at most so many after the first"""
LEARNT = 2
"""tokens: the end token, and the one before it, which may hold a full stop with or without the line break of a next item"""

_BETWEEN = re.compile(
    r"(?<=[。！？；])(?=\S)|(?<=[^\d\s][.!?;])(?=\s)|(?<=[^\s])(?=\s+[-*•]\s)|(?<=\S)(?=\n)|(?<=[，,：:])(?=\d{1,2}[.、．])"
)
_NUMBER = re.compile(r"(\s*)(\d{1,2})(?=[.、．])")


def repeating(row: ChatRow, rng: random.Random) -> ChatRow:
    """The row with its last answer cut after some sentence or two, and those written up to `COPIES` times more."""
    *before, answer = row.turns
    pieces = [piece for piece in _BETWEEN.split(answer.content) if piece.strip()]
    last = rng.randrange(len(pieces)) + 1
    first = max(0, last - rng.choice((1, 1, 1, 2)))
    span, written = pieces[first:last], "".join(pieces[:last])
    numbered = sum(1 for piece in span if _NUMBER.match(piece))
    for copy in range(1, rng.randint(1, COPIES) + 1):
        written += "".join(_counted(piece, copy * numbered) for piece in _spaced(span, written))
    return replace(row, turns=(*before, Turn("assistant", written)))


def ending(encoded: Encoded) -> Encoded:
    """The same tokens, of which only the end of the last answer is learnt."""
    mask = np.zeros_like(encoded.mask)
    mask[-LEARNT:] = encoded.mask[-LEARNT:]
    return Encoded(encoded.ids, mask)


def _spaced(span: list[str], written: str) -> list[str]:
    """The pieces, with a space before them where Latin text would run together: the first sentence has none."""
    first = span[0]
    return [" " + first, *span[1:]] if written[-1].isascii() and not first[0].isspace() else span


def _counted(piece: str, more: int) -> str:
    found = _NUMBER.match(piece)
    return f"{found[1]}{int(found[2]) + more}{piece[found.end() :]}" if found and more else piece
