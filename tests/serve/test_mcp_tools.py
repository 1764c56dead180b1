"""The tools for other assistants through the protocol's own client: in this process, and over stdio as assistants start them."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ming_app.errors import FetchError, PromptTooLongError
from ming_app.models.progress import Progress
from ming_app.molora.trace import RouterTrace
from ming_app.safety.notices import AI_LABEL
from ming_app.settings import Settings
from ming_app.ui.loader import EngineLoader
from tests.away import finished
from tests.conftest import ROOT
from tests.fakes import FakeEngine, long_text

pytest.importorskip("mcp.server.mcpserver", reason="the mcp package is not installed (requirements-mcp.txt)")

from mcp import Client, StdioServerParameters  # noqa: E402

from ming_app.mcp_server import build_server  # noqa: E402

STROKE = "my father suddenly cannot speak and his face droops"
SCURVY = {
    "stem": "Lack of which vitamin causes scurvy?",
    "options": ["Vitamin A", "Vitamin C", "Vitamin D"],
    "answer": "B",
}
SERVER = """
import os, sys, time
from ming_app import cli
from tests.fakes import FakeEngine, long_text
def load(settings, progress):
    print("a library prints"); os.write(1, b"and so does its C code\\n")
    time.sleep(0.8)
    return FakeEngine(long_text(40), delay=0.02)
