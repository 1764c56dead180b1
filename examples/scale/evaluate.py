"""An evaluation by many engines at a time, by Ray Data; the same report as `python -m training evaluate`, whose words follow:

    python -m examples.scale.evaluate --engines 2 --threads 1 --model ming-moe-1.5b --suite training/suites/short.toml \\
        --precision 4bit --out runs/evaluation

Shared out are answers, and exams where a `--precision` is given: what the engine measures. Loss, and exams without a
precision, are measured on the training form of the model, by this process. Engines are loaded anew for every file of the suite.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from examples.scale.pool import Work, over_engines
from ming_app.engine.engine import Engine
from ming_app.models.progress import ProgressCallback
from ming_app.settings import Settings
from training.answers import SLOTS, Generated, greedy_answers
from training.cli import main as training
from training.letters import LetterTask, Tick, score_letters_served

BATCH = 2 * SLOTS  # of an actor: slots that fall free are filled again


def letters_of(engine: Engine, tasks: list[LetterTask]) -> list[tuple[str, np.ndarray]]:
    """What one actor does with exams; the engine's precision comes along."""
    return [(engine.info.precision, one) for one in score_letters_served(engine.backend, tasks)]


def answers_of(
    engine: Engine, prompts: list[list[int]], stop_ids: Collection[int], max_new_tokens: int
) -> list[tuple[str, Generated]]:
    """What one actor does with prompts."""
    answers = greedy_answers(engine.backend, prompts, stop_ids, max_new_tokens)
    return [(engine.info.precision, one) for one in answers]


class ManyEngines:
    """`training.served.Served` by so many engines of so many threads."""

    def __init__(self, settings: Settings, progress: ProgressCallback | None, *, engines: int, threads: int):
        self.settings, self.engines, self.precision = replace(settings, threads=threads), engines, ""

    def letters(self, tasks: Sequence[LetterTask], tick: Tick | None = None) -> list[np.ndarray]:
        return self._asked(letters_of, tasks, tick)

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        stop_ids: Collection[int],
        max_new_tokens: int,
        *,
        tick: Tick | None = None,
    ) -> list[Generated]:
        work = partial(answers_of, stop_ids=stop_ids, max_new_tokens=max_new_tokens)
        return self._asked(work, prompts, tick)

    def close(self) -> None:
        """The actors have ended with their work."""

    def _asked(self, work: Work, rows: Sequence[Any], tick: Tick | None) -> list[Any]:
        found = over_engines(work, rows, self.settings, engines=self.engines, batch=BATCH)
        if found:
            self.precision = found[0][0]
        if tick:
            tick(len(rows), len(rows))
        return [one for _, one in found]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="all other options: python -m training evaluate --help",
        allow_abbrev=False,
    )
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of one engine, and the CPUs that ray keeps for it")
    own, rest = parser.parse_known_args(argv)
    return training(["evaluate", *rest], partial(ManyEngines, engines=own.engines, threads=own.threads))


if __name__ == "__main__":
    sys.exit(main())
