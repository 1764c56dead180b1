"""Progress of long work (fetching, converting, building, loading) as plain values passed to a callback.

Whoever does the work owns a `Meter` and tells it how far it is; the meter works out speed and time left and calls
back at most a few times a second. A callback may raise to stop the work: the worker then tidies up and lets it pass.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far one stage is."""

    stage: str
    """"fetch", "convert", "build", "kernels" or "load\""""
    done: int
    total: int
    """0 when not known"""
    unit: str
    """"bytes" or "steps\""""
    detail: str = ""
    """what is being worked on, short: a file, a source, a tensor"""
    speed: float = 0.0
    """units per second over the last seconds"""
    eta: float | None = None
    """seconds left, None while not known"""

    @property
    def fraction(self) -> float:
        """Share done, in 0..1; 0 when the total is not known."""
        return min(1.0, self.done / self.total) if self.total > 0 else 0.0


ProgressCallback = Callable[[Progress], None]


class Meter:
    """Turns "so many done" into `Progress` with speed and time left, at most every `interval` seconds."""

    WINDOW = 5.0  # seconds the speed is averaged over: long enough to be calm, short enough to notice a slow-down

    def __init__(
        self,
        callback: ProgressCallback | None,
        stage: str,
        total: int,
        unit: str,
        *,
        detail: str = "",
        interval: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._callback = callback
        self._stage, self._unit, self._detail = stage, unit, detail
        self._interval, self._clock = interval, clock
        self._samples: deque[tuple[float, int]] = deque()
        self._last = float("-inf")
        self.total = total

    def update(self, done: int, detail: str = "", *, force: bool = False) -> None:
        """Report `done` units of the whole, and what is being worked on where that changes (else the meter's own detail).

        Calls back when enough time has passed, at the end, or when forced.
        """
        if self._callback is None:
            return
        now = self._clock()
        if not force and done < self.total and now - self._last < self._interval:
            return
        self._last = now
        if self._samples and done < self._samples[-1][1]:
            self._samples.clear()  # started again (a source failed): an old speed would mislead
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > self.WINDOW:
            self._samples.popleft()
        then, before = self._samples[0]
        speed = (done - before) / (now - then) if now > then else 0.0
        eta = (self.total - done) / speed if speed > 0 and self.total > 0 else None
        self._callback(Progress(self._stage, done, self.total, self._unit, detail or self._detail, speed, eta))

    def rest(self) -> None:
        """Forget the speed so far: what follows (another source, a resumed offset) runs at its own."""
        self._samples.clear()
