"""What only shows in a real process: Ctrl-C, broken pipes, a C locale, a terminal, the speed of --help."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DRIVER = """
import sys
from ming_app.cli import main
from tests.fakes import FakeEngine
def script(messages):
    print("READY", file=sys.stderr, flush=True)
    text = messages[-1].content
    return text[5:] if text.startswith("echo ") else "\\u96e8 rain " * 300
sys.exit(main(sys.argv[1:], load_engine=lambda settings, progress: FakeEngine(script, delay=0.01)))
"""
COMMAND = [sys.executable, "-c", DRIVER]
posix_only = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX systems")


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", **changes}


@posix_only
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_ctrl_c_ends_ask_quietly_with_130(flags: list[str]) -> None:
    process = subprocess.Popen(
        [*COMMAND, "ask", "q", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), cwd=ROOT
    )
    assert process.stdout is not None and process.stderr is not None
    while (line := process.stderr.readline()) != b"READY\n":  # the answer begins, and takes 6 s
        assert line, "it ended before the answer began"
    if not flags:
        process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err
    if flags:
        assert out.count(b"\n") == 1 and b'"Interrupted"' in out


@posix_only
def test_a_reader_that_leaves_is_no_error() -> None:
    line = subprocess.run(
        ["bash", "-c", '"$@" | head -c 3; echo "${PIPESTATUS[0]}"', "-", *COMMAND, "ask", "q"],
        capture_output=True,
        env=environment(),
        cwd=ROOT,
        timeout=60,
    )
    assert line.stdout == "雨".encode() + b"141\n"
    assert b"Traceback" not in line.stderr and b"BrokenPipe" not in line.stderr


@posix_only
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_utf8_whatever_the_locale(locale: str) -> None:
    for words, stdin in ((["ask", "echo 雨💧"], None), (["ask", "-"], "echo 雨💧".encode())):
        env = environment(LC_ALL=locale, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        done = subprocess.run(
            [*COMMAND, *words, "--json"], input=stdin, capture_output=True, env=env, cwd=ROOT, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert '"text": "雨💧"' in done.stdout.decode("utf-8")


@posix_only
def test_chat_in_a_terminal_stops_an_answer_and_goes_on() -> None:
    """A real pseudo-terminal: ask, Ctrl-C in the answer, ask again, Ctrl-C at the prompt, leave."""
    import pty

    pid, fd = pty.fork()
    if pid == 0:  # the child is the program
        os.chdir(ROOT)
        os.execve(sys.executable, [*COMMAND, "chat"], environment(TERM="dumb"))
    screen = ""

    def appears(text: str, seconds: float) -> bool:
        nonlocal screen
        end = time.monotonic() + seconds
        while text not in screen:
            if time.monotonic() > end:
                return False
            if select.select([fd], [], [], 0.5)[0]:
                screen += os.read(fd, 4096).decode("utf-8", "replace")
        screen = screen[screen.index(text) + len(text) :]
        return True

    def wait_for(text: str) -> None:
        assert appears(text, 30), f"{text!r} did not appear in {screen!r}"

    try:
        wait_for("> ")
        for _ in range(2):
            os.write(fd, b"question\n")
            wait_for("rain")
            os.write(fd, b"\x03")
            wait_for("(stopped)")
            wait_for("> ")
        for _ in range(10):  # the prompt is drawn before the line editor listens: an early key may be lost
            os.write(fd, b"\x03")
            if appears("Press Ctrl-C again", 3):
                break
        else:
            pytest.fail(f"Ctrl-C at the prompt had no effect: {screen!r}")
        os.write(fd, b"/quit\n")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert "Traceback" not in screen
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.close(fd)


COMMANDS = ("", "ask", "chat", "trace", "verify", "weights", "bench")


HEAVY = ("torch", "gradio", "transformers", "numba", "plotly")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once(command: str) -> None:
    """Help loads none of the libraries that take seconds to import."""
    words = [sys.executable, "-X", "importtime", "-m", "ming_app", *([command] if command else []), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m ming_app"), done.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "ming_app.cli" in imported and not imported & set(HEAVY)


@pytest.mark.parametrize(
    "module", ["ming_app", "ming_app.cli", "ming_app.entry", "ming_app.settings", "ming_app.engine.types"]
)
def test_imports_are_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
