"""Names of columns and of JSON entries -> fields of a question: one table for every bank we know.

Covers our own names and those of CMExam, MedQA, MedMCQA, MMedBench, MLEC-QA, CMB, CMMLU, C-Eval and MMLU, and what people
write above the columns of their own tables, in Chinese and English.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ming_app.exam.formats.reading import BankFileError, ColumnsError, ReadOptions, Row
from ming_app.exam.question import LETTERS, QuestionError, squeezed

OPTION_FIELDS = tuple(f"option_{letter.lower()}" for letter in LETTERS)
TAG_FIELDS = ("subject", "disease_group", "department", "competency", "difficulty", "year", "topic", "exam")
FIELDS = (
    "stem",
    "options",
    *OPTION_FIELDS,
    "answer",
    "explanation",
    "type",
    "lang",
    *TAG_FIELDS,
    "tags",
    "group_id",
    "shared_stem",
    "reference",
    "source",
    "licence",
    "image",
    "id",
)
"""what a column can be"""

_NAMES = {
    "stem": "stem question qtext questiontext text prompt 题目 题干 试题 问题 题目内容 试题内容",
    "options": "options option choices 选项 备选答案 备选项",
    "answer": "answer answer_idx answeridx cop key correct correctanswer correctoption label 答案 正确答案 标准答案 参考答案",
    "explanation": "explanation exp rationale solution analysis 解析 答案解析 试题解析 解释 分析",
    "type": "type qtype question_type questiontype 题型 题目类型 试题类型",
    "lang": "lang language 语言",
    "subject": "subject subject_name exam_subject medicaldiscipline discipline 科目 学科 专业",
    "disease_group": "disease_group diseasegroup diseasecategory icd 疾病分类 疾病组",
    "department": "department clinicaldepartment 科室",
    "competency": "competency medicalcompetency 能力 能力要求",
    "difficulty": "difficulty difficultylevel level 难度",
    "year": "year 年份 年度",
    "topic": "topic topic_name chapter exam_class 章节 知识点 考点",
    "exam": "exam exam_type 考试",
    "tags": "tags",
    "group_id": "group_id groupid group 题组 组号",
    "shared_stem": "shared_stem sharedstem case vignette 共用题干 病例",
    "reference": "reference references 参考 参考文献 出处",
    "source": "source meta_info 来源",
    "licence": "licence license 许可 许可证",
    "image": "image qimage 图片",
    "id": "id qid no number 编号 序号 题号",
}
ALIASES: dict[str, str] = {
    re.sub(r"[\s_]", "", alias): field for field, names in _NAMES.items() for alias in names.split()
}
for _letter in LETTERS:
    _low = _letter.lower()
    ALIASES |= {f"{start}{_low}": f"option_{_low}" for start in ("", "option", "op", "choice", "选项", "答案选项")}
BETTER = ("answer_idx", "answeridx", "cop")  # name the letter where a bank has the option's text as well


def understand(names: Sequence[str], options: ReadOptions) -> dict[str, str]:
    """name -> field for the columns of a file; "" for those that are not used. Each field is used once.

    Raises BankFileError when stem, answer or options are not among them, with the names there are.
    """
    found: dict[str, str] = {}
    taken: set[str] = {field for name, field in options.columns.items() if name in names and field}
    unknown = taken - set(FIELDS)
    if unknown:
        raise BankFileError(
            f"{', '.join(sorted(unknown))}: no such field; a column can be {', '.join(FIELDS)}.",
            f"没有字段 {'、'.join(sorted(unknown))}；列可对应：{'、'.join(FIELDS)}。",
        )
    for name in sorted(names, key=lambda name: str(name).strip().lower() not in BETTER):
        if name in options.columns:
            found[name] = options.columns[name]
            continue
        field = ALIASES.get(re.sub(r"[\s_（(].*$|[\s_]", "", squeezed_name(name)), "")
        found[name] = field if field not in taken else ""
        taken.add(field)
    fields = set(found.values())
    missing = [field for field in ("stem", "answer") if field not in fields]
    if "options" not in fields and not {"option_a", "option_b"} <= fields and "type" not in fields:
        missing.append("options")
    if missing:
        shown = ", ".join(map(repr, list(names)[:20]))
        raise ColumnsError(
            f"There is no column for {', '.join(missing)} among {shown}. Say which column is which.",
            f"在列 {shown} 中找不到 {'、'.join(missing)}，请指定各列的含义。",
            {name: found[name] for name in list(names)[:100]},
        )
    return {name: found[name] for name in names}


def squeezed_name(name: str) -> str:
    """A column's name in one writing: no spaces, no underscores, small letters."""
    return squeezed(str(name)[:100]).replace("_", "")


