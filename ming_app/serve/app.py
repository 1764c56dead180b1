"""`build_app`: the page and the API over one engine, as one ASGI app."""

from __future__ import annotations

from fastapi import FastAPI

from ming_app.serve.api import Api, explain_errors
from ming_app.serve.guard import Guard, read_keys
from ming_app.serve.metrics import Metrics
from ming_app.settings import Settings
from ming_app.ui.launch import SafeHeaders, mount
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import build_page


def build_app(loader: EngineLoader, settings: Settings) -> FastAPI:
    """Routes of the API first, the page at everything else. Raises UsageError for unusable API keys."""
    keys = read_keys(settings.api_keys)
    metrics = Metrics(lambda: _load(loader))
    loader.when_ready(lambda engine: engine.on_end(metrics.ended))

    app = FastAPI(
        title="MING-MOE",
        summary="OpenAI-compatible chat completions with a router trace. For learning; not a physician.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
    )
    app.add_middleware(Guard, keys=keys)
    app.add_middleware(SafeHeaders)
    app.include_router(Api(loader.ready, settings, metrics).router)
    explain_errors(app)
    return mount(app, build_page(loader, settings), settings)


def _load(loader: EngineLoader) -> tuple[int, int]:
    engine = loader.state.engine
    return engine.load_now() if engine is not None else (0, 0)
