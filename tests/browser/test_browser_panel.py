"""The expert panel in Chromium over the scripted engine: what it shows, keeps, saves, and how the keyboard drives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ming_app.molora.trace import RouterTrace, TraceToken
from ming_app.router import panel
from ming_app.router.payload import trace_payload
from ming_app.router.tables import load_table, token_table
from tests.browser.conftest import engine
from tests.fakes import long_text

pytestmark = pytest.mark.browser


def test_a_ticked_box_looks_ticked(serve: Any, visit: Any) -> None:
    """Gradio's own style would draw a white tick on no ground."""
    v = visit(serve(engine("well", num_layers=5)))
    v.ask("q")
    v.finished()
    for box in (".xp-prompt input", ".tk-incognito"):  # the second opens a new conversation
        v.page.locator(box).first.check()
        style = "e => [getComputedStyle(e).appearance, getComputedStyle(e).backgroundImage]"
        assert v.page.locator(box).first.evaluate(style) == ["auto", "none"]


def test_the_panel_shows_what_the_trace_holds(serve: Any, visit: Any) -> None:
    """Strip, detail, load and table in the browser against the Python tables of the same trace."""
    fake = engine("多喝水 and rest 💧 well", num_layers=5)
    v = visit(serve(fake))
    page = v.page
    v.ask("q")
    v.finished()
    page.wait_for_selector(".xp-live", state="hidden")
    with page.expect_download() as download:
        page.click("#ming-save-npz")
    trace = RouterTrace.load(download.value.path())
    first = next(i for i, t in enumerate(trace.tokens) if t.role == "answer")
    layer, last_tokens = 3, [members[-1] for _, members in trace.pieces() if members[0] >= first]
    page.fill(".xp-layer input", str(layer))
    for name, projection in (("0", "gate"), ("2", "down")):
        page.check(f".xp-seg input[value='{name}']", force=True)
        shown = [int(x) for x in page.locator(".xp-tok:not(.xp-q) sub").all_inner_texts()]
        assert shown == [int(trace.top_expert(layer, projection)[i]) for i in last_tokens]
        shares = page.eval_on_selector_all(".xp-load-row", "rows => rows.map(r => +r.dataset.share)")
        expected = [row.share for row in load_table(trace, layer=layer, projection=projection, role="answer")]
        assert shares == pytest.approx(expected, abs=1e-5)
    page.check(".xp-scope input")
    shares = page.eval_on_selector_all(".xp-load-row", "rows => rows.map(r => +r.dataset.share)")
    assert shares == pytest.approx([row.share for row in load_table(trace, role="answer")], abs=1e-5)
    page.locator(".xp-tok:not(.xp-q)").nth(2).click()
    bars = page.eval_on_selector_all(
        ".xp-grid tbody tr",
        "rows => rows.map(r => [...r.querySelectorAll('td')].map(c => [...c.querySelectorAll('b')].map(b => +b.textContent)))",
    )
    assert bars == [[[e for e, _ in cell] for cell in row] for row in token_table(trace, last_tokens[2])]
    page.check(".xp-astable input")
    rows = page.locator(".xp-twin tbody tr")
    assert rows.count() == len(trace) - first
    assert rows.nth(0).locator("td").nth(4).inner_text().startswith(f"{trace.experts[first, layer, 2, 0]} (")
    page.check(".xp-prompt input")
    assert rows.count() == len(trace)


