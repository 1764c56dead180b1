"""Reading and writing banks: native shapes, round trips, reports of rejected rows, encodings."""

from __future__ import annotations

import json
import sqlite3
import zipfile
from io import BytesIO
from pathlib import Path

import openpyxl
import pytest

from ming_app.exam.formats import BankFileError, ColumnsError, Import, ReadOptions, read_bank, write_bank
from ming_app.exam.formats.columns import split_options
from ming_app.exam.formats.text import plain_text
from ming_app.exam.question import Question
from tests.exam.conftest import mixed

OPTIONS = {"A": "one", "B": "two", "C": "three", "D": "four"}


def read(text: str | list | dict, name: str = "bank.txt", **options: object) -> Import:
    data = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return read_bank(data.encode(), name, ReadOptions(**options))  # type: ignore[arg-type]


def reasons(found: Import) -> dict[int, str]:
    return {row.line: row.reason.en for row in found.rejected}


NATIVE = {
    "ours": {"stem": "Q?", "options": OPTIONS, "answer": ["B"], "type": "single", "tags": {"subject": "s"}},
    "CMExam": {"Question": "Q?", "Options": "A one\nB two\nC three\nD four", "Answer": "B", "Explanation": "why"},
    "MedQA": {"question": "Q?", "answer": "two", "options": OPTIONS, "meta_info": "step1", "answer_idx": "B"},
    "MedQA list": {
        "question": "Q?",
        "answer": "two",
        "options": [{"key": key, "value": value} for key, value in OPTIONS.items()],
        "answer_idx": "B",
    },
    "MMedBench": {"question": "Q?", "answer": "two", "options": OPTIONS, "answer_idx": "B", "rationale": "why"},
    "MLEC-QA": {"qid": 7, "qtype": "A1型题", "qtext": "Q?", "qimage": "", "options": OPTIONS, "answer": "B"},
    "CMB": {
        "exam_type": "医师考试",
        "exam_class": "执业医师",
        "exam_subject": "内科",
        "question": "Q?",
        "answer": "B",
        "question_type": "单项选择题",
        "option": OPTIONS,
    },
    "CMMLU, C-Eval": {"id": 0, "question": "Q?", **OPTIONS, "answer": "B", "explanation": "why"},
}


@pytest.mark.parametrize("shape", NATIVE)
def test_native_shapes(shape: str) -> None:
    for found in (read([NATIVE[shape]]), read(json.dumps(NATIVE[shape])), read({"questions": [NATIVE[shape]]})):
        assert found.format == "jsonl" and found.rejected == ()
        (question,) = found.questions
        assert (question.stem, question.options, question.answer) == ("Q?", OPTIONS, ("B",))
        assert question.explanation == ("why" if "why" in NATIVE[shape].values() else "")


def test_medmcqa_counts_from_zero_or_one_by_the_whole_file() -> None:
    row = {
        "question": "Q?",
        "opa": "one",
        "opb": "two",
        "opc": "three",
        "opd": "four",
        "exp": "why",
        "choice_type": "multi",
    }
    rows = [{**row, "question": f"Q{cop}?", "cop": cop} for cop in (1, 2, 3)]
    from_one = read([*rows, {**row, "cop": 4}])
    assert [q.answer for q in from_one.questions] == [("A",), ("B",), ("C",), ("D",)]
    from_zero = read([*rows, {**row, "cop": 0}])
    assert [q.answer for q in from_zero.questions] == [("B",), ("C",), ("D",), ("A",)]
    unknown = read(rows)
    assert not unknown.questions and all("count from 0 or 1" in reason for reason in reasons(unknown).values())
    assert [q.answer[0] for q in read(rows, count_from=0).questions] == ["B", "C", "D"]


def test_every_row_is_accounted_for() -> None:
    good = NATIVE["ours"]
    rows = [good, {**good, "stem": ""}, good, {**good, "stem": "R?", "answer": "F"}, 5, {**good, "stem": "S?"}]
    lines = [json.dumps(row) for row in rows] + ["{broken", ""]
    found = read("\n".join(lines), "b.jsonl")
    assert found.rows == 7 and len(found.questions) == 2
    told = reasons(found)
    assert list(told) == [2, 3, 4, 5, 7]
    assert "stem is empty" in told[2] and "line 1" in told[3] and "none of the options" in told[4]
    assert "not a JSON object" in told[5] and "not JSON" in told[7]
    assert all(row.reason.zh for row in found.rejected)


