"""Errors of the API, in the form that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from ming_app.errors import BusyError, MingError, NotReadyError, PromptTooLongError, UsageError


@dataclass(eq=False)
class ApiError(Exception):
    """`param`: the field that is wrong. `retry_after`: seconds, for a header of that name."""

    status: int
    kind: str
    code: str
    en: str
    zh: str
    param: str | None = None
    retry_after: float | None = None

    def body(self, lang: str) -> dict[str, Any]:
        message = self.zh if lang == "zh" else self.en
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self, lang: str) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(lang), self.status, headers)


def invalid(param: str | None, en: str, zh: str, code: str = "invalid_value") -> ApiError:
    """What was sent cannot be used."""
    return ApiError(400, "invalid_request_error", code, en, zh, param)


def unavailable(code: str, retry_after: float, en: str, zh: str) -> ApiError:
    """The model cannot answer now."""
    return ApiError(503, "server_error", code, en, zh, retry_after=retry_after)


def api_error(error: BaseException) -> ApiError:
    """What the engine raised, as the API says it. A bug is named by its kind alone: its words may hold a person's."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        if error.kind in ("closing", "lost"):
            return unavailable(error.kind, error.retry_after, error.en, error.zh)
        code = "queue_full" if error.kind == "full" else "too_many_requests"
        return ApiError(429, "rate_limit_error", code, error.en, error.zh, retry_after=error.retry_after)
    if isinstance(error, NotReadyError):
        code, retry_after = ("failed", 60) if error.failed else ("loading", 10)
        return unavailable(code, retry_after, error.en, error.zh)
    if isinstance(error, PromptTooLongError):
        return invalid("messages", error.en, error.zh, "context_length_exceeded")
    if isinstance(error, UsageError):
        return invalid(None, error.en, error.zh)
    if isinstance(error, MingError):
        return ApiError(500, "server_error", "engine_error", error.en, error.zh)
    name = type(error).__name__
    return ApiError(
        500,
        "server_error",
        "internal_error",
        f"An unexpected error ({name}) stopped this request; the server goes on. Please try again.",
        f"发生意外错误（{name}），本次请求中断，服务仍在运行。请重试。",
    )
