"""What the batcher runs: an answer in the making, or continuations to be scored. Each knows what it reads next and what to do
with the logits; neither knows of the others. Driven by one thread (batch.py); events leave through a queue.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ming_app.engine.decode import RoutingRecord, Sampler, likeliest, log_probabilities
from ming_app.engine.interventions import Compiled, described
from ming_app.engine.paging import PAGE
from ming_app.engine.prompt import ChatTokenizer, PieceStream
from ming_app.engine.types import EngineInfo, Event, Finish, Outcome, Queued, SamplingParams, Start, Timings, Token
from ming_app.errors import UsageError
from ming_app.molora.config import PROJECTIONS
from ming_app.molora.trace import RouterTrace, TraceToken


class Job:
    """Something that reads `prompt` (int64 [n]) into a row of the cache and then goes on token by token.

    `feed`: the next token, once the prompt has been read; `ended`: it wants no more. `most_new`: tokens that may follow.
    `visitor`: see `SamplingParams`.
    """

    def __init__(self, prompt: np.ndarray, changes: Compiled, most_new: int, visitor: str = ""):
        self.visitor = visitor
        self.prompt = prompt
        self.changes = changes
        self.most_new = most_new
        self.arrived = time.monotonic()
        self.read = self.reused = 0
        """tokens of the prompt that are in the cache; those of them that an earlier request had read"""
        self.feed: int | None = None
        self.ended = False
        self.record: RoutingRecord | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens of the cache that it may take; a page may have to be copied."""
        return len(self.prompt) + self.most_new + PAGE

    def wait(self, before: int, seconds: float) -> None:
        """It has no row yet: so many go before it, which may take so long."""

    def begin(self) -> None:
        """It has a row; called once, before anything is read."""

    def reuse(self, record: RoutingRecord | None, length: int) -> None:
        """The first `length` tokens of the prompt are in the cache already; their routing, where it is wanted."""
        self.read = self.reused = length
        if self.record is not None and record is not None:
            self.record.append(record.experts[:length], record.weights[:length])

    def took(
        self,
        count: int,
        logits: np.ndarray,
        log_total: float | None,
        experts: np.ndarray | None,
        weights: np.ndarray | None,
    ) -> None:
        """`count` tokens have been read; `logits` float32 [V] after the last, routing [count, L, P, k] of all."""
        if self.record is not None and experts is not None and weights is not None:
            width = self.record.experts.shape[-1]  # other rows of the batch may choose more experts
            self.record.append(experts[..., :width], weights[..., :width])
        if self.read < len(self.prompt):
            self.read += count
        if self.read == len(self.prompt):
            self.think(logits, log_total)

    def think(self, logits: np.ndarray, log_total: float | None) -> None:
        """The prompt and all that was fed have been read: emits, and sets `feed` or `ended`. `log_total`: see `Step`."""
        raise NotImplementedError

    def interrupted(self) -> bool:
        """Whether it must end now; it has said so to whoever waits."""
        return False

    def fail(self, error: BaseException) -> None:
        """It cannot go on."""
        raise NotImplementedError

    def close(self) -> None:
        """The server stops while it runs."""
        self.fail(closed())

    def outcome(self, reason: str) -> Outcome | None:
        """How it ended, with this reason in place of its own unless ""; None where nobody counts."""
        return None


def closed() -> UsageError:
    """The model is gone."""
    return UsageError("The model has been closed.", "模型已关闭。")


