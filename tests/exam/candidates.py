"""Twenty candidates at one server, as a process to be killed: run by test_exam_killed_server.py.

    python candidates.py FOLDER COUNT

Begins (or, after a restart, goes on with) one 600-question mock per candidate, answers in threads, and prints a line for
every answer that was accepted: what is printed must never be lost.
"""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path

from ming_app.exam.bank import Shelf
from ming_app.exam.desk import Desk
from ming_app.exam.sitting import PRESETS
from ming_app.exam.store import Store

CANDIDATES = 20
print_lock = threading.Lock()


def say(*words: object) -> None:
    with print_lock:
        print(*words, flush=True)


def sit(desk: Desk, name: str, count: int) -> None:
    sitting = desk.sitting(name)
    rng = random.Random(name)
    places = [at for at in range(len(sitting.questions)) if at not in sitting.responses]
    for place in places[:count]:
        if sitting.hidden(place):
            continue
        desk.go(name, place)
        letter = rng.choice(list(sitting.questions[place].options))
        desk.choose(name, place, letter)
        say("answer", name, place, letter)


def main(folder: Path, count: int) -> None:
    desk = Desk(Store(folder / "progress.sqlite"), Shelf(folder / "banks", folder / "none"))
    bank = desk.shelf.list()[0].name
    preset = next(preset for preset in PRESETS if preset.name == "physician-full")
    running = desk.unfinished()
    say("resumed", len(running))
    while len(running) < CANDIDATES:
        sitting, _ = desk.mock(bank, preset)
        say("began", sitting.id, repr(sitting.deadline), len(sitting.questions))
        running.append(sitting)
    threads = [threading.Thread(target=sit, args=(desk, sitting.id, count)) for sitting in running]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say("done")
    desk.store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
