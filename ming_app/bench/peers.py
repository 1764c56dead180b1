"""The parent's side of a measurement: a peer in a process of its own, spoken to in lines of JSON (see worker.py)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from ming_app.errors import MingError
from ming_app.settings import Settings

STOP_SECONDS = 20


class PeerError(MingError):
    """A measured process failed; the message is its own."""


@dataclass(frozen=True)
class Setup:
    """What every peer is given."""

    settings: Settings
    tokens: int
    """decoded per measurement"""
    prompt_tokens: int
    """of the prompt before decoding, about"""
    prefill_tokens: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=os.fspath)  # folders as text

    @classmethod
    def from_json(cls, text: str) -> Setup:
        from pathlib import Path

        values = json.loads(text)
        for name in ("cache_dir", "data_dir"):
            values["settings"][name] = Path(values["settings"][name])
        return cls(**{**values, "settings": Settings(**values["settings"])})


class Peer:
    """A loaded peer; `measure` gives one figure. A context manager: the process ends with it. Raises PeerError."""

    def __init__(self, name: str, setup: Setup) -> None:
        command = [sys.executable, "-m", "ming_app.bench.worker", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        self._name = name
        self._send(setup.to_json())
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def measure(self, what: str) -> float:
        """One figure in the unit of the case."""
        self._send(json.dumps(what))
        return float(self._receive()["value"])

    def close(self) -> None:
        """Ends the process: politely, then not."""
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None  # opened as a pipe above
        with contextlib.suppress(BrokenPipeError):  # it has ended: _receive says so
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # opened as a pipe above
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise PeerError(f"{self._name} ended with exit code {code}.", f"{self._name} 已退出，退出码 {code}。")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerError(f"{self._name}: {reply['error']['en']}", f"{self._name}：{reply['error']['zh']}")
        return reply


def start_and_chat(setup: Setup) -> dict[str, float]:
    """A fresh process: `load` seconds from its start until the engine is ready (from the cache once it has been
    built), `rss` bytes at its peak after a short chat."""
    begin = time.monotonic()
    with Peer("engine", setup) as peer:
        ready = time.monotonic() - begin
        return {"load": ready, "rss": peer.measure("chat-rss")}


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    try:  # Linux: VmHWM is this program's own; ru_maxrss would count the parent's memory at the fork
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import psutil

        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))  # elsewhere: Windows keeps a peak, others the present size
