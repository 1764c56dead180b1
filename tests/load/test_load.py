"""A short run of many visitors over the tiny model: no answer is lost, mixed up, doubled or cut, and nothing is left over."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.load.__main__ import ROOT, serving
from tests.load.visitors import visit


def test_visitors_get_their_own_answers(tmp_path: Path) -> None:
    with serving("", "", True, tmp_path, 16) as url:
        tally = asyncio.run(visit(url, 16, 8.0))
    assert tally.wrong == []
    assert tally.ended["answered"] > 30 and tally.ended["left"] > 1 and tally.first
    summary = tally.summary()
    assert summary["first_token_p95"] >= summary["first_token_p50"] > 0 and summary["tokens_per_second"] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_process_ends_with_0(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "ming_app", "serve", "--model", str(tmp_path / "none"), "--port", "0", "--json"]
    server = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    assert "Page: http://127.0.0.1:" in server.stderr.readline()  # it stays up, and says on the page what is wrong
    server.stderr.readline()
    server.send_signal(signal.SIGINT)
    said, _ = server.communicate(timeout=30)
    assert server.returncode == 0 and said.strip() == '{"stopped": true}'