class AnswerJob(Job):
    """One answer: Start, Tokens, Finish into `queue`, or an exception."""

    def __init__(
        self,
        info: EngineInfo,
        tokenizer: ChatTokenizer,
        ids: Sequence[int],
        dropped_turns: int,
        params: SamplingParams,
        changes: Compiled,
        cancel: threading.Event,
    ):
        most_new = min(params.max_new_tokens, info.context_limit - len(ids))
        super().__init__(np.array(ids, np.int64), changes, most_new, params.visitor)
        self.info = info
        self.params = params
        self.cancel = cancel
        self.queue: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._dropped_turns = dropped_turns
        self._stop_ids = tokenizer.stop_ids
        self._tokens = prompt_tokens(ids, tokenizer.piece_stream())
        self._pieces = tokenizer.piece_stream()
        self._sampler = Sampler(params)
        self._logprob = 0.0
        self._piece = self._tokens[-1].piece + 1
        self._pending = 0  # tokens of a character that is not whole yet
        self._alternatives: list[tuple[tuple[int, float], ...]] = []  # of the next token and of those that are pending
        self._held: list[Token] = []  # pieces that may be the beginning of a stop text
        self._new = 0
        self._abandoned = False
        self._prefill_seconds = 0.0
        self._began: float | None = None
        self._before: int | None = None  # what it was told of its place
        self._reason = ""
        self._first_token = self._latest_token = self.arrived
        if params.trace and info.num_experts:
            most = changes.largest_k(info.top_k)
            self.record = RoutingRecord(len(ids) + most_new, info.num_layers, len(PROJECTIONS), most)

    def events(self) -> Iterator[Event]:
        """Up to Finish; raises what stopped the answer."""
        while True:
            item = self.queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, Finish):
                return

    def wait(self, before: int, seconds: float) -> None:
        if before != self._before:
            self._before = before
            self.queue.put(Queued(before, seconds))

    def begin(self) -> None:
        self._began = time.monotonic()
        if self._before is not None:
            self.queue.put(Queued(0, 0.0))

    def think(self, logits: np.ndarray, log_total: float | None) -> None:
        if self.feed is None:
            self._prefill_seconds = time.monotonic() - (self._began or self.arrived)
            limit, dropped = self.info.context_limit, self._dropped_turns
            self.queue.put(Start(len(self.prompt), self.most_new, limit, dropped, self._trace(), self.reused))
        elif self._write(self.feed):
            return
        if self._new >= self.most_new:
            self._finish("length")
        elif not self.interrupted():
            token, self._logprob = self._sampler.choose(logits, log_total)
            if token in self._stop_ids:
                self._finish("stop")
            else:
                self.feed = token
                self._alternatives.append(likeliest(logits, log_total, self.params.alternatives))

    def abandon(self) -> None:
        """Nobody listens any more."""
        self._abandoned = True

    def interrupted(self) -> bool:
        since, limit = (
            (self.arrived, self.params.patience) if self._began is None else (self._began, self.params.deadline)
        )
        if self._abandoned or self.cancel.is_set():
            self._finish("cancelled")
        elif limit is not None and time.monotonic() - since > limit:
            self._finish("deadline")
        return self.ended

    def fail(self, error: BaseException) -> None:
        self.ended = True
        self.queue.put(error)

    def close(self) -> None:
        self._finish("closing")

    def outcome(self, reason: str) -> Outcome:
        now = time.monotonic()
        return Outcome(
            reason or self._reason,
            len(self.prompt),
            self.reused,
            self._new,
            (self._began or now) - self.arrived,
            self._first_token - self.arrived if self._new else 0.0,
            now - self.arrived,
        )

    def _write(self, token: int) -> bool:
        """A token that has been read: it is announced with its own routing. Whether that ended the answer."""
        self._new += 1
        self._latest_token = time.monotonic()
        if self._new == 1:
            self._first_token = self._latest_token
        text = self._pieces.push(token)
        self._tokens.append(TraceToken(token, text or "", "answer", self._piece, self._logprob))
        self._pending += 1
        if text is None:
            return False
        piece = self._take_piece()
        if not self.params.stop:
            self.queue.put(piece)
            return False
        self._held.append(piece)
        said = "".join(one.text for one in self._held)
        at = min((i for i in (said.find(stop) for stop in self.params.stop) if i >= 0), default=-1)
        if at >= 0:
            self._let_go(at)
            self._finish("stop")
            return True
        if not any(said.endswith(stop[:n]) for stop in self.params.stop for n in range(1, len(stop))):
            self._let_go(len(said))
        return False

    def _let_go(self, length: int) -> None:
        """Emits the held pieces, cut to so many characters."""
        for piece in self._held:
            if length > 0:
                cut = piece.text[:length]
                self.queue.put(replace(piece, text=cut))
                length -= len(cut)
        self._held.clear()

    def _take_piece(self) -> Token:
        """The event of the piece that the pending tokens form."""
        count, self._pending = self._pending, 0
        self._piece += 1
        tokens = tuple(self._tokens[-count:])
        experts = weights = None
        if self.record is not None:
            rows = slice(self.record.length - count, self.record.length)
            experts, weights = self.record.experts[rows].copy(), self.record.weights[rows].copy()
        beside, self._alternatives = tuple(self._alternatives[:count]), self._alternatives[count:]
        text, logprob = "".join(t.text for t in tokens), sum(t.logprob or 0.0 for t in tokens)
        return Token(text, tokens, logprob, experts, weights, beside if self.params.alternatives else ())

    def _finish(self, reason: str) -> None:
        self.ended, self._reason = True, reason
        if self._pending:
            last = self._tokens[-1]
            self._tokens[-1] = TraceToken(last.id, self._pieces.flush(), last.role, last.piece, last.logprob)
            self._held.append(self._take_piece())
        self._let_go(1 << 60)
        if self.record is not None:  # what was not read leaves no trace
            del self._tokens[self.record.length :]
        now, new = time.monotonic(), self._new
        spent = self._latest_token - self._first_token if new > 1 else 0.0
        first = self._first_token - self.arrived if new else 0.0
        rate = (new - 1) / spent if spent > 0 else 0.0
        timings = Timings(self._prefill_seconds, first, now - self.arrived, rate)
        self.queue.put(Finish(reason, len(self.prompt), new, timings, self._trace()))

    def _trace(self) -> RouterTrace | None:
        if self.record is None or not self.record.length:
            return None
        info, rows = self.info, slice(0, self.record.length)
        return RouterTrace(
            experts=self.record.experts[rows].copy(),
            weights=self.record.weights[rows].copy(),
            tokens=tuple(self._tokens[rows]),
            num_experts=info.num_experts,
            model=info.title,
            fingerprint=info.fingerprint,
            config={
                **info.adapter_config,
                "backend": info.backend,
                "precision": info.precision,
                **described(self.params.interventions),
            },
        )


