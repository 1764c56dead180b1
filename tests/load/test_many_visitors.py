"""A short run of many visitors over the tiny model: no answer is lost, mixed up, doubled or cut, and nothing is left over."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.away import finished
from tests.load.__main__ import ROOT, serving
from tests.load.visitors import resident, visit


def test_visitors_get_their_own_answers(tmp_path: Path) -> None:
    with serving("", "", True, tmp_path, 16) as url:
        tally = finished(visit(url, 16, 8.0))
    assert tally.wrong == []
    assert tally.ended["answered"] > 30 and tally.ended["left"] > 1 and tally.first
    summary = tally.summary()
    assert summary["first_token_p95"] >= summary["first_token_p50"] > 0 and summary["tokens_per_second"] > 0


def test_memory_is_back_to_the_line_after_500_requests(tmp_path: Path) -> None:
    with serving("", "", True, tmp_path, 8) as url:
        finished(_ask(url, 150))
        line = finished(resident(url))
        finished(_ask(url, 500))
        grown = finished(resident(url)) - line
    assert grown < 15, f"{grown:.0f} MB more after 500 requests"


async def _ask(url: str, requests: int) -> None:
    """So many, of all lengths, eight at a time; every fifth goes away in the middle."""
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        for first in range(0, requests, 8):
            await asyncio.gather(*(_once(http, at) for at in range(first, first + 8)))


async def _once(http: httpx.AsyncClient, at: int) -> None:
    asked = {
        "messages": [{"role": "user", "content": f"{at} " + "cough " * (at % 40)}],
        "max_tokens": 1 + at % 30,
        "stream": at % 5 == 0,
        "router_trace": at % 3 == 0,
    }
    async with http.stream("POST", "/v1/chat/completions", json=asked) as reply:
        assert reply.status_code == 200
        async for _ in reply.aiter_lines():
            if at % 5 == 0:
                return


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
