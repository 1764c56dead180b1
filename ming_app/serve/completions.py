"""An answer in OpenAI's words: one object, or a stream of chunks. Pure: events in, dictionaries out.

What is ours stands under `ming`: the warning of an emergency in the question, notes about the answer, the AI label, the engine's
own reason to end, and the router's trace where it was asked for.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ming_app.engine.prompt import ChatTokenizer
from ming_app.engine.types import EngineInfo, Finish, Message, Start, Token
from ming_app.molora.trace import RouterTrace
from ming_app.molora.trace_file import to_json
from ming_app.safety.notices import AI_LABEL, assessed
from ming_app.safety.output import check_answer, note_text
from ming_app.safety.red_flags import assess


class Completion:
    """One answer in the making. `take` every event; then `chunk`s or the `whole`."""

    def __init__(
        self,
        info: EngineInfo,
        tokenizer: ChatTokenizer,
        messages: Sequence[Message],
        lang: str,
        region: str,
        *,
        logprobs: bool = False,
        trace: bool = False,
    ):
        self.info, self.tokenizer, self.lang = info, tokenizer, lang
        self.with_logprobs, self.with_trace = logprobs, trace
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.text = ""
        self.reused = 0
        self.finish: Finish | None = None
        self.logprobs: list[dict[str, Any]] = []
        self.warning = _warning(messages, region)

    def take(self, event: Start | Token | Finish) -> str:
        """Applies an event; the text that it added."""
        if isinstance(event, Start):
            self.reused = event.reused_tokens
        elif isinstance(event, Finish):
            self.finish = event
        elif isinstance(event, Token):
            self.text += event.text
            if self.with_logprobs:
                self.logprobs += self._logprobs(event)
            return event.text
        return ""

    def whole(self) -> dict[str, Any]:
        """The chat.completion object, once finished."""
        message = {"role": "assistant", "content": self.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": self._content(), "finish_reason": self.finish_reason}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": self.usage(),
            "ming": self._closing(),
        }

    def opening_chunk(self) -> dict[str, Any]:
        """The role, and the warning before any word of the model."""
        ming = {"warning": self.warning, "ai_label": AI_LABEL[self.lang]}
        return self._chunk({"role": "assistant", "content": ""}, ming=ming)

    def text_chunk(self, text: str) -> dict[str, Any]:
        """A piece of text, with the log-probabilities since the last chunk."""
        content, self.logprobs = self._content(), []
        return self._chunk({"content": text}, logprobs=content)

    def closing_chunk(self) -> dict[str, Any]:
        """Why it ended; with the log-probabilities of tokens that gave no text."""
        return self._chunk({}, logprobs=self._content(), finish_reason=self.finish_reason, ming=self._closing())

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of prompt and answer; `cached_tokens` were in memory already."""
        finish = self._finished()
        return {
            "prompt_tokens": finish.prompt_tokens,
            "completion_tokens": finish.new_tokens,
            "total_tokens": finish.prompt_tokens + finish.new_tokens,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }

    @property
    def finish_reason(self) -> str:
        """OpenAI's word: "stop" where the model ended, or a stop text; "length" where the answer was cut."""
        return "stop" if self._finished().reason == "stop" else "length"

    def _finished(self) -> Finish:
        if self.finish is None:
            raise RuntimeError("the answer has not ended")
        return self.finish

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.info.model,
            "system_fingerprint": fingerprint(self.info),
        }

    def _chunk(
        self,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        ming: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        extra = {} if ming is None else {"ming": ming}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **extra}

    def _closing(self) -> dict[str, Any]:
        finish = self._finished()
        notes = [{"check": one.check, "note": note_text(one.check, self.lang)} for one in check_answer(self.text)]
        said: dict[str, Any] = {
            "warning": self.warning,
            "notes": notes,
            "ai_label": AI_LABEL[self.lang],
            "finish_reason": finish.reason,
            "tokens_per_second": round(finish.timings.tokens_per_second, 3),
            "seconds_to_first_token": round(finish.timings.first_token_seconds, 4),
        }
        if self.with_trace:
            said["router_trace"] = _trace(finish.trace)
        return said

    def _content(self) -> dict[str, Any] | None:
        return {"content": self.logprobs, "refusal": None} if self.with_logprobs else None

    def _logprobs(self, event: Token) -> list[dict[str, Any]]:
        beside = event.alternatives or ((),) * len(event.tokens)
        return [
            {
                **self._likely(token.id, token.logprob or 0.0),
                "top_logprobs": [self._likely(one, logprob) for one, logprob in others],
            }
            for token, others in zip(event.tokens, beside, strict=True)
        ]

    def _likely(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self.tokenizer.token_bytes(token)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}


def fingerprint(info: EngineInfo) -> str:
    """Changes with weights, precision and backend, as far as they change answers."""
    weights = "_".join(part[:12] for part in info.fingerprint.split("+"))  # base, and adapter where there is one
    return f"fp_{weights}_{info.backend}_{info.precision}"


def _warning(messages: Sequence[Message], region: str) -> dict[str, str] | None:
    found = assess([one.content for one in messages if one.role == "user"])
    banner = assessed(found, "", region)
    return None if banner is None else {"category": banner.category, "title": banner.title, "action": banner.action}


def _trace(trace: RouterTrace | None) -> dict[str, Any] | None:
    return None if trace is None else to_json(trace)
