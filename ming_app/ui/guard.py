"""What stands between the page and what others send: other sites are kept out, text that nobody can keep is put right, and
what a bug leaves in the log names the place but never what somebody wrote.

A page on this machine would answer any site whose name is pointed at 127.0.0.1 (DNS rebinding), and take what the pages of
other sites send here; both are refused before Gradio sees them. Gradio logs whatever a handler or its own checks raise, and
such messages quote what came in.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio import queueing, route_utils, routes, state_holder, utils
from gradio.blocks import Block
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ming_app.reading import whole_text
from ming_app.settings import LOOPBACK, Settings

READS = ("GET", "HEAD", "OPTIONS")
OURS = ("same-origin", "none")
"""values of Sec-Fetch-Site of what our own page sends, or a person; browsers set it and no script can"""


def own_hosts(settings: Settings) -> frozenset[str] | None:
    """The names under which the page may be asked for; None: any, where it listens for other machines too."""
    if settings.host not in LOOPBACK:
        return None
    return frozenset(LOOPBACK) | {name.strip().lower() for name in settings.hosts.split(",") if name.strip()}


@dataclass
class OwnSite:
    """ASGI middleware: 421 for a host that is not among `hosts`, 403 for what another site's page sends to be done."""

    app: ASGIApp
    hosts: Collection[str] | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            refused = self._refusal(Headers(scope=scope), scope.get("method", "GET"))
            if refused is not None:
                await refused(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers, method: str) -> PlainTextResponse | None:
        if self.hosts is not None and _name(headers.get("host", "")) not in self.hosts:
            return PlainTextResponse("This page is not served under that name (see MING_HOSTS).", 421)
        if method not in READS and headers.get("sec-fetch-site", "none") not in OURS:
            return PlainTextResponse("Another site's page cannot send this.", 403)
        return None


def _name(host: str) -> str:
    """The host of a Host header without its port; of an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


class WholeBlocks(gr.Blocks):
    """Blocks whose handlers never see a lone surrogate: it could be neither kept nor sent back."""

    async def process_api(self, block_fn: Any, inputs: list[Any], *rest: Any, **named: Any) -> dict[str, Any]:
        event = named.get("event_data")
        if event is not None:
            event._data = whole_text(event._data)
        return await super().process_api(block_fn, whole_text(inputs), *rest, **named)


# -- what is remembered of a visitor ----------------------------------------------------------------------------------


class SameIds(state_holder.SessionState):
    """What Gradio keeps of a session. A component that an update has made anew keeps its id: under an id of its own Gradio would
    keep one more of it with every event, for as long as it knows the visitor."""

    def __setitem__(self, key: int, value: Any) -> None:
        if isinstance(value, Block):
            value._id = key
        super().__setitem__(key, value)


def keep_no_old_components() -> None:
    """For the whole process."""
    state_holder.SessionState = SameIds  # type: ignore[misc]


# -- what is logged ----------------------------------------------------------------------------------------------------


def places(error: BaseException) -> str:
    """A traceback without messages: kinds of the exceptions, files and lines."""
    parts: list[str] = []
    found: BaseException | None = error
    while found is not None and len(parts) < 5:
        parts.append(f"{''.join(traceback.format_tb(found.__traceback__))}{type(found).__name__}\n")
        found = found.__cause__ or found.__context__
    return "\n".join(reversed(parts))


class _Places:
    """Stands in for the traceback module within Gradio."""

    @staticmethod
    def format_exc() -> str:
        error = sys.exception()
        return places(error) if error is not None else ""

    @classmethod
    def print_exc(cls) -> None:
        sys.stderr.write(cls.format_exc())
        sys.stderr.flush()


class PlacesOnly(logging.Filter):
    """Takes the messages of exceptions out of log records. That a reader has gone is no news."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg == "socket.send() raised exception.":
            return False
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if error is not None:
            record.msg, record.args = record.getMessage().partition("\n")[0], None  # asyncio quotes it below
            record.exc_info, record.exc_text = None, places(error)
        return True


PLACES_ONLY = PlacesOnly()
PRINTERS = (queueing, route_utils, routes, utils)
"""modules of Gradio that print tracebacks"""
LOGGERS = ("uvicorn.error", "asyncio")


def keep_words_out_of_logs() -> None:
    """For the whole process; doing it again changes nothing."""
    for module in PRINTERS:
        module.traceback = _Places  # type: ignore[attr-defined]
    for name in LOGGERS:
        logging.getLogger(name).addFilter(PLACES_ONLY)
