"""`Engine`: messages in, events out. Streams tokens and, with each, the experts that fired; scores continuations.

One request runs at a time (a lock); closing the iterator of `stream`, setting its cancel event or passing its deadline
frees the model within two tokens. Nothing a person typed is logged or kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ming_app.engine.decode import RoutingRecord, Sampler, log_probabilities
from ming_app.engine.interventions import Compiled, compile_interventions, described
from ming_app.engine.prompt import ChatTokenizer, PieceStream
from ming_app.engine.types import (
    Backend,
    Cache,
    EngineInfo,
    Event,
    Finish,
    Intervention,
    Message,
    SamplingParams,
    Start,
    Step,
    Timings,
    Token,
)
from ming_app.errors import PromptTooLongError, UsageError
from ming_app.models.progress import ProgressCallback
from ming_app.molora.config import PROJECTIONS
from ming_app.molora.trace import RouterTrace, TraceToken
from ming_app.settings import Settings

WAIT_SECONDS = 0.05  # between two looks at cancel and deadline while another request runs
PREFILL_CHUNK = 256  # tokens per prefill call: between two chunks a request can be cancelled


class Engine:
    """A loaded model. Make one with `Engine.load(settings)`, or from a backend and a tokenizer."""

    def __init__(self, backend: Backend, tokenizer: ChatTokenizer, info: EngineInfo, adapter: Path | None = None):
        """`adapter`: the folder that the experts came from."""
        self.backend = backend
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.info = info
        self._lock = threading.Lock()

    @classmethod
    def load(cls, settings: Settings, progress: ProgressCallback | None = None) -> Engine:
        """Fetches, checks, builds what is not built yet and loads the model the settings name. Raises MingError."""
        from ming_app.engine.loading import load_engine

        return load_engine(settings, progress)

    def stream(
        self, messages: Sequence[Message], params: SamplingParams, cancel: threading.Event | None = None
    ) -> Iterator[Event]:
        """One Start, Tokens, one Finish; only Finish when stopped before the prompt was read, waiting for its turn too.

        Raises UsageError or PromptTooLongError before the first event.

        A conversation that ends with an assistant message is continued from its words.
        """
        limit = self.info.context_limit
        prompt = self.tokenizer.build(messages, limit, params.max_new_tokens)
        changes = self.changes(params.interventions, params.router_bias)
        return _Request(self, prompt.ids, prompt.dropped_turns, params, changes, cancel or threading.Event()).run(
            self._lock
        )

    def score(
        self,
        prefix: Sequence[Message] | Sequence[int],
        continuations: Sequence[str],
        interventions: Sequence[Intervention] = (),
    ) -> list[float]:
        """Natural log-probability of each continuation after the prefix (messages, or prompt ids).

        The prefix is read once. A prefix of messages that ends with an assistant turn continues that turn's words.
        Raises UsageError for an empty continuation, PromptTooLongError when it does not fit.
        """
        encoded = [np.array(self.tokenizer.encode_text(text), np.int64) for text in continuations]
        if not encoded or any(not len(ids) for ids in encoded):
            raise UsageError("There is nothing to score.", "没有可打分的内容。")
        longest = max(len(ids) for ids in encoded)
        changes = self.changes(interventions)
        if all(isinstance(item, Message) for item in prefix):
            turns = [item for item in prefix if isinstance(item, Message)]
            ids = np.array(self.tokenizer.build(turns, self.info.context_limit, 1).ids, np.int64)
        else:
            ids = np.array(prefix, np.int64)
        if len(ids) + longest > self.info.context_limit:
            raise PromptTooLongError(
                f"Text and continuation have {len(ids) + longest} tokens; the context holds {self.info.context_limit}.",
                f"文本与续写共 {len(ids) + longest} 个词元，超过上下文上限 {self.info.context_limit}。",
            )
        with self._lock:
            cache = self.backend.new_cache(1, len(ids) + longest)
            first = self._prefill(ids, cache, changes, None, lambda: False)
            assert first is not None  # only a stop request ends a prefill early
            scores = []
            for continuation in encoded:
                total = log_probabilities(first, continuation[:1])[0]
                if len(continuation) > 1:
                    step = self.forward(continuation[:-1], cache, changes, all_logits=True)
                    total += log_probabilities(step.logits[0], continuation[1:]).sum()
                    cache.truncate(0, len(ids))
                scores.append(float(total))
            return scores

    def count_tokens(self, text: str) -> int:
        """Tokens of a text on its own."""
        return len(self.tokenizer.encode_text(text))

    def turn(self) -> threading.Lock:
        """The lock that whoever calls `forward` must hold: one request runs at a time."""
        return self._lock

    def forward(self, ids: np.ndarray, cache: Cache, changes: Compiled, **options: bool) -> Step:
        """One call of the backend for one row, with a request's changes."""
        return self.backend.forward([ids], cache, router_bias=changes.rows, gates=changes.gates, **options)

    def close(self) -> None:
        """Lets go of the model; waits for a running request. The engine cannot be used afterwards."""
        with self._lock:
            self.backend.close()

    def _prefill(
        self,
        ids: np.ndarray,
        cache: Cache,
        changes: Compiled,
        record: RoutingRecord | None,
        stopped: Callable[[], bool],
    ) -> np.ndarray | None:
        """Reads ids in chunks; logits [1, V] after the last, or None when stopped between chunks."""
        step: Step | None = None
        for start in range(0, len(ids), PREFILL_CHUNK):
            if stopped():
                return None
            step = self.forward(ids[start : start + PREFILL_CHUNK], cache, changes)
            if record is not None and step.experts is not None and step.weights is not None:
                record.append(step.experts[0], step.weights[0])
        assert step is not None  # a prompt is never empty
        return step.logits

    def changes(self, interventions: Sequence[Intervention], bias: np.ndarray | None = None) -> Compiled:
        """What the backend must change for a request. Raises UsageError for a bias of another shape or with values that are
        not finite, for interventions out of range, and for any on a model without experts."""
        info = self.info
        if bias is not None:
            shape = (info.num_layers, len(PROJECTIONS), info.num_experts)
            bias = np.asarray(bias, np.float32)
            if bias.shape != shape or not np.isfinite(bias).all():
                raise UsageError(
                    f"The router bias must be finite numbers of shape {shape}, got {bias.shape}.",
                    f"路由偏置应为形状 {shape} 的有限数值，实际为 {bias.shape}。",
                )
        if interventions and not info.num_experts:
            raise UsageError("This model has no experts to intervene on.", "该模型没有专家，无法进行干预。")
        return compile_interventions(interventions, info.num_layers, info.num_experts, info.top_k, bias)


