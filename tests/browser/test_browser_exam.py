"""The Exam tab in Chromium: practice by mouse, a mock by keyboard alone, clock, restart, files, the model, phone, dark."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ming_app.exam.formats import read_bank, write_bank
from ming_app.settings import Settings
from ming_app.ui.launch import launch
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import Page
from tests.browser.conftest import Visit, engine
from tests.exam.conftest import mixed, question

pytestmark = pytest.mark.browser

NAMES = {"en": {"exam": "Exam", "mock": "Mock exam", "statistics": "Statistics", "banks": "Banks", "data": "My data"}}
NAMES["zh"] = {"exam": "刷题", "mock": "模拟考试", "statistics": "统计", "banks": "题库管理", "data": "我的数据"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


def room(v: Visit, lang: str = "en", pane: str = "") -> None:
    v.page.get_by_role("tab", name=NAMES[lang]["exam"], exact=True).first.click()
    v.page.wait_for_selector("#ming-exam-counts p")
    if pane:
        v.page.get_by_role("tab", name=NAMES[lang][pane], exact=True).click()


def counter(v: Visit, text: str) -> None:
    v.page.wait_for_function("text => document.querySelector('.ex-counter')?.innerText.includes(text)", arg=text)


def cell(v: Visit, number: int) -> str:
    return v.page.locator(".ex-cell").nth(number - 1).get_attribute("class")


def tab_to(v: Visit, selector: str) -> None:
    """Presses Tab until the focus is there."""
    for _ in range(80):
        v.page.keyboard.press("Tab")
        if v.page.evaluate("selector => document.activeElement?.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} cannot be reached by keyboard")


def test_practising_by_mouse(serve: Any, visit: Any, settings: Settings) -> None:
    v = visit(serve(engine(), settings))
    room(v)
    assert "40 questions" in v.text("#ming-exam-counts")
    v.shot("exam-home-en")
    v.page.click("#ming-exam-start")
    counter(v, "Question 1 of 20")
    assert v.page.is_hidden("#ming-exam-home") and v.page.is_disabled(".ex-submit")
    v.page.locator(".ex-strike").nth(0).click()
    v.page.locator(".ex-strike").nth(0).and_(v.page.locator("[aria-pressed=true]")).wait_for()
    v.page.locator(".ex-chip[data-value=unsure]").click()
    v.page.locator(".ex-pick").nth(1).click()
    assert v.page.locator(".ex-pick").nth(1).get_attribute("aria-checked") == "true"
    v.page.click(".ex-submit")
    v.page.wait_for_selector(".ex-verdict:visible")
    assert v.page.locator(".ex-option.ex-right").count() == 1 and len(v.text(".ex-explanation")) > 80
    v.page.fill(".ex-note textarea", "look at the murmur")
    if v.page.is_visible(".ex-cause"):
        v.page.click(".ex-chip[data-value=misread]")
    v.page.click(".ex-flag")
    v.shot("exam-answered-en")
    v.page.click(".ex-next")
    counter(v, "Question 2 of 20")
    assert v.page.is_hidden(".ex-verdict")
    v.page.locator(".ex-cell").nth(0).click()
    counter(v, "Question 1 of 20")
    assert v.page.input_value(".ex-note textarea") == "look at the murmur"
    assert "ex-flagged" in cell(v, 1) and ("ex-state-2" in cell(v, 1) or "ex-state-3" in cell(v, 1))
    v.page.click(".ex-finish")
    v.page.click(".ex-yes")
    v.page.wait_for_selector("#ming-exam-result .er-score")
    v.shot("exam-result-en")
    v.page.click("#ming-exam-back")
    v.page.wait_for_selector("#ming-exam-home", state="visible")
    assert "1 answered before" in v.text("#ming-exam-counts") and "1 flagged" in v.text("#ming-exam-counts")
    v.page.get_by_role("tab", name="Statistics", exact=True).click()
    v.page.wait_for_selector("#ming-exam-statistics .er-table")
    v.page.wait_for_selector("#ming-exam .plot-container")
    v.shot("exam-statistics-en")
    assert v.errors == [] and v.outside == []


def test_a_mock_by_keyboard_alone_in_chinese(serve: Any, visit: Any, settings: Settings) -> None:
    v = visit(serve(engine(), settings), locale="zh-CN")
    tab_to(v, "[role=tab]")
    while v.page.evaluate("document.activeElement.innerText") != "刷题":
        v.page.keyboard.press("Tab")
    v.page.keyboard.press("Enter")
    v.page.wait_for_selector("#ming-exam-counts p")
    for _ in range(80):
        v.page.keyboard.press("Tab")
        if v.page.evaluate("document.activeElement.innerText") == "模拟考试":
            break
    v.page.keyboard.press("Enter")
    v.page.wait_for_selector("#ming-exam-start-mock")
    tab_to(v, "#ming-exam-start-mock")
    v.page.keyboard.press("Enter")
    counter(v, "第 1 题，共 20 题")
    assert v.page.is_visible(".ex-clock") and v.text(".ex-clock b") in ("20:00", "19:59", "19:58")
    for number in range(1, 21):
        v.page.wait_for_function(
            "n => document.querySelector('.ex-counter').innerText.includes(`第 ${n} 题`)", arg=number
        )
        v.page.keyboard.press("abcde"[number % 5] if number % 2 else "12345"[number % 5])
        v.page.wait_for_selector(".ex-chosen")
        if number == 3:
            v.page.keyboard.press("f")
            v.page.wait_for_selector(".ex-cell.ex-flagged")
            v.shot("exam-mock-zh")
        if number < 20:
            v.page.keyboard.press("Enter" if number % 2 else "ArrowRight")
    v.page.keyboard.press("Enter")
    v.page.wait_for_selector(".ex-confirm:visible")
    v.page.keyboard.press("Enter")  # the focus is on "yes"
    v.page.wait_for_selector("#ming-exam-result .er-score")
    assert "未作答" not in v.text("#ming-exam-result") and "及格线" in v.text("#ming-exam-result")
    v.shot("exam-result-zh")
    v.page.keyboard.press("ArrowLeft")
    counter(v, "第 19 题")
    assert v.errors == []


def test_the_clock_hands_in_and_a_restart_loses_nothing(serve: Any, visit: Any, settings: Settings) -> None:
    v = visit(serve(engine(), settings))
    room(v, pane="mock")
    v.page.click("#ming-exam-start-mock")
    counter(v, "Question 1 of 20")
    v.page.keyboard.press("b")
    v.page.wait_for_selector(".ex-chosen")
    v.page.keyboard.press("ArrowRight")
    counter(v, "Question 2 of 20")
    v.page.context.close()  # the tab is closed, and the server stopped
    first = serve.pages[-1]
    first.blocks.close(verbose=False)
    first.exam.rooms.new().desk.store.close()

    v = visit(serve(engine(), settings))
    room(v)
    assert "1 of 20" in v.page.input_value("#ming-exam-unfinished input")
    v.page.click("#ming-exam-resume")
    counter(v, "Question 2 of 20")
    assert "ex-state-1" in cell(v, 1)
    desk = serve.pages[-1].exam.rooms.new().desk
    (sitting,) = desk.unfinished()
    sitting.deadline = time.time() + 2
    v.page.locator(".ex-pick").nth(0).click()  # the page learns of the new deadline
    v.page.wait_for_selector("#ming-exam-result .er-score", timeout=15_000)
    assert "handed in automatically" in v.text("#ming-exam-result").lower()
    assert desk.unfinished() == [] and v.errors == []


def test_an_unfolding_case_locks(serve: Any, visit: Any, settings: Settings, tmp_path: Path) -> None:
    v = visit(serve(engine(), settings))
    path = tmp_path / "types.jsonl"
    path.write_bytes(write_bank(mixed(), "jsonl"))
    room(v, pane="banks")
    import_file(v, path)
    v.page.click("#ming-exam-keep")
    v.page.wait_for_function(
        "() => document.querySelector('#ming-exam-message').innerText.includes('Imported: types, 14')"
    )
    v.page.get_by_role("tab", name="Practise", exact=True).click()
    v.page.click("#ming-exam-start")
    counter(v, "Question 1 of 14")
    assert v.page.locator(".ex-cell").nth(7).is_disabled()  # part 2 of the A4 case
    v.page.locator(".ex-cell").nth(6).click()
    counter(v, "Question 7 of 14")
    assert "cannot be changed" in v.text(".ex-hint") and v.text(".ex-case-text") == "Case 20."
    v.page.click(".ex-next")
    v.page.wait_for_selector(".ex-error:visible")
    assert "unfolds" in v.text(".ex-error")
    v.page.locator(".ex-pick").nth(0).click()
    v.page.click(".ex-submit")
    v.page.wait_for_selector(".ex-verdict:visible")
    v.page.click(".ex-next")
    counter(v, "Question 8 of 14")
    assert "Question 20?" in v.text(".ex-told")
    v.page.locator(".ex-cell").nth(12).click()
    counter(v, "Question 13 of 14")
    for number in (0, 2):
        v.page.locator(".ex-pick").nth(number).click()
    assert v.page.locator("[role=checkbox][aria-checked=true]").count() == 2
    assert v.errors == []


def import_file(v: Visit, path: Path) -> None:
    with v.page.expect_file_chooser() as chooser:
        v.page.click("#ming-exam-upload")
    chooser.value.set_files(str(path))
    v.page.wait_for_selector("#ming-exam-import .er", timeout=20_000)


HOSTILE = "题目,A,B,答案\n<img src=x onerror=alert(1)>选？,<script>alert(2)</script>,乙,A\n坏题,甲,乙,Z\n"


def test_files_come_in_and_go_out(serve: Any, visit: Any, settings: Settings, tmp_path: Path) -> None:
    v = visit(serve(engine(), settings), locale="zh-CN")
    path = tmp_path / "敌意题库.csv"
    path.write_bytes(HOSTILE.encode("gb18030"))
    room(v, "zh", "banks")
    import_file(v, path)
    assert "可导入 1 题，1 行有误" in v.text("#ming-exam-import") and "不在选项之中" in v.text("#ming-exam-import")
    v.shot("exam-import-zh")
    v.page.get_by_label("答案", exact=True).select_option("")  # a column is chosen, not typed
    v.page.wait_for_function("() => document.querySelector('#ming-exam-message').innerText.includes('找不到 answer')")
    v.page.get_by_label("答案", exact=True).select_option(label="答案")
    v.page.wait_for_function("() => document.querySelector('#ming-exam-import').innerText.includes('可导入 1 题')")
    v.page.get_by_label("未标明语言的题目").select_option(label="英文")
    v.until(lambda: "可导入 1 题" in v.text("#ming-exam-import"))
    v.page.click("#ming-exam-keep")
    v.page.wait_for_function("() => document.querySelector('#ming-exam-message').innerText.includes('已导入')")
    with v.page.expect_download() as download:
        v.page.click("#ming-exam-export")
    (question,) = read_bank(Path(download.value.path()).read_bytes(), "x.jsonl").questions
    assert question.stem == "<img src=x onerror=alert(1)>选？"
    v.page.locator("#ming-exam-tabs").get_by_role("tab", name="练习", exact=True).click()
    v.page.click("#ming-exam-start")
    counter(v, "第 1 题")
    assert v.text(".ex-stem") == question.stem and v.page.locator(".ex img[src=x], .ex script").count() == 0
    assert v.dialogs == [] and v.errors == []


def test_the_model_helps(serve: Any, visit: Any, settings: Settings) -> None:
    v = visit(serve(engine("Because of the **heart**."), settings))
    room(v)
    v.page.click("#ming-exam-start")
    counter(v, "Question 1 of 20")
    assert v.page.is_visible("#ming-exam-ai-hint") and v.page.is_hidden("#ming-exam-ai-explain")
    v.page.locator(".ex-pick").nth(0).click()
    v.page.click(".ex-submit")
    v.page.wait_for_selector(".ex-verdict:visible")
    v.page.click("#ming-exam-ai-explain")
    v.page.wait_for_function(
        "() => document.querySelector('#ming-exam-help-text')?.innerText.includes('Because of the heart.')"
    )
    v.page.wait_for_selector("#ming-exam-ai-stop", state="hidden")
    v.page.click("#ming-exam-ai-answer")
    v.page.wait_for_selector(".ex-chance")
    assert "The model chose" in v.text("#ming-exam-help-note") and v.page.locator(".ex-chance").count() == 5
    v.shot("exam-model-en")
    v.page.click("#ming-exam-ai-chat")
    v.page.wait_for_selector("#ming-chat [data-testid=bot]", state="visible")
    assert "Because of the" in v.text("#ming-chat")
    v.page.get_by_role("tab", name="Exam", exact=True).first.click()
    counter(v, "Question 1 of 20")  # still there
    assert v.errors == []


def test_progress_stays_in_the_browser_where_the_server_keeps_none(serve: Any, visit: Any, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", progress="browser")
    v = visit(serve(engine(), settings))
    room(v)
    v.page.click("#ming-exam-start")
    counter(v, "Question 1 of 20")
    v.page.locator(".ex-pick").nth(0).click()
    v.page.click(".ex-submit")
    v.page.wait_for_selector(".ex-verdict:visible")
    v.until(lambda: '"answers"' in (v.page.evaluate("localStorage.getItem('ming.exam')") or ""))
    v.page.reload()
    v.page.wait_for_selector("html[data-ming=ready]")
    room(v)
    v.page.wait_for_function(
        "() => document.querySelector('#ming-exam-counts').innerText.includes('1 answered before')"
    )
    v.page.click("#ming-exam-resume")
    counter(v, "Question 1 of 20")
    assert v.page.is_visible(".ex-verdict") and not (tmp_path / "data").exists()
    v.page.click(".ex-leave")
    room(v, pane="data")
    v.page.click("#ming-exam-data-delete")
    v.page.click("#ming-exam-data-yes")
    v.page.wait_for_function("() => document.querySelector('#ming-exam-message').innerText.includes('deleted')")
    assert v.page.evaluate("localStorage.getItem('ming.exam')") is None and v.errors == []


def test_a_server_that_forgot_does_not_clear_the_browser(serve: Any, visit: Any, tmp_path: Path) -> None:
    served = serve(engine(), Settings(data_dir=tmp_path / "data", progress="browser"))
    v = visit(served)
    room(v)
    v.page.click("#ming-exam-start")
    counter(v, "Question 1 of 20")
    v.page.locator(".ex-pick").nth(0).click()
    v.page.click(".ex-submit")
    v.until(lambda: '"answers"' in (v.page.evaluate("localStorage.getItem('ming.exam')") or ""))
    kept = v.page.evaluate("localStorage.getItem('ming.exam')")
    serve.pages[-1].blocks.state_holder.session_data.clear()  # as after an hour of sleep, or a restart
    v.page.locator(".ex-next").click()
    v.until(lambda: v.dialogs != [])
    assert "started anew" in v.dialogs[0]
    v.page.wait_for_selector("html[data-ming=ready]")
    room(v)
    v.page.wait_for_function(
        "() => document.querySelector('#ming-exam-counts').innerText.includes('1 answered before')"
    )
    assert v.page.evaluate("localStorage.getItem('ming.exam')") == kept and v.errors == []


def test_old_sittings_leave_the_browser_and_their_figures_stay(serve: Any, visit: Any, tmp_path: Path) -> None:
    v = visit(serve(engine(), Settings(data_dir=tmp_path / "data", progress="browser")))
    left = v.page.evaluate(
        """() => {
          const columns = { sittings: ["id", "finished"], responses: ["sitting", "place"], tally: ["key"] };
          const rows = { sittings: [], responses: [], tally: [["k"]] };
          for (let i = 0; i < 100; i++) { rows.sittings.push([`s${i}`, i < 99 ? i : null]); rows.responses.push([`s${i}`, 0]); }
          const keys = { sittings: ["id"], responses: ["sitting", "place"], tally: ["key"] };
          ming.keep("exam", JSON.stringify({ store: ming.storeOf("exam"), columns, rows, keys, gone: {} }));
          const kept = JSON.parse(localStorage.getItem("ming.exam")).rows;
          return [Object.keys(kept.sittings), Object.keys(kept.responses).length, Object.keys(kept.tally).length];
        }"""
    )
    assert len(left[0]) == 61 and "s99" in left[0] and "s98" in left[0] and "s38" not in left[0]
    assert left[1:] == [61, 1]


def test_arrows_walk_through_options_and_letters_can_be_switched_off(
    serve: Any, visit: Any, settings: Settings
) -> None:
    v = visit(serve(engine(), settings))
    room(v)
    v.page.click("#ming-exam-start")
    counter(v, "Question 1 of 20")
    v.page.locator(".ex-pick").nth(0).focus()
    v.page.keyboard.press("ArrowDown")
    v.page.keyboard.press("ArrowDown")
    assert v.page.evaluate("[...document.querySelectorAll('.ex-pick')].indexOf(document.activeElement)") == 2
    v.page.keyboard.press("Space")
    assert v.page.locator(".ex-pick").nth(2).get_attribute("aria-checked") == "true"
    v.page.click(".ex-keys-switch")
    assert "off" in v.text(".ex-keys-switch")
    v.page.keyboard.press("A")
    v.page.keyboard.press("F")
    assert v.page.locator(".ex-pick").nth(0).get_attribute("aria-checked") == "false"
    assert v.page.get_attribute(".ex-flag", "aria-pressed") == "false"
    v.page.keyboard.press("ArrowRight")
    counter(v, "Question 2 of 20")
    v.page.reload()
    v.page.wait_for_selector("html[data-ming=ready]")
    room(v)
    v.page.click("#ming-exam-resume")
    counter(v, "Question 2 of 20")
    assert "off" in v.text(".ex-keys-switch")
    v.page.click(".ex-keys-switch")
    v.page.keyboard.press("B")
    assert v.page.locator(".ex-pick").nth(1).get_attribute("aria-checked") == "true" and v.errors == []


def test_an_account_keeps_its_own_progress(serve: Any, chromium: Any, tmp_path: Path) -> None:
    """Two who sign in do not see each other's; the same one does from another browser."""
    settings = Settings(data_dir=tmp_path / "data", progress="account", port=0)
    users = [("li", "one-secret"), ("wang", "another-secret")]
    page = Page(EngineLoader.of(engine()), settings)
    url = launch(page.blocks, settings, prevent_thread_lock=True, auth=users)[1]
    try:

        def signed_in(user: tuple[str, str]) -> Visit:
            v = Visit(chromium.new_context(locale="en-US").new_page())
            v.page.goto(url)
            v.page.get_by_label("username").fill(user[0])
            v.page.get_by_label("password").fill(user[1])
            v.page.get_by_role("button", name="Login").click()
            v.page.wait_for_selector("html[data-ming=ready]")
            room(v)
            return v

        one = signed_in(users[0])
        one.page.click("#ming-exam-start")
        counter(one, "Question 1 of 20")
        one.page.locator(".ex-pick").nth(0).click()
        one.page.click(".ex-submit")
        one.page.wait_for_selector(".ex-verdict:visible")
        assert "0 answered before" in signed_in(users[1]).text("#ming-exam-counts")
        again = signed_in(users[0])
        assert "1 answered before" in again.text("#ming-exam-counts")
        room(again, pane="data")
        assert "Signed in as li" in again.text("#ming-exam")
        assert again.page.evaluate("localStorage.getItem('ming.exam')") is None
        folders = list((tmp_path / "data" / "accounts").iterdir())
        assert len(folders) == 2 and not any(folder.name == "li" for folder in folders)
    finally:
        page.blocks.close(verbose=False)


