"""Formats of conversations, JSON lines and arrays, broken rows by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from training.errors import DataError
from training.readers import language_of, read_chats
from training.records import CHUNK, Damage, read_rows

TURNS = [("user", "发热怎么办？"), ("assistant", "多喝水。"), ("user", "多久？"), ("assistant", "三天。")]
SHAREGPT = [{"from": "human" if role == "user" else "gpt", "value": text} for role, text in TURNS]


def write(path: Path, text: str) -> Path:
    data = text.encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def said(row) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in row.turns]


@pytest.mark.parametrize(
    ("format", "row", "system"),
    [
        ("chat", {"messages": [{"role": r, "content": c} for r, c in TURNS]}, None),
        ("conversations", {"conversations": SHAREGPT}, None),
        ("sharegpt", {"conversations": [{"from": "system", "value": "简短"}, *SHAREGPT]}, "简短"),
        ("sharegpt", {"system": "brief", "conversations": SHAREGPT}, "brief"),
        (
            "alpaca",
            {"instruction": "多久？", "input": "", "output": "三天。", "history": [["发热怎么办？", "多喝水。"]]},
            None,
        ),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz"])
def test_every_format_gives_the_same_conversation(tmp_path: Path, name: str, format: str, row: dict, system) -> None:
    rows = [row, {**row, "id": 7, "source": "book", "lang": "en"}]
    text = "\n".join(json.dumps(r) for r in rows) if "jsonl" in name else json.dumps(rows, indent=1)
    first, second = read_chats(write(tmp_path / name, text), format=format)
    assert said(first) == said(second) == TURNS
    assert first.system == system
    assert (first.lang, first.source) == ("zh", "") and (second.id, second.source, second.lang) == ("7", "book", "en")
    assert first.id.startswith(f"{name}:")


def test_alpaca_input_stands_under_the_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Name the drug.", "input": "It thins blood.", "output": "Warfarin"}
    (read,) = read_chats(write(tmp_path / "a.json", json.dumps([row])), format="alpaca")
    assert said(read) == [("user", "Name the drug.\nIt thins blood."), ("assistant", "Warfarin")]
    assert read.lang == "en"


def test_greetings_and_open_questions_are_left_out(tmp_path: Path) -> None:
    row = {"conversations": [SHAREGPT[1], *SHAREGPT, SHAREGPT[0]]}
    (read,) = read_chats(write(tmp_path / "a.jsonl", json.dumps(row)), format="sharegpt")
    assert said(read) == TURNS


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [SHAREGPT[0], SHAREGPT[0], SHAREGPT[1]]},
        {"conversations": [{"from": "narrator", "value": "x"}, SHAREGPT[1]]},
        {"conversations": [SHAREGPT[0], {"from": "gpt", "value": "  "}]},
        {"conversations": [SHAREGPT[0], {"from": "gpt", "value": None}]},
        {"conversations": [{"from": "gpt", "value": "hello"}]},
        {"conversations": SHAREGPT, "id": [1]},
        {"messages": []},
        "text",
        None,
    ],
)
def test_unusable_rows_are_named_or_counted(tmp_path: Path, row) -> None:
    good = {"conversations": SHAREGPT}
    for name, text in (
        ("a.jsonl", "\n".join(map(json.dumps, [good, row, good]))),
        ("a.json", "[\n" + ",\n".join(map(json.dumps, [good, row, good])) + "\n]"),
    ):
        path = write(tmp_path / name, text)
        line = 2 if name == "a.jsonl" else 3
        with pytest.raises(DataError, match=f"{name}:{line}: "):
            list(read_chats(path, format="conversations"))
        damage = Damage()
        assert len(list(read_chats(path, damage, "conversations"))) == 2
        assert damage.count == 1 and damage.first[0].startswith(f"{name}:{line}: ")


def test_bytes_that_are_no_text_spoil_their_row_only(tmp_path: Path) -> None:
    good = json.dumps({"conversations": SHAREGPT})
    path = tmp_path / "a.jsonl"
    path.write_bytes(good.encode() + b"\n" + good.replace("gpt", "gpt").encode()[:-3] + b"\xff\xfe\n" + good.encode())
    damage = Damage()
    assert len(list(read_chats(path, damage, "conversations"))) == 2 and damage.count == 1
    path.write_bytes(b'{"conversations": [{"from": "human", "value": "a\xff"}, {"from": "gpt", "value": "b"}]}')
    with pytest.raises(DataError, match="UnicodeEncodeError"):
        list(read_chats(path, format="conversations"))


def test_long_arrays_are_read_in_pieces(tmp_path: Path) -> None:
    values = [[1], "x" * (3 * CHUNK), {"a": "]"}, 12345678901234567890, [], "y"] * 3
    for text in (json.dumps(values), json.dumps(values, indent=3), "\n\n " + json.dumps(values) + "\n"):
        assert list(read_rows(write(tmp_path / "a.json", text), lambda value, _: value)) == values
    assert list(read_rows(write(tmp_path / "a.json", "[ ]"), lambda value, _: value)) == []
    assert list(read_rows(write(tmp_path / "a.json", " \n"), lambda value, _: value)) == []


@pytest.mark.parametrize("text", ["[1, 2", "[1 2]", "[1,\n\n{", '["a', "[1, nope]", "[" * 100_000])
def test_an_array_that_breaks_off_is_an_error_even_when_rows_may_be_skipped(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"a\.json:\d+: "):
        list(read_rows(write(tmp_path / "a.json", text), lambda value, _: value, Damage()))


def test_language_by_script() -> None:
    assert language_of("ACEI类药物的副作用是什么") == "zh"
    assert language_of("What does 黄 mean in this report about jaundice?") == "en"
    assert language_of("123") == "en"