@dataclass
class _Request:
    """The state of one answer while it is made."""

    engine: Engine
    prompt_ids: list[int]
    dropped_turns: int
    params: SamplingParams
    changes: Compiled
    cancel: threading.Event

    def run(self, lock: threading.Lock) -> Iterator[Event]:
        self.started = time.monotonic()
        self.prefill_seconds = 0.0
        self.record: RoutingRecord | None = None
        self.tokens: list[TraceToken] = []
        while not lock.acquire(timeout=WAIT_SECONDS):
            reason = self._interruption()
            if reason:
                yield self._finish(reason, 0)
                return
        try:
            yield from self._events()
        finally:
            lock.release()

    def _events(self) -> Iterator[Event]:
        engine, backend, n_prompt = self.engine, self.engine.backend, len(self.prompt_ids)
        max_new = min(self.params.max_new_tokens, engine.info.context_limit - n_prompt)
        self.record = self._new_record(n_prompt + max_new)
        self.tokens = prompt_tokens(self.prompt_ids, engine.tokenizer.piece_stream())
        cache = backend.new_cache(1, n_prompt + max_new)
        ids = np.array(self.prompt_ids, np.int64)
        began = time.monotonic()
        logits = engine._prefill(ids, cache, self.changes, self.record, self._interrupted)
        self.prefill_seconds = time.monotonic() - began
        if logits is None:
            self.tokens = self.tokens[: self.record.length if self.record else 0]
            yield self._finish(self._interruption() or "cancelled", 0)
            return
        yield Start(n_prompt, max_new, engine.info.context_limit, self.dropped_turns, self._trace(0))
        yield from self._decode(logits, cache, max_new)

    def _decode(self, logits: np.ndarray, cache: Cache, max_new: int) -> Iterator[Event]:
        """Tokens until a stop token, the length, a cancel or the deadline; then Finish.

        A token's router rows come from the forward that reads it, so a token is announced after that forward: the
        event carries its own routing. The forward of the last token is what its routing costs.
        """
        stop_ids = self.engine.tokenizer.stop_ids
        sampler, pieces = Sampler(self.params), self.engine.tokenizer.piece_stream()
        piece, pending, new = self._next_piece(), 0, 0
        reason = "length"
        while new < max_new:
            interruption = self._interruption()
            if interruption:
                reason = interruption
                break
            token, logprob = sampler.choose(logits[0])
            if token in stop_ids:
                reason = "stop"
                break
            step = self.engine.forward(np.array([token], np.int64), cache, self.changes)
            logits = step.logits
            if self.record is not None and step.experts is not None and step.weights is not None:
                self.record.append(step.experts[0], step.weights[0])
            new += 1
            text = pieces.push(token)
            self._clock(new)
            self.tokens.append(TraceToken(token, text or "", "answer", piece, logprob))
            pending += 1
            if text is not None:
                yield self._token(pending)
                piece, pending = piece + 1, 0
        if pending:
            last = self.tokens[-1]
            self.tokens[-1] = TraceToken(last.id, pieces.flush(), last.role, last.piece, last.logprob)
            yield self._token(pending)
        yield self._finish(reason, new)

    def _clock(self, new: int) -> None:
        now = time.monotonic()
        if new == 1:
            self.first_token = now
        self.latest_token = now

    def _token(self, count: int) -> Token:
        """The event of the piece formed by the last `count` tokens."""
        tokens = tuple(self.tokens[-count:])
        experts = weights = None
        if self.record is not None:
            rows = slice(self.record.length - count, self.record.length)
            experts, weights = self.record.experts[rows].copy(), self.record.weights[rows].copy()
        return Token("".join(t.text for t in tokens), tokens, sum(t.logprob or 0.0 for t in tokens), experts, weights)

    def _finish(self, reason: str, new: int) -> Finish:
        now = time.monotonic()
        first = self.first_token - self.started if new else 0.0
        spent = self.latest_token - self.first_token if new > 1 else 0.0
        rate = (new - 1) / spent if spent > 0 else 0.0
        timings = Timings(self.prefill_seconds, first, now - self.started, rate)
        return Finish(reason, len(self.prompt_ids), new, timings, self._trace(0))

    def _interruption(self) -> str | None:
        if self.cancel.is_set():
            return "cancelled"
        deadline = self.params.deadline
        return "deadline" if deadline is not None and time.monotonic() - self.started > deadline else None

    def _interrupted(self) -> bool:
        return self._interruption() is not None

    def _next_piece(self) -> int:
        return self.tokens[-1].piece + 1 if self.tokens else 0

    def _new_record(self, capacity: int) -> RoutingRecord | None:
        info = self.engine.info
        if not self.params.trace or info.num_experts == 0:
            return None
        return RoutingRecord(capacity, info.num_layers, len(PROJECTIONS), self.changes.largest_k(info.top_k))

    def _trace(self, start: int) -> RouterTrace | None:
        if self.record is None:
            return None
        info, rows = self.engine.info, slice(start, self.record.length)
        return RouterTrace(
            experts=self.record.experts[rows].copy(),
            weights=self.record.weights[rows].copy(),
            tokens=tuple(self.tokens[rows]),
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


def prompt_tokens(ids: Sequence[int], pieces: PieceStream) -> list[TraceToken]:
    """Prompt tokens with their text; tokens that form one character share a piece."""
    tokens, piece = [], 0
    for token_id in ids:
        text = pieces.push(token_id)
        tokens.append(TraceToken(token_id, text or "", "prompt", piece))
        piece += text is not None
    return tokens
