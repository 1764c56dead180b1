"""`chat` in a terminal: several turns, streamed, with commands that begin with a slash; works with piped input too.

Contract: Ctrl-C stops the answer, not the program (twice at an empty prompt leaves); end of input leaves. Nothing typed
is stored. The conversation lives in `Conversation`, which knows no terminal.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ming_app.answering import Answer, Streams, answer
from ming_app.console import Console
from ming_app.engine.types import Message, SamplingParams, Start
from ming_app.errors import MingError, TraceError, UsageError
from ming_app.molora.trace import RouterTrace
from ming_app.safety.notices import answer_notes, warning
from ming_app.ui.record import save_record

HELP = (
    "/help          this list\n"
    "/clear         forget the conversation\n"
    "/trace FILE    save which experts fired for the last answer (.npz or .json)\n"
    "/quit          leave (so does Ctrl-D)\n"
    "Ctrl-C         stop the answer\n"
    "A line that ends in \\ goes on in the next one.",
    "/help          显示本说明\n"
    "/clear         清空对话\n"
    "/trace 文件    保存上一个回答的专家轨迹（.npz 或 .json）\n"
    "/quit          退出（Ctrl-D 亦可）\n"
    "Ctrl-C         停止当前回答\n"
    "行末加 \\ 可换行继续输入。",
)


@dataclass
class Conversation:
    """The turns so far and the last trace. `system` is an optional system prompt."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)
    trace: RouterTrace | None = None

    def ask(
        self,
        engine: Streams,
        text: str,
        params: SamplingParams,
        *,
        on_text: Callable[[str], None],
        on_start: Callable[[Start], None],
        cancel: threading.Event,
    ) -> Answer:
        """Answers `text` in the light of the turns so far. A failed or empty answer leaves the turns as they were."""
        head = [Message("system", self.system)] if self.system else []
        messages = [*head, *self.turns, Message("user", text)]
        reply = answer(engine, messages, params, on_text=on_text, on_start=on_start, cancel=cancel)
        self.trace = reply.finish.trace
        if reply.text.strip():
            self.turns += [Message("user", text), Message("assistant", reply.text)]
        return reply

    def clear(self) -> None:
        self.turns.clear()
        self.trace = None


class Repl:
    """Reads lines from `lines` (a terminal or a pipe), answers each; `run` gives the object of `chat --json`."""

    def __init__(
        self, engine: Streams, console: Console, params: SamplingParams, system: str = "", region: str = "auto"
    ) -> None:
        self.region = region
        self.engine = engine
        self.console = console
        self.params = params
        self.conversation = Conversation(system)
        self.interactive = sys.stdin.isatty()
        self.replies: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        if self.interactive:
            with contextlib.suppress(ImportError):  # line editing and recall within this session, where it exists
                import readline  # noqa: F401
            self.console.note("Type a question; /help lists the commands.", "请输入问题；输入 /help 查看命令。")
        for text in self._questions():
            command, _, argument = text.partition(" ")
            if not text.startswith("/"):
                self._answer(text)
            elif command in ("/quit", "/exit"):
                break
            else:
                self._command(command, argument.strip())
        return {"turns": self.replies, "model": self.engine.info.model}

    def _questions(self) -> Iterator[str]:
        """Non-empty entries until the end of input; Ctrl-C at the prompt drops the entry, twice in a row ends."""
        interrupted = False
        while True:
            try:
                entry = self._entry().strip()
            except EOFError:
                if self.interactive:
                    print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                print(file=sys.stderr)
                if interrupted:
                    return
                interrupted = True
                self.console.note("Press Ctrl-C again or type /quit to leave.", "再按一次 Ctrl-C 或输入 /quit 退出。")
                continue
            interrupted = False
            if entry:
                yield entry

    def _entry(self) -> str:
        """One entry: a line, and the next ones while a line ends in a backslash."""
        lines: list[str] = []
        while True:
            if self.interactive:
                with contextlib.nullcontext() if sys.stdout.isatty() else contextlib.redirect_stdout(sys.stderr):
                    line = input("... " if lines else "> ")
            else:
                line = sys.stdin.readline()
                if not line and not lines:
                    raise EOFError
                line = line.rstrip("\n")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _answer(self, text: str) -> None:
        def on_start(start: Start) -> None:
            if start.dropped_turns:
                n = start.dropped_turns
                self.console.note(
                    f"({n} oldest turns no longer fit the context and were left out.)",
                    f"（上下文已满，最早的 {n} 轮对话未纳入。）",
                )

        said = [*(turn.content for turn in self.conversation.turns if turn.role == "user"), text]
        found = warning(said, self.region)
        if found is not None:
            self.console.note(*found)
        cancel = threading.Event()
        try:
            with _sigint_sets(cancel):
                reply = self.conversation.ask(
                    self.engine, text, self.params, on_text=self.console.write, on_start=on_start, cancel=cancel
                )
        except MingError as error:
            self.console.note(error.en, error.zh)
            self.replies.append({"error": {"type": type(error).__name__, "en": error.en, "zh": error.zh}})
            return
        self.console.line()
        self.replies.append(reply.to_dict(self.engine.info))
        for note in answer_notes(self.replies[-1]["text"]):
            self.console.note(*note)
        if reply.finish.reason == "cancelled":
            self.console.note("(stopped)", "（已停止）")
        elif reply.finish.reason == "length":
            self.console.note("(cut at the token limit; see --max-new-tokens)", "（已达词元上限；见 --max-new-tokens）")

    def _command(self, command: str, argument: str) -> None:
        try:
            if command == "/help":
                self.console.note(*HELP)
            elif command == "/clear":
                self.conversation.clear()
                self.console.note("The conversation is cleared.", "对话已清空。")
            elif command == "/trace":
                self._save_trace(argument)
            else:
                raise UsageError(
                    f"{command} is not a command; /help lists them.", f"没有 {command} 这个命令；输入 /help 查看。"
                )
        except MingError as error:
            self.console.note(error.en, error.zh)

    def _save_trace(self, argument: str) -> None:
        if not argument:
            raise UsageError("Name a file: /trace answer.npz", "请给出文件名：/trace answer.npz")
        if self.conversation.trace is None:
            raise TraceError(
                "There is no trace yet: ask something first (a base without experts leaves none).",
                "还没有轨迹：请先提问（不带专家的基座模型没有轨迹）。",
            )
        path = save_record(self.conversation.trace, argument)
        self.console.note(f"Trace saved to {path}.", f"轨迹已保存到 {path}。")


@contextlib.contextmanager
def _sigint_sets(cancel: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `cancel` in place of raising; a second one raises as usual. Only the main thread may do this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