@pytest.mark.parametrize(("scheme", "locale"), [("dark", "zh-CN"), ("light", "en-US")])
def test_on_a_phone(serve: Any, visit: Any, settings: Settings, scheme: str, locale: str) -> None:
    v = visit(serve(engine(), settings), locale=locale, width=390, height=844, scheme=scheme)
    lang = "zh" if locale == "zh-CN" else "en"
    room(v, lang)
    v.shot(f"exam-home-phone-{lang}")
    v.page.click("#ming-exam-start")
    v.page.wait_for_selector(".ex-option")
    v.page.locator(".ex-pick").nth(2).click()
    v.page.click(".ex-submit")
    v.page.wait_for_selector(".ex-verdict:visible")
    v.shot(f"exam-phone-{lang}")
    assert v.page.evaluate("document.documentElement.scrollWidth") <= 390
    for selector in (".ex-next", ".ex-pick", ".ex-flag"):
        assert v.page.locator(selector).first.bounding_box()["height"] >= 32
    assert v.errors == []


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def test_pictures_show(serve: Any, visit: Any, settings: Settings, tmp_path: Path) -> None:
    v = visit(serve(engine(), settings))
    path = tmp_path / "pictures.jsonl"
    path.write_bytes(write_bank([question(1, image=f"data:image/png;base64,{PIXEL}"), question(2)], "jsonl"))
    room(v, pane="banks")
    import_file(v, path)
    v.page.click("#ming-exam-keep")
    v.page.wait_for_function("() => document.querySelector('#ming-exam-message').innerText.includes('Imported')")
    v.page.get_by_role("tab", name="Practise", exact=True).click()
    v.page.click("#ming-exam-start")
    counter(v, "Question 1 of 2")
    v.until(lambda: v.page.evaluate("document.querySelector('.ex-image').naturalWidth") == 1)
    assert v.page.get_attribute(".ex-image", "alt") == "Picture of the question"
    v.page.click(".ex-next")
    counter(v, "Question 2 of 2")
    assert v.page.is_hidden(".ex-image") and v.errors == []


def test_the_next_question_comes_at_once(serve: Any, visit: Any, settings: Settings) -> None:
    """No timed test: it prints what a benchmark would, and fails only when it is far off."""
    v = visit(serve(engine(), settings))
    room(v)
    v.page.click("#ming-exam-start")
    counter(v, "Question 1 of 20")
    times = []
    for number in range(2, 12):
        took = v.page.evaluate(
            """number => new Promise(done => {
              const begin = performance.now();
              new MutationObserver(() => { if (document.querySelector('.ex-counter').innerText.includes(`Question ${number} of`)) done(performance.now() - begin); })
                .observe(document.querySelector('.ex-counter'), { childList: true, characterData: true, subtree: true });
              document.querySelector('.ex-next').click();
            })""",
            number,
        )
        times.append(took)
    print(f"next question: {sorted(times)[len(times) // 2]:.0f} ms median, {max(times):.0f} ms at most")
    assert sorted(times)[len(times) // 2] < 2000
