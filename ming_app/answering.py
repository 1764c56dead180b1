"""One request through the Engine, collected: events in, an `Answer` out, text shown as it comes.

Shared by the commands `ask`, `chat`, `trace` and `bench`. Knows the Engine's contract, no terminal and no files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, cast

from ming_app.engine.types import EngineInfo, Event, Finish, Message, SamplingParams, Start, Token


class Streams(Protocol):
    """The part of the Engine that answering needs."""

    info: EngineInfo

    def stream(self, messages: Sequence[Message], params: SamplingParams, cancel: threading.Event | None = None) -> Any:
        """Iterator of Start, Tokens, Finish; closing it frees the model."""

    def close(self) -> None:
        """Frees the model."""


@dataclass(frozen=True)
class Answer:
    """What one request gave."""

    text: str
    start: Start | None
    """None when it was stopped before the prompt had been read"""
    finish: Finish

    def to_dict(self, info: EngineInfo) -> dict[str, Any]:
        """The object of `ask --json`; the first seven keys are fixed by contract. Seconds; tokens per second of decode."""
        timings = self.finish.timings
        return {
            "text": self.text,
            "finish_reason": self.finish.reason,
            "prompt_tokens": self.finish.prompt_tokens,
            "new_tokens": self.finish.new_tokens,
            "tokens_per_second": round(timings.tokens_per_second, 3),
            "seconds_to_first_token": round(timings.first_token_seconds, 4),
            "model": info.model,
            "seconds_total": round(timings.total_seconds, 4),
            "dropped_turns": self.start.dropped_turns if self.start else 0,
            "backend": info.backend,
            "precision": info.precision,
            "device": info.device,
            "ai_generated": True,
        }


def answer(
    engine: Streams,
    messages: Sequence[Message],
    params: SamplingParams,
    *,
    on_text: Callable[[str], None] = lambda text: None,
    on_start: Callable[[Start], None] = lambda start: None,
    cancel: threading.Event | None = None,
) -> Answer:
    """Runs one request to its end. Raises what the Engine raises; the model is free again in every case."""
    start: Start | None = None
    finish: Finish | None = None
    pieces: list[str] = []
    with closing(cast(Generator[Event, None, None], engine.stream(messages, params, cancel))) as events:
        for event in events:
            match event:
                case Start():
                    start = event
                    on_start(event)
                case Token():
                    pieces.append(event.text)
                    on_text(event.text)
                case Finish():
                    finish = event
    if finish is None:
        raise RuntimeError("the engine's stream ended without Finish")
    return Answer("".join(pieces), start, finish)
