"""The command line's contract, with a scripted engine: streams, JSON, exit codes, languages, traces, settings."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ming_app import cli
from ming_app.console import Console, bar_text, printable
from ming_app.engine.types import Message
from ming_app.errors import PreflightError
from ming_app.models.progress import Progress
from ming_app.molora.trace import RouterTrace
from ming_app.settings import Settings
from tests.fakes import FakeEngine

ASK_KEYS = [
    "text",
    "finish_reason",
    "prompt_tokens",
    "new_tokens",
    "tokens_per_second",
    "seconds_to_first_token",
    "model",
]


@dataclass
class Result:
    code: int
    out: str
    err: str
    settings: list[Settings]

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout: one line, nothing else."""
        assert self.out.count("\n") == 1 and self.out.endswith("\n")
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")

    def run_cli(*words: str, engine: FakeEngine | None = None, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        seen: list[Settings] = []

        def load(settings: Settings, progress: object) -> FakeEngine:
            seen.append(settings)
            return engine or FakeEngine()

        capsys.readouterr()
        code = cli.main(words, load_engine=load)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err, seen)

    return run_cli


# -- ask --------------------------------------------------------------------------------------------------------------


def test_ask_writes_only_the_answer_to_stdout(run: Run) -> None:
    engine = FakeEngine("多喝水，注意休息。")
    result = run("ask", "发烧怎么办？", engine=engine)
    assert result.code == 0
    assert result.out == "多喝水，注意休息。\n"
    assert "AI" in result.err
    assert engine.calls[0][0] == [Message("user", "发烧怎么办？")]
    assert engine.closed and engine.open_streams == 0


def test_ask_json_has_the_contract_keys_first(run: Run) -> None:
    values = run("ask", "fever?", "--json").json
    assert list(values)[: len(ASK_KEYS)] == ASK_KEYS
    assert values["text"].startswith("Drink water")
    assert values["finish_reason"] == "stop" and values["model"] == "fake-model"
    assert values["new_tokens"] > 1 and values["tokens_per_second"] > 0


def test_ask_json_keeps_characters_and_their_number(run: Run) -> None:
    result = run("ask", "q", "--json", engine=FakeEngine("肝💧"))
    assert "肝💧" in result.out  # readable, not escaped
    assert result.json["new_tokens"] == 3  # the emoji is two tokens, one character


def test_ask_reads_standard_input(run: Run) -> None:
    engine = FakeEngine()
    assert run("ask", "-", stdin="头疼\n两天了\n", engine=engine).code == 0
    assert engine.calls[0][0] == [Message("user", "头疼\n两天了")]


def test_sampling_flags_reach_the_engine(run: Run) -> None:
    engine = FakeEngine()
    run(
        "ask",
        "q",
        "--greedy",
        "--max-new-tokens",
        "7",
        "--seed",
        "3",
        "--top-k",
        "0",
        "--system",
        "Be brief.",
        engine=engine,
    )
    messages, params = engine.calls[0]
    assert messages[0] == Message("system", "Be brief.")
    assert (params.temperature, params.max_new_tokens, params.seed, params.top_k) == (0.0, 7, 3, 0)
    assert params.trace is False


def test_max_new_tokens_is_reported_as_length(run: Run) -> None:
    values = run("ask", "q", "--json", "--max-new-tokens", "3").json
    assert values["finish_reason"] == "length" and values["new_tokens"] == 3


def test_settings_flags_override_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MING_MODEL", "from-environment")
    monkeypatch.setenv("MING_CONTEXT", "512")
    words = (
        "ask",
        "q",
        "--model",
        "m",
        "--adapter",
        "none",
        "--backend",
        "torch",
        "--precision",
        "bf16",
        "--cache-dir",
        "/c",
    )
    settings = run(*words).settings[0]
    assert (settings.model, settings.adapter, settings.backend, settings.precision) == ("m", "none", "torch", "bf16")
    assert settings.cache_dir == Path("/c") and settings.context == 512


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("ask",), ("ask", "q", "--what"), ("fly",), (), ("ask", "q", "--seed", "x")])
def test_wrong_use_is_exit_2_in_both_forms(run: Run, words: tuple[str, ...]) -> None:
    plain = run(*words)
    assert plain.code == 2 and plain.out == "" and plain.err.startswith("Error: ")
    error = run(*words, "--json").json["error"]
    assert error["type"] == "UsageError" and error["en"] and error["zh"]


