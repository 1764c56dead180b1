"""Texts of an atlas from files of any kind, a resumed run, the report and tables it writes, and the trace tools of the terminal."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ming_app import atlas
from ming_app.atlas import Text, read_texts, trace_texts, write_atlas
from ming_app.cli import main
from ming_app.engine.engine import Engine
from ming_app.engine.types import Message, SamplingParams
from ming_app.errors import UsageError
from ming_app.molora.trace import RouterTrace
from ming_app.router.report import report_html, report_views
from tests.fakes import FakeEngine
from tests.tiny import make_engine

TEXTS = [Text("What is gout?", "gout", {"language": "en"}), Text("什么是痛风？", "<b>痛风", {"language": "zh"})]


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return make_engine(tmp_path_factory.mktemp("tiny"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_texts_of_every_kind_of_file(tmp_path: Path) -> None:
    toml = read_texts(write(tmp_path / "a.toml", '[[zh]]\ntext = "痛风？"\n[[en]]\ntext = "Gout?"\ntitle = "g"\n'))
    assert [(t.text, t.title, t.labels) for t in toml] == [
        ("痛风？", "痛风？", {"language": "zh"}),
        ("Gout?", "g", {"language": "en"}),
    ]
    rows = [{"text": "a", "stream": "qa"}, {"stem": "哪种？", "options": {"A": "甲", "B": "乙"}, "lang": "zh"}]
    lines = read_texts(write(tmp_path / "b.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n"))
    assert lines[0].labels == {"stream": "qa", "language": "en"} and lines[1].text == "哪种？\nA. 甲\nB. 乙"
    plain = read_texts(write(tmp_path / "c.txt", "\n".join(f"line {i}" for i in range(10))), limit=3)
    assert [t.text for t in plain] == ["line 0", "line 3", "line 6"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text"', "line 2"),
        ("a.jsonl", "[1]\n", "line 1"),
        ("a.jsonl", '{"text": ["x"]}\n', "line 1"),
        ("a.toml", "[[zh]", "not valid TOML"),
        ("a.toml", "zh = [1]", "needed"),
        ("a.txt", "\n \n", "holds no text"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, name: str, content: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        read_texts(write(tmp_path / name, content))
    with pytest.raises(UsageError, match="cannot be read"):
        read_texts(tmp_path / "none.txt")


def test_a_run_goes_on_where_it_was(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trace_texts(engine, TEXTS, tmp_path, 6)
    assert [s.title for s in first.segments] == ["gout", "<b>痛风"] and first.segments[1].labels == {"language": "zh"}
    assert first.probabilities is not None and first.contributions is not None and first.is_answer().sum() > 0
    calls = []
    monkeypatch.setattr(atlas, "inspect", lambda *words, **named: calls.append(words) or pytest.fail("read again"))
    again = trace_texts(engine, TEXTS, tmp_path, 6)
    assert np.array_equal(again.experts, first.experts) and calls == []
    kept = sorted((tmp_path / "traces").iterdir())
    kept[0].write_bytes(b"PK damaged")
    monkeypatch.undo()
    assert np.array_equal(trace_texts(engine, TEXTS, tmp_path, 6).experts, first.experts)


def test_questions_alone(engine: Engine, tmp_path: Path) -> None:
    trace = trace_texts(engine, TEXTS, tmp_path, 0)
    assert not trace.is_answer().any() and len(trace.segments) == 2


def test_given_answers_are_read_not_written(engine: Engine, tmp_path: Path) -> None:
    given = replace(TEXTS[1], answer="是痛风💧。")
    trace = trace_texts(engine, [given], tmp_path, 50)
    answers = [token for token in trace.tokens if token.role == "answer"]
    assert "".join(token.text for token in answers) == "是痛风💧。"
    assert all(token.logprob is not None and token.others for token in answers)
    ids = np.array([token.id for token in trace.tokens])
    whole = engine.backend.forward([ids], engine.backend.new_cache(1, 512))
    assert np.array_equal(trace.experts, whole.experts[0])
    pieces = [text for text, members in trace.pieces() if trace.tokens[members[0]].role == "answer"]
    assert pieces == ["是", "痛", "风", "💧", "。"]


def test_the_shipped_atlas_is_what_its_texts_say() -> None:
    folder = Path(__file__).parents[1] / "examples" / "atlas"
    texts, trace = read_texts(folder / "texts.jsonl"), RouterTrace.load(folder / "trace.npz")
    assert [segment.title for segment in trace.segments] == [text.title for text in texts]
    of = trace.segment_of()
    for index, text in enumerate(texts):
        mine = [token for token, segment in zip(trace.tokens, of, strict=True) if segment == index]
        assert "".join(token.text for token in mine if token.role == "answer") == text.answer
        assert text.text in "".join(token.text for token in mine if token.role == "prompt")
    assert trace.contributions is not None and (folder / "trace.npz").stat().st_size < 1_200_000


def test_report_and_tables(engine: Engine, tmp_path: Path) -> None:
    trace = trace_texts(engine, TEXTS, tmp_path, 6)
    page = write_atlas(trace, tmp_path, "en", engine.adapter).read_text(encoding="utf-8")
    assert "&lt;b&gt;痛风" in page and "<b>痛风" not in page
    assert (
        'src="http' not in page and "<script src" not in page and 'href="http' not in page.split("</style>")[-1][-5000:]
    )
    for name in ("load", "contribution", "specialisation-language", "vocabulary", "together", "flow", "alike", "texts"):
        with open(tmp_path / f"{name}.csv", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
        assert name == "vocabulary" or len(rows) > 1, name
        assert name == "texts" or f'id="{name}"' in page
        if name in ("load", "contribution", "specialisation-language", "together", "alike", "flow"):
            cells = {tuple(row[:2]) for row in rows[1:]}
            layers = 1 if name == "flow" else 2
            assert cells == {(str(layer), p) for layer in range(layers) for p in ("gate", "up", "down")}, name
    assert len(RouterTrace.load(tmp_path / "trace.npz")) == len(trace)
    assert not list(tmp_path.glob("*.partial"))


def test_tokens_cannot_end_the_script_of_a_report() -> None:
    answer = "</script><script>alert(1)</script>"
    *_, finish = FakeEngine(answer).stream([Message("user", "q")], SamplingParams())
    page = report_html(finish.trace, "zh", report_views(finish.trace, "zh"))
    assert page.count("</script>") == report_html(replace(finish.trace, tokens=plain(finish.trace)), "zh", {}).count(
        "</script>"
    )


def plain(trace: RouterTrace) -> tuple:
    """The same tokens with harmless texts."""
    return tuple(replace(token, text="x") for token in trace.tokens)


def run(capsys: pytest.CaptureFixture[str], engine: Engine, *words: object) -> tuple[int, dict]:
    code = main([*map(str, words), "--json"], load_engine=lambda settings, progress: _Shared(engine))
    return code, json.loads(capsys.readouterr().out)


class _Shared(Engine):
    """The engine of the module, which a command must not close."""

    def __init__(self, engine: Engine):
        self.__dict__ = engine.__dict__

    def close(self) -> None:
        pass


def test_the_terminal(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    code, made = run(capsys, engine, "trace", "--prompt", "What is gout?", "--max-new-tokens", 4, "--greedy", a)
    assert code == 0 and made["file"] == str(a)
    code, _ = run(
        capsys,
        engine,
        "trace",
        "--prompt",
        "What is gout?",
        "--max-new-tokens",
        4,
        "--greedy",
        "--intervene",
        "ban:1",
        b,
    )
    assert code == 0 and RouterTrace.load(b).config["interventions"] == ["ban:1"]
    code, found = run(capsys, engine, "trace", "diff", a, b)
    assert code == 0 and 0 < found["same_experts"] < 1 and found["aligned"] > 10
    code, found = run(capsys, engine, "trace", "merge", a, b, "--out", tmp_path / "c.json")
    assert code == 0 and found["texts"] == 2 and len(RouterTrace.load(tmp_path / "c.json").segments) == 2
    code, found = run(capsys, engine, "trace", "report", a, "--out", tmp_path / "r.html")
    assert code == 0 and (tmp_path / "r.html").stat().st_size > 1_000_000
    prompts = write(tmp_path / "p.txt", "one\ntwo\n")
    code, found = run(
        capsys, engine, "trace", "atlas", "--prompts", prompts, "--out", tmp_path / "o", "--max-new-tokens", 3
    )
    assert code == 0 and found["texts"] == 2 and Path(found["report"]).is_file()
    for words in (["diff", a], ["merge", a, b], ["atlas", "--out", tmp_path], ["report", a], [a, b]):
        code, failed = run(capsys, engine, "trace", *words)
        assert code == 2 and failed["error"], words
    code, failed = run(capsys, engine, "trace", "--prompt", "x", "--intervene", "ban:77")
    assert code == 2 and "0 to 3" in failed["error"]["message"]
