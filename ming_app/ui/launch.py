"""Serving the page: privacy and network settings of Gradio, in one place, and where it listens.

Nothing but this machine is contacted: analytics, run history, monitoring, sharing and server-side rendering are off,
and a Content-Security-Policy keeps the browser from loading anything from elsewhere, whatever a model writes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, so before the imports below
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ming_app.errors import MingError
from ming_app.settings import Settings
from ming_app.ui.assets import LOGO, head
from ming_app.ui.guard import OwnSite, own_hosts
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import at_once, build_page
from ming_app.ui.text import t
from ming_app.ui.theme import build_theme

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self' https://huggingface.co"
)
"""Gradio needs inline scripts and `new Function`; what matters here is that no other host can be reached, and that no other
site can show the page in a frame and have it clicked (a Space is shown in one of Hugging Face's)."""
SESSIONS = 300
"""visitors that Gradio remembers, about 1 MB each, long after they have gone; who is forgotten and comes back begins anew, with
the conversations that disk or browser keep"""
HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}


class SafeHeaders:
    """ASGI middleware that adds HEADERS to every HTTP response."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


def spare_loopback() -> None:
    """Keeps requests to this machine off a proxy that the environment names: Gradio asks its own server at launch."""
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    if not any(value and name.lower() in proxies for name, value in os.environ.items()):
        return
    spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in spared.split(",") if host.strip()]
    hosts += [host for host in ("localhost", "127.0.0.1", "::1") if host not in hosts]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


def page_options(settings: Settings) -> dict[str, Any]:
    """What the page is served with, whoever serves it."""
    folders = (settings.cache_dir, settings.data_dir, Path(__file__).parents[2] / "weights")
    return {
        "run_history": False,
        "enable_monitoring": False,
        "footer_links": [],
        "ssr_mode": False,
        "pwa": not settings.space,  # installable where it is served by oneself
        "max_file_size": "20mb",
        "blocked_paths": [str(path.resolve()) for path in folders if path.exists()],
        "app_kwargs": {
            "middleware": [Middleware(OwnSite, hosts=own_hosts(settings)), Middleware(SafeHeaders)],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
        },
        "theme": build_theme(),
        "head": head(),
        "favicon_path": LOGO,
    }


def launch(blocks: gr.Blocks, settings: Settings, **options: Any) -> Any:
    """`blocks.launch` with this app's settings; `options` are for tests. Raises MingError when the port is taken."""
    host, port = settings.host, settings.port
    chosen: dict[str, Any] = {
        "server_name": host,
        "server_port": port or None,
        "quiet": True,
        "share": False,
        "strict_cors": True,
        "max_threads": max_threads(settings),
        "state_session_capacity": SESSIONS,
        **page_options(settings),
        **options,
    }
    spare_loopback()
    try:
        return blocks.launch(**chosen)
    except OSError as error:
        raise port_taken(settings) from error


def port_taken(settings: Settings) -> MingError:
    """Nothing can listen there."""
    return MingError(
        f"The page cannot listen on {settings.host}:{settings.port}: another program seems to use that port. Stop it, or choose another port with --port or MING_PORT.",
        f"无法在 {settings.host}:{settings.port} 上启动页面：该端口可能已被其他程序占用。请停止该程序，或用 --port 或 MING_PORT 选择其他端口。",
    )


def mount(app: FastAPI, blocks: gr.Blocks, settings: Settings) -> FastAPI:
    """The page at every address of `app` that has no route of its own."""
    import gradio as gr

    blocks.state_session_capacity = SESSIONS
    blocks.max_threads = blocks._queue.max_thread_count = max_threads(settings)  # as `launch` sets them
    return gr.mount_gradio_app(app, blocks, path="/", **page_options(settings))


def max_threads(settings: Settings) -> int:
    """Who waits holds a thread; 40 are Gradio's own default."""
    return at_once(settings) + 40


def serve(settings: Settings) -> int:
    """Opens the page at once, loads the engine behind it, and blocks until stopped. Returns the exit code.

    SIGINT or SIGTERM lets running answers end (`settings.drain_seconds`); the second one stops at once.
    """
    loader = EngineLoader.for_settings(settings)
    loader.start()
    lang, blocks = settings.message_lang(), build_page(loader, settings)
    try:
        _, url, _ = launch(blocks, settings, prevent_thread_lock=True)
        stopped = heed_signals()
        print(t(lang, "serve.open", url=url), flush=True)
        while not stopped.wait(0.5):
            pass
        if loader.state.engine is not None:
            loader.state.engine.drain(settings.drain_seconds)
    except MingError as error:
        print(error.message(lang), file=sys.stderr)
        return error.exit_code
    finally:
        loader.close()
        blocks.close(verbose=False)
    return 0


def heed_signals() -> threading.Event:
    """Set by the first SIGINT or SIGTERM; the second one raises KeyboardInterrupt."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopped
