"""The page in Chromium over the scripted engine: streaming, stopping, keys, languages, appearance, widths."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from ming_app.errors import FetchError
from ming_app.models.progress import Progress
from ming_app.settings import Settings
from ming_app.ui.loader import EngineLoader
from tests.browser.conftest import ANSWER, engine
from tests.fakes import long_text

pytestmark = pytest.mark.browser

ATTACK = (
    "<img src=x onerror=alert(1)> <script>alert(2)</script> ![t](http://track.example/a.png) <b>bold</b> "
    "[x](javascript:alert(3)) </div><iframe src=//evil.example></iframe> `<i>`"
)


def overflow(page: Any) -> list[str]:
    """Visible elements that stick out of the window sideways, other than what scrolls inside its own box.

    The page clips what sticks out, so its own scroll width would tell nothing.
    """
    return page.evaluate(
        """() => {
          const scrolls = (e) => {
            for (let box = e.parentElement; box && box !== document.body; box = box.parentElement)
              if (['auto', 'scroll'].includes(getComputedStyle(box).overflowX)) return true;
            return false;
          };
          const out = (e) => {
            const box = e.getBoundingClientRect();
            return box.width > 1 && box.height > 0 && (box.right > innerWidth + 1 || box.left < -1);
          };
          return [...document.querySelectorAll('body *')].filter((e) => out(e) && e.checkVisibility() && !scrolls(e))
            .slice(0, 8).map((e) => `${e.tagName}#${e.id}.${e.className} ${e.getBoundingClientRect().right}`);
        }"""
    )


CHOOSE = """async () => {
  const began = performance.now();
  document.querySelectorAll('.xp-tok:not(.xp-q)')[20].click();
  while (document.querySelectorAll('.xp-grid tbody tr').length < 12) await new Promise((next) => setTimeout(next, 5));
  return performance.now() - began;
}"""


def test_ask_watch_it_stream_and_look_at_a_token(serve: Any, visit: Any) -> None:
    v = visit(serve(engine(delay=0.05)))
    page = v.page
    v.watch()
    v.ask("How do I lower my blood pressure?")
    page.wait_for_selector(".xp-live:visible")
    v.finished()
    page.wait_for_selector(".xp-live", state="hidden")
    counts, texts = v.seen()
    assert counts == sorted(counts) and len(set(counts)) >= 4 and len(set(texts)) >= 5
    assert page.locator("#ming-chat strong").inner_text() == "生活方式调整"
    assert page.locator("#ming-chat table").count() == 1
    assert "tokens/s" in v.text("#ming-status") and "of 4096 tokens" in v.text("#ming-status")
    tokens = page.locator(".xp-tok:not(.xp-q)")
    assert page.evaluate(CHOOSE) < 3000
    assert page.locator(".xp-grid tbody tr").count() == 12
    assert tokens.nth(20).get_attribute("aria-selected") == "true"
    assert "layer" in page.locator(".xp-say").inner_text().lower()
    v.shot("asked_1440_en_light")
    assert v.errors == [] and v.outside == []


def test_stop_by_button_and_by_escape(serve: Any, visit: Any) -> None:
    fake = engine(long_text(4000), delay=0.02)
    v = visit(serve(fake))
    page = v.page
    for stop in (lambda: page.click("#ming-stop"), lambda: page.keyboard.press("Escape")):
        page.click("#ming-new")  # so that nothing of the round before can be taken for this one's
        page.wait_for_selector(".m-welcome")
        page.wait_for_selector(".xp-empty", state="visible")
        v.ask("q")
        page.wait_for_selector("#ming-stop", state="visible")
        page.wait_for_selector(".xp-live:visible")
        page.wait_for_function("document.querySelectorAll('.xp-tok:not(.xp-q)').length > 10")
        assert not page.is_visible("#ming-send")
        stop()
        page.wait_for_selector("#ming-send", state="visible", timeout=5000)
        assert fake.open_streams == 0
        page.wait_for_function("document.querySelector('#ming-status').innerText.includes('Stopped')")
        assert "word" in page.locator("#ming-chat [data-testid=bot]").last.inner_text()
    page.wait_for_selector(".xp-live", state="hidden")  # the panel too has its last, complete state


def test_leaving_the_page_frees_the_engine(serve: Any, visit: Any) -> None:
    fake = engine(long_text(4000), delay=0.02)
    v = visit(serve(fake))
    v.ask("q")
    v.page.wait_for_selector(".xp-live:visible")
    v.page.close()
    for _ in range(100):
        if not fake.open_streams:
            break
        time.sleep(0.1)
    assert fake.open_streams == 0


def test_a_waiting_question_can_be_taken_back(serve: Any, visit: Any) -> None:
    fake = engine(long_text(4000), delay=0.02, slots=1)
    url = serve(fake, Settings(streams=1, data_dir=serve.folder))
    one, two = visit(url), visit(url)
    one.ask("first")
    one.page.wait_for_selector(".xp-live:visible")
    two.ask("second")
    two.page.wait_for_function("document.querySelector('#ming-status').innerText.includes('number 1 in the queue')")
    two.page.click("#ming-stop")
    two.page.wait_for_selector("#ming-send", state="visible")
    assert two.page.input_value("#ming-input textarea") == "second"
    assert two.page.locator("#ming-chat [data-testid=user]").count() == 0
    one.page.click("#ming-stop")
    one.page.wait_for_selector("#ming-send", state="visible")
    assert [m[-1].content for m, _ in fake.calls] == ["first", "second"] and fake.load_now() == (0, 0)


def test_busy_is_said_politely(serve: Any, visit: Any) -> None:
    fake = engine(long_text(4000), delay=0.02, slots=1, max_waiting=1)
    url = serve(fake, Settings(max_queue=1, streams=1))
    visitors = [visit(url, locale="zh-CN") for _ in range(3)]
    for v in visitors[:2]:
        v.ask("问题")
        v.page.wait_for_selector("#ming-stop", state="visible")
        v.until(lambda: sum(fake.load_now()) == visitors.index(v) + 1)  # noqa: B023 (asked at once)
    assert fake.load_now() == (1, 1)
    visitors[1].page.wait_for_function("document.querySelector('#ming-status').innerText.includes('第 1 位')")
    visitors[2].ask("我的问题")
    visitors[2].page.wait_for_selector("text=当前提问人数较多")
    assert visitors[2].page.input_value("#ming-input textarea") == "我的问题"
    visitors[2].shot("busy_1440_zh_light", full=False)


def test_retry_edit_and_new_chat(serve: Any, visit: Any) -> None:
    fake = engine(lambda messages: f"Answer {len(fake.calls)} to {messages[-1].content}")
    v = visit(serve(fake))
    page = v.page
    for number, question in enumerate(("alpha", "beta"), 1):
        v.ask(question)
        v.finished()
        page.wait_for_selector(f"text=Answer {number} to {question}")
    page.locator("#ming-chat button[aria-label='Answer again']").last.click()
    page.wait_for_selector("text=Answer 3 to beta")
    v.finished()
    assert [m.content for m in fake.calls[-1][0]] == ["alpha", "Answer 1 to alpha", "beta"] and len(fake.calls) == 3
    assert page.locator("#ming-chat [data-testid=user]").count() == 2
    page.locator("#ming-chat .message-row.user-row").first.hover()
    page.locator("#ming-chat button[aria-label='Edit the question']").first.click()
    editor = page.locator("#ming-chat textarea")
    editor.fill("gamma <b>x</b>")
    page.locator("#ming-chat button[aria-label='Send the edited question']").first.click()
    page.wait_for_selector("text=Answer 4 to gamma")
    v.answers = 1
    v.finished()
    assert [m.content for m in fake.calls[-1][0]] == ["gamma <b>x</b>"]
    assert page.locator("#ming-chat [data-testid=user]").count() == 1
    page.click("#ming-new")
    page.wait_for_selector(".m-welcome")
    assert page.locator(".xp-empty").is_visible() and "0 of 4096" in v.text("#ming-status")


def test_an_example_is_asked_by_click(serve: Any, visit: Any) -> None:
    fake = engine("ok")
    v = visit(serve(fake), locale="zh-CN")
    v.page.click("#ming-chat .example >> nth=0")
    v.finished()
    assert "血压" in fake.calls[0][0][0].content


def test_enter_newline_and_input_method(serve: Any, visit: Any) -> None:
    fake = engine("ok")
    v = visit(serve(fake))
    page = v.page
    page.click("#ming-input textarea")
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    compose = (
        "new KeyboardEvent('keydown', {key: 'Enter', keyCode: 229, bubbles: true, cancelable: true, isComposing: true})"
    )
    page.eval_on_selector("#ming-input textarea", f"area => area.dispatchEvent({compose})")
    page.wait_for_timeout(400)
    assert fake.calls == []
    assert page.inner_text("#ming-count") == "17 of 8000 characters"
    page.keyboard.press("Enter")
    v.finished()
    assert fake.calls[0][0][0].content == "line one\nline two"
    assert page.input_value("#ming-input textarea") == ""


def test_escape_of_an_input_method_stops_nothing(serve: Any, visit: Any) -> None:
    """Escape gives up a half-typed pinyin word; the answer that is being written goes on."""
    v = visit(serve(engine(long_text(4000), delay=0.02)))
    page, tokens = v.page, v.page.locator(".xp-tok:not(.xp-q)")
    v.ask("q")
    page.wait_for_selector(".xp-live:visible")
    compose = "new KeyboardEvent('keydown', {key: 'Escape', keyCode: 229, bubbles: true, isComposing: true})"
    page.eval_on_selector("#ming-input textarea", f"area => area.dispatchEvent({compose})")
    before = tokens.count()
    v.until(lambda: tokens.count() > before + 60)
    assert page.is_visible("#ming-stop")
    page.keyboard.press("Escape")
    page.wait_for_selector("#ming-send", state="visible")


def test_a_refused_question_stays(serve: Any, visit: Any) -> None:
    v = visit(serve(engine("ok", context_limit=64)), locale="zh-CN")
    v.ask("很长的问题" * 40)
    v.page.wait_for_selector("#ming-notices .m-bad")
    assert "200" in v.text("#ming-notices")
    v.page.wait_for_function("document.querySelector('#ming-input textarea').value.length === 200")
    v.shot("refused_1440_zh_light", full=False)
    v.page.fill("#ming-input textarea", "   ")
    v.page.keyboard.press("Enter")
    v.page.wait_for_selector("text=请先输入问题")


def test_language_follows_the_browser_then_the_person(serve: Any, visit: Any) -> None:
    url = serve(engine(delay=0.01))
    v = visit(url, locale="zh-CN")
    page = v.page
    page.wait_for_selector("text=想了解哪方面的医学问题")
    assert page.get_attribute("html", "lang") == "zh-CN"
    v.ask("问题")
    v.finished()
    page.click("#ming-lang label:has-text('English')")
    page.wait_for_selector("text=Experts at work")
    for text in ("Finished", "Answer settings", "New chat", "Load", "One token", "AI-generated content", "About"):
        page.locator(f"text={text}").first.wait_for()

    def left() -> set[str]:
        visible = page.evaluate("document.querySelector('.gradio-container').innerText")
        return {c for line in visible.splitlines() for c in line if "\u4e00" <= c <= "\u9fff"}

    v.until(lambda: left() <= set(ANSWER) | set("中文问题"))  # the parts are reworded one after the other
    page.reload()
    page.wait_for_selector("text=What would you like to understand?")
    assert page.get_attribute("html", "lang") == "en"


def test_words_change_while_an_answer_streams(serve: Any, visit: Any) -> None:
    v = visit(serve(engine(long_text(200), delay=0.04)))
    v.ask("q")
    v.page.wait_for_selector(".xp-live:visible")
    v.page.click("#ming-lang label:has-text('中文')")
    v.page.wait_for_selector("text=正在回答")
    v.page.wait_for_selector("text=专家在工作")
    v.finished()
    v.page.wait_for_selector("text=回答完毕")
    assert v.page.locator("#ming-chat [data-testid=bot]").inner_text().count("word") == 200


def test_appearance(serve: Any, visit: Any) -> None:
    v = visit(serve(engine()), scheme="dark")
    page = v.page
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(14, 22, 24)"
    page.click("#ming-theme label:has-text('Light')")
    page.wait_for_function(f"{background} === 'rgb(244, 247, 247)'")
    page.reload()
    page.wait_for_selector("#ming-input textarea")
    page.wait_for_function(f"{background} === 'rgb(244, 247, 247)'")
    page.wait_for_selector("#ming-theme label.selected:has-text('Light')")


@pytest.mark.parametrize(
    "width,locale,scheme",
    [(390, "zh-CN", "dark"), (390, "en-US", "light"), (1440, "zh-CN", "dark"), (2200, "en-US", "light")],
)
def test_nothing_overflows(serve: Any, visit: Any, width: int, locale: str, scheme: str) -> None:
    fake = engine(ANSWER * 3, num_layers=28)
    fake.info = replace(fake.info, title="a_folder_of_somebody/with_a_long_name_and_nowhere_to_break_it_7B_Instruct")
    v = visit(
        serve(fake),
        locale=locale,
        width=width,
        height=844 if width < 500 else 900,
        scheme=scheme,
    )
    name = f"{width}_{locale[:2]}_{scheme}"
    assert overflow(v.page) == []
    v.shot(f"empty_{name}", full=False)
    v.ask("血压偏高怎么办？ What can I do about high blood pressure?")
    v.finished()
    v.page.locator(".xp-tok:not(.xp-q)").nth(7).click()
    v.page.wait_for_timeout(200)
    assert overflow(v.page) == []
    foot = v.page.locator("#ming-foot").bounding_box()
    assert foot["y"] + foot["height"] <= v.page.viewport_size["height"] + 1  # the disclaimer is in sight, whole
    middle = [foot["x"] + foot["width"] / 2, foot["y"] + foot["height"] / 2]
    assert v.page.evaluate("([x, y]) => document.elementFromPoint(x, y).closest('#ming-foot') !== null", middle)
    v.shot(f"answered_{name}")
    v.page.click("#ming-settings button")
    v.page.wait_for_timeout(400)
    assert overflow(v.page) == []
    v.shot(f"settings_{name}", full=False)
    v.page.click("button[role=tab]:has-text('About'), button[role=tab]:has-text('说明')")
    v.page.wait_for_timeout(300)
    assert overflow(v.page) == []
    v.shot(f"about_{name}", full=False)


def test_model_text_and_typed_text_are_inert(serve: Any, visit: Any) -> None:
    v = visit(serve(engine(ATTACK)))
    page = v.page
    v.ask(ATTACK)
    v.finished()
    page.locator(".xp-tok:not(.xp-q)").nth(3).click()
    page.check(".xp-prompt input")
    page.check(".xp-astable input")
    page.wait_for_timeout(500)
    assert v.dialogs == [] and v.outside == []
    inside = page.evaluate(
        "[...document.querySelectorAll('#ming-chat .message img, #ming-chat .message iframe, #ming-chat .message script, "
        "#ming-chat .message b, #ming-panel img, #ming-panel script, [onerror]')].length"
    )
    assert inside == 0
    assert "javascript:" not in page.evaluate("[...document.querySelectorAll('#ming-chat a')].map(a => a.href).join()")
    assert "<img src=x" in page.locator("#ming-chat [data-testid=bot]").inner_text().replace("\u2060", "")


def test_copied_text_carries_the_label(serve: Any, visit: Any) -> None:
    v = visit(serve(engine("Drink water.")), locale="zh-CN")
    v.ask("q")
    v.finished()
    v.until(lambda: v.page.locator("#ming-chat button[data-key='chat.copy']").count() == 2)
    offered = v.page.locator("#ming-chat button[data-key='chat.copy']:visible")
    assert offered.count() == 1  # a person's own words are not AI-generated: their copy would be labelled too
    v.page.evaluate("navigator.clipboard.writeText('')")
    offered.click()
    v.until(lambda: bool(v.page.evaluate("navigator.clipboard.readText()")))
    copied = v.page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("Drink water.") and "人工智能" in copied and "Fake model" in copied


def test_settings_reset(serve: Any, visit: Any) -> None:
    fake = engine("ok")
    v = visit(serve(fake))
    page = v.page
    page.click("#ming-settings button")
    number = page.locator("#ming-temperature input[type=number]")

    def taken() -> bool:
        """Typed right after opening, the value was lost once under load; most likely the contents were still mounting."""
        number.fill("0")
        number.blur()
        page.wait_for_timeout(200)
        return bool(number.input_value() == "0")

    v.until(taken)
    v.ask("q")
    v.finished()
    assert fake.calls[-1][1].temperature == 0
    page.click("text=Reset to defaults")
    page.wait_for_function("document.querySelector('#ming-temperature input[type=number]').value === '0.7'")


def test_a_loading_engine(serve: Any, visit: Any) -> None:
    """Progress with bytes and time left, a failure in words, another try, then chat opens."""
    steps: list[Any] = [
        "wait",
        FetchError("No network. Connect and try again.", "没有网络，请联网后重试。"),
        "wait",
        engine("ok"),
    ]
    go = {"on": False}

    def load(progress: Any) -> Any:
        steps.pop(0)
        progress(Progress("fetch", 300_000_000, 1_117_000_000, "bytes", "part 6 of 22", 25e6, 33.0))
        while not go["on"]:
            time.sleep(0.05)
        go["on"] = False
        result = steps.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    loader = EngineLoader(load)
    loader.start()
    v = visit(serve(loader), locale="zh-CN")
    page = v.page
    page.wait_for_selector("text=300 MB / 1.1 GB")
    page.wait_for_selector("#ming-send[disabled]")
    v.shot("loading_1440_zh_light", full=False)
    go["on"] = True
    page.wait_for_selector("text=没有网络")
    v.shot("failed_1440_zh_light", full=False)
    page.click("button:has-text('重试')")
    page.wait_for_selector("text=正在下载")
    go["on"] = True
    page.wait_for_selector("#ming-send:not([disabled])")
    v.ask("q")
    v.finished()
    assert "Fake model" in v.text("#ming-tools")
