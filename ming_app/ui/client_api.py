"""The one named endpoint of the page, `/ask`, for gradio_client and for Gradio apps that load this one.

Everything else of the page is private to it. Refusals are gr.Error in the caller's language; what the model says is labelled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from ming_app.engine.types import DEADLINE, PATIENCE, Finish, Message, SamplingParams, Token
from ming_app.errors import LANGS, MingError, UsageError
from ming_app.safety.notices import AI_LABEL, assessed
from ming_app.safety.output import check_answer, note_text
from ming_app.safety.red_flags import assess
from ming_app.ui.chat import MAX_CHARS
from ming_app.ui.handlers import QUEUED, Handlers
from ming_app.ui.pump import Pump
from ming_app.ui.text import refusal, t

UPDATE_SECONDS = 0.2


def add_client_api(do: Handlers) -> None:
    """Adds the endpoint to the Blocks that are being built."""

    def ask_once(
        request: gr.Request, question: str, lang: str = "en", max_new_tokens: int = 512, seed: int = -1
    ) -> Iterator[dict[str, Any]]:
        """Asks one question. Gives {"text", "finish_reason", "warning", "notes", "ai_label"} again and again while it is answered;
        the last one is complete. `seed` -1: another answer every time; 0 and up: reproducible. `lang`: of notices, "en" or "zh"."""
        lang = lang if lang in LANGS else "en"
        try:
            yield from _answer(do, request.session_hash or "", question, lang, max_new_tokens, seed)
        except MingError as error:
            raise gr.Error(error.message(lang), print_exception=False) from None
        except Exception as error:  # a bug, named without the person's words
            raise gr.Error(t(lang, "refuse.unexpected", kind=type(error).__name__), print_exception=False) from None

    options = {name: value for name, value in QUEUED.items() if name.startswith("concurrency")}
    gr.api(ask_once, api_name="ask", api_visibility="public", **options)


def _answer(do: Handlers, visitor: str, question: Any, lang: str, most: Any, seed: Any) -> Iterator[dict[str, Any]]:
    """Raises MingError."""
    engine = do.loader.ready()
    if not isinstance(question, str):
        raise UsageError("The question must be text.", "问题应为文本。")
    if not question.strip():
        raise refusal("refuse.empty")
    if len(question) > MAX_CHARS:
        raise refusal("refuse.long", n=len(question), limit=MAX_CHARS)
    most, seed = _whole("max_new_tokens", most), _whole("seed", seed)
    banner = assessed(assess([question]), lang, do.settings.region)
    said: dict[str, Any] = {
        "text": "",
        "finish_reason": None,
        "warning": banner.text if banner is not None else "",
        "notes": [],
        "ai_label": AI_LABEL[lang],
    }
    params = SamplingParams(
        most,
        seed=seed if seed >= 0 else None,
        trace=False,
        deadline=DEADLINE,
        patience=PATIENCE,
        visitor=visitor,
    )
    yield said
    told = time.monotonic()
    with closing(Pump(engine, [Message("user", question)], params, threading.Event())) as pump:
        for event in pump.events(1.0):
            if isinstance(event, Token):
                said["text"] += event.text
            elif isinstance(event, Finish):
                said["finish_reason"] = event.reason
                said["notes"] = [note_text(one.check, lang) for one in check_answer(said["text"])]
                break
            if time.monotonic() - told >= UPDATE_SECONDS:
                told = time.monotonic()
                yield said
    yield said


def _whole(name: str, value: Any) -> int:
    """A whole number, also as other languages write it (64.0); what came instead is not repeated."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be a whole number.", f"{name} 应为整数。")
    return value