@pytest.mark.parametrize(
    "words",
    [
        ("ask", "  "),
        ("ask", "q", "--temperature", "9"),
        ("ask", "q", "--greedy", "--temperature", "1"),
        ("ask", "q", "--trace", "trace.txt"),
        ("ask", "q", "--trace", "no/such/folder/trace.npz"),
        ("ask", "q", "--precision", "3bit"),
        ("ask", "q", "--threads", "-1"),
        ("trace",),
        ("bench", "--only", "decod"),
    ],
)
def test_wrong_values_are_exit_2_before_anything_loads(run: Run, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.code == 2 and result.settings == []


def test_messages_follow_the_language(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "问题为空" in run("ask", " ", "--lang", "zh").err
    assert "The question is empty" in run("ask", " ", "--lang=en").err
    assert "缺少参数" in run("ask", "--lang", "zh").err  # argparse's own, before the words are understood
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert "错误：" in run("ask", " ").err
    assert "回答一个问题" in _help(run)
    monkeypatch.setenv("MING_LANG", "en")
    assert "answer one question" in _help(run)


def _help(run: Run) -> str:
    with pytest.raises(SystemExit) as left:
        run("--help")
    assert left.value.code == 0
    buffer = io.StringIO()
    cli.build_parser(cli.Console(cli.language([]))).print_help(buffer)
    return buffer.getvalue()


def test_a_failure_for_people_is_exit_1(run: Run) -> None:
    engine = FakeEngine(error=PreflightError("It needs 9 GB.", "需要 9 GB 内存。"))
    plain = run("ask", "q", engine=engine)
    assert plain.code == 1 and plain.out == "" and "It needs 9 GB." in plain.err and "Traceback" not in plain.err
    error = run("ask", "q", "--json", "--lang", "zh", engine=engine).json["error"]
    assert error == {
        "type": "PreflightError",
        "message": "需要 9 GB 内存。",
        "en": "It needs 9 GB.",
        "zh": "需要 9 GB 内存。",
    }
    assert engine.closed


def test_a_bug_still_gives_one_json_object(run: Run) -> None:
    def broken(messages: object) -> str:
        print("a library's chatter")
        raise ValueError("boom")

    result = run("ask", "q", "--json", engine=FakeEngine(broken))
    assert result.code == 1 and result.json["error"]["type"] == "InternalError"
    assert "boom" in result.err and "chatter" in result.err  # the traceback and the chatter are not on stdout


def test_an_unknown_model_is_answered_with_the_closest_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", "q", "--model", "ming-moe-1.5", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "UnknownModelError"
    assert "ming-moe-1.5b" in error["en"] and "ming-moe-1.5b" in error["zh"]


# -- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["npz", "json"])
def test_ask_trace_round_trip(run: Run, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"answer.{ending}"
    asked = run("ask", "hello 你好", "--trace", str(file), "--json", engine=FakeEngine("好的。")).json
    assert asked["trace"] == str(file)
    trace = RouterTrace.load(file)
    assert len(trace) == asked["prompt_tokens"] + asked["new_tokens"]
    assert "".join(text for text, _ in trace.pieces()).endswith("好的。")
    assert trace.config["ai_generated"] is True and "人工智能" in trace.config["notice_zh"]

    shown = run("trace", str(file), "--json")
    assert shown.settings == []  # no model is loaded to read a file
    summary = shown.json
    assert summary["answer_tokens"] == asked["new_tokens"] and summary["num_experts"] == 4
    expected = np.bincount(trace.experts.ravel(), minlength=4) / trace.experts.size
    assert np.allclose(summary["load"]["all"], expected, atol=1e-4)
    assert len(summary["layers"]) == 3 and np.isclose(sum(summary["layers"][1]["up"]), 1, atol=1e-3)
    assert [t["text"] for t in summary["tokens"] if t["role"] == "answer"] == ["好", "的", "。"]
    assert "好/" in run("trace", str(file)).out


def test_trace_of_a_prompt_with_and_without_a_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "t.npz"
    made = run("trace", str(file), "--prompt", "q", "--json", "--max-new-tokens", "4").json
    assert made["file"] == str(file) and made["answer_tokens"] == 4 == made["num_experts"]
    assert len(RouterTrace.load(file)) == made["prompt_tokens"] + 4
    assert run("trace", "--prompt", "q", "--json").json["file"] is None


def test_a_base_without_experts_has_no_trace(run: Run, tmp_path: Path) -> None:
    bare = FakeEngine(num_experts=0)
    assert run("ask", "q", "--trace", str(tmp_path / "t.npz"), engine=bare).code == 2
    assert run("trace", "--prompt", "q", engine=bare).code == 2
    assert bare.calls == [] and list(tmp_path.iterdir()) == []


def test_damaged_and_missing_trace_files_are_refused(run: Run, tmp_path: Path) -> None:
    damaged = tmp_path / "t.json"
    damaged.write_text('{"format": "ming-router-trace"}')
    for file in (damaged, tmp_path / "absent.npz"):
        assert run("trace", str(file), "--json").json["error"]["type"] == "TraceError"
        assert run("trace", str(file)).code == 1


@pytest.mark.parametrize("word", ["--jso", "--trac", "--mod=x"])
def test_flags_are_written_in_full(run: Run, word: str) -> None:
    assert run("ask", "q", word).code == 2


# -- pieces of the console --------------------------------------------------------------------------------------------


def test_the_progress_line_gives_bytes_speed_and_time_left() -> None:
    step = Progress("fetch", 50 * 2**20, 200 * 2**20, "bytes", "file.gguf", 10 * 2**20, 15.0)
    assert (
        bar_text(step, "Fetching", "en")
        == "Fetching   25% [#####...............]  50/200 MiB  10.0 MiB/s  0:15 left  file.gguf"
    )
    assert "剩余 0:15" in bar_text(step, "下载", "zh")
    assert bar_text(Progress("build", 3, 0, "steps"), "Building", "en") == "Building"  # a total not known


def test_the_progress_bar_lives_on_one_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    console = Console("zh", json_mode=True)
    for done in (0, 1, 2):
        console.progress(Progress("load", done, 2, "steps"))
    console.note("ready", "就绪")
    lines = sys.stderr.getvalue().split("\n")
    assert lines[0].count("\r\x1b[K正在加载模型") == 2  # first and last: in between is too soon to redraw
    assert "100%" in lines[0] and lines[1:] == ["就绪", ""]


def test_progress_in_a_log_is_one_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("en")
    for stage in ("fetch", "build"):
        for done in range(5):
            console.progress(Progress(stage, done, 4, "bytes"))
    assert capsys.readouterr() == ("", "Downloading the weights\nBuilding the quantised engine (first start only)\n")


def test_a_terminal_gets_no_control_characters() -> None:
    assert printable("ok\x1b[31m\x07\n\tü中") == "ok[31m\n\tü中"


# -- triage and warnings ----------------------------------------------------------------------------------------------


def test_triage_is_one_object_and_loads_no_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("triage", "我爸突然嘴歪，说话不清，右手抬不起来", "--json")
    assert list(found.json) == ["red_flag", "category", "lang", "matched", "message"] and found.settings == []
    assert found.json["red_flag"] is True and found.json["category"] == "stroke" and found.json["lang"] == "zh"
    assert "120" in found.json["message"] and found.json["matched"]
    calm = run("triage", "how much sleep is healthy?", "--json")
    assert calm.code == 0 and calm.json == {
        "red_flag": False,
        "category": "",
        "lang": "en",
        "matched": [],
        "message": "",
    }
    british = run("triage", "-", "--region", "uk", stdin="he is not breathing and his lips are blue")
    assert "999" in british.out and british.code == 0
    assert "no all-clear" in run("triage", "my knee aches a little").out
    monkeypatch.setenv("MING_LANG", "fr")  # as everywhere: what is not Chinese is English
    assert "stroke" in run("triage", "suddenly his face droops and he cannot speak").out
    assert run("triage", "", "--json").code == 2 and run("triage", "x", "--region", "mars").code == 2


def test_ask_and_chat_warn_before_the_answer(run: Run) -> None:
    asked = run("ask", "my husband has crushing chest pain and is sweating", "--region", "us")
    assert "heart attack" in asked.err and "911" in asked.err and "heart attack" not in asked.out
    talked = run("chat", stdin="我妈胸口有点不舒服\n出了一身冷汗，左胳膊麻，脸色发白\n")
    assert "120" in talked.err or "heart" in talked.err
    dosed = run("ask", "my knee aches", engine=FakeEngine("Take 400 mg of ibuprofen every 6 hours."))
    assert "names a dose" in dosed.err
    assert "names a dose" in run("chat", stdin="my knee aches\n", engine=FakeEngine("Take 400 mg of ibuprofen.")).err
    traced = run("trace", "--prompt", "my husband has crushing chest pain and is sweating")
    assert "heart attack" in traced.err


def test_mcp_without_its_package_names_the_remedy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it takes no --json: stdout is the protocol's."""
    for module in ("mcp", "mcp.server.mcpserver"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "ming_app.mcp_server", raising=False)
    result = run("mcp")
    assert result.code == 1 and "pip install -r requirements-mcp.txt" in result.err and result.out == ""
    assert "缺少 mcp 包" in run("mcp", "--lang", "zh").err
    assert run("mcp", "--json").code == 2
