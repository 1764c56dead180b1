"""The real 0.5B model in Chromium: ask, watch stream and panel grow, choose a token, stop, change the language."""

from __future__ import annotations

from typing import Any

import pytest

from ming_app.settings import Settings

pytestmark = [pytest.mark.real, pytest.mark.browser]


def greedy(page: Any, longest: int) -> None:
    """Temperature 0 and a length, by the page's own controls."""
    page.click("#ming-settings button")
    for name, value in (("temperature", 0), ("max_new_tokens", longest)):
        number = page.locator(f"#ming-{name} input[type=number]")
        number.fill(str(value))
        number.blur()
    page.click("#ming-settings button")


def test_a_visit_with_the_real_model(real_engine: Any, serve: Any, visit: Any) -> None:
    v = visit(serve(real_engine, Settings(context=2048)), locale="zh-CN")
    page, info = v.page, real_engine.info
    assert info.title in v.text("#ming-tools") and info.precision in v.text("#ming-tools")
    greedy(page, 96)

    v.watch()
    v.ask("高血压患者在饮食上应该注意什么？请分条说明。")
    v.finished(120)
    page.wait_for_selector(".xp-live", state="hidden")
    tokens, text = v.seen()
    assert tokens == sorted(tokens) and len(set(tokens)) >= 3 and len(set(text)) >= 3  # both grew as it was written
    assert len(page.locator("#ming-chat [data-testid=bot]").inner_text()) > 20

    page.locator(".xp-tok:not(.xp-q)").nth(5).click()
    assert page.locator(".xp-grid tbody tr").count() == info.num_layers
    bars = page.locator(".xp-grid tbody tr:first-child td:nth-child(2) .xp-bar")
    assert bars.count() == info.top_k
    shares = [
        int(text.rstrip("%"))
        for text in page.locator(".xp-grid tbody tr:nth-child(3) td:nth-child(3) i").all_inner_texts()
    ]
    assert sum(shares) == pytest.approx(100, abs=2)
    v.shot("real_zh")

    page.click("#ming-lang label:has-text('English')")
    page.wait_for_selector("text=Experts at work")
    page.click("#ming-new")
    page.wait_for_selector("text=What would you like to understand?")
    greedy(page, 1024)
    v.ask("List as many causes of headache as you can, with one paragraph for each of them.")
    page.wait_for_function("document.querySelectorAll('.xp-tok:not(.xp-q)').length > 8", timeout=60_000)
    page.keyboard.press("Escape")
    page.wait_for_selector("#ming-send", state="visible", timeout=5000)
    page.wait_for_function("document.querySelector('#ming-status').innerText.includes('Stopped')")
    written = page.locator("#ming-chat [data-testid=bot]").inner_text()
    page.wait_for_timeout(800)
    assert page.locator("#ming-chat [data-testid=bot]").inner_text() == written  # really stopped
    v.shot("real_en_stopped")
    assert v.errors == [] and v.outside == []
