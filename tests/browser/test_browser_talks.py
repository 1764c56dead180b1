"""Conversations, warnings and consultation in Chromium: reload, branches, two windows, hostile text, axe, phone, keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ming_app.exam.formats import write_bank
from ming_app.settings import Settings
from tests.browser.conftest import Visit, engine
from tests.exam.conftest import question
from tests.fakes import FakeEngine, long_text

pytestmark = pytest.mark.browser

CHEST = "my husband has crushing chest pain and is sweating"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


def talk(v: Visit, *texts: str) -> None:
    for text in texts:
        v.ask(text)
        v.finished()


def titles(v: Visit) -> list[str]:
    return v.page.evaluate("[...document.querySelectorAll('.tk-title')].map(made => made.textContent)")


def test_a_conversation_survives_reload_and_is_searched_renamed_deleted(
    serve: Any, visit: Any, settings: Settings
) -> None:
    v = visit(serve(engine("Drink water."), settings))
    talk(v, "what helps against a cold?")
    v.page.reload()
    v.page.wait_for_selector("html[data-ming=ready]")
    v.page.wait_for_selector("#ming-chat [data-testid=bot]")
    assert "what helps against a cold?" in v.text("#ming-chat")
    v.page.click(".tk-new")
    v.until(lambda: v.page.locator("#ming-chat [data-testid=bot]").count() == 0)
    talk(v, "how much sleep is healthy?")
    v.until(lambda: len(titles(v)) == 2)
    v.page.fill(".tk-search", "cold")
    v.until(lambda: titles(v) == ["what helps against a cold?"])
    v.page.fill(".tk-search", "")
    v.until(lambda: len(titles(v)) == 2)
    v.page.locator(".tk-list li").nth(1).hover()
    v.page.locator(".tk-rename").nth(1).click()
    v.page.fill(".tk-name", "Colds")
    v.page.press(".tk-name", "Enter")
    v.until(lambda: "Colds" in titles(v))
    v.page.locator(".tk-open").filter(has_text="Colds").click()
    v.until(lambda: "against a cold" in v.text("#ming-chat"))
    v.page.locator("li.tk-here .tk-delete").click()
    v.page.click(".tk-yes")
    v.until(lambda: titles(v) == ["how much sleep is healthy?"])
    v.shot("talks-en")
    assert v.errors == [] and v.outside == []


def test_branches_are_walked_through(serve: Any, visit: Any, settings: Settings) -> None:
    answers = iter(["first answer", "second answer", "third answer", "fourth"])
    v = visit(serve(engine(lambda _messages: next(answers)), settings))
    talk(v, "q")
    v.page.locator('#ming-chat button[data-key="chat.retry"]').last.click()
    v.page.wait_for_selector(".m-branch")
    v.until(lambda: "second answer" in v.text("#ming-chat") and "2/2" in v.text(".m-branch"))
    v.page.locator(".m-branch button").first.click()
    v.until(lambda: "first answer" in v.text("#ming-chat") and "1/2" in v.text(".m-branch"))
    v.page.wait_for_selector("#ming-send", state="visible")
    v.page.click("#ming-input textarea")
    v.page.keyboard.press("ArrowUp")  # edits the last question
    area = v.page.locator("#ming-chat textarea")
    area.wait_for()
    area.fill("another question")
    v.page.locator("#ming-chat button[aria-label='Send the edited question']").first.click()
    v.until(lambda: "third answer" in v.text("#ming-chat"))
    assert "another question" in v.text("#ming-chat") and v.errors == []


def test_the_warning_stands_first_and_stays(serve: Any, visit: Any, settings: Settings) -> None:
    v = visit(serve(engine("Nothing to worry about. " + "It will pass soon enough, rest a little."), settings))
    talk(v, CHEST)
    assert "heart attack" in v.text("#ming-alert") and v.page.locator("#ming-alert [role=alert]").count() == 1
    box, chat = v.page.locator("#ming-alert").bounding_box(), v.page.locator("#ming-chat").bounding_box()
    assert box["y"] < chat["y"] and box["height"] > 60
    assert "more certain" in v.text(".m-check")  # the note beside the answer
    v.shot("alarm-en")
    talk(v, "thank you")
    assert "heart attack" in v.text("#ming-alert")
    v.page.click("#ming-new")
    v.until(lambda: v.text("#ming-alert").strip() == "")
    talk(v, "Which of the following is the first sign of shock? A. tachycardia B. anuria C. coma")
    assert v.text("#ming-alert").strip() == "" and v.errors == []


def test_two_browsers_do_not_see_each_other(serve: Any, visit: Any, tmp_path: Path) -> None:
    """On a public page: each keeps its own, the server nothing."""
    url = serve(engine("ok"), Settings(data_dir=tmp_path / "data", progress="browser"))
    one, two = visit(url), visit(url)
    talk(one, "mine")
    talk(two, "yours")
    one.until(lambda: titles(one) == ["mine"] and titles(two) == ["yours"])
    one.until(lambda: "mine" in (one.page.evaluate("localStorage.getItem('ming.chat')") or ""))
    one.page.reload()
    one.page.wait_for_selector("html[data-ming=ready]")
    one.until(lambda: titles(one) == ["mine"] and "mine" in one.text("#ming-chat"))
    assert "yours" not in one.page.content() and not (tmp_path / "data").exists()
    one.page.click(".tk-wipe")
    one.page.click(".tk-yes")
    one.until(lambda: titles(one) == [])
    assert one.page.evaluate("localStorage.getItem('ming.chat')") is None and one.errors == []


def test_two_windows_of_one_person(serve: Any, visit: Any, settings: Settings) -> None:
    url = serve(engine("ok"), settings)
    one, two = visit(url), visit(url)
    talk(one, "from window one")
    talk(two, "from window two")
    two.until(lambda: sorted(titles(two)) == ["from window one", "from window two"])
    two.page.locator(".tk-open").filter(has_text="window one").click()
    two.until(lambda: "from window one" in two.text("#ming-chat"))
    talk(two, "second window adds")
    talk(one, "first window adds")
    assert len(titles(one)) == 2 and one.errors == [] and two.errors == []


def test_incognito_leaves_nothing(serve: Any, visit: Any, settings: Settings) -> None:
    v = visit(serve(engine("ok"), settings))
    v.page.check(".tk-incognito")
    v.until(lambda: "kept nowhere" in v.text(".tk-note"))
    talk(v, "a secret")
    assert titles(v) == []
    v.page.reload()
    v.page.wait_for_selector("html[data-ming=ready]")
    v.page.wait_for_timeout(800)
    assert "a secret" not in v.page.content() and v.errors == []


def test_a_consultation_in_chinese(serve: Any, visit: Any, settings: Settings) -> None:
    def script(messages: Any) -> str:
        return (
            "能说得再具体一些吗？"
            if "请提出下一个问题" in messages[-1].content
            else "可能是胃食管反流。建议消化内科门诊。"
        )

    v = visit(serve(engine(script), settings), locale="zh-CN")
    v.page.get_by_text("智能问诊", exact=True).click()
    v.page.wait_for_selector("#ming-chat [data-testid=bot]")
    talk(v, "烧心，我自己，35岁", "两个月前", "饭后明显", "没有别的", "没有", "铝碳酸镁", "不过敏")
    v.page.wait_for_selector("#ming-consult", state="visible")
    area = v.page.locator("#ming-consult textarea")
    assert "起病：两个月前" in area.input_value()
    area.fill(area.input_value() + "\n补充：吸烟")
    v.answers += 1
    v.page.click("#ming-explain")
    v.finished()
    v.until(lambda: "消化内科" in v.text("#ming-chat") and "吸烟" in v.text("#ming-chat"))
    with v.page.expect_download() as download:
        v.page.click("#ming-note")
    note = Path(download.value.path()).read_text(encoding="utf-8")
    assert "吸烟" in note and "未经专业人员核实" in note
    v.shot("consult-zh")
    assert v.errors == []


def test_feedback_with_a_reason(serve: Any, visit: Any, settings: Settings) -> None:
    page = serve(engine("ok"), settings)
    v = visit(page)
    talk(v, "q")
    v.page.locator("#ming-chat button[aria-label*='ike']").first.click()
    store = serve.pages[-1].do.talks._stores.at(settings.data_dir)
    v.until(lambda: len(store.feedback()) == 1)
    assert store.feedback()[0]["question"] == "q" and v.errors == []


# -- hostile text -----------------------------------------------------------------------------------------------------

PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "[click](javascript:alert(1))",
    "![x](x onerror=alert(1))",
    '"><details open ontoggle=alert(1)>',
    "<style>#ming-alert{display:none!important}</style>",
    "<div class='m-alarm' style='position:fixed;inset:0'>all is well</div>",
    "</span><base href=//evil.example>",
    "{{constructor.constructor('alert(1)')()}}",
    "<math><mtext><img src onerror=alert(1)>",
)


def inert(v: Visit) -> None:
    """Nothing of a payload became an element, and no dialog opened."""
    v.page.wait_for_timeout(300)
    bad = v.page.evaluate(
        """() => [...document.querySelectorAll('#ming-main, #ming-exam, #ming-explorer')].flatMap(root =>
          [...root.querySelectorAll('script, iframe, object, embed, base, style:not(svg style):not([id^=plotly]), details[ontoggle], [onerror], [onload], [src="x"], a[href^="javascript"], svg[onload]')]
            .map(e => e.outerHTML.slice(0, 120)))"""
    )
    assert bad == [] and v.dialogs == [] and v.outside == []


def test_hostile_text_is_inert_everywhere(serve: Any, visit: Any, settings: Settings, tmp_path: Path) -> None:
    everything = "\n\n".join(PAYLOADS)
    v = visit(serve(engine(everything), settings))
    v.page.click("#ming-settings > button, #ming-settings .label-wrap")
    v.page.locator("#ming-starting textarea, #ming-starting input").first.fill(PAYLOADS[1])
    talk(v, everything[:2000], CHEST)
    inert(v)
    assert v.page.is_visible("#ming-alert .m-alarm h2") and "heart attack" in v.text("#ming-alert")
    v.page.locator("li.tk-here .tk-rename").click()
    v.page.fill(".tk-name", PAYLOADS[1])
    v.page.press(".tk-name", "Enter")
    v.until(lambda: PAYLOADS[1] in titles(v))
    inert(v)
    data = {
        "ming_conversations": 1,
        "conversations": [
            {
                "title": PAYLOADS[2],
                "system": PAYLOADS[0],
                "summary": PAYLOADS[3],
                "mode": "consult",
                "turns": [
                    {"id": "a", "parent": "", "role": "user", "text": everything},
                    {"id": "b", "parent": "a", "role": "assistant", "text": everything, "comment": PAYLOADS[1]},
                ],
            }
        ],
    }
    path = tmp_path / "hostile.json"
    path.write_text(json.dumps(data))
    with v.page.expect_file_chooser() as chooser:
        v.page.click(".tk-import")
    chooser.value.set_files(str(path))
    v.until(lambda: PAYLOADS[2] in titles(v))
    v.page.locator(".tk-open").filter(has_text="svg").click()
    v.until(lambda: v.page.is_visible("#ming-consult"))
    inert(v)
    bank = tmp_path / "hostile.jsonl"
    bank.write_bytes(write_bank([question(1, stem=everything[:900], explanation=PAYLOADS[1])], "jsonl"))
    v.page.get_by_role("tab", name="Exam", exact=True).first.click()
    v.page.wait_for_selector("#ming-exam-counts p")
    v.page.get_by_role("tab", name="Banks", exact=True).click()
    with v.page.expect_file_chooser() as chooser:
        v.page.click("#ming-exam-upload")
    chooser.value.set_files(str(bank))
    v.page.wait_for_selector("#ming-exam-import .er", timeout=20_000)
    inert(v)
    v.page.get_by_role("tab", name="Experts", exact=True).first.click()
    v.page.wait_for_timeout(1500)
    inert(v)


def test_a_hostile_routing_record_is_inert(serve: Any, visit: Any, settings: Settings, tmp_path: Path) -> None:
    v = visit(serve(engine("\n\n".join(PAYLOADS)), settings))
    talk(v, "\n\n".join(PAYLOADS)[:2000])
    with v.page.expect_download() as download:
        v.page.click("#ming-save-json")
    saved = tmp_path / "record.json"
    download.value.save_as(saved)
    v.page.locator(".m-open").last.click()
    v.page.wait_for_selector("#ming-explorer-panel-card .xp-tok:not(.xp-q)")
    inert(v)
    with v.page.expect_file_chooser() as chooser:
        v.page.click("#ming-open-record")
    chooser.value.set_files(str(saved))
    v.page.wait_for_timeout(2000)
    inert(v)
    for view in v.page.locator("#ming-view label").all():
        view.click()
        v.page.wait_for_timeout(300)
    inert(v)


def test_exports_are_inert_in_a_browser(serve: Any, visit: Any, settings: Settings, tmp_path: Path) -> None:
    v = visit(serve(engine("\n\n".join(PAYLOADS)), settings))
    talk(v, "\n\n".join(PAYLOADS)[:2000])
    with v.page.expect_download() as download:
        v.page.locator(".tk-export").select_option("html")
    saved = tmp_path / "saved.html"
    download.value.save_as(saved)
    v.page.goto(saved.as_uri())
    assert v.page.locator("script, img, iframe, svg, details").count() == 0 and v.dialogs == []
    assert "AI-generated" in v.text("body")


# -- accessibility, phone, keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(serve: Any, visit: Any, settings: Settings, locale: str, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    v = visit(serve(engine("Nothing to worry about."), settings), locale=locale, scheme=scheme)
    talk(v, CHEST)
    names = ("Exam", "Experts", "About") if locale == "en-US" else ("刷题", "专家", "说明")

    def serious(where: str) -> list[str]:
        v.page.wait_for_timeout(700)
        found = axe.run(v.page).response["violations"]
        return [
            f"{where}: {entry['id']} {node['target']} {node.get('failureSummary', '')[:160]}"
            for entry in found
            if entry["impact"] in ("serious", "critical")
            for node in entry["nodes"][:3]
        ]

    problems = serious("chat")
    for name in names:
        v.page.get_by_role("tab", name=name, exact=True).first.click()
        problems += serious(name)
        if name in ("Exam", "刷题"):
            v.page.click("#ming-exam-start")
            v.page.wait_for_selector(".ex-pick")
            problems += serious("question")
    assert problems == []


@pytest.mark.parametrize(("locale", "scheme"), [("zh-CN", "light"), ("en-US", "dark")])
def test_on_a_phone(serve: Any, visit: Any, settings: Settings, locale: str, scheme: str) -> None:
    v = visit(serve(engine("See a doctor."), settings), locale=locale, width=390, height=844, scheme=scheme)
    talk(v, CHEST if locale == "en-US" else "我爸胸口像压了石头，出冷汗")
    assert v.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert v.page.locator("#ming-alert .m-alarm").bounding_box()["y"] < 844
    v.page.click(".tk summary")
    v.page.wait_for_selector(".tk-open", state="visible")
    v.shot(f"talks-phone-{locale[:2]}")
    for selector in (".tk-open", ".tk-new", "#ming-send"):
        assert v.page.locator(selector).first.bounding_box()["height"] >= 30
    assert v.errors == []


def test_it_can_be_installed(serve: Any, visit: Any, settings: Settings) -> None:
    v = visit(serve(engine("ok"), settings))
    link = v.page.locator("link[rel=manifest]").first.get_attribute("href")
    manifest = v.page.evaluate("href => fetch(href).then(r => r.json())", link)
    assert manifest["icons"] and manifest["display"] in ("standalone", "minimal-ui") and v.outside == []


def test_wide_screens(serve: Any, visit: Any, settings: Settings) -> None:
    v = visit(serve(engine("ok"), settings), width=2560, height=1300)
    talk(v, "q")
    assert v.page.evaluate("document.documentElement.scrollWidth") <= 2560
    v.shot("talks-2560")


def test_the_chat_by_keyboard_alone(serve: Any, visit: Any, settings: Settings) -> None:
    """Ask, stop, open another conversation, rename, delete, choose a branch: without a mouse."""
    v = visit(serve(engine("ok"), settings))

    def reach(selector: str) -> None:
        for _ in range(90):
            v.page.keyboard.press("Tab")
            if v.page.evaluate("selector => document.activeElement?.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} cannot be reached by keyboard")

    reach("#ming-input textarea")
    v.answers = 1
    v.page.keyboard.type("first question")
    v.page.keyboard.press("Enter")
    v.finished()
    v.page.keyboard.press("ArrowUp")
    area = v.page.locator("#ming-chat textarea")
    area.wait_for()
    area.focus()
    v.page.keyboard.press("ControlOrMeta+a")
    v.page.keyboard.type("first question, edited")
    reach("#ming-chat button[aria-label='Send the edited question']")
    v.page.keyboard.press("Enter")
    v.until(lambda: "edited" in v.text("#ming-chat"))
    v.page.wait_for_selector(".m-branch")
    reach(".m-branch button:not(:disabled)")
    v.page.keyboard.press("Enter")
    v.until(lambda: "1/2" in v.text(".m-branch") and "edited" not in v.text("#ming-chat"))
    reach(".tk-rename")
    v.page.keyboard.press("Enter")
    v.page.wait_for_selector(".tk-name")
    v.page.keyboard.press("ControlOrMeta+a")
    v.page.keyboard.type("By keys")
    v.page.keyboard.press("Enter")
    v.until(lambda: titles(v) == ["By keys"])
    v.until(lambda: v.page.evaluate("document.activeElement.className").endswith("tk-rename"))  # where it was left
    reach(".tk-delete")
    v.page.keyboard.press("Enter")
    v.page.wait_for_selector(".tk-yes:visible")
    assert v.page.evaluate("document.activeElement.className") == "tk-yes"
    v.page.keyboard.press("Enter")
    v.until(lambda: titles(v) == [] and v.page.locator("#ming-chat [data-testid=bot]").count() == 0)
    assert v.errors == []


def test_a_name_that_is_being_typed_outlives_an_answer_and_escape_stops_none(
    serve: Any, visit: Any, settings: Settings
) -> None:
    slow = FakeEngine(long_text(40), delay=0.1)
    v = visit(serve(slow, settings))
    v.ask("a long story")
    v.page.wait_for_selector("#ming-stop", state="visible")
    v.until(lambda: titles(v) == ["a long story"])
    v.page.locator("li.tk-here").hover()
    v.page.locator(".tk-rename").first.click()
    v.page.fill(".tk-name", "half a na")
    v.finished()  # the answer ends, and the list is drawn anew
    assert v.page.input_value(".tk-name") == "half a na"
    assert v.page.evaluate("document.activeElement.className") == "tk-name"
    v.page.keyboard.type("me")
    v.page.keyboard.press("Enter")
    v.until(lambda: titles(v) == ["half a name"])
    v.page.locator(".tk-list li").first.hover()
    v.page.locator(".tk-rename").first.click()
    v.page.keyboard.type("my story")
    v.page.locator(".tk-new").click()  # what is pressed next acts at once
    v.until(lambda: v.page.locator("#ming-chat [data-testid=bot]").count() == 0 and titles(v) == ["my story"])
    v.page.locator(".tk-open").first.click()
    v.until(lambda: v.page.locator("#ming-chat [data-testid=bot]").count() == 1)
    v.ask("another long story")
    v.page.wait_for_selector("#ming-stop", state="visible")
    v.page.locator(".tk-list li").first.hover()
    v.page.locator(".tk-rename").first.click()
    v.page.keyboard.press("Escape")  # leaves the box, and nothing else
    v.until(lambda: v.page.locator(".tk-name").count() == 0)
    v.finished()
    assert "word39" in v.text("#ming-chat [data-testid=bot] >> nth=-1") and titles(v) == ["my story"]
    assert v.errors == []


def test_the_dropdown_names_the_role_of_the_conversation_in_view(serve: Any, visit: Any, settings: Settings) -> None:
    said = FakeEngine(long_text(20), delay=0.1)
    v = visit(serve(said, settings))
    v.page.click("#ming-settings button")
    v.page.locator("#ming-system input").click()
    v.page.get_by_role("option", name="My own instructions").click()
    v.page.fill("#ming-own-system textarea", "Be brief.")
    v.ask("who are you?")
    v.page.wait_for_selector("#ming-stop", state="visible")
    v.page.fill("#ming-own-system textarea", "Answer like a pirate.")
    v.finished()  # what is being written stays when an answer ends
    assert v.page.input_value("#ming-own-system textarea") == "Answer like a pirate."
    talk(v, "who are you really?")
    assert [messages[0].content for messages, _ in said.calls] == ["Be brief.", "Answer like a pirate."]
    v.page.reload()
    v.page.wait_for_selector("html[data-ming=ready]")
    v.page.wait_for_selector("#ming-chat [data-testid=bot]")
    v.page.click("#ming-settings button")
    v.until(lambda: v.page.input_value("#ming-system input") == "My own instructions")
    assert v.page.input_value("#ming-own-system textarea") == "Answer like a pirate."
    assert v.errors == []
