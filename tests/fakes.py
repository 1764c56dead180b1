"""Scripted stand-in for the Engine, for tests of its callers only: real event types, no model, fully deterministic.

`FakeEngine` answers from a script and follows the Engine's contract: one Start, Tokens of whole characters (a
non-BMP character is formed by several tokens, as byte tokens form it in the real engine), one Finish whose trace
covers prompt and answer; cancel, length and deadline act as they do there.
"""

from __future__ import annotations

import re
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ming_app.engine.types import (
    EngineInfo,
    Event,
    Finish,
    Message,
    Outcome,
    Queued,
    SamplingParams,
    Start,
    Timings,
    Token,
)
from ming_app.engine.waiting import WaitingRoom
from ming_app.errors import MingError, PromptTooLongError
from ming_app.molora.trace import RouterTrace, TraceToken

Script = str | Callable[[Sequence[Message]], str]

DEFAULT_ANSWER = "Drink water and rest. 多喝水，注意休息。💧"


def long_text(words: int) -> str:
    """So many words, no two alike: an answer that goes on without repeating itself."""
    return "".join(f"word{i} " for i in range(words))


def split_pieces(text: str) -> list[str]:
    """Whole-character pieces: a word with its leading spaces, or one character of anything else."""
    return re.findall(r"[ \t]*[A-Za-z0-9]+|\s|.", text, re.DOTALL)


