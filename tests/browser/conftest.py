"""A real Chromium on a launched page. Screenshots go to tests/browser/screenshots (not kept in git)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ming_app.settings import Settings
from ming_app.ui.launch import launch
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import Page
from tests.fakes import FakeEngine

SCREENSHOTS = Path(__file__).parent / "screenshots"
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
ANSWER = (
    "高血压的**生活方式调整**：\n\n1. 限盐，每日不超过 5 克。\n2. 规律运动，如快走 30 分钟 💪。\n\n"
    "| 项目 | 目标 |\n|---|---|\n| 血压 | <140/90 mmHg |\n\nSee a doctor if it stays high despite these changes.\n"
)
BOT = "#ming-chat [data-testid=bot]"
WATCH = """() => {
  window.seen = { tokens: [], text: [] };
  const look = () => {
    seen.tokens.push(document.querySelectorAll('.xp-tok:not(.xp-q)').length);
    seen.text.push(document.querySelector('#ming-chat').innerText.length);
  };
  for (const id of ['#ming-chat', '#ming-panel'])
    new MutationObserver(look).observe(document.querySelector(id), { childList: true, subtree: true, characterData: true });
}"""
"""Notes in the page itself how much there is to see after each change: asking from outside misses most of them."""


def engine(script: Any = ANSWER, **options: Any) -> FakeEngine:
    """A scripted engine of 12 layers."""
    return FakeEngine(script, num_layers=options.pop("num_layers", 12), **options)


@dataclass
class Visit:
    """A browser page on the app, with what it logged and every address it asked for outside this machine."""

    page: Any
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    answers: int = 1
    """how many answers the page will hold when the last question is answered"""

    def shot(self, name: str, full: bool = True) -> None:
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=full)

    def ask(self, text: str) -> None:
        self.answers = self.page.locator(BOT).count() + 1
        self.page.fill("#ming-input textarea", text)
        self.page.press("#ming-input textarea", "Enter")

    def finished(self, timeout: float = 30) -> None:
        """Waits until the answer has ended."""
        self.page.locator(BOT).nth(self.answers - 1).wait_for(timeout=timeout * 1000)
        self.page.wait_for_selector("#ming-send", state="visible", timeout=timeout * 1000)

    def watch(self) -> None:
        """From now on the page notes how it grows, for `seen`."""
        self.page.evaluate(WATCH)

    def seen(self) -> tuple[list[int], list[int]]:
        """Tokens in the panel and characters in the conversation after every change."""
        tokens, text = self.page.evaluate("[seen.tokens, seen.text]")
        return tokens, text

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Waits for what no selector can say; the browser goes on meanwhile."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "what was waited for did not come"
            self.page.wait_for_timeout(50)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    if path is None:
        pytest.skip("needs Chromium (Debian: chromium, fonts-noto-cjk)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGS)
        yield browser
        browser.close()


class Serve:
    """Launches a page over an engine or loader when called; gives its address."""

    def __init__(self, folder: Path) -> None:
        self.pages: list[Page] = []
        self.folder = folder

    def __call__(self, engine: Any, settings: Settings | None = None) -> str:
        settings = (settings or Settings(data_dir=self.folder)).with_(port=0)
        page = Page(engine if isinstance(engine, EngineLoader) else EngineLoader.of(engine), settings)
        self.pages.append(page)
        return launch(page.blocks, settings, prevent_thread_lock=True)[1]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    made = Serve(tmp_path / "kept")
    yield made
    for page in made.pages:
        page.blocks.close(verbose=False)


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Visit]]:
    """Opens an address in a fresh browser profile and waits until the page is there."""
    contexts: list[Any] = []

    def open_page(
        url: str, locale: str = "en-US", width: int = 1440, height: int = 900, scheme: str = "light"
    ) -> Visit:
        context = chromium.new_context(
            viewport={"width": width, "height": height}, locale=locale, color_scheme=scheme, accept_downloads=True
        )
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        made = Visit(context.new_page())
        page, host = made.page, url.split("/")[2]
        page.on("console", lambda m: made.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: made.errors.append(str(e)))
        page.on("dialog", lambda d: (made.dialogs.append(d.message), d.dismiss()))
        page.on(
            "request",
            lambda r: (
                made.outside.append(r.url) if not r.url.startswith(("data:", "blob:")) and host not in r.url else None
            ),
        )
        page.goto(url)
        page.wait_for_selector("#ming-input textarea")
        page.wait_for_selector("html[data-ming=ready]")  # in the visitor's language and appearance
        return made

    yield open_page
    for context in contexts:
        context.close()