class ScoreJob(Job):
    """Scores continuations (int64 [n] each) after a prompt that is read once.

    Continuations of one token need no more than the logits after the prompt; longer ones are fed one after the other.
    """

    def __init__(self, prompt: np.ndarray, continuations: Sequence[np.ndarray], changes: Compiled):
        super().__init__(prompt, changes, max(len(one) for one in continuations) - 1)
        self._scores: list[float] = []
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._left = list(continuations)
        self._after_prompt: np.ndarray | None = None
        self._at = 0  # tokens of the first of `_left` that have been fed
        self._sum = 0.0
        self.rewind = False
        """the next feed begins again after the prompt"""

    def think(self, logits: np.ndarray, log_total: float | None) -> None:
        if self._after_prompt is None:
            self._after_prompt = logits.copy()
        self.feed = None
        while self._left:
            ids = self._left[0]
            after = self._after_prompt if self._at == 0 else logits
            self._sum += float(log_probabilities(after[None], ids[self._at : self._at + 1])[0])
            self._at += 1
            if self._at < len(ids):
                self.rewind = self._at == 1
                self.feed = int(ids[self._at - 1])
                return
            self._scores.append(self._sum)
            self._left.pop(0)
            self._at, self._sum = 0, 0.0
        self.ended = True
        self._done.set()

    def result(self) -> list[float]:
        """Natural log-probabilities, once they are there; raises what stopped it."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._scores

    def fail(self, error: BaseException) -> None:
        self.ended = True
        self._error = error
        self._done.set()


def prompt_tokens(ids: Sequence[int], pieces: PieceStream) -> list[TraceToken]:
    """Prompt tokens with their text; tokens that form one character share a piece."""
    tokens, piece = [], 0
    for token_id in ids:
        text = pieces.push(token_id)
        tokens.append(TraceToken(token_id, text or "", "prompt", piece))
        piece += text is not None
    return tokens
