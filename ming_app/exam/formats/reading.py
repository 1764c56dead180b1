"""`read_bank`: bytes of a file -> an `Import`, in which every row is a question or a `Rejected` with line and reason.

A reader of one format turns text (or bytes) into `Row`s: a line number and either raw fields or the reason why there
are none. Names of fields are understood by `columns.py`; `make_question` is the gate. Nothing is guessed in silence: what
was taken for granted (format, encoding, columns) stands in the Import.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ming_app.errors import MingError
from ming_app.exam.question import Question, QuestionError, make_question

MAX_BYTES = 20 << 20
MAX_ROWS = 100_000
EXCERPT = 80  # characters of a rejected row that are shown


class BankFileError(MingError):
    """A file of questions as a whole cannot be read; the message says why and what to do."""


class ColumnsError(BankFileError):
    """The columns of a table, or the entries of JSON objects, are not understood; a person can say what they are.

    `columns`: name -> field as far as it was understood. `format` and `encoding` of the file are set by read_bank.
    """

    format = encoding = ""

    def __init__(self, en: str, zh: str, columns: Mapping[str, str]):
        super().__init__(en, zh)
        self.columns = columns


@dataclass(frozen=True)
class Row:
    """What a reader found: `line` (1-based; of a JSON array or a sheet, the row) and `fields`, or the reason for none."""

    line: int
    fields: Mapping[str, Any] | QuestionError
    text: str = ""
    """of the row, to show where it is rejected"""


@dataclass(frozen=True)
class Rejected:
    """A row that made no question."""

    line: int
    reason: QuestionError
    excerpt: str


@dataclass(frozen=True)
class ReadOptions:
    """What a person may set before importing."""

    format: str = ""
    """a key of FORMATS; "" tells it from name and content"""
    columns: Mapping[str, str] = field(default_factory=dict)
    """name of a column or JSON entry -> field (see columns.FIELDS); "" leaves it out"""
    lang: str = ""
    """language of rows that name none; "" tells it from the text"""
    count_from: int | None = None
    """whether answers given as numbers count options from 0 or from 1; None tells it from all rows"""
    rows: int = MAX_ROWS
    """read no further (for a preview)"""


@dataclass(frozen=True)
class Import:
    """`rows` == len(questions) + len(rejected), whatever the file."""

    questions: tuple[Question, ...]
    rejected: tuple[Rejected, ...]
    format: str
    encoding: str
    columns: Mapping[str, str] = field(default_factory=dict)
    """name of a column or JSON entry -> field, as it was understood; "" for one that is not used"""

    @property
    def rows(self) -> int:
        return len(self.questions) + len(self.rejected)


Reader = Callable[[Any, ReadOptions], tuple[Iterator[Row], Mapping[str, str]]]
"""text (bytes for xlsx) and options -> rows, and the columns as understood"""


def _readers() -> dict[str, Reader]:
    from ming_app.exam.formats import aiken, gift, moodle, plain, tables
    from ming_app.exam.formats import json_rows as json

    return {
        "jsonl": json.read,
        "csv": tables.read_csv,
        "xlsx": tables.read_xlsx,
        "moodle": moodle.read,
        "gift": gift.read,
        "aiken": aiken.read,
        "text": plain.read,
    }


FORMATS: Mapping[str, tuple[str, str]] = {
    "jsonl": ("JSON or JSON lines", "JSON 或 JSON 行"),
    "csv": ("Table: CSV or TSV", "表格：CSV 或 TSV"),
    "xlsx": ("Spreadsheet: XLSX", "电子表格：XLSX"),
    "moodle": ("Moodle XML", "Moodle XML"),
    "gift": ("GIFT", "GIFT"),
    "aiken": ("Aiken", "Aiken"),
    "text": ("Plain text", "纯文本题库"),
}
"""format -> its name in English and in Chinese"""


def read_bank(data: bytes, name: str, options: ReadOptions | None = None) -> Import:
    """The questions of a file called `name`. Raises BankFileError where the file as a whole cannot be read."""
    options = options or ReadOptions()
    if len(data) > MAX_BYTES:
        raise too_large()
    if not data.strip():
        raise BankFileError("The file is empty.", "文件为空。")
    kind = options.format or ("xlsx" if data.startswith(b"PK\x03\x04") else "")
    if kind == "xlsx":
        content: str | bytes = data
        encoding = ""
    else:
        content, encoding = decode(data)
        kind = kind or guess_format(content, name)
    readers = _readers()
    if kind not in readers:
        raise BankFileError(
            f"{kind!r} is not a format; choose one of {', '.join(readers)}.",
            f"不支持格式 {kind!r}，可选：{'、'.join(readers)}。",
        )
    try:
        rows, columns = readers[kind](content, options)
    except ColumnsError as error:
        error.format, error.encoding = kind, encoding
        raise
    questions, rejected = _sort_out(rows, name, options)
    if not questions and not rejected:
        raise BankFileError("No question was found in the file.", "文件中没有找到题目。")
    return Import(tuple(questions), tuple(rejected), kind, encoding, columns)


def too_large() -> BankFileError:
    """The refusal of a file of more than MAX_BYTES."""
    return BankFileError(
        f"The file has more than {MAX_BYTES >> 20} MiB, and no more are read. Split it.",
        f"文件超过 {MAX_BYTES >> 20} MiB 的上限，请拆分后再导入。",
    )


def decode(data: bytes) -> tuple[str, str]:
    """Text and the encoding it was in: UTF-8 or UTF-16 (with a mark or without), or GB18030. Raises BankFileError."""
    marks = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
    names = [name for mark, name in marks if data.startswith(mark)]
    if not names:
        even, odd = data[:4096:2].count(0), data[1:4096:2].count(0)
        zeros = ["utf-16-be"] * (even > 8 * max(odd, 1)) + ["utf-16-le"] * (odd > 8 * max(even, 1))
        names = [*zeros, "utf-8", "gb18030"]
    for name in names:
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            continue
        if name.startswith("utf") or text.count("\0") == 0:
            return text.removeprefix("\ufeff"), name
    raise BankFileError(
        "The file is not text in UTF-8, UTF-16 or GB18030. Save it in one of them, or as XLSX.",
        "文件不是 UTF-8、UTF-16 或 GB18030 文本，请另存为其中一种编码或 XLSX。",
    )


def guess_format(text: str, name: str) -> str:
    """A key of FORMATS, by the file's content first and by its ending."""
    ending = name.rpartition(".")[2].lower()
    start = text.lstrip()[:400]
    json_like = start.startswith("{") or re.match(r"\[\s*[\[{\]]", start)
    if json_like and ending not in ("csv", "tsv", "gift"):
        return "jsonl"
    if start.startswith("<"):
        return "moodle"
    if ending in ("csv", "tsv", "tab"):
        return "csv"
    if ending == "gift":
        return "gift"
    from ming_app.exam.formats import aiken, gift, tables

    head = text[:20_000]
    if aiken.looks_like(head):
        return "aiken"
    if gift.looks_like(head):
        return "gift"
    return "csv" if tables.looks_like(head) else "text"


