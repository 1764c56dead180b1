"""Nothing leaves loopback, and no word of a question, answer, prompt, bank or title is in a log or the name of a file."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ming_app import cli
from ming_app.ui.guard import LOGGERS, PRINTERS, PlacesOnly, places
from tests.fakes import FakeEngine
from tests.security.planted import SECRETS, secret

ROOT = Path(__file__).parents[2]
LOOPBACK = {"127.0.0.1", "localhost", "::1", "0.0.0.0", "None"}


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """(what the probe reports, all that it wrote to its terminal)."""
    home = tmp_path_factory.mktemp("visit")
    folders = {"TMPDIR": home / "tmp", "MING_DATA_DIR": home / "data", "MING_CACHE_DIR": home / "cache"}
    for folder in folders.values():
        folder.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")}
    environment = {**kept, **{name: str(folder) for name, folder in folders.items()}, "PYTHONUTF8": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.security.probe"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    line = next((line for line in run.stdout.splitlines() if line.startswith("PROBE ")), None)
    assert line, run.stderr[-3000:]
    return json.loads(line.removeprefix("PROBE ")), run.stdout.replace(line, "") + run.stderr


def test_the_visit_did_what_it_should(visit: tuple[dict, str]) -> None:
    report, said = visit
    assert report["answered"] and [name for name, good in report["done"].items() if not good] == []
    assert "KeyError" in said and "ValueError" in said  # the bugs are named, with their places
    assert "probe.py" in said


def test_no_call_leaves_this_machine(visit: tuple[dict, str]) -> None:
    assert set(visit[0]["contacted"]) <= LOOPBACK, visit[0]["contacted"]


def test_no_word_of_a_person_is_logged(visit: tuple[dict, str]) -> None:
    lines = [line for line in visit[1].splitlines() if any(word in line for word in SECRETS)]
    assert lines == []


def test_no_word_of_a_person_is_in_the_name_of_a_file(visit: tuple[dict, str]) -> None:
    report, _ = visit
    assert any("conversations.sqlite" in name for name in report["files"])
    assert [name for name in report["files"] if any(word in name for word in SECRETS)] == []
    assert report["opened"] == []


def test_a_crash_of_the_command_line_names_places_only(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(messages: list) -> str:
        raise ValueError(f"{messages} {secret('answer')}")

    for form in ([], ["--json"]):
        code = cli.main(["ask", secret("question"), *form], load_engine=lambda *_: FakeEngine(broken))
        said = capsys.readouterr()
        assert code == 1 and "ValueError" in said.err and "fakes.py" in said.err
        assert not any(word in said.out + said.err for word in SECRETS)


def test_an_answer_is_on_stdout_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(secret("question")))
    assert (
        cli.main(["ask", "-", "--system", secret("system")], load_engine=lambda *_: FakeEngine(secret("answer"))) == 0
    )
    said = capsys.readouterr()
    assert secret("answer") in said.out and not any(word in said.err for word in SECRETS)


def test_places_of_chained_errors() -> None:
    try:
        try:
            raise KeyError(secret("question"))
        except KeyError as inner:
            raise ValueError(secret("answer")) from inner
    except ValueError as error:
        told = places(error)
    assert told.index("KeyError") < told.index("ValueError") and __file__ in told
    assert "zebrafish" not in told


def test_log_records_lose_the_messages_of_exceptions() -> None:
    out = io.StringIO()
    logger = logging.Logger("test")
    logger.addHandler(logging.StreamHandler(out))
    logger.addFilter(PlacesOnly())
    try:
        raise ValueError(secret("question"))
    except ValueError as error:
        logger.exception("it failed\nfuture: %r", error)
        logger.info("a plain line")
    assert "it failed" in out.getvalue() and "ValueError" in out.getvalue() and "zebrafish" not in out.getvalue()


def test_gradio_still_prints_where_we_look() -> None:
    """An update of Gradio that prints tracebacks elsewhere must be noticed."""
    import gradio

    printing = {
        path.stem
        for path in Path(gradio.__file__).parent.glob("*.py")
        if "traceback.print_exc" in path.read_text(encoding="utf-8")
    }
    assert printing - {module.__name__.rpartition(".")[2] for module in PRINTERS} <= {"screen_recording_utils"}
    assert LOGGERS
