"""HTML pieces: everything escaped, model text inert, loading and figures readable."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ming_app.conversation.tree import Turn
from ming_app.errors import FetchError
from ming_app.models.progress import Progress
from ming_app.ui import render
from ming_app.ui.chat import Meter, Note, Run, Session
from ming_app.ui.loader import LoadState
from tests.fakes import FakeEngine

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](http://example.org/track.png)",
    "![x][1]\n\n[1]: http://example.org/track.png",
    "</div><iframe src=//example.org>",
    "<!-- --><svg/onload=alert(1)>",
    "`<b>code</b>`",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_model_text_opens_no_tag_and_no_image(text: str) -> None:
    made = render.inert(text)
    assert "![" not in made
    assert all(made[i + 1] == render.JOINER for i, c in enumerate(made[:-1]) if c == "<" and made[i + 1] != " ")
    assert render.restore(made) == text


def test_ordinary_text_is_left_alone() -> None:
    for text in ("p<0.05 且 BMI <18.5", "a < b", "**bold** | table |", "Great! [link](https://who.int)"):
        assert render.inert(text) == text


def test_messages_map_one_to_one() -> None:
    made = render.messages([Turn("user", "q <b>"), Turn("assistant", "")])
    assert [m["role"] for m in made] == ["user", "assistant"] and made[1]["content"] == "…"


def test_badge_and_errors_are_escaped() -> None:
    engine = FakeEngine()
    info = type(engine.info)(**{**engine.info.__dict__, "title": "<b>evil</b>"})
    assert "<b>evil" not in render.badge("en", info)
    session = Session(error=FetchError("see <script>x</script>", "看 <script>x</script>"))
    assert "<script>" not in render.notices(session)


def test_status_line() -> None:
    info = FakeEngine().info
    session = Session(lang="zh", run=Run(), status=Note("status.writing"), meter=Meter(100, 28, 12.345, 0.81))
    made = render.status(session, info)
    assert "正在回答" in made and "12.3" in made and "0.8" in made and "128 / 4096" in made and "m-on" in made
    borrowing = render.status(
        Session(status=Note("status.reading", {"seconds": 3}), run=Run()), replace(info, device="ZeroGPU")
    )
    assert "Waiting for a GPU" in borrowing and "3 s" in borrowing
    reading = render.status(Session(status=Note("status.reading", {"seconds": 3}), run=Run()), info)
    assert 'role="status"></span>' in reading  # the seconds are shown, but not read out


def test_loading_tells_bytes_speed_and_time_left() -> None:
    progress = Progress("fetch", 300_000_000, 1_117_000_000, "bytes", "part 3 of 22", 25e6, 33.0)
    made = render.loading("en", LoadState(progress=progress))
    for part in ("Downloading", "300 MB / 1.1 GB", "25 MB/s", "33 s left", "part 3 of 22", "26.9%"):
        assert part in made
    assert "剩余约 33 秒" in render.loading("zh", LoadState(progress=progress))
    assert "12 / 28" in render.loading("en", LoadState(progress=Progress("build", 12, 28, "steps")))
    assert "Preparing" in render.loading("en", LoadState())


def test_loading_errors_in_words() -> None:
    failed = LoadState(error=FetchError("No network. Connect and try again.", "没有网络，请联网后重试。"))
    assert "没有网络" in render.loading("zh", failed) and "No network" in render.loading("en", failed)
    assert "ZeroDivisionError" in render.loading("en", LoadState(error=ZeroDivisionError("x")))
    assert render.loading("en", LoadState(engine=FakeEngine())) == ""
