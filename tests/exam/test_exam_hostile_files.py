"""Hostile files: bombs, entities, deep nesting and noise are refused or made inert, quickly, with a reason."""

from __future__ import annotations

import json
import time
import zipfile
from contextlib import suppress
from io import BytesIO

import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ming_app.errors import MingError
from ming_app.exam.formats import FORMATS, BankFileError, ReadOptions, read_bank
from ming_app.exam.formats import tables as table_files

LAUGHS = """<?xml version="1.0"?><!DOCTYPE quiz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<quiz><question type="multichoice"><questiontext><text>&b;</text></questiontext></question></quiz>"""
OUTSIDE = '<!DOCTYPE quiz SYSTEM "file:///etc/passwd"><quiz/>'


@pytest.mark.parametrize("text", [LAUGHS, OUTSIDE])
def test_xml_with_a_document_type_is_not_read(text: str) -> None:
    with pytest.raises(BankFileError, match="document type"):
        read_bank(text.encode(), "q.xml")


def test_deep_and_broken_xml() -> None:
    with pytest.raises(BankFileError, match="nested"):
        read_bank(("<quiz>" + "<a>" * 5000).encode(), "q.xml")
    with pytest.raises(BankFileError, match="broken at line 2"):
        read_bank(b"<quiz>\n<question></quiz>", "q.xml")


def test_deep_json() -> None:
    with pytest.raises(BankFileError, match="not JSON"):
        read_bank(("[" * 200_000).encode(), "q.json")
    found = read_bank(b'{"stem":"Q","A":"a","B":"b","answer":"A"}\n' + b'{"a":' * 50_000, "q.jsonl")
    assert len(found.questions) == 1 and len(found.rejected) == 1


def sheet(**members: bytes) -> bytes:
    """A small workbook with members added or replaced; "__" in a name is a slash."""
    book = openpyxl.Workbook()
    book.active.append(["题目", "A", "B", "答案"])
    book.active.append(["Q?", "a", "b", "A"])
    first = BytesIO()
    book.save(first)
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(first.getvalue())) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if name not in members:
                new.writestr(name, old.read(name))
        for name, data in members.items():
            new.writestr(name, data)
    return out.getvalue()


def test_zip_bombs_are_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "MAX_UNPACKED", 5 << 20)
    start = time.monotonic()
    with pytest.raises(BankFileError, match="unpacks to more than"):
        read_bank(sheet(**{"xl/media/image1.png": bytes(50 << 20)}), "q.xlsx")
    assert time.monotonic() - start < 5


def test_a_spreadsheet_with_entities_is_not_read() -> None:
    bad = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "b">]><sst/>'
    for data in (bad, bad.decode().encode("utf-16")):
        for part in ("xl/sharedStrings.xml", "xl/worksheets/sheet1.dat", "xl/media/image1.png", "xl/media/image1.svg"):
            with pytest.raises(BankFileError, match="entities"):
                read_bank(sheet(**{part: data}), "q.xlsx")


@pytest.mark.parametrize(
    "data",
    [
        b"PK\x03\x04",
        sheet()[:900],
        sheet(**{"xl/worksheets/sheet1.xml": b"<worksheet><sheetData><row"}),
        b"PK\x03\x04" + b"x" * 999,
    ],
)
def test_damaged_spreadsheets(data: bytes) -> None:
    with pytest.raises(BankFileError):
        read_bank(data, "q.xlsx")


def test_a_sheet_that_claims_a_million_rows_is_read_in_seconds() -> None:
    book = openpyxl.Workbook()
    book.active.append(["题目", "A", "B", "答案"])
    book.active["A1048576"], book.active["XFD9"] = "far", "away"
    out = BytesIO()
    book.save(out)
    start = time.monotonic()
    with pytest.raises(BankFileError):
        read_bank(out.getvalue(), "q.xlsx")
    assert time.monotonic() - start < 20


def test_huge_cells_are_rejected_with_their_line() -> None:
    text = "question,A,B,answer\n" + "x" * 60_000 + ",a,b,A\nfine?,a,b,A\n"
    found = read_bank(text.encode(), "q.csv")
    assert [row.line for row in found.rejected] == [2] and len(found.questions) == 1
    assert len(found.rejected[0].excerpt) <= 80


