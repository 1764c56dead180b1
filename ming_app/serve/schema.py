"""What a client may send to /v1/chat/completions: OpenAI's fields as far as they mean something here, and two of our own.

Fields that would change an answer and are not supported are refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ming_app.engine.interventions import parse_intervention
from ming_app.engine.types import Message, SamplingParams
from ming_app.errors import UsageError
from ming_app.serve.errors import invalid

MAX_MESSAGES = 2000
MAX_NEW_TOKENS = 1024  # where the client names no number
MAX_ALTERNATIVES = 20
T = TypeVar("T")
Text = Annotated[str, StringConstraints(max_length=100_000)]


class Strict(BaseModel):
    """Nothing is ignored: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """`developer` counts as `system`. A conversation that ends with an assistant message is continued."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = Field(default=None, max_length=100)

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(Strict):
    include_usage: bool = False


class ChatRequest(Strict):
    """One request. `router_trace` and `interventions` are ours (`extra_body` of OpenAI's client)."""

    model: str = Field(default="", max_length=300)
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    user: str | None = Field(default=None, max_length=256)
    # the only values that ask for what is done anyway
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    # ours
    top_k: int | None = Field(default=None, ge=0, le=1 << 20)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.5, le=3)
    router_trace: bool = False
    interventions: list[str] = Field(default_factory=list, max_length=64)

    def params(self, visitor: str, deadline: float, patience: float) -> SamplingParams:
        """Raises ApiError for texts to stop at, or interventions, that cannot be."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if getattr(self, name) is not None
        }
        if "top_p" in given:
            given["top_p"] = max(given["top_p"], 0.01)
        interventions = _checked("interventions", lambda: tuple(map(parse_intervention, self.interventions)))
        _checked("stop", lambda: SamplingParams(stop=tuple(stop)))
        return SamplingParams(
            max_new_tokens=self.max_completion_tokens or self.max_tokens or MAX_NEW_TOKENS,
            seed=None if self.seed is None else self.seed & ((1 << 63) - 1),
            stop=tuple(stop),
            trace=self.router_trace,
            interventions=interventions,
            alternatives=(self.top_logprobs or 0) if self.logprobs else 0,
            deadline=deadline,
            patience=patience,
            visitor=visitor,
            **given,
        )


def _checked(field: str, make: Callable[[], T]) -> T:
    """What `make` gives; where it cannot be, the field is named."""
    try:
        return make()
    except UsageError as error:
        raise invalid(field, error.en, error.zh) from None