sys.exit(cli.main(["mcp", *sys.argv[1:]], load_engine=load))
"""


def with_client(server: Any, work: Callable[[Client], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with asyncio.timeout(60):
            async with Client(server) as client:
                return await work(client)

    return finished(run())


def call(engine: Any, tool: str, **arguments: Any) -> Any:
    """The result of one call, in this process. `engine`: one, or a loader."""
    loader = engine if isinstance(engine, EngineLoader) else EngineLoader.of(engine)
    return with_client(build_server(loader, Settings()), lambda client: client.call_tool(tool, arguments))


def texts(result: Any) -> list[str]:
    return [block.text for block in result.content]


def test_four_tools_are_offered_and_described() -> None:
    found = with_client(
        build_server(EngineLoader.of(FakeEngine()), Settings()), lambda client: client.list_tools()
    ).tools
    assert [tool.name for tool in found] == ["ask", "explain", "trace", "triage"]
    for tool in found:
        assert tool.title and tool.description and tool.output_schema and tool.annotations.read_only_hint
        assert "ctx" not in tool.input_schema["properties"]
    assert found[0].input_schema["required"] == ["question"]


def test_an_answer_carries_its_label() -> None:
    engine = FakeEngine("Rest.")
    result = call(engine, "ask", question="What helps against a cold?", max_new_tokens=30, seed=4)
    assert texts(result) == ["Rest.", AI_LABEL["en"]] and not result.is_error
    said = result.structured_content
    assert said["text"] == "Rest." and said["warning"] == "" and said["notes"] == [] and said["finish_reason"] == "stop"
    ((messages, params),) = engine.calls
    assert messages[0].content == "What helps against a cold?" and (params.max_new_tokens, params.seed) == (30, 4)
    assert not params.trace and engine.closed, "the engine is freed when the client goes"


def test_a_warning_stands_before_the_answer_in_the_language_of_the_question() -> None:
    first, answer, *notes, label = texts(
        call(FakeEngine("每天服用布洛芬500毫克。"), "ask", question="我突然胸口剧痛，出冷汗")
    )
    assert "120" in first and answer == "每天服用布洛芬500毫克。" and len(notes) == 1 and label == AI_LABEL["zh"]
    english = call(FakeEngine(), "ask", question="我突然胸口剧痛，出冷汗", lang="en").structured_content
    assert english["warning"].startswith("Th") and english["ai_label"] == AI_LABEL["en"]


def test_a_warning_stands_when_the_model_fails() -> None:
    error = FetchError("The weights could not be fetched.", "无法获取权重。")

    def fails(progress: Any) -> Any:
        raise error

    warning, reason = texts(result := call(EngineLoader(fails), "ask", question=STROKE))
    assert result.is_error and "911" in warning and reason == error.en
    assert texts(call(EngineLoader(fails), "ask", question="发热怎么办？")) == [error.zh]


def test_a_failed_load_is_tried_again_when_asked() -> None:
    tried: list[int] = []

    def second(progress: Any) -> Any:
        tried.append(1)
        if len(tried) == 1:
            raise FetchError("No network.", "无网络。")
        return FakeEngine("ok")

    loader = EngineLoader(second)

    async def work(client: Client) -> Any:
        await asyncio.to_thread(loader.wait)
        return await client.call_tool("ask", {"question": "q"})

    assert texts(with_client(build_server(loader, Settings()), work))[0] == "ok" and len(tried) == 2


def test_an_exam_question_is_explained_and_its_key_stands() -> None:
    engine = FakeEngine("It is needed for collagen. Answer: B")
    result = call(engine, "explain", **SCURVY)
    assert texts(result) == ["It is needed for collagen. Answer: B", AI_LABEL["en"]]
    asked = engine.calls[0][0][0].content
    assert "B. Vitamin C" in asked and "The key is: Vitamin C" in asked
    (note,) = call(FakeEngine("So it is A. Answer: A"), "explain", **SCURVY).structured_content["notes"]
    assert "The model chose A." in note and "B" in note
    for wrong in ({"options": ["one"]}, {"answer": "Z"}, {"stem": " "}):
        assert call(engine, "explain", **{**SCURVY, **wrong}).is_error
    assert "选项" in texts(call(engine, "explain", **{**SCURVY, "options": ["one"], "lang": "zh"}))[0]


def test_a_trace_says_which_experts_fired(tmp_path) -> None:
    engine = FakeEngine("one two three four")
    result = call(engine, "trace", question="What is anaemia?", full=True)
    said = result.structured_content
    assert (said["num_experts"], said["top_k"], said["even_share"]) == (4, 2, 0.25) and len(said["layers"]) == 3
    for load in (*said["load"].values(), *(row["load"] for row in said["layers"])):
        assert len(load) == 4 and abs(sum(load) - 1) < 0.001
    assert engine.calls[0][1].temperature == 0 and "Load per expert (even use: 25.0%)" in texts(result)[1]
    file = tmp_path / "trace.json"
    file.write_text(json.dumps(said["router_trace"]), encoding="utf-8")
    assert RouterTrace.load(file).num_layers == 3
    assert call(engine, "trace", question="What is anaemia?").structured_content["router_trace"] is None
    assert "没有专家" in texts(call(FakeEngine(num_experts=0), "trace", question="贫血", lang="zh"))[0]


def test_triage_needs_no_model() -> None:
    never = threading.Event()
    loader = EngineLoader(lambda progress: never.wait(30) and None)
    found = call(loader, "triage", text=STROKE)
    never.set()
    assert found.structured_content["category"] == "stroke" and texts(found) == [found.structured_content["message"]]
    harmless = call(FakeEngine(), "triage", text="怎样预防感冒？")
    assert harmless.structured_content["red_flag"] is False
    assert texts(harmless)[0].startswith("未发现急症信号")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"question": " "}, "Please write a question first."),
        ({"question": " ", "lang": "zh"}, "请先输入问题。"),
        ({"question": "q" * 9000}, "at most 8000"),
        ({"question": "q", "max_new_tokens": 0}, "between 1 and"),
        ({"question": "q", "seed": -1}, "seed must be"),
        ({"question": {"a": 1}}, "valid string"),
        ({"question": "q", "max_new_tokens": "x"}, "valid integer"),
        ({"question": "q", "lang": "fr"}, "'en' or 'zh'"),
        ({}, "Field required"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(asked: dict[str, Any], said: str) -> None:
    engine = FakeEngine()
    result = call(engine, "ask", **asked)
    assert result.is_error and said in texts(result)[0] and engine.calls == []


def test_what_the_engine_refuses_is_told(caplog: pytest.LogCaptureFixture) -> None:
    error = PromptTooLongError("The message is too long.", "消息过长。")
    assert texts(call(FakeEngine(error=error), "ask", question="q")) == [error.en]

    def breaks(messages: Any) -> str:
        raise KeyError(messages[-1].content)

    with caplog.at_level(logging.INFO):
        result = call(FakeEngine(breaks), "ask", question="my private illness")
    assert result.is_error and "(KeyError)" in texts(result)[0]
    assert "KeyError" in caplog.text and "private" not in caplog.text + texts(result)[0]


def test_progress_grows_while_it_loads_and_while_it_writes() -> None:
    go = threading.Event()

    def load(progress: Any) -> Any:
        progress(Progress("fetch", 1, 4, "bytes"))
        go.wait(30)
        return FakeEngine(long_text(60), delay=0.03)

    told: list[tuple[float, float | None, str | None]] = []

    async def work(client: Client) -> Any:
        async def progress(done: float, total: float | None, message: str | None) -> None:
            told.append((done, total, message))
            go.set()

        return await client.call_tool("ask", {"question": "q"}, progress_callback=progress)

    result = with_client(build_server(EngineLoader(load), Settings()), work)
    assert result.structured_content["text"] == long_text(60)
    assert told[0][2] == "Downloading the weights 25%" and told[-1][1] == 513
    assert len(told) >= 3 and [one[0] for one in told] == sorted({one[0] for one in told})


def test_a_cancelled_call_frees_the_engine() -> None:
    engine = FakeEngine(long_text(3000), delay=0.01)

    async def work(client: Client) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.call_tool("ask", {"question": "q", "max_new_tokens": 4000}), 0.5)
        while engine.open_streams:
            await asyncio.sleep(0.02)

    with_client(build_server(EngineLoader.of(engine), Settings()), work)
    assert engine.load_now() == (0, 0)


# -- over stdio -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_over_stdio_it_answers_and_a_cancelled_call_ends(mode: str) -> None:
    server = StdioServerParameters(command=sys.executable, args=["-c", SERVER], cwd=ROOT)

    async def run() -> None:
        async with asyncio.timeout(60):
            async with Client(server, mode=mode) as client:
                assert client.server_info.name == "ming-app" and "not a physician" in (client.instructions or "")
                with pytest.raises(TimeoutError):  # while the model still loads
                    await asyncio.wait_for(client.call_tool("ask", {"question": "q"}), 0.3)
                result = await client.call_tool("ask", {"question": STROKE, "max_new_tokens": 8})
                assert "911" in texts(result)[0] and texts(result)[1] == long_text(8).strip()

    finished(run())


def test_nothing_but_the_protocol_is_on_stdout() -> None:
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}}
    lines = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {
            "jsonrpc": "2.0",
            "id": 2,
            "method": "tools/call",
            "params": {"name": "triage", "arguments": {"text": STROKE}},
        },
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("".join(json.dumps(line) + "\n" for line in lines).encode() + b"this is no message\n")
    process.stdin.flush()
    replies = []
    while not any(reply.get("id") == 2 for reply in replies):
        replies.append(json.loads(process.stdout.readline()))
    rest, noise = process.communicate(timeout=30)  # closes stdin: the client went away
    assert process.returncode == 0 and all(json.loads(line)["jsonrpc"] == "2.0" for line in rest.splitlines())
    assert b"a library prints" in noise and b"so does its C code" in noise
    assert STROKE.encode() not in noise and b"Traceback" not in noise