def test_a_table_says_how_it_read_its_columns() -> None:
    text = "题号,题目,选项A,选项B,选项C,答案,解析,科目,备注\n1,甲？,一,二,三,B,因为,内科,x\n2,乙？,一,二,三,4,,内科,\n"
    found = read(text, "表.csv")
    assert found.format == "csv" and found.columns["题目"] == "stem" and found.columns["备注"] == ""
    assert found.questions[0].tags == {"subject": "内科"} and found.questions[0].explanation == "因为"
    assert list(reasons(found)) == [3]


def test_columns_can_be_named() -> None:
    text = "a1,a2,a3,a4\nQ?,yes,no,a3\n"
    with pytest.raises(BankFileError, match="no column for stem, answer"):
        read(text, "t.csv")
    columns = {"a1": "stem", "a2": "option_a", "a3": "option_b", "a4": "answer"}
    found = read("a1,a2,a3,a4\nQ?,yes,no,B\n", "t.csv", columns=columns)
    assert found.questions[0].answer == ("B",)
    with pytest.raises(BankFileError, match="no such field"):
        read(text, "t.csv", columns={"a1": "colour"})


def test_a_table_without_header_in_the_shape_of_mmlu() -> None:
    found = read('"Q1?",a,b,c,d,C\n"Q, two?",a,b,c,d,A\n', "t.csv")
    assert [q.answer for q in found.questions] == [("C",), ("A",)] and found.questions[1].stem == "Q, two?"


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_separators(separator: str) -> None:
    rows = [["question", "A", "B", "answer"], ["Q?", "one", "two", "A"]]
    found = read("\n".join(separator.join(row) for row in rows), "t.csv")
    assert found.questions[0].options == {"A": "one", "B": "two"}


def test_xlsx_with_a_title_above_and_formulas() -> None:
    book = openpyxl.Workbook()
    book.active.append(["内科题库 2024"])
    book.active.append([])
    book.active.append(["题目", "A", "B", "C", "答案", "年份"])
    book.active.append(["甲？", 1, 2, 3.5, "C", 2024])
    book.active.append([None, None])
    book.active.append(["乙？", "=1+1", "b", "c", "B", None])
    out = BytesIO()
    book.save(out)
    found = read_bank(out.getvalue(), "题.xlsx")
    assert found.format == "xlsx" and found.questions[0].options == {"A": "1", "B": "2", "C": "3.5"}
    assert found.questions[0].tags == {"year": "2024"}
    assert list(reasons(found)) == [6]  # a formula without a stored value is an empty option


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030"])
def test_encodings(encoding: str) -> None:
    text = "题目,A,B,答案\n患者发热，首先考虑？,感染,肿瘤,A\n" * 1
    found = read_bank(text.encode(encoding), "t.csv")
    assert found.questions[0].stem == "患者发热，首先考虑？"
    assert found.encoding == {"utf-8-sig": "utf-8", "utf-16": "utf-16-le"}.get(encoding, encoding)


def test_what_is_no_text_is_said() -> None:
    with pytest.raises(BankFileError, match="not text in UTF-8"):
        read_bank(b"\xff\xd8\xff\xe0" + bytes(range(128, 256)) * 3, "photo.jpg")
    with pytest.raises(BankFileError, match="empty"):
        read_bank(b"  \n", "x.csv")
    with pytest.raises(BankFileError, match="MiB"):
        read_bank(b"x" * (21 << 20), "x.csv")


def test_aiken() -> None:
    text = "Which bone\nis longest?\nA. femur\nB) tibia\nC. ulna\nANSWER: A\n\nNo answer here\nA. x\nB. y\n\nSecond?\nA. x\nB. y\nanswer: b\n"
    found = read(text)
    assert found.format == "aiken" and [q.answer for q in found.questions] == [("A",), ("B",)]
    assert found.questions[0].stem == "Which bone\nis longest?" and list(reasons(found)) == [8]


