"""The engine that serves, as an evaluation uses it: letters to score, greedy answers to write.

`evaluation.py` takes one engine in this process (`OneEngine`); `examples/scale/evaluate.py` many, by Ray Data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from ming_app.engine.engine import Engine
from ming_app.models.progress import ProgressCallback
from ming_app.settings import Settings
from training.answers import Generated, greedy_answers
from training.letters import LetterTask, Tick, score_letters_served


class Served(Protocol):
    """What is asked of it depends on no other question: tasks can be shared out in any way."""

    @property
    def precision(self) -> str:
        """In which it computes; known once something was asked."""

    def letters(self, tasks: Sequence[LetterTask], tick: Tick | None = None) -> list[np.ndarray]:
        """As `score_letters_served`."""

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        stop_ids: Collection[int],
        max_new_tokens: int,
        *,
        tick: Tick | None = None,
    ) -> list[Generated]:
        """As `greedy_answers`."""

    def close(self) -> None:
        """Lets go of the model."""


Load = Callable[[Settings, ProgressCallback | None], Served]


class OneEngine:
    """`Served` by an Engine in this process."""

    def __init__(self, settings: Settings, progress: ProgressCallback | None = None):
        self.engine = Engine.load(settings, progress)

    @property
    def precision(self) -> str:
        return self.engine.info.precision

    def letters(self, tasks: Sequence[LetterTask], tick: Tick | None = None) -> list[np.ndarray]:
        return score_letters_served(self.engine.backend, tasks, tick)

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        stop_ids: Collection[int],
        max_new_tokens: int,
        *,
        tick: Tick | None = None,
    ) -> list[Generated]:
        return greedy_answers(self.engine.backend, prompts, stop_ids, max_new_tokens, tick=tick)

    def close(self) -> None:
        self.engine.close()
