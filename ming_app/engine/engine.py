"""`Engine`: messages in, events out. Streams tokens and, with each, the experts that fired; scores continuations.

Many requests run together (batch.py); each gives what it gives alone. Closing the iterator of `stream`, setting its cancel
event or passing its deadline frees its place within two tokens. How many may wait is bounded (waiting.py). Nothing a person typed is logged or kept, beyond the cache of
what was read last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ming_app.engine.batch import Batcher
from ming_app.engine.interventions import Compiled, compile_interventions
from ming_app.engine.jobs import AnswerJob, Job, ScoreJob
from ming_app.engine.prompt import ChatTokenizer
from ming_app.engine.types import (
    Backend,
    Cache,
    EngineInfo,
    Event,
    Intervention,
    Message,
    Outcome,
    SamplingParams,
    Step,
)
from ming_app.engine.waiting import WaitingRoom
from ming_app.errors import PromptTooLongError, UsageError
from ming_app.models.progress import ProgressCallback
from ming_app.molora.config import PROJECTIONS
from ming_app.settings import Settings

SLOTS = 8


class Engine:
    """A loaded model. Make one with `Engine.load(settings)`, or from a backend and a tokenizer."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: ChatTokenizer,
        info: EngineInfo,
        adapter: Path | None = None,
        *,
        slots: int = SLOTS,
        kv_tokens: int = 0,
        max_waiting: int = 0,
        per_visitor: int = 0,
    ):
        """`adapter`: the folder that the experts came from. `slots`: requests that run at a time. `kv_tokens`: tokens that
        the cache of all conversations holds, at least one context; 0: four contexts. `max_waiting`, `per_visitor`: see
        `WaitingRoom`."""
        self.backend = backend
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.info = info
        self._reading = threading.Lock()
        self.closing = threading.Event()
        """set once `close` was called: what reads closely ends"""
        waiting: WaitingRoom[Job] = WaitingRoom(slots, max_waiting, per_visitor)
        self._batcher = Batcher(backend, kv_tokens or 4 * info.context_limit, info.context_limit, waiting)

    @classmethod
    def load(cls, settings: Settings, progress: ProgressCallback | None = None) -> Engine:
        """Fetches, checks, builds what is not built yet and loads the model the settings name. Raises MingError."""
        from ming_app.engine.loading import load_engine

        return load_engine(settings, progress)

    def stream(
        self, messages: Sequence[Message], params: SamplingParams, cancel: threading.Event | None = None
    ) -> Iterator[Event]:
        """Queued while it waits for its turn, one Start, Tokens, one Finish; only Finish when stopped before the prompt was
        read, waiting for its turn too.

        Raises UsageError, PromptTooLongError or BusyError before the first event.

        A conversation that ends with an assistant message is continued from its words.
        """
        limit = self.info.context_limit
        prompt = self.tokenizer.build(messages, limit, params.max_new_tokens)
        changes = self.changes(params.interventions, params.router_bias)
        stop = cancel or threading.Event()
        return self._events(
            AnswerJob(self.info, self.tokenizer, prompt.ids, prompt.dropped_turns, params, changes, stop)
        )

    def _events(self, job: AnswerJob) -> Iterator[Event]:
        self._batcher.submit(job)
        try:
            yield from job.events()
        finally:
            job.abandon()

    def score(
        self,
        prefix: Sequence[Message] | Sequence[int],
        continuations: Sequence[str],
        interventions: Sequence[Intervention] = (),
    ) -> list[float]:
        """Natural log-probability of each continuation after the prefix (messages, or prompt ids).

        The prefix is read once, and what it has in common with one read lately not at all. Threads that score at the same
        time are served together. A prefix of messages that ends with an assistant turn continues that turn's words.
        Raises UsageError for an empty continuation, PromptTooLongError when it does not fit.
        """
        encoded = [np.array(self.tokenizer.encode_text(text), np.int64) for text in continuations]
        if not encoded or any(not len(ids) for ids in encoded):
            raise UsageError("There is nothing to score.", "没有可打分的内容。")
        longest = max(len(ids) for ids in encoded)
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
        job = ScoreJob(ids, encoded, self.changes(interventions))
        self._batcher.submit(job)
        return job.result()

    def load_now(self) -> tuple[int, int]:
        """(requests that run, requests that wait for a place)."""
        return self._batcher.load()

    def on_end(self, told: Callable[[Outcome], None]) -> None:
        """`told` is called once for every request to `stream` that ends or is refused, from another thread; it must be quick."""
        self._batcher.on_end = told

    def drain(self, seconds: float) -> bool:
        """Before `close`: no new requests (BusyError), those that wait are sent away, those that run have so many seconds.
        Whether all of them ended."""
        return self._batcher.drain(seconds)

    def expected_wait(self) -> float:
        """Seconds that a request may have to wait that comes now, by how long answers took lately."""
        return self._batcher.expected_wait()

    @property
    def draining(self) -> bool:
        """Whether `drain` has begun."""
        return self._batcher.draining

    def count_tokens(self, text: str) -> int:
        """Tokens of a text on its own."""
        return len(self.tokenizer.encode_text(text))

    def turn(self) -> threading.Lock:
        """The lock that whoever calls `forward` must hold: one text is read closely at a time."""
        return self._reading

    def forward(self, ids: np.ndarray, cache: Cache, changes: Compiled, *, all_logits: bool, measure: bool) -> Step:
        """One call of the backend for the one row of a cache of one's own, with a request's changes."""
        bias, gates = changes.rows, changes.gates
        return self.backend.forward([ids], cache, router_bias=bias, gates=gates, all_logits=all_logits, measure=measure)

    def close(self) -> None:
        """Ends what runs and lets go of the model. The engine cannot be used afterwards."""
        self.closing.set()
        self._batcher.close()
        with self._reading:
            self.backend.close()

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
