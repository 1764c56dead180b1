"""`chat` over a pipe and the conversation behind it, with a scripted engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from ming_app.engine.types import Message
from ming_app.errors import PromptTooLongError
from ming_app.molora.trace import RouterTrace
from tests.fakes import FakeEngine
from tests.test_cli import ASK_KEYS, Run, run

__all__ = ["run"]  # the fixture


def test_turns_build_on_each_other(run: Run) -> None:
    engine = FakeEngine(lambda messages: f"answer {len(messages)}")
    result = run("chat", "--system", "Be kind.", stdin="first\n\n  second  \n", engine=engine)
    assert result.code == 0 and result.out == "answer 2\nanswer 4\n"
    assert engine.calls[1][0] == [
        Message("system", "Be kind."),
        Message("user", "first"),
        Message("assistant", "answer 2"),
        Message("user", "second"),
    ]
    assert engine.calls[0][1].trace is True and engine.closed


def test_json_lists_the_turns(run: Run) -> None:
    values = run("chat", "--json", stdin="a\nb\n").json
    assert values["model"] == "fake-model" and len(values["turns"]) == 2
    assert all(list(turn)[: len(ASK_KEYS)] == ASK_KEYS for turn in values["turns"])


def test_clear_forgets_and_quit_leaves(run: Run) -> None:
    engine = FakeEngine()
    run("chat", stdin="a\n/clear\nb\n/quit\nc\n", engine=engine)
    assert [len(messages) for messages, _ in engine.calls] == [1, 1]


def test_a_backslash_continues_the_line(run: Run) -> None:
    engine = FakeEngine()
    run("chat", stdin="one\\\ntwo\n", engine=engine)
    assert engine.calls[0][0] == [Message("user", "one\ntwo")]


def test_trace_saves_the_last_answer(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "t.npz"
    result = run(
        "chat",
        stdin=f"/trace {file}\nhello\n/trace {file}\n/trace\n/trace {tmp_path}/t.txt\n",
        engine=FakeEngine("嗯。"),
    )
    assert result.code == 0 and "no trace yet" in result.err and "Name a file" in result.err and ".txt" in result.err
    trace = RouterTrace.load(file)
    assert [t.text for t in trace.tokens if t.role == "answer"] == ["嗯", "。"] and trace.config["ai_generated"] is True


def test_help_and_unknown_commands_go_to_stderr(run: Run) -> None:
    result = run("chat", "--lang", "zh", stdin="/help\n/fly\n")
    assert result.out == "" and "显示本说明" in result.err and "没有 /fly" in result.err


def test_a_refused_question_leaves_the_conversation_as_it_was(run: Run) -> None:
    engine = FakeEngine(context_limit=64)
    result = run("chat", "--json", stdin="word " * 100 + "\nshort\n", engine=engine)
    first, second = result.json["turns"]
    assert first["error"]["type"] == PromptTooLongError.__name__ and second["finish_reason"] == "stop"
    assert engine.calls[1][0] == [Message("user", "short")]


def test_left_out_turns_are_announced(run: Run) -> None:
    engine = FakeEngine("fine " * 5, context_limit=64)
    result = run("chat", stdin="one two three four five six seven\n" * 4, engine=engine)
    assert "left out" in result.err


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_answer_is_not_kept(run: Run, text: str) -> None:
    engine = FakeEngine(text)
    run("chat", stdin="a\nb\n", engine=engine)
    assert engine.calls[1][0] == [Message("user", "b")]