def test_gift() -> None:
    text = r"""// a comment
$CATEGORY: $course$/Cardiology

::Q1:: The drug of choice is\: {
=right \= one # because
~wrong {not}
}

::Q2::[html]<b>Two</b> are right {~%50%one ~%50%two ~%-100%three ####All of it.}

Water is wet. {T}

Write an essay. {}

Match {=a -> b =c -> d}

How many? {#3:1}

Who? {=Grant =Lee}

::Q3:: This drug {~x =y} is best.
"""
    text = text.replace("{not}", r"\{not\}")
    found = read(text, "q.gift")
    assert found.format == "gift"
    first, second, third, last = found.questions
    assert first.stem == "The drug of choice is:" and first.options == {"A": "right = one", "B": "wrong {not}"}
    assert first.tags == {"subject": "Cardiology"} and first.explanation == "right = one: because"
    assert second.answer == ("A", "B") and second.stem == "Two are right" and second.explanation == "All of it."
    assert third.type == "TF" and third.answer == ("A",)
    assert last.answer == ("B",) and last.stem == "This drug  _____  is best."
    kinds = ("essay", "matching", "numerical", "short answer")
    assert [kind for kind in kinds if any(repr(kind) in reason for reason in reasons(found).values())] == list(kinds)


MOODLE = """<?xml version="1.0" encoding="UTF-8"?>
<quiz>
<question type="category"><category><text>$course$/Renal</text></category></question>
<question type="multichoice"><name><text>n1</text></name>
<questiontext format="html"><text><![CDATA[<p>Which <b>ion</b>?<script>alert(1)</script></p>]]></text></questiontext>
<generalfeedback><text>why</text></generalfeedback><single>true</single>
<answer fraction="0"><text>Na</text></answer><answer fraction="100"><text>K</text></answer></question>
<question type="truefalse"><questiontext><text>Wet?</text></questiontext>
<answer fraction="0"><text>true</text></answer><answer fraction="100"><text>false</text></answer></question>
<question type="essay"><questiontext><text>Write.</text></questiontext></question>
<question type="multichoice"><questiontext><text>&lt;img src="x.png"/&gt; What?</text></questiontext>
<answer fraction="100"><text>a</text></answer><answer fraction="0"><text>b</text></answer></question>
</quiz>"""


def test_moodle_xml() -> None:
    found = read(MOODLE, "q.xml")
    first, second = found.questions
    assert first.stem == "Which ion?" and first.answer == ("B",) and first.tags == {"subject": "Renal"}
    assert second.type == "TF" and second.answer == ("B",)
    assert len(found.rejected) == 2 and "essay" in found.rejected[0].reason.en
    assert "pictures are not in the file" in found.rejected[1].reason.en


PLAIN = """临床医学模拟题
一、A1型题
1. 高血压最常见的并发症是（  ）
A. 脑卒中  B. 肺炎  C. 胃炎
D．肝炎   E、肾结石
答案：A
解析：高血压首先损害血管。
脑卒中最常见。
2、下列属于抗生素的是
A、青霉素
B、阿司匹林
【答案】A
【解析】青霉素为β-内酰胺类。
3．首选药物是（C）
A.甲 B.乙 C.丙
二、多项选择题
(4) 心衰的表现有
A 呼吸困难
A. 呼吸困难 B. 水肿 C. 乏力 D. 脱发
正确答案：ABC
三、判断题
5. 水银是金属。（√）
（6～7题共用题干）
男，50岁，胸痛2小时。
6. 最可能的诊断是
A. 心肌梗死 B. 胃炎
答案：A
7. 首选检查是
A. 心电图 B. 胃镜
（8-9题共用备选答案）
A. 青霉素 B. 红霉素
C. 链霉素
8. 治疗梅毒首选
9. 有耳毒性的是
10. 没有答案的题
A. 甲 B. 乙
参考答案
7.A 8.A 9.C
"""


