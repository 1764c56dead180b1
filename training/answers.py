"""Greedy answers to many prompts by a serving backend, several at a time.

Every slot of the cache holds one conversation; when its answer ends, the next prompt takes the slot. The numbers of a row do
not depend on its neighbours, so the answers are those given one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from ming_app.engine.types import Backend

SLOTS = 8
Answerer = Callable[..., list["Generated"]]
"""`greedy_answers` of a backend: prompts, stop ids, the most new tokens and `tick` to answers"""


@dataclass
class Generated:
    """`ids` without the stop token; `ended` when the model wrote one, else the length was used up."""

    ids: list[int] = field(default_factory=list)
    ended: bool = False


def greedy_answers(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
    *,
    slots: int = SLOTS,
    tick: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """The answer to every prompt, in order. A prompt must leave room for its answer in the backend's context."""
    answers = [Generated() for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # popped from the end: short ones first
    slots = min(slots, len(prompts))
    if not slots:
        return answers
    room = max(map(len, prompts)) + max_new_tokens
    cache = backend.new_cache(slots, min(room, backend.max_context))
    held: list[int | None] = [waiting.pop() for _ in range(slots)]
    feed = [np.asarray(prompts[i], np.int64) for i in held if i is not None]
    done = 0
    while any(i is not None for i in held):
        picked = np.asarray(backend.forward(feed, cache).logits).argmax(-1)
        for slot, index in enumerate(held):
            token = int(picked[slot])
            feed[slot] = np.asarray([token], np.int64)
            if index is None:
                cache.truncate(slot, 0)  # an idle slot is fed a token a step, and forgets it
                continue
            answer = answers[index]
            answer.ended = token in stop_ids
            if not answer.ended:
                answer.ids.append(token)
            if answer.ended or len(answer.ids) >= max_new_tokens:
                cache.truncate(slot, 0)
                held[slot] = waiting.pop() if waiting else None
                if held[slot] is not None:
                    feed[slot] = np.asarray(prompts[held[slot]], np.int64)  # type: ignore[index]  # not None
                done += 1
                if tick:
                    tick(done, len(prompts))
    return answers
