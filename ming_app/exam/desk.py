"""`Desk`: one person's place in the exam room: shelf of banks, progress, and the sittings that are open.

Every action goes through here: the rules are the sitting's, and what changed is in the store before the action returns.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ming_app.errors import MingError, UsageError
from ming_app.exam.bank import Bank, Shelf, shuffled, weakest_first
from ming_app.exam.grade import Grade
from ming_app.exam.question import Question
from ming_app.exam.sitting import Blueprint, Drawn, Sitting, draw
from ming_app.exam.store import Store

ORDERS = ("sequential", "shuffled", "weakness")
ONLY = ("all", "new", "due", "wrong", "flagged", "noted")
UNKNOWN = 0.5  # weakness of what was never asked
OPEN_SITTINGS = 64  # kept in memory; the store has all


@dataclass(frozen=True)
class Choice:
    """What to practise."""

    only: str = "all"
    """one of ONLY"""
    order: str = "sequential"
    """one of ORDERS; due cards come longest overdue first whatever the order"""
    tags: Mapping[str, Collection[str]] = field(default_factory=dict)
    count: int = 0
    """at most so many (a group is never cut); 0: all"""
    causes: Collection[str] = ()
    """only what was wrong for one of these causes (store.CAUSES); empty: whatever the cause"""
    keys: Collection[str] = ()
    """only these questions; empty: all"""
    mode: str = "tutor"
    shuffle_options: bool = True
    partial: bool = False


class Desk:
    """One person's banks, progress and sittings."""

    def __init__(self, store: Store, shelf: Shelf):
        self.store, self.shelf = store, shelf
        self._lock = threading.RLock()
        self._open: OrderedDict[str, Sitting] = OrderedDict()
        self._banks: OrderedDict[str, Bank] = OrderedDict()
        self._unrecorded: set[str] = set()

    def bank(self, name: str) -> Bank:
        """Opened once, then kept."""
        with self._lock:
            if name not in self._banks:
                self._banks[name] = self.shelf.open(name)
                while len(self._banks) > 8:
                    self._banks.popitem(last=False)
            return self._banks[name]

    def add_bank(self, title: str, questions: Sequence[Question]) -> Bank:
        """Keeps an imported bank. Raises MingError when it cannot be kept."""
        bank = self.shelf.add(title, questions)
        with self._lock:
            self._banks.pop(bank.name, None)
        return bank

    def remove_bank(self, name: str) -> None:
        """Forgets an imported bank; progress stays."""
        self.shelf.remove(name)
        with self._lock:
            self._banks.pop(name, None)
            for sitting in [s for s in self._open.values() if s.bank == name]:
                del self._open[sitting.id]

    def drop(self, name: str) -> None:
        """Forgets a sitting that was not finished; what was graded stays."""
        with self._lock:
            self._open.pop(name, None)
            self.store.drop_sitting(name)

    def wipe(self) -> None:
        """Deletes all progress; banks stay."""
        with self._lock:
            self._open.clear()
            self.store.wipe()

    # -- beginning -----------------------------------------------------------------------------------------------

    def chosen(self, bank: Bank, choice: Choice) -> list[Question]:
        """The questions of a choice, in order, before any cut to a count."""
        if choice.only not in ONLY or choice.order not in ORDERS:
            raise UsageError(f"Choose {', '.join(ONLY)}, in the order {', '.join(ORDERS)}.", "筛选或顺序无效。")
        store = self.store
        weakness = store.weakness() if choice.order == "weakness" or choice.only == "new" else {}
        due = store.due() if choice.only == "due" else []
        keys: Collection[str] | None = {
            "all": lambda: None,
            "new": lambda: [key for key in bank.places if key not in weakness],
            "due": lambda: due,
            "wrong": lambda: store.wrong(),
            "flagged": lambda: store.flagged(),
            "noted": lambda: store.noted(),
        }[choice.only]()
        if choice.causes:
            caused = store.caused(choice.causes)
            keys = caused if keys is None else [key for key in keys if key in caused]
        if choice.keys:
            wanted = set(choice.keys)
            keys = wanted if keys is None else wanted & set(keys)
        found = bank.select(choice.tags, keys)
        if choice.order == "shuffled":
            return shuffled(found, secrets.randbits(32))
        if choice.order == "weakness":
            return weakest_first(found, lambda q: weakness.get(q.key, UNKNOWN))
        if choice.only == "due":
            rank = {key: -at for at, key in enumerate(due)}
            return weakest_first(found, lambda q: rank.get(q.key, -len(rank)))
        return found

    def practise(self, bank_name: str, choice: Choice) -> Sitting:
        """Begins a run of practice. Raises UsageError when nothing fits the choice."""
        bank = self.bank(bank_name)
        questions = _cut(self.chosen(bank, choice), choice.count)
        if not questions:
            raise UsageError("No question fits this choice. Widen the filters.", "没有符合条件的题目，请放宽筛选条件。")
        seed = secrets.randbits(32) if choice.shuffle_options else None
        return self._begin(bank, questions, kind="practice", mode=choice.mode, seed=seed, partial=choice.partial)

    def mock(
        self,
        bank_name: str,
        blueprint: Blueprint,
        *,
        shuffle_options: bool = True,
        partial: bool = False,
    ) -> tuple[Sitting, Drawn]:
        """Begins a mock exam: the clock starts now."""
        bank = self.bank(bank_name)
        drawn = draw(bank.questions, blueprint, secrets.randbits(32))
        if not drawn.questions:
            raise UsageError("The bank has no question for this exam.", "该题库没有可用于本场考试的题目。")
        sitting = self._begin(
            bank,
            drawn.questions,
            kind="mock",
            mode="exam",
            seed=secrets.randbits(32) if shuffle_options else None,
            partial=partial,
            title=blueprint.name,
            deadline=self.store.now() + 60 * drawn.minutes,
            pausable=blueprint.pausable,
            pass_share=blueprint.pass_share,
        )
        return sitting, drawn

    def _begin(self, bank: Bank, questions: Sequence[Question], *, title: str = "", **how: object) -> Sitting:
        now = self.store.now()
        sitting = Sitting(
            id=secrets.token_hex(8),
            bank=bank.name,
            title=title,
            questions=tuple(questions),
            started=now,
            shown=now,
            **how,  # type: ignore[arg-type]
        )
        self.store.save_sitting(sitting)
        self._keep(sitting)
        return sitting

    def _keep(self, sitting: Sitting) -> None:
        with self._lock:
            self._open[sitting.id] = sitting
            self._open.move_to_end(sitting.id)
            while len(self._open) > OPEN_SITTINGS:
                self._open.popitem(last=False)

    # -- going on ------------------------------------------------------------------------------------------------

    def sitting(self, name: str) -> Sitting:
        """The sitting of that id, after a restart too. Raises MingError when it or its bank is gone."""
        with self._lock:
            if name not in self._open:
                self._keep(self.store.load_sitting(name, lambda bank, key: self.bank(bank).get(key)))
            sitting = self._open[name]
            if sitting.tick(self.store.now()) or name in self._unrecorded:
                self._finished(sitting)
            return sitting

    def leave(self, name: str) -> Sitting:
        """Nobody looks at the question any more: no time is counted for it until somebody comes back."""
        return self._looked(name, "leave")

    def come_back(self, name: str) -> Sitting:
        """Somebody looks again."""
        return self._looked(name, "come_back")

    def _looked(self, name: str, action: str) -> Sitting:
        with self._lock:
            sitting = self.sitting(name)
            if sitting.finished is None:
                getattr(sitting, action)(self.store.now())
                self.store.save_sitting(sitting, {sitting.position} & set(sitting.responses))
            return sitting

    def go(self, name: str, index: int) -> Sitting:
        with self._lock:
            sitting = self.sitting(name)
            before = sitting.position
            sitting.go(index, self.store.now())
            self.store.save_sitting(sitting, {before, max(index - 1, 0)} & set(sitting.responses))
            return sitting

    def choose(self, name: str, index: int, letters: Collection[str]) -> Sitting:
        return self._act(name, index, "choose", letters)

    def strike(self, name: str, index: int, letters: Collection[str]) -> Sitting:
        return self._act(name, index, "strike", letters)

    def rate(self, name: str, index: int, confidence: str) -> Sitting:
        return self._act(name, index, "rate", confidence)

    def flag(self, name: str, index: int, on: bool) -> Sitting:
        """In this sitting, and on the question itself."""
        sitting = self._act(name, index, "flag", on)
        self.store.set_mark(sitting.questions[index].key, sitting.bank, flagged=on)
        return sitting

    def _act(self, name: str, index: int, action: str, value: object) -> Sitting:
        with self._lock:
            sitting = self.sitting(name)
            before = sitting.responses.get(index)
            getattr(sitting, action)(index, value, self.store.now())
            try:
                self.store.save_sitting(sitting, [index])
            except BaseException:
                if before is None:
                    sitting.responses.pop(index, None)
                else:
                    sitting.responses[index] = before
                raise
            return sitting

    def submit(self, name: str, index: int) -> Grade:
        """Makes the answer final; in practice with feedback it counts at once."""
        with self._lock:
            sitting = self.sitting(name)
            before = sitting.response(index)
            given = sitting.submit(index, self.store.now())
            try:
                if sitting.mode == "tutor":
                    self.store.record(sitting, {index: given})
                else:
                    self.store.save_sitting(sitting, [index])
            except BaseException:
                sitting.responses[index] = before
                raise
            return given

    def pause(self, name: str) -> Sitting:
        with self._lock:
            sitting = self.sitting(name)
            sitting.pause(self.store.now())
            self.store.save_sitting(sitting, [sitting.position])
            return sitting

    def resume(self, name: str) -> Sitting:
        with self._lock:
            sitting = self.sitting(name)
            sitting.resume(self.store.now())
            self.store.save_sitting(sitting)
            return sitting

    def finish(self, name: str) -> Sitting:
        """Hands in; in exam mode all answers are graded and counted now."""
        with self._lock:
            sitting = self.sitting(name)
            sitting.finish(self.store.now())
            self._finished(sitting)
            return sitting

    def _finished(self, sitting: Sitting) -> None:
        self._unrecorded.add(sitting.id)  # until it is: should the disk be full, the next look tries again
        self.store.record(sitting, dict(enumerate(sitting.grades())), count_empty=sitting.kind == "mock")
        self._unrecorded.discard(sitting.id)

    def unfinished(self) -> list[Sitting]:
        """Sittings to go on with, newest first; those whose time ran out meanwhile are handed in, those whose bank is
        gone are passed over."""
        found: list[Sitting] = []
        for row in self.store.sittings(finished=False):
            try:
                sitting = self.sitting(row["id"])
            except MingError:
                continue
            if sitting.finished is None:
                found.append(sitting)
        return found


def _cut(questions: list[Question], count: int) -> list[Question]:
    """At most `count` questions; a group that begins before the cut stays whole."""
    if not 0 < count < len(questions):
        return questions
    while (
        count < len(questions)
        and questions[count].group_id
        and questions[count].group_id == questions[count - 1].group_id
    ):
        count += 1
    return questions[:count]
