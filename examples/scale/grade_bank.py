"""The model sits a bank of exam questions on many engines at a time, by Ray Data; the same answers as `exam grade`.

    python -m examples.scale.grade_bank --bank clinical-zh --model ming-moe-0.5b --engines 2 --threads 1

Each actor loads an Engine and takes questions as they come; on a cluster (`ray start`) they spread over its machines.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from examples.scale.pool import over_engines
from ming_app.engine.engine import Engine
from ming_app.exam.bank import Shelf
from ming_app.exam.candidate import Attempt, report, sit_exam, spread
from ming_app.exam.formats import ReadOptions, read_bank
from ming_app.exam.question import Question
from ming_app.settings import Settings

BATCH = 16  # questions that an actor takes at a time; it reads eight of them together


def attempts_of(engine: Engine, asked: list[tuple[Question, int]], shuffles: int) -> list[Attempt | None]:
    """The attempt at every question with its place; None where it was too long."""
    made = {one.key: one for one in sit_exam(engine, asked, shuffles=shuffles)[0]}
    return [made.get(question.key) for question, _ in asked]


def grade(bank: str, settings: Settings, *, engines: int, limit: int = 0, shuffles: int = 0) -> dict[str, Any]:
    """The report of `exam grade`, its attempts, and questions per second."""
    path = Path(bank)
    questions = (
        read_bank(path.read_bytes(), path.name, ReadOptions()).questions
        if path.is_file()
        else Shelf().open(bank).questions
    )
    asked = spread(questions, limit)
    began = time.monotonic()
    found = over_engines(partial(attempts_of, shuffles=shuffles), asked, settings, engines=engines, batch=BATCH)
    attempts = [one for one in found if one is not None]
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
