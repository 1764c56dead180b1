"""Continuous batching: one thread drives the model for all requests; they join and leave at any token.

Every step takes one token of each answer that is being written and, with what room is left, pieces of prompts: short ones
first, and no more than PIECE tokens while somebody waits for a next word. Rows of the KV cache stay filled when a request
ends: the next one that begins with the same tokens (the next turn of a conversation, a question with the same preamble) reads
only what is new. Memory is bounded: a request is let in when its longest possible answer fits beside those of the others.
Who waits is bounded too, and turns go round between visitors (waiting.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ming_app.engine.decode import RoutingRecord
from ming_app.engine.interventions import Compiled
from ming_app.engine.jobs import Job, ScoreJob, closed
from ming_app.engine.types import Backend, Gates, Outcome, Step
from ming_app.engine.waiting import WaitingRoom
from ming_app.errors import BusyError

logger = logging.getLogger(__name__)

CHUNK = 256  # tokens of prompts per step while nobody writes
PIECE = 32  # ... and while somebody does: bounds the pause between two of their words
SPARE_ROWS = 8  # rows that only remember
PATIENCE = (
    5.0  # seconds of waiting that halve what a prompt counts as, and end being overtaken: long ones get their turn
)
LINGER = 20.0  # seconds without work after which the thread ends; the next request starts one
POLL = 0.05  # between two looks at requests that wait for a row: they may be cancelled


@dataclass
class _Row:
    """One row of the cache: the tokens it holds, under which changes they were read, and who uses it."""

    index: int
    ids: list[int] = field(default_factory=list)
    key: bytes = b""
    record: RoutingRecord | None = None
    """routing of `ids`; None when it was not recorded"""
    job: Job | None = None
    used: float = 0.0


class Batcher:
    """Runs jobs on a backend. `tokens`: what the KV cache holds in all, at least one context. `waiting`: with room for as many
    at a time as it has slots. `on_end` is told how every answer ended, from the thread that drives the model."""

    def __init__(self, backend: Backend, tokens: int, context: int, waiting: WaitingRoom[Job]):
        self._backend = backend
        self.slots = waiting.slots
        self.on_end: Callable[[Outcome], None] = lambda outcome: None
        self._tokens = max(tokens, context)
        self._context = context
        self._rows: list[_Row] = []
        self._waiting = waiting
        self._promised = 0  # tokens that the running jobs may come to hold
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = self.draining = False

    def submit(self, *jobs: Job) -> None:
        """Queues jobs, in order. Raises UsageError once closed, BusyError when they cannot be taken now."""
        with self._changed:
            try:
                if self.draining:
                    raise BusyError.closing()
                if self._closed:
                    raise closed()
                self._waiting.enter(jobs, self._running())
            except BusyError as error:
                self.on_end(Outcome(error.kind))
                raise
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="batch", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def load(self) -> tuple[int, int]:
        """(requests that run, requests that wait)."""
        with self._changed:
            return len(self._running()), len(self._waiting)

    def expected_wait(self) -> float:
        """Seconds until the turn of a request that comes now."""
        with self._changed:
            busy = len(self._running()) >= self.slots
            return self._waiting.seconds(len(self._waiting)) if busy or self._waiting else 0.0

    def drain(self, seconds: float) -> bool:
        """Takes no more requests, sends away those that wait, and waits so long for what runs. Whether all of it ended."""
        with self._changed:
            self.draining = True
            for job in self._waiting.clear():
                self._fail(job, BusyError.closing())
            return self._changed.wait_for(lambda: not self._running(), seconds)

    def _running(self) -> list[Job]:
        """Jobs that have a row and have not ended: who has heard the end of an answer may ask again at once."""
        return [row.job for row in self._rows if row.job is not None and not row.job.ended]

    def close(self) -> None:
        """Ends what has not ended and stops."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._go_on()
        except BaseException as error:  # nobody must wait for a thread that is gone
            with self._changed:
                for job in [*self._running(), *self._waiting.clear()]:
                    self._fail(job, error)
                self._rows, self._promised, self._thread = [], 0, None
                self._changed.notify_all()
            logger.error("the batch thread failed: %s", type(error).__name__)

    def _go_on(self) -> None:
        """Steps until there has been nothing to do for a while, or the engine is closed."""
        if not self._rows:
            self._cache = self._backend.new_cache(self.slots + SPARE_ROWS, self._context, self._tokens)
            self._rows = [_Row(index) for index in range(self.slots + SPARE_ROWS)]
        idle_since = time.monotonic()
        while True:
            with self._changed:
                self._let_in()
                running = [row for row in self._rows if row.job is not None]
                if self.draining:
                    self._changed.notify_all()
                if self._closed:
                    for row in running:
                        self._end(row)
                    for job in self._waiting.clear():
                        self._fail(job, closed())
                    return
                if not running:
                    if not self._waiting and time.monotonic() - idle_since > LINGER:
                        self._thread = None
                        return
                    self._changed.wait(POLL if self._waiting else LINGER)
                    continue
            self._step(running)
            idle_since = time.monotonic()

    def _let_in(self) -> None:
        """Those that gave up leave, those whose turn it is get a row, and the others hear their place."""
        for job in list(self._waiting):
            if job.interrupted():
                self._waiting.leave(job)
                self._report(job)
        if self._waiting:
            self._admit()
            for before, job in enumerate(self._waiting.order(self._running())):
                job.wait(before, self._waiting.seconds(before))

    def _admit(self) -> None:
        """Gives rows to those that wait, in order, as long as there are rows and memory. Where one needs more memory than is
        left, smaller ones may go before it for a while."""
        now, held_back = time.monotonic(), False
        for job in self._waiting.order(self._running()):
            running = len(self._running())
            if running >= self.slots or held_back:
                return
            if running and self._promised + job.most_tokens > self._tokens:
                held_back = now - job.arrived > PATIENCE
                continue
            row = self._seat(job)
            self._waiting.leave(job)
            self._promised += job.most_tokens
            row.job, row.used = job, now
            job.begin()

    def _seat(self, job: Job) -> _Row:
        """A row for the job, which holds as much of its prompt as any row does."""
        key = _key(job.changes)
        best, shared = None, 0
        for row in self._rows:
            if row.key == key and (job.record is None or row.record is not None):
                same = _common(row.ids, job.prompt)
                if same > shared:
                    best, shared = row, same
        shared = min(shared, len(job.prompt) - 1)  # the last token is read again, for its logits
        if best is not None and best.job is None and shared > len(best.ids) // 2:
            row, record = best, best.record
            self._cache.truncate(row.index, shared)
        else:
            idle = [row for row in self._rows if row.job is None and row is not best]
            row = min(idle, key=lambda one: (bool(one.ids), one.used))
            self._cache.truncate(row.index, 0)
            record = best.record if best is not None else None
            shared = self._cache.share(best.index, row.index, shared) if best is not None else 0
        row.ids, row.key = job.prompt[:shared].tolist(), key
        job.reuse(record, shared)
        row.record = job.record
        return row

    def _step(self, running: Sequence[_Row]) -> None:
        """One forward for all that can go on."""
        pieces: list[tuple[_Row, np.ndarray]] = []
        reading: list[_Row] = []
        for row in running:
            job = row.job
            assert job is not None  # only rows in use are running
            if job.interrupted():
                self._leave(row)
            elif job.feed is not None:
                if isinstance(job, ScoreJob) and job.rewind:
                    self._cache.truncate(row.index, len(job.prompt))
                    del row.ids[len(job.prompt) :]
                pieces.append((row, np.array([job.feed], np.int64)))
            else:
                reading.append(row)
        pieces += _portions(reading, PIECE if pieces else CHUNK)
        if pieces:
            self._run(pieces)

    def _run(self, pieces: Sequence[tuple[_Row, np.ndarray]]) -> None:
        """Runs the pieces together; should that fail, one by one, so that only those fail that cannot run."""
        try:
            step = self._forward(pieces)
        except Exception as error:
            if len(pieces) > 1:
                for piece in pieces:
                    self._run([piece])
                return
            row = pieces[0][0]
            self._leave(row, error)
            self._forget(row)
            return
        for index, (row, ids) in enumerate(pieces):
            job = row.job
            assert job is not None  # rows keep their job during a step
            row.ids += ids.tolist()
            row.used = time.monotonic()
            experts = None if step.experts is None else step.experts[index]
            weights = None if step.weights is None else step.weights[index]
            log_total = None if step.log_totals is None else float(step.log_totals[index])
            try:
                job.took(len(ids), step.logits[index], log_total, experts, weights)
            except Exception as error:  # a bug in one job must not end the others
                self._leave(row, error)
            else:
                if job.ended:
                    self._leave(row)

    def _forward(self, pieces: Sequence[tuple[_Row, np.ndarray]]) -> Step:
        rows = [row.index for row, _ in pieces]
        self._make_room(rows, [len(ids) for _, ids in pieces])
        changes = [row.job.changes for row, _ in pieces if row.job is not None]
        bias, gates = _together(changes, self._backend)
        return self._backend.forward([ids for _, ids in pieces], self._cache, rows=rows, router_bias=bias, gates=gates)

    def _make_room(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Forgets rows that nobody uses, the longest unused first, until the step fits."""
        idle = sorted((row for row in self._rows if row.job is None and row.ids), key=lambda one: -one.used)
        while idle and not self._cache.fits(rows, counts):
            self._forget(idle.pop())

    def _forget(self, row: _Row) -> None:
        self._cache.truncate(row.index, 0)
        row.ids, row.record = [], None

    def _leave(self, row: _Row, error: BaseException | None = None) -> None:
        """The row's job has ended, or ends with an error."""
        job = row.job
        if job is None:
            return
        self._promised -= job.most_tokens
        row.job = None
        if error is not None:
            self._fail(job, error)
        else:
            self._report(job)

    def _end(self, row: _Row) -> None:
        """The server stops: what was written so far is the answer."""
        if row.job is not None:
            row.job.close()
            self._leave(row)

    def _fail(self, job: Job, error: BaseException) -> None:
        job.fail(error)
        self._report(job, error.kind if isinstance(error, BusyError) else "error")

    def _report(self, job: Job, reason: str = "") -> None:
        outcome = job.outcome(reason)
        if outcome is not None:
            if outcome.reason in ("stop", "length"):
                self._waiting.ended(outcome.total_seconds - outcome.waited_seconds)
            self.on_end(outcome)


def _portions(reading: Sequence[_Row], left: int) -> list[tuple[_Row, np.ndarray]]:
    """What is read next of the prompts, `left` tokens at most: the most urgent one's, and of the others those that end
    with it. A prompt that can be finished does not wait for pieces of longer ones."""
    taken: list[tuple[_Row, np.ndarray]] = []
    now = time.monotonic()
    for row in sorted(reading, key=lambda one: _urgency(one, now)):
        job = row.job
        assert job is not None
        rest = len(job.prompt) - job.read
        if not taken or rest <= left:
            taken.append((row, job.prompt[job.read : job.read + left]))
            left -= min(rest, left)
    return taken


def _urgency(row: _Row, now: float) -> float:
    """What is left to read, counted the less the longer it has waited."""
    job = row.job
    assert job is not None
    return (len(job.prompt) - job.read) * 0.5 ** ((now - job.arrived) / PATIENCE)


def _common(ids: Sequence[int], prompt: np.ndarray) -> int:
    """Tokens that both begin with."""
    count = min(len(ids), len(prompt))
    differ = np.flatnonzero(np.asarray(ids[:count], np.int64) != prompt[:count])
    return int(differ[0]) if len(differ) else count


def _key(changes: Compiled) -> bytes:
    """Equal for changes under which the same tokens give the same cache."""
    parts = [] if changes.bias is None else [changes.bias]
    if changes.gates is not None:
        gates = changes.gates
        parts += [gates.top_k, gates.uniform, gates.strength, gates.attention]
    return b"|".join(np.ascontiguousarray(part).tobytes() for part in parts)


def _together(changes: Sequence[Compiled], backend: Backend) -> tuple[np.ndarray | None, Gates | None]:
    """The changes of several rows as one bias and one set of gates."""
    shape = (backend.num_layers, 3, backend.num_experts)
    bias = gates = None
    if any(one.bias is not None for one in changes):
        bias = np.stack([np.zeros(shape, np.float32) if one.bias is None else one.bias for one in changes])
    if any(one.gates is not None for one in changes):
        plain = Gates.unchanged(1, backend.num_layers, 3, backend.top_k)
        rows = [one.gates or plain for one in changes]
        gates = Gates(
            np.concatenate([one.top_k for one in rows]),
            np.concatenate([one.uniform for one in rows]),
            np.concatenate([one.strength for one in rows]),
            np.concatenate([one.attention for one in rows]),
        )
    return bias, gates
