"""Reads Moodle XML: `multichoice` and `truefalse`; other kinds are rejected by name.

Parsed by the standard library's expat. A document type is refused before anything in it is read, so that no entity can
be declared; depth and number of elements are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat

from ming_app.exam.formats.reading import MAX_ROWS, BankFileError, ReadOptions, Row, unsupported
from ming_app.exam.formats.text import html_words
from ming_app.exam.question import TRUE_FALSE, QuestionError, language_of

MAX_DEPTH = 40
MAX_ELEMENTS = 3_000_000
PIECE = 1 << 18
NOT_QUESTIONS = ("category", "description")


@dataclass
class _Element:
    name: str
    attributes: dict[str, str]
    line: int
    parts: list[str] = field(default_factory=list)
    children: list[_Element] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts).strip()

    def find(self, *names: str) -> _Element | None:
        found: _Element | None = self
        for name in names:
            found = next((child for child in found.children if child.name == name), None) if found else None
        return found

    def text_of(self, *names: str) -> str:
        found = self.find(*names)
        return found.text if found else ""


def read(text: str, _options: ReadOptions) -> tuple[Iterator[Row], Mapping[str, str]]:
    """Rows: one for each <question>. Raises BankFileError for what is not well-formed, or has a document type."""
    return _rows(_questions(text)), {}


def _questions(text: str) -> list[_Element]:
    parser = expat.ParserCreate()
    open_elements: list[_Element] = []
    found: list[_Element] = []
    names: list[str] = []
    count = [0]

    def refuse(*_: Any) -> None:
        raise BankFileError(
            "The XML declares a document type or entities, which Moodle never writes; it is not read.",
            "该 XML 声明了文档类型或实体（Moodle 不会生成），拒绝读取。",
        )

    def start(name: str, attributes: dict[str, str]) -> None:
        names.append(name)
        if len(names) > MAX_DEPTH:
            raise BankFileError("The XML is nested too deeply.", "XML 嵌套过深。")
        if name == "question" or open_elements:
            count[0] += 1
            if count[0] > MAX_ELEMENTS:
                raise BankFileError("The XML has too many elements.", "XML 元素过多。")
            element = _Element(name, attributes, parser.CurrentLineNumber)
            if open_elements:
                open_elements[-1].children.append(element)
            open_elements.append(element)

    def end(_name: str) -> None:
        names.pop()
        if open_elements and len(open_elements) == 1:
            found.append(open_elements[0])
            if len(found) > MAX_ROWS:
                raise BankFileError(f"The file has more than {MAX_ROWS:,} questions.", f"题目超过 {MAX_ROWS:,} 道。")
        if open_elements:
            open_elements.pop()

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = lambda data: open_elements[-1].parts.append(data) if open_elements else None
    data = re.sub(r"^\s*<\?xml[^>]*\?>", "", text).encode("utf-8", "replace")
    try:
        for at in range(0, len(data), PIECE):
            parser.Parse(data[at : at + PIECE], False)
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise BankFileError(
            f"The XML is broken at line {error.lineno}: {expat.ErrorString(error.code)}.",
            f"XML 在第 {error.lineno} 行出错：{expat.ErrorString(error.code)}。",
        ) from None
    return found


def _rows(questions: list[_Element]) -> Iterator[Row]:
    category = ""
    for question in questions:
        kind = question.attributes.get("type", "")
        if kind == "category":
            category = question.text_of("category", "text").rpartition("/")[2]
        if kind not in NOT_QUESTIONS:
            yield _row(question, kind, category)


def _row(question: _Element, kind: str, category: str) -> Row:
    stem, images = html_words(question.text_of("questiontext", "text"))
    if kind not in ("multichoice", "truefalse"):
        return Row(question.line, unsupported(kind), stem)
    picture = question.find("questiontext", "file")
    if images > 1 or images and picture is None:
        return Row(question.line, QuestionError("its pictures are not in the file", "题目图片不在文件中"), stem)
    explanation = html_words(question.text_of("generalfeedback", "text"))[0]
    answers = [child for child in question.children if child.name == "answer"]
    texts = [html_words(answer.text_of("text"))[0] for answer in answers]
    several = question.text_of("single").lower() in ("false", "0")
    least = 0.0 if several else max(map(_fraction, answers), default=0.0)  # near misses of a single choice earn a part
    right = [
        chr(65 + at) for at, answer in enumerate(answers[:26]) if _fraction(answer) > 0 and _fraction(answer) >= least
    ]
    fields: dict[str, Any] = {
        "id": question.text_of("name", "text"),
        "stem": stem,
        "options": texts,
        "answer": right,
        "explanation": explanation,
    }
    if kind == "truefalse":
        words = TRUE_FALSE[language_of(stem)]
        told = [text.casefold() for text, answer in zip(texts, answers, strict=True) if _fraction(answer) > 0]
        fields |= {"type": "TF", "options": words, "answer": told[0] if told else ""}
    elif several:
        fields["type"] = "X"
    if picture is not None and images:
        fields["image"] = _image(picture)
    tags = _tags(question)
    if category:
        tags.setdefault("subject", category)
    for name in ("reference", "source", "licence", "group_id", "shared_stem", "type", "lang"):
        if name in tags:
            value = tags.pop(name)
            fields[name] = value
    return Row(question.line, fields | {"tags": tags}, stem)


def _fraction(answer: _Element) -> float:
    try:
        return float(answer.attributes.get("fraction", "0"))
    except ValueError:
        return 0.0


def _tags(question: _Element) -> dict[str, str]:
    """Tags written as `name: value` (as we write them); Moodle's own words are topics."""
    found: dict[str, str] = {}
    tags = question.find("tags")
    for tag in tags.children if tags else ():
        name, colon, value = tag.text_of("text").partition(": ")
        found[name if colon else "topic"] = value if colon else name
    return found


def _image(picture: _Element) -> str:
    name = picture.attributes.get("name", "").lower()
    media = "image/png" if name.endswith(".png") else "image/jpeg"
    return f"data:{media};base64," + re.sub(r"\s", "", picture.text)
