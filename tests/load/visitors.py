"""Many visitors at once, against a running server: page (Gradio's own protocol) and API, with stops, aborts and reloads.

Every question's answer is known (greedy, asked alone before), so that a lost, mixed up, doubled or cut answer shows. `python -m
tests.load` starts a server and prints what it measured; test_many_visitors.py runs a short one.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx

from ming_app.settings import Settings
from ming_app.ui.loader import EngineLoader
from ming_app.ui.page import Page
from ming_app.ui.render import restore
from tests.fakes import FakeEngine

QUESTIONS = (
    "发烧三天要注意什么？",
    "What is anaemia?",
    "高血压患者如何控制饮食？",
    "What does HbA1c measure?",
    "什么是慢性胃炎？",
    "How does aspirin work?",
    "糖尿病有哪些常见并发症？",
    "Why is vitamin D important?",
    "感冒和流感有什么区别？",
    "What are the layers of the heart wall?",
    "肝脏有哪些功能？",
    "What is the function of insulin?",
    "骨质疏松如何预防？",
    "Which organs make up the urinary system?",
    "贫血有哪些常见原因？",
    "What does a red blood cell carry?",
)
MAX_NEW_TOKENS = 48
ACTS = {"full": 70, "stop": 10, "abort": 10, "reload": 10}
"""how often, in percent, a visitor waits for the end, stops the answer, loses the connection, or reloads the page"""
FREED_SECONDS = 10
PAUSE = 1.0  # longest pause between two questions of a visitor, in seconds


@dataclass
class Tally:
    """What happened. `wrong`: one line for everything that must not happen."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    ended: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    resident: list[tuple[int, float]] = field(default_factory=list)
    """(requests so far, resident megabytes of the server)"""
    seconds: float = 0.0
    tokens: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Figures for people; times in seconds."""

        def at(values: list[float], share: float) -> float | None:
            return round(sorted(values)[min(int(share * len(values)), len(values) - 1)], 3) if values else None

        late = [megabytes for count, megabytes in self.resident if count >= 100]
        return {
            "seconds": round(self.seconds, 1),
            "requests": sum(self.ended.values()),
            "ended": dict(self.ended),
            "first_token_p50": at(self.first, 0.5),
            "first_token_p95": at(self.first, 0.95),
            "whole_p50": at(self.whole, 0.5),
            "whole_p95": at(self.whole, 0.95),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "resident_mb_after_100": round(late[0]) if late else None,
            "resident_mb_at_the_end": round(self.resident[-1][1]) if self.resident else None,
            "resident_mb_median_of_last_tenth": round(statistics.median(late[-max(len(late) // 10, 1) :]))
            if late
            else None,
            "wrong": self.wrong[:20],
        }


@cache
def handlers() -> dict[tuple[str, int], int]:
    """(name of a handler, number of its inputs) -> its index, of the page as it is built everywhere."""
    found: dict[tuple[str, int], int] = {}
    for index, fn in Page(EngineLoader.of(FakeEngine()), Settings()).blocks.fns.items():
        if fn.api_visibility == "private":
            found.setdefault((fn.name or "", len(fn.inputs)), index)
    return found


class Visitor:
    """One person: a page of their own, or a program that uses the API."""

    def __init__(self, url: str, known: dict[str, str], tally: Tally, seed: int, *, api: bool):
        self.url, self.known, self.tally, self.api = url, known, tally, api
        self.random = random.Random(seed)
        self.http = httpx.AsyncClient(base_url=url, timeout=1200, trust_env=False)
        self.session = ""
        self.shown: list[tuple[str, str]] = []
        """what the page must show: (role, text)"""

    async def live(self, until: float) -> None:
        """Asks one question after the other."""
        try:
            if not self.api:
                await self.arrive()
            while time.monotonic() < until:
                question = self.random.choice(sorted(self.known))
                act = self.random.choices(list(ACTS), list(ACTS.values()))[0]
                try:
                    await (self.ask_api(question, act) if self.api else self.ask_page(question, act))
                except (httpx.HTTPError, KeyError, ValueError, IndexError) as error:
                    self.wrong(question, act, f"{type(error).__name__}: {error}")
                await asyncio.sleep(self.random.random() * PAUSE)
        finally:
            await self.http.aclose()

    def wrong(self, question: str, act: str, what: str) -> None:
        self.tally.wrong.append(f"{'api' if self.api else 'page'} {act} {question[:20]!r}: {what[:200]}")

    def check(self, question: str, act: str, text: str, *, whole: bool) -> None:
        """The answer is the known one, or the beginning of it."""
        right = self.known[question]
        if text.strip() != right.strip() if whole else not right.startswith(text.rstrip("\ufffd")):
            self.wrong(question, act, f"got {text[-80:]!r} for {right[-80:]!r}")

    # -- the API ------------------------------------------------------------------------------------------------------

    async def ask_api(self, question: str, act: str) -> None:
        began, text, stream = time.monotonic(), "", self.random.random() < 0.7 or act != "full"
        body = {
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": MAX_NEW_TOKENS,
            "stream": stream,
        }
        if not stream:
            reply = await self.http.post("/v1/chat/completions", json=body)
            if reply.status_code != 200:
                return self.refused(question, act, reply)
            text = reply.json()["choices"][0]["message"]["content"]
        else:
            leave = self.random.randrange(1, 12) if act != "full" else None
            async with self.http.stream("POST", "/v1/chat/completions", json=body) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                    return self.refused(question, act, reply)
                async for chunk in _server_sent(reply):
                    piece = chunk["choices"][0]["delta"].get("content")
                    if piece and not text:
                        self.tally.first.append(time.monotonic() - began)
                    text += piece or ""
                    if leave is not None and piece:
                        leave -= 1
                        if leave == 0:
                            self.check(question, act, text, whole=False)
                            self.tally.ended["left"] += 1
                            return None
        self.tally.whole.append(time.monotonic() - began)
        self.tally.ended["answered"] += 1
        self.check(question, act, text, whole=True)
        return None

    def refused(self, question: str, act: str, reply: httpx.Response) -> None:
        if reply.status_code == 429 and reply.headers.get("retry-after"):
            self.tally.ended["refused"] += 1
        else:
            self.wrong(question, act, f"status {reply.status_code}: {reply.text}")

    # -- the page -----------------------------------------------------------------------------------------------------

    async def arrive(self) -> None:
        """Opens the page: a new session, and an empty conversation."""
        self.session, self.shown = uuid.uuid4().hex[:10], []
        await self.call("arrive", None, "en", "auto", 0)
        await self.call("restore", None, "", "")

    async def call(self, name: str, *data: Any) -> list[Any]:
        """A quick handler."""
        body = {"data": list(data), "fn_index": handlers()[name, len(data)], "session_hash": self.session}
        reply = await self.http.post("/gradio_api/run/predict", json=body)
        reply.raise_for_status()
        return reply.json()["data"]

    async def ask_page(self, question: str, act: str) -> None:
        if len(self.shown) >= 2:  # each question alone, as it was asked for the known answer
            await self.call("clear", None)
            self.shown = []
        reply = await self.http.post(
            "/gradio_api/run/predict",
            json={
                "data": [None, question],
                "fn_index": handlers()["ask", 2],
                "session_hash": self.session,
            },
        )
        if reply.status_code != 200:
            shown = await self.call("show", None)
            if shown[4] and shown[4].get("value") == question:
                self.tally.ended["refused"] += 1
            else:
                self.wrong(question, act, f"refused, and the question is lost: {shown[3]}")
            return
        began, leave = time.monotonic(), self.random.uniform(0.2, 4.0)
        sampling = (0.0, MAX_NEW_TOKENS, 0.9, 40, 0, 1.05, -1)
        body = {"data": [None, *sampling], "fn_index": handlers()["answer", 8], "session_hash": self.session}
        (await self.http.post("/gradio_api/queue/join", json=body)).raise_for_status()
        stopped, first = False, False
        async with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as reply:
            async for message in _server_sent(reply):
                if message["msg"] == "process_generating" and not first and _answer_begins(message):
                    first = True
                    self.tally.first.append(time.monotonic() - began)
                if act != "full" and time.monotonic() - began > leave and not stopped:
                    if act == "stop":
                        stopped = True
                        await self.call("stop", None)
                    else:
                        break
                if message["msg"] == "process_completed":
                    break
        if act in ("abort", "reload") and message["msg"] != "process_completed":
            self.tally.ended["left"] += 1
            if act == "reload":
                await self.arrive()
            else:
                await self.freed(question, act)
                await self.call("settle", None)
                await self.settled(question, act)
            return
        if not message["success"]:
            self.wrong(question, act, str(message["output"])[:200])
            return
        await self.call("settle", None)
        self.tally.whole.append(time.monotonic() - began)
        self.tally.ended["stopped" if stopped else "answered"] += 1
        await self.settled(question, act, whole=not stopped)

    async def freed(self, question: str, act: str) -> None:
        """After a lost connection the answer ends by itself: soon the person may ask again."""
        for _ in range(2 * FREED_SECONDS):
            shown = await self.call("show", None)
            if shown[5].get("visible"):  # the button that sends
                return
            await asyncio.sleep(0.5)
        self.wrong(question, act, f"still busy {FREED_SECONDS} seconds after the connection was lost")

    async def settled(self, question: str, act: str, *, whole: bool = False) -> None:
        """What the page shows in the end: the question once with one answer, or the question back in the box."""
        shown = await self.call("show", None)
        said = [(one["role"], restore(_text(one["content"]))) for one in shown[0]["value"] or []]
        if not said:
            if whole:
                self.wrong(question, act, f"nothing is shown: {shown[3]}")
            return
        self.shown = said
        if [role for role, _ in said] != ["user", "assistant"] or said[0][1] != question:
            if whole or said != [("user", question)]:
                self.wrong(question, act, f"the page shows {[(role, text[:30]) for role, text in said]}")
            return
        self.check(question, act, said[1][1], whole=whole)


def _answer_begins(message: dict[str, Any]) -> bool:
    return "assistant" in json.dumps(message["output"]["data"][0])


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)


async def _server_sent(reply: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in reply.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


async def known_answers(url: str) -> dict[str, str]:
    """question -> its answer, asked one after the other with nobody else there."""
    found = {}
    async with httpx.AsyncClient(base_url=url, timeout=1200, trust_env=False) as http:
        for question in QUESTIONS:
            body = {
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_tokens": MAX_NEW_TOKENS,
            }
            reply = await http.post("/v1/chat/completions", json=body)
            found[question] = reply.raise_for_status().json()["choices"][0]["message"]["content"]
    return found


async def visit(url: str, visitors: int, seconds: float, *, api_share: float = 0.5) -> Tally:
    """Lets so many visitors ask for so long. The rest of what was under way at the end is finished."""
    known, tally = await known_answers(url), Tally()
    before, began = await _measures(url), time.monotonic()
    watching = asyncio.create_task(_watch(url, tally, before))
    people = [
        Visitor(url, known, tally, seed, api=seed < visitors * api_share).live(began + seconds)
        for seed in range(visitors)
    ]
    await asyncio.gather(*people)
    watching.cancel()
    after = await _measures(url)
    tally.seconds = time.monotonic() - began
    tally.tokens = after["ming_tokens_total new"] - before["ming_tokens_total new"]
    await _idle(url, tally)
    return tally


async def _idle(url: str, tally: Tally) -> None:
    """Nothing may be left running or waiting."""
    for _ in range(100):
        now = await _measures(url)
        if now["ming_running"] == now["ming_waiting"] == 0:
            return
        await asyncio.sleep(0.1)
    tally.wrong.append(f"left over: {now['ming_running']} running, {now['ming_waiting']} waiting")


async def _watch(url: str, tally: Tally, before: dict[str, float]) -> None:
    while True:
        now = await _measures(url)
        tally.resident.append((int(now["requests"] - before["requests"]), now["process_resident_memory_bytes"] / 1e6))
        await asyncio.sleep(2)


async def resident(url: str) -> float:
    """Megabytes that the server's process holds."""
    return (await _measures(url))["process_resident_memory_bytes"] / 1e6


async def _measures(url: str) -> dict[str, float]:
    """The server's own counters; "requests": of all kinds."""
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    found: dict[str, float] = {"requests": 0, "ming_tokens_total new": 0}
    for line in lines:
        if line.startswith(("ming_", "process_")):
            name, value = line.rsplit(" ", 1)
            key = name.partition("{")[0] + (" new" if 'kind="new"' in name else "")
            found[key] = float(value)
            found["requests"] += float(value) if name.startswith("ming_requests_total") else 0
    return found
