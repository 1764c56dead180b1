"""The model sits a bank of exam questions on many engines at a time, by Ray Data; the same answers as `exam grade`.

    python -m examples.scale.grade_bank --bank clinical-zh --model ming-moe-0.5b --engines 2 --threads 1

Each actor loads an Engine and takes questions as they come; on a cluster (`ray start`) they spread over its machines.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ming_app.engine.engine import Engine
from ming_app.exam.bank import Shelf
from ming_app.exam.candidate import Attempt, report, sit_exam, spread
from ming_app.exam.formats import ReadOptions, read_bank
from ming_app.settings import Settings

BATCH = 16  # questions that an actor takes at a time; it reads eight of them together


class Candidate:
    """One actor: an Engine that sits what it is given."""

    def __init__(self, settings: Settings, shuffles: int):
        self.engine, self.shuffles = Engine.load(settings), shuffles

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rows of a pickled question and its place; back come the place and the attempt, as JSON ("" where it was too long)."""
        asked = [pickle.loads(row) for row in batch["question"]]  # written by `grade` below, never read from a file
        attempts, _ = sit_exam(self.engine, asked, shuffles=self.shuffles)
        made = {one.key: json.dumps(asdict(one)) for one in attempts}
        return {"at": batch["at"], "attempt": [made.get(question.key, "") for question, _ in asked]}


def grade(bank: str, settings: Settings, *, engines: int, limit: int = 0, shuffles: int = 0) -> dict[str, Any]:
    """The report of `exam grade`, its attempts, and questions per second."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    path = Path(bank)
    questions = (
        read_bank(path.read_bytes(), path.name, ReadOptions()).questions
        if path.is_file()
        else Shelf().open(bank).questions
    )
    asked = spread(questions, limit)
    rows = [{"at": at, "question": pickle.dumps(one)} for at, one in enumerate(asked)]
    began = time.monotonic()
    ray.data.DataContext.get_current().enable_progress_bars = False
    answered = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // BATCH)).map_batches(
        Candidate,
        fn_constructor_kwargs={"settings": settings, "shuffles": shuffles},
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=engines),
        num_cpus=settings.threads or 1,
    )
    found = sorted(answered.take_all(), key=lambda row: row["at"])
    attempts = [Attempt(**json.loads(row["attempt"])) for row in found if row["attempt"]]
    spent = time.monotonic() - began
    return report(attempts) | {
        "too_long": len(found) - len(attempts),
        "attempts": [asdict(one) for one in attempts],
        "seconds": round(spent, 1),
        "engines": engines,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", required=True, help="a file of questions, or the name of a bank")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--limit", type=int, default=0, help="so many questions, spread evenly")
    parser.add_argument("--shuffles", type=int, default=0, help="also with options in so many other orders")
    for name in ("model", "adapter", "precision"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--threads", type=int, default=1, help="of one engine, and the CPUs that ray keeps for it")
    parser.add_argument("--out", help="JSON lines, one an answer")
    args = parser.parse_args()
    settings = Settings.load({name: getattr(args, name) for name in ("model", "adapter", "precision", "threads")})
    found = grade(args.bank, settings, engines=args.engines, limit=args.limit, shuffles=args.shuffles)
    attempts = found.pop("attempts")
    if args.out:
        Path(args.out).write_text(
            "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in attempts), encoding="utf-8"
        )
    print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
