"""Many engines at a time, by Ray Data: each actor loads an Engine and takes rows as they come. What it does with them is the
caller's `work`, the same code as for one engine. On a cluster (`ray start`) the actors spread over its machines.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ming_app.engine.engine import Engine
from ming_app.errors import MingError
from ming_app.settings import Settings

Work = Callable[[Engine, list[Any]], Sequence[Any]]
"""an engine and some rows to what is made of each, in their order"""


class Worker:
    """One actor. Rows and what is made of them travel pickled: `over_engines` below writes them, no file is read so. Ray
    makes text of an exception, so a MingError is given back in place of what could not be made."""

    def __init__(self, settings: Settings, work: Work):
        self.work = work
        self.engine: Engine | MingError
        try:
            self.engine = Engine.load(settings)
        except MingError as error:
            self.engine = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rows with their places to what is made of them, with theirs."""
        rows = [pickle.loads(row) for row in batch["row"]]
        try:
            if isinstance(self.engine, MingError):
                raise self.engine
            made = self.work(self.engine, rows)
        except MingError as error:
            made = [error] * len(rows)
        return {"at": batch["at"], "made": [pickle.dumps(one) for one in made]}


def in_order(answered: Iterable[dict[str, Any]]) -> list[Any]:
    """What rows of {"at", "made"} hold, by their places. Raises the first MingError among it."""
    found = [pickle.loads(row["made"]) for row in sorted(answered, key=lambda row: row["at"])]
    for one in found:
        if isinstance(one, MingError):
            raise one
    return found


def over_engines(work: Work, rows: Sequence[Any], settings: Settings, *, engines: int, batch: int) -> list[Any]:
    """What `work` makes of every row, in the order of the rows; an actor takes at most `batch` of them at a time and keeps
    `settings.threads` CPUs (0: one) for itself. A MingError of an actor is raised here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if not rows:
        return []
    ray.data.DataContext.get_current().enable_progress_bars = False
    batch = min(batch, -(-len(rows) // engines))  # all engines have something to do
    items = [{"at": at, "row": pickle.dumps(row)} for at, row in enumerate(rows)]
    made = ray.data.from_items(items, override_num_blocks=-(-len(items) // batch)).map_batches(
        Worker,
        fn_constructor_kwargs={"settings": settings, "work": work},
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=engines),
        num_cpus=settings.threads or 1,
    )
    return in_order(made.take_all())
