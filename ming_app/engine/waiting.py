"""Who waits for the model and who is next: a bounded, fair queue. Knows nothing of tokens or caches.

Turns go round: a visitor's second request waits behind everybody's first. More than `limit` waiting requests, and more than
`per_visitor` unfinished ones of one visitor, are refused at once (`BusyError`) with the time after which to try again.
Not thread-safe: its owner holds a lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from ming_app.errors import BusyError

SMOOTHING = 0.2  # share of the latest answer in the mean time an answer takes
UNKNOWN_SECONDS = 20.0  # what an answer is taken to last before one has ended


class Request(Protocol):
    """`visitor`: who asks; "" for somebody who shares with nobody and is not limited."""

    visitor: str


R = TypeVar("R", bound=Request)


class WaitingRoom(Generic[R]):
    """`slots`: requests that run at a time. `limit`, `per_visitor`: 0 for no bound."""

    def __init__(self, slots: int, limit: int = 0, per_visitor: int = 0):
        self.slots, self.limit, self.per_visitor = slots, limit, per_visitor
        self._waiting: list[R] = []
        self._mean_seconds = UNKNOWN_SECONDS

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[R]:
        return iter(self._waiting)

    def enter(self, requests: Sequence[R], running: Sequence[R]) -> None:
        """Lets the requests wait, all or none. Raises BusyError."""
        free = max(0, self.slots - len(running))
        if self.limit and len(self._waiting) + len(requests) > self.limit + free:
            raise BusyError.full(len(self._waiting), self.seconds(len(self._waiting)))
        if self.per_visitor:
            unfinished = Counter(one.visitor for one in (*self._waiting, *running, *requests) if one.visitor)
            if any(unfinished[one.visitor] > self.per_visitor for one in requests if one.visitor):
                raise BusyError.visitor(self.per_visitor, self.seconds(0))
        self._waiting += requests

    def leave(self, request: R) -> None:
        """The request's turn has come, or it gives up."""
        self._waiting = [one for one in self._waiting if one is not request]

    def clear(self) -> list[R]:
        """Everybody leaves."""
        gone, self._waiting = self._waiting, []
        return gone

    def order(self, running: Iterable[R]) -> list[R]:
        """Those that wait, the next one first: by what their visitor has running and waiting before them, then by arrival."""
        ahead = Counter(one.visitor for one in running)
        rounds = []
        for one in self._waiting:
            rounds.append(ahead[one.visitor] if one.visitor else 0)
            ahead[one.visitor] += 1
        return [self._waiting[at] for at in sorted(range(len(rounds)), key=lambda at: (rounds[at], at))]

    def ended(self, seconds: float) -> None:
        """An answer took so long."""
        self._mean_seconds += SMOOTHING * (seconds - self._mean_seconds)

    def seconds(self, before: int) -> float:
        """Estimated wait of somebody with `before` others before them, while all slots are taken."""
        return (before + 1) * self._mean_seconds / self.slots
