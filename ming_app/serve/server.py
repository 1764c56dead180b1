"""Runs the server: listens, keeps slow clients from holding connections, and stops without losing answers.

The first SIGINT or SIGTERM lets running answers end (`settings.drain_seconds`), while /ready says 503 and nothing new is taken; what
is not finished by then is cut and kept. The second one stops at once.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ming_app.serve.app import build_app
from ming_app.serve.guard import is_loopback
from ming_app.settings import Settings
from ming_app.ui.launch import port_taken, spare_loopback
from ming_app.ui.loader import EngineLoader

HEADER_SECONDS = 15.0  # in which the head of a request must have arrived
MAX_CONNECTIONS = 2000
CLOSING_SECONDS = 3  # for connections that stay open after the last answer: the page's own


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which closes a connection whose request does not arrive."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """The clock runs while the head of a request is awaited, from its first byte on or from the connection's begin."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _rest(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """Stops when no answer is being written any more."""

    def __init__(self, config: uvicorn.Config, loader: EngineLoader, settings: Settings):
        super().__init__(config)
        self._loader, self._settings = loader, settings
        self._draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says where it listens once it does, and a signal would be heeded."""
        await super().startup(sockets)
        for listening in sockets or ():
            _announce(self._settings, *listening.getsockname()[:2])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn would end the process by the same signal afterwards; here the stop is orderly and ends with 0."""
        if self._draining:
            self.should_exit = self.force_exit = True
            return
        self._draining = True
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        engine = self._loader.state.engine
        if engine is not None:
            engine.drain(self._settings.drain_seconds)
            self._loader.close()  # what still runs ends here, and its reader gets what there is
        self.should_exit = True


def configured(app: Any, settings: Settings) -> uvicorn.Config:
    """How the server listens. No line of a log holds an address or a path."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=PatientProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # who asks is who connects
        timeout_keep_alive=15,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=32 << 10,
        lifespan="on",
    )


def serve(settings: Settings) -> int:
    """Serves page and API until stopped. Returns the exit code. Raises MingError when the port is taken."""
    spare_loopback()
    loader = EngineLoader.for_settings(settings)
    app = build_app(loader, settings)
    config = configured(app, settings)
    server = Server(config, loader, settings)
    try:
        listening = config.bind_socket()
    except SystemExit:  # uvicorn has said why, in English
        raise port_taken(settings) from None
    loader.start()
    try:
        server.run(sockets=[listening])
    finally:
        loader.close()
    return 0


def _announce(settings: Settings, host: str, port: int) -> None:
    zh = settings.message_lang() == "zh"
    shown = host if is_loopback(host) else "127.0.0.1" if host in ("0.0.0.0", "::") else host
    print(f"{'页面' if zh else 'Page'}: http://{shown}:{port}", file=sys.stderr)
    if settings.api_keys:
        who = "需要 API 密钥" if zh else "with an API key"
    else:
        who = "未设置 MING_API_KEYS，仅限本机" if zh else "this machine only, as MING_API_KEYS is not set"
    print(f"API: http://{shown}:{port}/v1 ({who})", file=sys.stderr, flush=True)