def test_plain_text_as_people_paste_it() -> None:
    found = read(PLAIN, "题库.txt")
    by_id = {question.id: question for question in found.questions}
    assert found.format == "text" and len(found.questions) + len(found.rejected) == found.rows
    assert list(by_id["1"].options.values()) == ["脑卒中", "肺炎", "胃炎", "肝炎", "肾结石"]
    assert by_id["1"].explanation == "高血压首先损害血管。\n脑卒中最常见。" and by_id["1"].stem.endswith("是（  ）")
    assert by_id["2"].explanation == "青霉素为β-内酰胺类。"
    assert by_id["3"].answer == ("C",) and "C" not in by_id["3"].stem
    assert by_id["4"].type == "X" and by_id["4"].answer == ("A", "B", "C")
    assert by_id["5"].type == "TF" and by_id["5"].answer == ("A",) and by_id["5"].stem == "水银是金属。"
    assert by_id["6"].type == by_id["7"].type == "A3" and by_id["7"].answer == ("A",)
    assert by_id["6"].group_id == by_id["7"].group_id and by_id["6"].shared_stem == "男，50岁，胸痛2小时。"
    assert by_id["8"].type == by_id["9"].type == "B1" and by_id["9"].answer == ("C",)
    assert by_id["8"].options == {"A": "青霉素", "B": "红霉素", "C": "链霉素"}
    assert {row.line: row.reason.en for row in found.rejected} == {
        1: "text that belongs to no question",
        35: "there is no answer",
    }


def test_cells_of_all_options() -> None:
    wanted = {"A": "one", "B": "two"}
    for text in ("A one\nB two", "A. one\nB. two", "A、one|B、two", "(A) one; (B) two", "A.one  B.two"):
        assert split_options(text) == wanted, text
    assert split_options("one\ntwo") == ["one", "two"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "moodle"])
def test_round_trips_keep_everything(kind: str) -> None:
    questions = mixed()
    found = read_bank(write_bank(questions, kind), f"x.{kind}")
    assert list(found.questions) == questions and not found.rejected


def test_gift_keeps_what_gift_knows() -> None:
    for question in read_bank(write_bank(mixed(), "gift"), "x.gift").questions:
        original = next(q for q in mixed() if q.stem in question.stem)
        assert (question.options, question.answer) == (original.options, original.answer)


