"""The Experts tab in Chromium: linked views, a real close look and real changes on a tiny model, files, phone, dark, Chinese."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ming_app.atlas import trace_texts, write_atlas
from ming_app.engine.engine import Engine
from ming_app.molora.trace import RouterTrace
from ming_app.router.statistics import load
from tests.browser.conftest import Visit, engine
from tests.test_atlas import TEXTS
from tests.tiny import make_engine

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Engine:
    return make_engine(tmp_path_factory.mktemp("tiny"), 1024, max_position_embeddings=1024)


def explore(v: Visit, name: str = "Experts") -> None:
    v.page.get_by_role("tab", name=name).click()
    v.page.wait_for_selector("#ming-explorer-panel .xp-tok:not(.xp-q)")


def view(v: Visit, name: str) -> None:
    v.page.locator(f"#ming-view label:has(input[value={name}])").click()


def heading(v: Visit, text: str) -> None:
    v.page.wait_for_function(
        "text => [...document.querySelectorAll('#ming-explorer .xv h3, #ming-explorer .xp-empty')].some(e => e.innerText.includes(text))",
        arg=text,
    )


def test_an_answer_opens_and_its_views_follow_the_panel(serve: Any, visit: Any, tmp_path: Path) -> None:
    v = visit(serve(engine("多喝水 and rest well, 37 度", num_layers=5)))
    for question in ("first", "second"):
        v.ask(question)
        v.finished()
    v.page.locator(".m-open").first.click()
    v.page.wait_for_selector("#ming-explorer-panel .xp-tok:not(.xp-q)")
    assert "first" in v.page.input_value("#ming-explorer-sources input >> nth=0")
    heading(v, "Load of the experts")
    v.page.wait_for_selector("#ming-plot .plot-container")
    with v.page.expect_download() as download:
        v.page.click("#ming-explorer-csv")
    rows = Path(download.value.path()).read_text(encoding="utf-8-sig").splitlines()
    with v.page.expect_download() as download:
        v.page.click("#ming-explorer-npz")
    trace = RouterTrace.load(download.value.path())
    assert rows[1].split(",")[3] == f"{round(float(load(trace, trace.is_answer()).share[0, 0, 0]), 4)}"
    with v.page.expect_download() as download:
        v.page.click("#ming-explorer-html")
    assert "How the experts of Fake model route" in Path(download.value.path()).read_text(encoding="utf-8")
    v.page.check("#ming-explorer-panel .xp-agree input")
    assert "Of up and down" in v.text("#ming-explorer-panel .xp-map-hint")
    v.page.click("#ming-example")
    v.page.wait_for_function(
        "document.querySelector('#ming-explorer-panel .xp-counts').innerText.includes('28 layers')"
    )
    assert v.page.is_checked("#ming-explorer-panel .xp-prompt input")
    v.page.locator(".m-open").first.evaluate("button => button.click()")
    v.page.wait_for_function("document.querySelector('#ming-explorer-panel .xp-counts').innerText.includes('5 layers')")
    view(v, "together")
    heading(v, "Which experts are chosen together")
    v.page.fill("#ming-explorer-panel .xp-layer input", "4")
    v.page.check("#ming-explorer-panel .xp-seg input[value='2']", force=True)
    v.page.wait_for_function(
        "document.querySelector('#ming-explorer .xv .xp-hint').innerText.includes('layer 4, down')"
    )
    for name, title in (
        ("groups", "Do groups of tokens"),
        ("vocabulary", "Tokens each expert"),
        ("flow", "From layer to layer"),
    ):
        view(v, name)
        heading(v, title)
    view(v, "groups")
    v.page.locator("#ming-explorer details summary").last.click()
    assert v.page.locator("#ming-explorer .xv-table tbody tr").count() == 15
    view(v, "compare")
    heading(v, "Choose a second record")
    assert v.errors == [] and v.outside == []
    v.shot("explorer")


def test_close_looks_and_changes_on_a_real_model(serve: Any, visit: Any, tiny: Engine) -> None:
    v = visit(serve(tiny))
    page = v.page
    for slider, value in (("temperature", "0"), ("max_new_tokens", "16")):
        page.evaluate("document.querySelector('#ming-settings button')?.click()") if slider == "temperature" else None
        page.fill(f"#ming-{slider} input[type=number]", value)
        page.press(f"#ming-{slider} input[type=number]", "Tab")
    v.ask("Which one?\nA. flu\nB. gout")
    v.finished()
    explore(v)
    assert page.locator(".xp-added").count() == 0
    view(v, "contribution")
    heading(v, "Contributions were not recorded yet")
    page.click("#ming-measure")
    heading(v, "How much the experts add")
    page.locator("#ming-explorer-panel .xp-tok:not(.xp-q)").nth(3).click()
    assert page.locator("#ming-explorer-panel .xp-added").count() == 2 * 3
    assert "likeliest here" in v.text("#ming-explorer-panel .xp-others")
    page.click("#ming-changes button")
    page.click("#ming-add-change")
    page.wait_for_selector("#ming-change-list label")
    page.click("#ming-reread")
    page.wait_for_selector("#ming-moved .plot-container")
    assert "Options of the question: A " in v.text("#ming-changes")
    page.click("#ming-reanswer")
    page.wait_for_selector(".xv-pair section:nth-of-type(2) p")
    page.wait_for_function("document.querySelectorAll('#ming-explorer-sources input')[1].value.includes('[ban:0]')")
    view(v, "compare")
    heading(v, "What differs between the two")
    assert v.errors == [] and v.outside == []
    v.shot("explorer-changes")


def test_a_report_opens_by_itself(chromium: Any, tiny: Engine, tmp_path: Path) -> None:
    trace = trace_texts(tiny, TEXTS, tmp_path, 8)
    report = write_atlas(trace, tmp_path, "en", tiny.adapter)
    page, errors, asked = chromium.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector(".xp-tok:not(.xp-q)")
    assert page.locator(".xp-tok:visible").count() == len(trace.pieces())  # several texts: the questions are shown too
    assert page.locator(".r-plot .plot-container").count() == page.locator(".r-plot").count() > 6
    assert page.is_checked(".xp-prompt input")
    note = page.inner_text("#together .r-note")
    page.select_option("#together select", "4")
    assert page.inner_text("#together .r-note") != note
    page.close()
    assert errors == [] and all(url.startswith(("file:", "data:", "blob:")) for url in asked)


def test_records_from_files_phone_dark_and_chinese(serve: Any, visit: Any, tmp_path: Path) -> None:
    v = visit(serve(engine("多喝水，注意休息。")), locale="zh-CN", width=390, height=844, scheme="dark")
    v.page.get_by_role("tab", name="专家").click()
    heading(v, "暂无可查看的内容")
    v.page.get_by_role("tab", name="对话").click()
    v.ask("q")
    v.finished()
    with v.page.expect_download() as download:
        v.page.click("#ming-save-npz")
    kept = tmp_path / "kept.npz"
    download.value.save_as(kept)
    explore(v, "专家")
    v.page.set_input_files("#ming-explorer-sources input[type=file]", kept)
    v.page.wait_for_function("document.querySelector('#ming-explorer-sources input').value.includes('kept.npz')")
    bad = tmp_path / "bad.json"
    bad.write_text("{", encoding="utf-8")
    v.page.set_input_files("#ming-explorer-sources input[type=file]", bad)
    v.page.wait_for_selector("#ming-explorer-notice [role=alert]")
    assert "路由轨迹文件有问题" in v.text("#ming-explorer-notice")
    heading(v, "专家负载")
    width = v.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, "the page must not scroll sideways on a phone"
    assert v.errors == []
    v.shot("explorer-phone")
    v.page.locator("#ming-lang label").last.click()
    heading(v, "Load of the experts")