def to_fields(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Raw fields of a row: options collected, tags apart, a cell of all options taken apart."""
    fields: dict[str, Any] = {}
    tags: dict[str, Any] = {}
    letters: dict[str, Any] = {}
    for name, value in row.items():
        field = columns.get(name, "")
        if not field or value is None or value == "":
            continue
        if field in OPTION_FIELDS:
            letters[field[-1].upper()] = value
        elif field in TAG_FIELDS:
            tags[field] = value
        else:
            fields[field] = value
    if letters:
        fields["options"] = dict(sorted(letters.items()))
    options = fields.get("options")
    if isinstance(options, str):
        fields["options"] = split_options(options)
    elif isinstance(options, list) and options and all(isinstance(part, Mapping) for part in options):
        pairs = [(part.get("key", part.get("label")), part.get("value", part.get("text"))) for part in options]
        fields["options"] = {str(key): text for key, text in pairs}
    if tags:
        own = fields.get("tags")
        fields["tags"] = tags | (own if isinstance(own, dict) else {})
    return fields


_LETTERED = re.compile(r"(?:^|[\n|;；]|\s{2,})\s*[(（]?([A-Ja-j])(?:[.、．:：)）]|\s)\s*")


def split_options(text: str) -> dict[str, str] | list[str]:
    """`A. one\\nB. two` (or with other separators) -> options by letter; lines without letters -> a list."""
    text = re.sub(r"[ \t\u3000]{2,}", "  ", text[:30_000])  # no run of spaces for the pattern to search through
    parts = _LETTERED.split(text)
    if len(parts) > 4 and not parts[0].strip():
        found: dict[str, str] = {}
        for letter, part in zip(parts[1::2], parts[2::2], strict=True):
            if letter.upper() in found:  # "a" within an option
                return [line for line in text.splitlines() if line.strip()]
            found[letter.upper()] = part.strip().rstrip("|;；").strip()
        return found
    return [line for line in re.split(r"\n|\|", text) if line.strip()]


class Numbered:
    """Answers that are numbers of options: whether a file counts from 0 or from 1 is told from all of its rows."""

    def __init__(self, count_from: int | None):
        self._from = count_from

    def apply(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, answers as letters."""
        held = list(rows)
        numbers = [(self._number(row.fields), row) for row in held]
        if self._from is None:
            known = [(number, len(row.fields["options"])) for number, row in numbers if number is not None]  # type: ignore[index]
            zero, size_too = any(n == 0 for n, _ in known), any(n == size for n, size in known)
            if zero != size_too:  # both: some row is wrong, and which cannot be told
                self._from = 0 if zero else 1
        for number, row in numbers:
            yield row if number is None else self._lettered(number, row)

    @staticmethod
    def _number(fields: Mapping[str, Any] | QuestionError) -> int | None:
        if isinstance(fields, QuestionError) or not fields.get("options") or "answer" not in fields:
            return None
        answer = fields["answer"]
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)
        if isinstance(answer, str) and re.fullmatch(r"\s*\d{1,2}\s*", answer, re.ASCII):
            options = fields["options"]
            texts = options.values() if isinstance(options, Mapping) else options
            if any(str(text).strip() == answer.strip() for text in texts):
                return None  # the text of an option
            answer = int(answer)
        return answer if isinstance(answer, int) and not isinstance(answer, bool) else None

    def _lettered(self, number: int, row: Row) -> Row:
        assert isinstance(row.fields, Mapping)
        if self._from is None:
            return Row(
                row.line,
                QuestionError(
                    f"the answer is number {number}, and nothing tells whether options count from 0 or 1",
                    f"答案为数字 {number}，无法判断选项从 0 还是从 1 编号",
                ),
                str(row.fields.get("stem", "")),
            )
        at = number - self._from
        if not 0 <= at < len(LETTERS):
            return Row(
                row.line, QuestionError(f"there is no option number {number}", f"没有第 {number} 个选项"), row.text
            )
        return Row(row.line, {**row.fields, "answer": LETTERS[at]}, row.text)
