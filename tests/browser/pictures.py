"""Pictures of the real page for the READMEs: `python -m tests.browser.pictures` writes all of `examples/pictures`.

The default model (or `--model`) answers the first example question of each language, greedily, so the same weights on the
same kind of machine give the same words. Needs Chromium and a CJK font, as the browser tests do.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ming_app.engine.engine import Engine
from ming_app.exam.formats import read_bank
from ming_app.settings import Settings
from ming_app.ui.launch import launch
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import Page
from ming_app.ui.text import t
from tests.browser.conftest import ARGS, Visit

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "pictures"
DESKTOP, PHONE = (1440, 900), (390, 844)
QUALITY = 26
"""of WebP, 0 to 100: small letters stay sharp"""
LOCALES = {"en": "en-US", "zh": "zh-CN"}
TOP = "document.querySelectorAll('#ming-chat *').forEach((box) => (box.scrollTop = 0)); scrollTo(0, 0)"
"""the page and the conversation from their beginning"""


def main() -> None:
    """Makes every picture, or those that are named."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=None)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names())}; all when none is named")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    settings = Settings.load({"model": options.model, "port": 0})
    engine = Engine.load(settings)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=ARGS)
            for name in options.names or names():
                with tempfile.TemporaryDirectory() as data:  # nobody has been there before
                    picture = _take(browser, engine, settings.with_(data_dir=Path(data)), name)
                (options.out / f"{name}.webp").write_bytes(picture)
            browser.close()
    finally:
        engine.close()


def names() -> list[str]:
    """Every picture, without `.webp`."""
    return [f"{scene}-{lang}" for scene, (_, langs) in SCENES.items() for lang in langs]


def _take(browser: Any, engine: Engine, settings: Settings, name: str) -> bytes:
    scene, lang = name.rsplit("-", 1)
    width, height = PHONE if scene == "phone" else DESKTOP
    page = Page(EngineLoader.of(engine), settings)
    context = browser.new_context(
        viewport={"width": width, "height": height}, locale=LOCALES[lang], color_scheme="light", reduced_motion="reduce"
    )
    try:
        visit = Visit(context.new_page())
        visit.page.goto(launch(page.blocks, settings, prevent_thread_lock=True)[1])
        visit.page.wait_for_selector("#ming-input textarea")
        visit.page.wait_for_selector("html[data-ming=ready]")
        SCENES[scene][0](visit, lang)
        visit.page.mouse.move(0, 0)
        visit.page.wait_for_timeout(1000)  # plots draw themselves, what opened has opened
        visit.page.evaluate(TOP)
        visit.page.wait_for_timeout(300)
        return _webp(context, visit.page)
    finally:
        context.close()
        page.blocks.close(verbose=False)


def _webp(context: Any, page: Any) -> bytes:
    """Of what the window shows. Playwright writes PNG and JPEG only; the browser itself knows WebP."""
    session = context.new_cdp_session(page)
    shot = session.send("Page.captureScreenshot", {"format": "webp", "quality": QUALITY})
    return base64.b64decode(shot["data"])


# -- scenes -----------------------------------------------------------------------------------------------------------


def _chat(visit: Visit, lang: str) -> None:
    """The first example question, answered, with a token chosen in the panel."""
    page = visit.page
    _answered(visit)
    page.locator(".xp-tok:not(.xp-q)").nth(6).click()
    page.wait_for_selector(".xp-grid tbody tr")


def _phone(visit: Visit, lang: str) -> None:
    _answered(visit)


def _exam(visit: Visit, lang: str) -> None:
    """The first question of our own bank, answered rightly, and the model's answer beside it."""
    page = visit.page
    first = read_bank((FOLDER.parent / "banks" / f"clinical-{lang}.jsonl").read_bytes(), "bank.jsonl").questions[0]
    page.get_by_role("tab", name=t(lang, "tab.exam"), exact=True).first.click()
    page.wait_for_selector("#ming-exam-counts p")
    page.click("#ming-exam-start")
    page.wait_for_selector(".ex-counter")
    page.click(f".ex-pick:has-text('{first.options[first.answer[0]]}')")
    page.click(".ex-submit")
    page.wait_for_selector(".ex-verdict:visible")
    page.click("#ming-exam-ai-answer")
    page.wait_for_selector(".ex-chance", timeout=60_000)


def _experts(visit: Visit, lang: str) -> None:
    """The bundled example, its load over layers."""
    page = visit.page
    page.get_by_role("tab", name=t(lang, "tab.experts"), exact=True).first.click()
    page.click("#ming-example")
    page.wait_for_selector("#ming-explorer-panel .xp-tok:not(.xp-q)")
    page.wait_for_selector("#ming-plot .plot-container")


def _answered(visit: Visit) -> None:
    """Asks the first example question, greedily and not too long."""
    page = visit.page
    page.click("#ming-settings button")
    for name, value in (("temperature", 0), ("max_new_tokens", 360)):
        number = page.locator(f"#ming-{name} input[type=number]")
        number.fill(str(value))
        number.blur()
    page.click("#ming-settings button")
    page.wait_for_timeout(500)  # what was set is told to the server
    page.click("#ming-chat .example >> nth=0")
    visit.finished(180)
    page.wait_for_selector(".xp-live", state="hidden")


SCENES: dict[str, tuple[Callable[[Visit, str], None], tuple[str, ...]]] = {
    "chat": (_chat, ("en", "zh")),
    "exam": (_exam, ("en", "zh")),
    "experts": (_experts, ("en",)),  # hardly a word differs, and all pictures together stay below 300 KB
    "phone": (_phone, ("en", "zh")),
}


if __name__ == "__main__":
    main()