class FakeEngine:
    """Answers with `script` (a text, or a function of the messages). `calls` records (messages, params).

    `delay`: seconds between tokens. `error`: raised before the first event. `open_streams`: streams not yet closed. `slots`,
    `max_waiting`: who runs and who waits is decided by the engine's own WaitingRoom.
    """

    def __init__(
        self,
        script: Script = DEFAULT_ANSWER,
        *,
        num_layers: int = 3,
        num_experts: int = 4,
        top_k: int = 2,
        context_limit: int = 4096,
        delay: float = 0.0,
        error: MingError | None = None,
        model: str = "fake-model",
        slots: int = 8,
        max_waiting: int = 0,
    ) -> None:
        self._room: WaitingRoom[SamplingParams] = WaitingRoom(slots, max_waiting)
        self._running: list[SamplingParams] = []
        self._changed = threading.Condition()
        self.script = script
        self.delay = delay
        self.error = error
        self.calls: list[tuple[list[Message], SamplingParams]] = []
        self.open_streams = 0
        self.closed = False
        self.info = EngineInfo(
            model=model,
            title="Fake model",
            backend="torch",
            precision="float32",
            device="cpu",
            num_layers=num_layers,
            num_experts=num_experts,
            top_k=top_k,
            context_limit=context_limit,
            fingerprint="f" * 64,
            adapter_config={"num_experts": num_experts, "top_k": top_k} if num_experts else {},
        )

    def count_tokens(self, text: str) -> int:
        return len(split_pieces(text))

    def score(self, prefix: Sequence[Message] | Sequence[int], continuations: Sequence[str]) -> list[float]:
        """A log-probability per continuation, fixed by its text alone."""
        return [-1.0 - zlib.crc32(text.encode()) % 1000 / 100 for text in continuations]

    def close(self) -> None:
        self.closed = True

    def stream(
        self, messages: Sequence[Message], params: SamplingParams, cancel: threading.Event | None = None
    ) -> Iterator[Event]:
        """Start, Tokens, Finish, as the Engine's contract has them."""
        self.calls.append((list(messages), params))
        if self.error is not None:
            raise self.error
        self.open_streams += 1
        mine, cancel = replace(params), cancel or threading.Event()  # told from others by identity
        try:
            if (yield from self._turn(mine, cancel)):
                yield from self._events(messages, params, cancel)
        finally:
            self.open_streams -= 1
            with self._changed:
                self._room.leave(mine)
                self._running = [one for one in self._running if one is not mine]
                self._changed.notify_all()

    def on_end(self, told: Callable[[Outcome], None]) -> None:
        """Nothing is counted."""

    draining = False

    def expected_wait(self) -> float:
        return self._room.seconds(len(self._room))

    def drain(self, seconds: float) -> bool:
        return True

    def load_now(self) -> tuple[int, int]:
        return len(self._running), len(self._room)

    def _turn(self, mine: SamplingParams, cancel: threading.Event) -> Generator[Event, None, bool]:
        """Waits until there is a place. False when it gave up."""
        with self._changed:
            self._room.enter([mine], self._running)
        told = None
        while not cancel.is_set():
            with self._changed:
                before = next(at for at, one in enumerate(self._room.order(self._running)) if one is mine)
                if before == 0 and len(self._running) < self._room.slots:
                    self._room.leave(mine)
                    self._running.append(mine)
                    break
                if before == told:
                    self._changed.wait(0.02)
                    continue
                told = before
            yield Queued(before, self._room.seconds(before))
        if cancel.is_set():
            yield Finish("cancelled", 0, 0, Timings(0.0, 0.0, 0.0, 0.0), None)
            return False
        if told is not None:
            yield Queued(0, 0.0)
        return True

    def _events(self, messages: Sequence[Message], params: SamplingParams, cancel: threading.Event) -> Iterator[Event]:
        begin = time.perf_counter()
        limit = self.info.context_limit
        kept, dropped = self._fit(list(messages))
        prompt = [t for m in kept for t in self._tokens(f"{m.role}: {m.content}\n", "prompt")]
        prompt = [replace(t, piece=i) for i, t in enumerate(prompt)]
        traced = params.trace and self.info.num_experts > 0
        room = min(params.max_new_tokens, limit - len(prompt))
        yield Start(len(prompt), room, limit, dropped, self._trace(prompt) if traced else None)

        answer: list[TraceToken] = []
        reason, first, piece = "stop", 0.0, len(prompt)
        text = self.script if isinstance(self.script, str) else self.script(messages)
        for part in split_pieces(text):
            group = tuple(replace(t, piece=piece) for t in self._tokens(part, "answer", joined=True))
            if cancel.is_set():
                reason = "cancelled"
            elif params.deadline is not None and time.perf_counter() - begin > params.deadline:
                reason = "deadline"
            elif len(answer) + len(group) > room:
                reason = "length"
            if reason != "stop":
                break
            if self.delay:
                time.sleep(self.delay)
            first = first or time.perf_counter() - begin
            answer.extend(group)
            piece += 1
            experts, weights = self._routing(group) if traced else (None, None)
            yield Token(part, group, -0.25 * len(group), experts, weights)
        total = time.perf_counter() - begin
        rate = (len(answer) - 1) / max(total - first, 1e-6) if len(answer) > 1 else 0.0
        trace = self._trace([*prompt, *answer]) if traced else None
        yield Finish(reason, len(prompt), len(answer), Timings(first, first, total, rate), trace)

    def _fit(self, messages: list[Message]) -> tuple[list[Message], int]:
        """Drops the oldest turns (never the system message nor the newest) until half the context is free."""
        limit, dropped = self.info.context_limit, 0
        if self.count_tokens(messages[-1].content) > limit - 16:
            count = self.count_tokens(messages[-1].content)
            raise PromptTooLongError(
                f"The message has {count} tokens; the limit is {limit}.", f"消息有 {count} 个词元，上限为 {limit}。"
            )
        while len(messages) > 1 and sum(self.count_tokens(f"{m.role}: {m.content}\n") for m in messages) > limit - 16:
            oldest = next(i for i, m in enumerate(messages) if m.role != "system")
            if oldest == len(messages) - 1:
                break
            del messages[oldest]
            dropped += 1
        return messages, dropped

    def _tokens(self, text: str, role: str, joined: bool = False) -> list[TraceToken]:
        """Tokens of `text`; characters outside the BMP become two tokens of one piece when `joined`."""
        rows = []
        for part in split_pieces(text):
            ident = zlib.crc32(part.encode()) % 50000
            logprob = -0.25 if role == "answer" else None
            if joined and ord(part[-1]) > 0xFFFF:
                rows.append(TraceToken(ident + 1, "", role, 0, logprob))
            rows.append(TraceToken(ident, part, role, 0, logprob))
        return rows

    def _routing(self, tokens: Sequence[TraceToken]) -> tuple[np.ndarray, np.ndarray]:
        """experts uint8 and weights float16, both [n, L, P, k], fixed by token id, layer and projection."""
        L, E, k = self.info.num_layers, self.info.num_experts, self.info.top_k
        ids = np.array([t.id for t in tokens], np.int64).reshape(-1, 1, 1, 1)
        layer, projection = np.arange(L).reshape(1, L, 1, 1), np.arange(3).reshape(1, 1, 3, 1)
        experts = (ids + layer + projection + np.arange(k)) % E
        raw = np.broadcast_to(0.5 ** np.arange(1, k + 1), experts.shape)
        return experts.astype(np.uint8), (raw / raw.sum(-1, keepdims=True)).astype(np.float16)

    def _trace(self, tokens: Sequence[TraceToken]) -> RouterTrace:
        experts, weights = self._routing(tokens)
        return RouterTrace(
            experts,
            weights,
            tuple(tokens),
            num_experts=self.info.num_experts,
            model=self.info.title,
            fingerprint=self.info.fingerprint,
            config={**self.info.adapter_config, "precision": self.info.precision, "backend": self.info.backend},
        )
