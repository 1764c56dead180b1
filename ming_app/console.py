"""What the command line shows and where: answers and JSON on stdout, everything else on stderr, in one language.

Contract: with `json_mode` stdout receives exactly one JSON object, written by `result` or `fail`; what libraries print
meanwhile goes to stderr. Without it stdout receives only what the command produces. No heavy imports.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
import traceback
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from ming_app.errors import MingError
from ming_app.ui.text import TEXTS

if TYPE_CHECKING:
    from ming_app.models.progress import Progress

REDRAW_SECONDS = 0.1


def use_utf8() -> None:
    """UTF-8 on all three streams whatever the locale; what cannot be shown is replaced, never an exception."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")


class Console:
    """Output of one command in one language ("zh" or "en")."""

    def __init__(self, lang: str = "en", json_mode: bool = False) -> None:
        self.lang = lang
        self.json_mode = json_mode
        self._out: TextIO = sys.stdout
        self._bar_shown = False
        self._bar_stage = ""
        self._bar_time = 0.0

    def text(self, en: str, zh: str) -> str:
        """The one of two texts that fits the language."""
        return zh if self.lang == "zh" else en

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """While it lasts, whatever a library prints to stdout in JSON mode goes to stderr."""
        if not self.json_mode:
            yield
            return
        with contextlib.redirect_stdout(sys.stderr):
            yield

    # -- what the command produces ------------------------------------------------------------------------------------

    def write(self, text: str) -> None:
        """Text for people on stdout, at once; nothing in JSON mode. A terminal gets no control characters."""
        if not self.json_mode:
            self._end_bar()
            self._out.write(printable(text) if self._out.isatty() else text)
            self._out.flush()

    def line(self, text: str = "") -> None:
        self.write(text + "\n")

    def result(self, values: dict[str, Any]) -> None:
        """The one JSON object of JSON mode; nothing otherwise."""
        if self.json_mode:
            self._end_bar()
            self._out.write(json.dumps(_finite(values), ensure_ascii=False) + "\n")
            self._out.flush()

    # -- everything else ----------------------------------------------------------------------------------------------

    def note(self, en: str, zh: str) -> None:
        """A remark on stderr. It may quote a file, so it is made printable."""
        self._end_bar()
        print(printable(self.text(en, zh)), file=sys.stderr, flush=True)

    def fail(self, error: MingError) -> int:
        """Shows an error and gives the exit code it asks for."""
        self.note(f"Error: {error.en}", f"错误：{error.zh}")
        self._fail(type(error).__name__, error.en, error.zh)
        return error.exit_code

    def crash(self, error: Exception) -> int:
        """Shows a bug: where it happened on stderr, and in JSON mode an object that says so. Exit code 1.

        The exception's own message stays out: it may quote what was asked or answered, and this is what people send on."""
        self._end_bar()
        kind = type(error).__name__
        print("".join(traceback.format_tb(error.__traceback__)) + kind, file=sys.stderr, flush=True)
        self._fail(
            "InternalError", f"Unexpected failure, please report it ({kind}).", f"程序内部错误，请反馈（{kind}）。"
        )
        return 1

    def interrupted(self) -> int:
        """After Ctrl-C: a clean line, and in JSON mode an object that says so. Exit code 130."""
        self._end_bar()
        if sys.stderr.isatty():
            print(file=sys.stderr)
        self._fail("Interrupted", "Interrupted.", "已中断。")
        return 130

    def _fail(self, kind: str, en: str, zh: str) -> None:
        self.result({"error": {"type": kind, "message": self.text(en, zh), "en": en, "zh": zh}})

    # -- progress -----------------------------------------------------------------------------------------------------

    def progress(self, step: Progress) -> None:
        """A ProgressCallback: a bar on stderr when that is a terminal, else one line per stage."""
        names = TEXTS.get(f"load.{step.stage}", {})
        title = names.get(self.lang, step.stage)
        if not sys.stderr.isatty():
            if step.stage != self._bar_stage:
                self._bar_stage = step.stage
                print(f"{title}{f': {step.detail}' if step.detail else ''}", file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        finished = step.total > 0 and step.done >= step.total
        if now - self._bar_time < REDRAW_SECONDS and not finished and step.stage == self._bar_stage:
            return
        self._bar_stage, self._bar_time, self._bar_shown = step.stage, now, True
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write("\r\x1b[K" + bar_text(step, title, self.lang)[:width])
        sys.stderr.flush()
        if finished:
            self._end_bar()

    def _end_bar(self) -> None:
        if self._bar_shown:
            self._bar_shown = False
            sys.stderr.write("\n")
            sys.stderr.flush()


def bar_text(step: Progress, title: str, lang: str) -> str:
    """One line: title, percentage, bar, amount, speed, time left."""
    parts = [title]
    if step.total > 0:
        share = min(max(step.done / step.total, 0.0), 1.0)
        filled = round(share * 20)
        parts.append(f"{share:4.0%} [{'#' * filled}{'.' * (20 - filled)}]")
    if step.unit == "bytes":
        parts.append(f"{step.done / 2**20:.0f}/{step.total / 2**20:.0f} MiB")
        if step.speed > 0:
            parts.append(f"{step.speed / 2**20:.1f} MiB/s")
    elif step.total > 0:
        parts.append(f"{step.done}/{step.total}")
    if step.eta is not None and math.isfinite(step.eta):
        minutes, seconds = divmod(round(step.eta), 60)
        parts.append(f"剩余 {minutes}:{seconds:02d}" if lang == "zh" else f"{minutes}:{seconds:02d} left")
    if step.detail:
        parts.append(step.detail)
    return "  ".join(parts)


def printable(text: str) -> str:
    """`text` without control characters but newline and tab: neither a model nor a file may steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _finite(value: Any) -> Any:
    """A copy fit for strict JSON: NaN and infinities become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
