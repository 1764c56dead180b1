"""The string table: complete in both languages, every key used, placeholders equal, numbers readable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ming_app.ui
from ming_app.errors import MingError
from ming_app.ui.text import TEXTS, duration_text, refusal, size_text, t

UI = Path(ming_app.ui.__file__).parent
SOURCES = {
    path.name: path.read_text(encoding="utf-8") for path in UI.rglob("*") if path.suffix in (".py", ".js", ".html")
}


@pytest.mark.parametrize("key", TEXTS)
def test_both_languages_are_there_with_the_same_placeholders(key: str) -> None:
    texts = TEXTS[key]
    assert set(texts) == {"en", "zh"} and all(text.strip() for text in texts.values())
    assert set(re.findall(r"\{(\w+)\}", texts["en"])) == set(re.findall(r"\{(\w+)\}", texts["zh"]))


def test_english_texts_have_no_chinese_characters_and_chinese_ones_do() -> None:
    cjk = re.compile(r"[\u4e00-\u9fff]")
    neutral = {"exam.history_item", "set.top_p", "set.top_k", "set.min_p", "chat.counter", "meter.context_used"}
    for key, texts in TEXTS.items():
        assert not cjk.search(texts["en"]), key
        assert cjk.search(texts["zh"]) or key in neutral, key


def test_every_key_is_used() -> None:
    code = "\n".join(text for name, text in SOURCES.items() if name not in ("text.py", "words.py"))
    dynamic = ("about.", "load.", "notice.", "app.theme_", "experts.download_", "set.")
    dynamic += ("exam.card.state_", "exam.card.cause_", "exam.difficulty_")
    dynamic += (
        "exam.result.by_",
        "exam.when_",
        "exam.import_",
        "exam.field.",
        "exam.only",
        "exam.order",
        "exam.mode",
        "exam.sure_",
    )
    dynamic += ("exam.reading.", "talk.")
    dynamic += ("exp.view_", "exp.kind_", "exp.missing_", "exp.col_")  # made from names in code
    unused = []
    for key in TEXTS:
        short = key.removeprefix("exam.card.").removeprefix(
            "exam.ai."
        )  # as the card's script and the help's buttons say it
        if not any(f"{q}{k}{q}" in code for q in "\"'" for k in (key, short)) and not key.startswith(dynamic):
            unused.append(key)
    assert unused == []


def test_every_key_that_code_names_exists() -> None:
    code = "\n".join(text for name, text in SOURCES.items() if name.endswith(".py"))
    named = set(re.findall(r"""(?:\bt\(\w+, |refusal\(|Note\(|labelled\(|valued\()["'](\w+(?:\.\w+)+)["']""", code))
    assert named and named <= set(TEXTS)


def test_reading_the_table() -> None:
    assert t("zh-CN", "chat.send") == "发送" and t("fr", "chat.send") == "Send"
    assert t("en", "status.turn", n=3, seconds=9) == "Waiting for a turn · number 3 in the queue · about 9 s"
    error = refusal("refuse.long", n=9, limit=8)
    assert isinstance(error, MingError) and "9" in error.en and "9" in error.zh and error.en != error.zh


@pytest.mark.parametrize(
    "count,text", [(1_117_320_768, "1.1 GB"), (35_000_000, "35 MB"), (12_400, "12 kB"), (7, "7 B")]
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text


def test_durations() -> None:
    assert [duration_text("en", s) for s in (4, 80, 200, 7000)] == ["4 s", "80 s", "3 min", "1 h 57 min"]
    assert duration_text("zh", 200) == "3 分钟"