TRICKY = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-1",
    "@SUM(A1)",
    "\t=x",
    "'=already",
    "＝1+1",
    "－SUM(A1)",
    "a = b",
    "~ {x} # : \\\n=",
    "<b>&amp;</b>",
]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "gift", "moodle"])
@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_survives_and_is_no_formula(kind: str, text: str) -> None:
    base = mixed()[0]
    question = Question(**{**vars(base), "explanation": "x " + text, "options": {"A": text.strip(), "B": "other"}})
    data = write_bank([question], kind)
    if kind == "csv":
        import csv

        cells = [cell for row in csv.reader(data.decode("utf-8-sig").splitlines(keepends=True)) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r", "＝", "－"))]
    (found,) = read_bank(data, f"x.{kind}").questions
    assert found.options == question.options and found.answer == question.answer
    assert found.explanation == question.explanation


def test_anki_deck(tmp_path: Path) -> None:
    data = write_bank(mixed(), "apkg", "Title")
    with zipfile.ZipFile(BytesIO(data)) as archive:
        archive.extract("collection.anki2", tmp_path)
    db = sqlite3.connect(tmp_path / "collection.anki2")
    notes = db.execute("SELECT guid, flds FROM notes").fetchall()
    assert len(notes) == len(mixed()) == db.execute("SELECT COUNT(*) FROM cards").fetchone()[0]
    assert len({guid for guid, _ in notes}) == len(notes)
    assert any("c of 40" in fields and "A. a of 40<br>C. c of 40" in fields for _, fields in notes)
    db.close()


def test_groups_are_held_together() -> None:
    case = {"type": "A3", "group_id": "g", "shared_stem": "Case.", "options": OPTIONS, "answer": "A"}
    rows = [
        {**case, "stem": "First?"},
        {**NATIVE["ours"], "stem": "Between?"},
        {"stem": "Second?", "group_id": "g", "options": OPTIONS, "answer": "B"},
        {**case, "stem": "Third?", "shared_stem": "Another case."},
    ]
    found = read(rows)
    assert [q.stem for q in found.questions] == ["First?", "Second?", "Between?"]
    assert found.questions[1].shared_stem == "Case." and "differ from those of its group" in reasons(found)[4]


def test_html_becomes_words() -> None:
    assert (
        plain_text("<p>One<br/>two</p><ul><li>three</li></ul><style>x{}</style>a &lt; b")
        == "One\ntwo\n\nthree\n\na < b"
    )


def test_plain_text_keeps_what_looks_like_something_else() -> None:
    """Ages after numbers, type names inside sentences, numbering that begins again, keys in a row."""
    text = """第一章
1. 感冒的病因是
A. 病毒 B. 细菌
2、45岁女性，咳嗽。请判断最可能的诊断是
A. 肺炎 B. 肾炎
答案：A
解析：根据病史判断为肺炎，B型超声帮助不大。
3.60岁男性，胸痛，给予 2.5 mg
2.5 mg 无效，应
A. 加量 B. 停药
答案：B
参考答案
1.A
第二章
1. 甲状腺激素由何处分泌
A. 甲状腺 B. 肾上腺
2. 何者是多选题的特点
A. 多个答案 B. 一个答案
参考答案
1-2 AB
[单选题]
1. 最后一题
A. 对 B. 不对
答案：B
"""
    found = read(text, "题.txt")
    assert [(q.stem, "".join(q.answer)) for q in found.questions] == [
        ("感冒的病因是", "A"),
        ("45岁女性，咳嗽。请判断最可能的诊断是", "A"),
        ("60岁男性，胸痛，给予 2.5 mg\n2.5 mg 无效，应", "B"),
        ("甲状腺激素由何处分泌", "A"),
        ("何者是多选题的特点", "B"),
        ("最后一题", "B"),
    ]
    assert found.questions[1].explanation == "根据病史判断为肺炎，B型超声帮助不大。"
    assert {q.type for q in found.questions} == {"A1"}


def test_a_brace_that_never_closes_costs_one_question() -> None:
    blocks = [f"Q{i}? {{=a ~b}}" for i in range(1000)]
    blocks[5] = "Q5? {=a ~b"
    found = read("\n\n".join(blocks), "q.gift")
    assert len(found.questions) == 999 and len(found.rejected) == 1


def test_near_misses_are_not_right() -> None:
    (question,) = read("Where? {~%25%Bethlehem ~%50%Galilee =Nazareth ~Rome}", "q.gift").questions
    assert (question.answer, question.type) == (("C",), "A1")
    xml = MOODLE.replace('fraction="0"><text>Na', 'fraction="50"><text>Na')
    assert read(xml, "q.xml").questions[0].answer == ("B",)


def test_numbers_from_zero_and_to_the_end_are_told_apart_by_nobody() -> None:
    rows = [{"question": f"Q{n}?", "choices": ["a", "b", "c"], "answer": n} for n in (0, 1, 2, 3)]
    assert not read(rows).questions and len(read(rows[:3]).questions) == len(read(rows[1:]).questions) == 3


def test_all_sheets_and_late_entries_are_read() -> None:
    book = openpyxl.Workbook()
    book.active.append(["题目", "A", "B", "答案"])
    book.active.append(["甲？", "a", "b", "A"])
    book.create_sheet("说明").append(["只是说明"])
    more = book.create_sheet("多选")
    more.append(["题目", "A", "B", "C", "答案"])
    more.append(["乙？", "a", "b", "c", "AC"])
    out = BytesIO()
    book.save(out)
    assert [q.stem for q in read_bank(out.getvalue(), "q.xlsx").questions] == ["甲？", "乙？"]
    rows = [{"stem": f"Q{i}?", "A": "a", "B": "b", "answer": "A"} for i in range(300)]
    rows.append({"stem": "last?", "A": "a", "B": "b", "C": "c", "answer": "C", "explanation": "why"})
    assert read(rows).questions[-1].explanation == "why"


def test_aiken_with_explanations() -> None:
    text = "One?\nA. x\nB. y\nANSWER: A\nExplanation: because\n\nTwo?\nA. x\nB. y\nANSWER: B\n"
    assert [(q.stem, q.explanation) for q in read(text).questions] == [("One?", "because"), ("Two?", "")]


def test_what_differs_only_in_case_or_picture_is_another() -> None:
    rows = [{"stem": "Genotype?", "options": ["AA", "Aa", "aa"], "answer": "B", "lang": "中文", "type": "最佳选择题"}]
    assert read(rows).questions[0].lang == "zh"


def test_columns_that_are_not_understood_can_be_said() -> None:
    with pytest.raises(ColumnsError) as caught:
        read("a1,a2,a3,a4\nQ?,yes,no,B\n", "t.csv")
    assert caught.value.columns == {"a1": "", "a2": "", "a3": "", "a4": ""} and caught.value.format == "csv"
