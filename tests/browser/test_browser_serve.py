"""`python -m ming_app serve` in a browser: the page mounted beside the API, both in one queue over one model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from ming_app.ui.loader import EngineLoader
from tests.engine.tiny_engine import tiny_engine
from tests.serve.conftest import run_server, settings, stop

pytestmark = pytest.mark.browser

LONG = {"model": "tiny", "messages": [{"role": "user", "content": "发烧 cough"}], "temperature": 0, "max_tokens": 300}


def test_page_and_api_share_one_queue(visit: Any, tmp_path: Path) -> None:
    with tiny_engine(tmp_path, pause=0.05, slots=1) as engine:
        served = run_server(EngineLoader.of(engine), settings(tmp_path, streams=1))
        try:
            v = visit(served.url)
            v.ask("cough")
            v.finished()
            assert v.page.locator("#ming-chat [data-testid=bot]").count() == 1
            held = served.client().chat.completions.create(**LONG, stream=True)
            next(iter(held))
            v.ask("again")
            v.page.wait_for_function(
                "document.querySelector('#ming-status').innerText.includes('number 1 in the queue')"
            )
            waiting = threading.Thread(
                target=lambda: served.client().chat.completions.create(**{**LONG, "max_tokens": 2})
            )
            waiting.start()
            v.until(lambda: served.engine.load_now() == (1, 2))
            held.close()
            v.finished()
            waiting.join(30)
            assert v.page.locator("#ming-chat [data-testid=bot]").count() == 2
            assert served.engine.load_now() == (0, 0) and v.errors == [] and v.outside == []
            v.page.reload()
            v.page.wait_for_selector("html[data-ming=ready]")
            v.shot("serve_1440_en_light", full=False)
        finally:
            stop(served)
