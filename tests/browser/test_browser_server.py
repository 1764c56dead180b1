"""The server goes away under an open page: the page says so and goes on with the next one. Nothing is polled before."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from ming_app.settings import Settings
from ming_app.ui.launch import launch
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import Page
from tests.browser.conftest import engine

NOTICE = "#ming-gone [role=status]"


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def open_server(folder: Path, port: int) -> tuple[Any, str]:
    settings = Settings(data_dir=folder, port=port)
    page = Page(EngineLoader.of(engine()), settings)
    return page, launch(page.blocks, settings, prevent_thread_lock=True)[1]


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_page_whose_server_is_gone_says_so_and_goes_on_with_the_next(tmp_path: Path, visit: Any, locale: str) -> None:
    english, port = locale == "en-US", free_port()
    first, url = open_server(tmp_path, port)
    seen = visit(url, locale, *((1440, 900) if english else (390, 844)))
    asked: list[str] = []
    seen.page.on("request", lambda request: asked.append(request.url))
    seen.page.wait_for_timeout(2500)
    assert not seen.page.query_selector("#ming-gone") and not any("app_id" in one for one in asked)

    first.blocks.close(verbose=False)
    seen.ask("What is asthma?")
    seen.page.wait_for_selector(NOTICE)
    assert ("cannot be reached" if english else "无法连接服务器") in seen.text(NOTICE)
    seen.page.wait_for_timeout(1500)
    waited = seen.text("#ming-gone p:last-child")
    assert int(waited.split()[0]) >= 1 and waited.endswith("s" if english else "秒")
    assert seen.page.is_hidden(".toast-wrap")
    box = seen.page.locator("#ming-gone").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= seen.page.viewport_size["width"]
    seen.shot(f"server-gone-{locale}", full=False)

    second, _ = open_server(tmp_path, port)
    try:
        seen.page.wait_for_selector("#ming-gone", state="detached", timeout=20000)
        seen.page.wait_for_selector("html[data-ming=ready]")
        seen.until(lambda: seen.page.input_value("#ming-input textarea") == "What is asthma?")
        assert seen.page.evaluate("sessionStorage.getItem('ming.draft')") is None
        seen.page.press("#ming-input textarea", "Enter")
        seen.answers = 1
        seen.finished()
        assert not seen.page.query_selector("#ming-gone")
    finally:
        second.blocks.close(verbose=False)


def test_a_server_that_starts_is_told_from_one_that_is_gone(tmp_path: Path, visit: Any) -> None:
    page, url = open_server(tmp_path, free_port())
    try:
        seen = visit(url)
        seen.page.route("**/gradio_api/app_id", lambda route: route.fulfill(status=503, body="waking"))
        seen.page.evaluate("fetch('/gradio_api/app_id').catch(() => 0)")
        seen.page.wait_for_selector(NOTICE)
        assert "is starting" in seen.text(NOTICE)
        seen.page.unroute("**/gradio_api/app_id")
        seen.page.wait_for_selector(
            "#ming-gone", state="detached"
        )  # the same server as before: nothing is loaded again
        seen.page.route("**/other", lambda route: route.abort())
        seen.page.evaluate("fetch('/other').catch(() => 0)")
        seen.page.wait_for_timeout(1000)  # one request failed, but the server answers
        assert not seen.page.query_selector("#ming-gone")
    finally:
        page.blocks.close(verbose=False)