def test_a_quote_that_never_closes() -> None:
    text = 'question,A,B,answer\n"open,a,b,A\n' + "more?,a,b,A\n" * 40_000
    with pytest.raises(BankFileError, match="breaks off"):
        read_bank(text.encode(), "q.csv")


def test_too_many_rows() -> None:
    text = "question,A,B,answer\n" + "".join(f"Q{i}?,a,b,A\n" for i in range(100_001))
    with pytest.raises(BankFileError, match="more than 100,000"):
        read_bank(text.encode(), "q.csv")


@pytest.mark.parametrize(
    "line",
    [
        "A. x" + " " * 20_000 + "-",
        "<a " * 10_000,
        "答案：A" + " " * 20_000 + "x",
        "A. " * 30_000,
        "(" * 50_000,
        "1. " + "答案" * 20_000,
        "{~" * 30_000,
        "1.1.1." * 20_000,
    ],
)
def test_no_line_takes_for_ever(line: str) -> None:
    for kind in ("text", "gift", "aiken", "csv"):
        start = time.monotonic()
        with suppress(MingError):
            read_bank(f"question,options,answer\nQ?,{line},A\n".encode(), "q.csv")
        with suppress(MingError):
            read_bank(
                f"<quiz><question type='multichoice'><questiontext><text><![CDATA[<p>{line}]]></text></questiontext></question></quiz>".encode(),
                "q.xml",
            )
        with suppress(MingError):
            read_bank(f"1. Q?\nA. a\nB. b\n{line}\n答案：A\n".encode(), "q.txt", ReadOptions(format=kind))
        assert time.monotonic() - start < 5, kind


pieces = st.sampled_from(
    [
        "1. ",
        "A. ",
        "B、",
        "答案：",
        "ANSWER: A",
        "解析",
        "{",
        "}",
        "=",
        "~",
        "%50%",
        "::",
        "#",
        "(1~2题共用题干)",
        "\n",
        "\n\n",
        ",",
        '"',
        "\t",
    ]
    + [
        "question",
        "answer",
        "<question",
        "</question>",
        "<quiz>",
        "</quiz>",
        "&lt;",
        '{"stem":',
        '"A":',
        "[",
        "]",
        "√",
        "\\",
        "T",
        "Q?",
    ]
)
noise = st.lists(pieces | st.text(max_size=8), max_size=60).map("".join)


@settings(max_examples=250, deadline=None)
@given(noise, st.sampled_from([kind for kind in FORMATS if kind != "xlsx"] + [""]))
def test_noise_in_any_format(text: str, kind: str) -> None:
    try:
        found = read_bank(text.encode("utf-8", "replace"), "x.txt", ReadOptions(format=kind))
    except BankFileError as error:
        assert error.en and error.zh
    else:
        assert found.rows == len(found.questions) + len(found.rejected) > 0


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["", *FORMATS]))
def test_bytes_in_any_format(data: bytes, kind: str) -> None:
    try:
        read_bank(data, "x.bin", ReadOptions(format=kind))
    except BankFileError as error:
        assert error.en and error.zh


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=40), st.integers(0, 4000))
def test_spreadsheets_with_changed_bytes(patch: bytes, at: int) -> None:
    data = bytearray(sheet())
    data[at : at + len(patch)] = patch
    try:
        read_bank(bytes(data), "x.xlsx", ReadOptions(format="xlsx"))
    except BankFileError as error:
        assert error.en and error.zh


def test_script_in_a_stem_stays_text() -> None:
    row = {"stem": "<img src=x onerror=alert(1)>?", "A": "a", "B": "b", "answer": "A"}
    assert read_bank(json.dumps(row).encode(), "q.jsonl").questions[0].stem == row["stem"]


def test_markup_that_makes_no_sense() -> None:
    xml = "<quiz><question type='multichoice'><questiontext><text>&lt;![ 5 Q?</text></questiontext>"
    xml += (
        "<answer fraction='100'><text>a</text></answer><answer fraction='0'><text>b</text></answer></question></quiz>"
    )
    assert read_bank(xml.encode(), "q.xml").rows == 1