def test_choice_and_scroll_survive_the_stream(serve: Any, visit: Any) -> None:
    v = visit(serve(engine(long_text(400), delay=0.05)))
    page = v.page
    v.ask("q")
    page.wait_for_function(
        "document.querySelectorAll('.xp-tok:not(.xp-q)').length > 100"
    )  # more than fits in the strip
    page.locator(".xp-tok:not(.xp-q)").nth(5).click()
    page.fill(".xp-layer input", "2")
    page.eval_on_selector(".xp-map", "box => { box.scrollLeft = 3; box.dispatchEvent(new Event('scroll')) }")
    page.eval_on_selector(".xp-strip", "box => { box.scrollTop = 0 }")
    before = page.locator(".xp-tok").count()
    page.wait_for_function(f"document.querySelectorAll('.xp-tok').length > {before + 20}")
    assert page.locator(".xp-tok:not(.xp-q)").nth(5).get_attribute("aria-selected") == "true"
    assert page.locator(".xp-layer output").inner_text() == "2"
    assert page.eval_on_selector(".xp-map", "box => box.scrollLeft") < 10
    assert page.eval_on_selector(".xp-strip", "box => box.scrollTop") < 10
    assert page.locator(".xp-grid tbody tr").count() == 12


def test_keyboard_alone(serve: Any, visit: Any) -> None:
    v = visit(serve(engine("one two three four five six", num_layers=4)))
    page = v.page
    v.ask("q")
    v.finished()
    page.focus(".xp-strip")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    chosen = page.locator(".xp-tok[aria-selected=true]")
    assert chosen.locator(".xp-text").inner_text().strip() == "two"
    page.keyboard.press("ArrowDown")
    assert page.locator(".xp-layer output").inner_text() == "3"
    page.keyboard.press("End")
    assert chosen.locator(".xp-text").inner_text().strip() == "six"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.className") == "xp-detail"
    page.focus(".xp-map")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowUp")
    assert chosen.locator(".xp-text").inner_text().strip() == "one"
    assert page.locator(".xp-layer output").inner_text() == "2"
    box = page.locator(".xp-map canvas").bounding_box()
    page.mouse.click(box["x"] + 26 + 13 * 3 + 3, box["y"] + 46 + 14 * 1 + 5)
    assert page.locator(".xp-layer output").inner_text() == "1"


def test_records_are_saved(serve: Any, visit: Any, tmp_path: Path) -> None:
    v = visit(serve(engine("ok fine")))
    assert not v.page.is_visible("#ming-save-json")
    v.ask("q")
    v.finished()
    for kind in ("json", "npz"):
        with v.page.expect_download() as download:
            v.page.click(f"#ming-save-{kind}")
        assert download.value.suggested_filename.endswith(f".{kind}")
        kept = tmp_path / f"trace.{kind}"
        download.value.save_as(kept)
        assert RouterTrace.load(kept).config["ai_generated"] is True


def test_without_adapter(serve: Any, visit: Any) -> None:
    v = visit(serve(engine("ok", num_experts=0)), locale="zh-CN")
    v.ask("q")
    v.finished()
    assert "未加载专家适配器" in v.text(".xp-empty")


def test_agreement_of_the_matrices(chromium: Any) -> None:
    """The panel's own arithmetic against Python's, on a trace where up is gate renumbered and down is at random."""
    rng = np.random.default_rng(0)
    gate = rng.integers(0, 4, 60)
    experts = np.stack([gate, np.array([2, 3, 0, 1])[gate], rng.integers(0, 4, 60)], 1)[:, None, :, None]
    tokens = tuple(TraceToken(i, "x", "answer", i) for i in range(60))
    trace = RouterTrace(experts.astype(np.uint8), np.ones(experts.shape, np.float16), tokens, num_experts=4)
    page = chromium.new_page()
    page.add_script_tag(content=(panel.STATIC / "panel_data.js").read_text(encoding="utf-8"))
    found = page.evaluate(
        "payload => { const t = new Trace(); t.take(payload); return t.tokens.map((_, i) => t.agreement(i, 0)); }",
        trace_payload(trace, "a"),
    )
    page.close()
    down = experts[:, 0, 2, 0]
    partner = [np.bincount(gate[down == e], minlength=4).argmax() for e in range(4)]
    assert found == [1 + int(partner[d] == g) for g, d in zip(gate, down, strict=True)]