def _sort_out(rows: Iterator[Row], name: str, options: ReadOptions) -> tuple[list[Question], list[Rejected]]:
    """Every row becomes a question or a rejection; groups are brought together and held to what they share."""
    made: list[tuple[Row, Question]] = []
    rejected: list[Rejected] = []
    seen: dict[str, int] = {}
    groups = _Groups()
    short = (name.rpartition("/")[2].rpartition(".")[0] or name)[:80]
    for count, row in enumerate(rows):
        if count >= options.rows:
            if options.rows >= MAX_ROWS:
                raise BankFileError(
                    f"The file has more than {MAX_ROWS:,} rows. Split it.",
                    f"文件超过 {MAX_ROWS:,} 行，请拆分后再导入。",
                )
            break
        try:
            if isinstance(row.fields, QuestionError):
                raise row.fields
            fields = {"lang": options.lang, "id": f"{short}-{row.line}"} | {k: v for k, v in row.fields.items() if v}
            question = make_question(groups.completed(fields))
            before = seen.setdefault(question.key, row.line)
            if before != row.line:
                raise QuestionError(f"the same question stands in line {before}", f"与第 {before} 行的题目相同")
            groups.check(question)
            made.append((row, question))
        except QuestionError as reason:
            rejected.append(Rejected(row.line, reason, _excerpt(row)))
    order = {question.group_id: at for at, (_, question) in reversed(list(enumerate(made))) if question.group_id}
    made_sorted = sorted(enumerate(made), key=lambda pair: (order.get(pair[1][1].group_id, pair[0]), pair[0]))
    return [groups.settled(question) for _, (_, question) in made_sorted], rejected


class _Groups:
    """What the groups of a file share, as their first questions say it."""

    def __init__(self) -> None:
        self._first: dict[str, Question] = {}

    def completed(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields with what the group has said already, where the row leaves it out."""
        group = fields.get("group_id")
        first = self._first.get(str(group)) if isinstance(group, str | int) and group else None
        if first is None:
            return fields
        if fields.get("type") not in (None, "", first.type):
            return fields
        shared: dict[str, Any] = {"type": first.type, "shared_stem": first.shared_stem}
        if first.shared_options:
            shared["options"] = first.options
        return shared | dict(fields)

    def check(self, question: Question) -> None:
        """Raises QuestionError for a question that does not fit its group."""
        if not question.group_id or not question.kind.shares:
            return
        first = self._first.setdefault(question.group_id, question)
        if (question.type, question.shared_stem) != (first.type, first.shared_stem) or (
            first.shared_options and question.options != first.options
        ):
            raise QuestionError(
                f"type, case or shared options differ from those of its group {question.group_id!r}",
                f"题型、共用题干或共用选项与所属题组 {question.group_id!r} 不一致",
            )

    def settled(self, question: Question) -> Question:
        """A1, A2, X and TF have no groups: an id that names one alone, or means nothing for the type, is dropped."""
        return replace(question, group_id="") if question.group_id and not question.kind.shares else question


def _excerpt(row: Row) -> str:
    text = row.text
    if not text and isinstance(row.fields, Mapping):
        text = str(row.fields.get("stem") or "")
    text = " ".join(text[: 4 * EXCERPT].split())
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"


def unsupported(kind: str) -> QuestionError:
    """A question of a sort that no option can answer."""
    return QuestionError(
        f"questions of the kind {kind!r} are not supported: there is nothing to choose",
        f"不支持 {kind!r} 类题目（不是选择题）",
    )


def first_lines(texts: Sequence[str]) -> str:
    """The beginning of a row of several lines, to show."""
    return " ".join(texts)[: 4 * EXCERPT]
