"""Reads the plain text in which people keep and paste Chinese question banks (and English ones alike).

一、A1 型题                          a heading names the type of what follows
1. 题干……                            numbers as 1. 1、 1． (1) 第1题
A. 选项一  B. 选项二                  options on one line or several, A. A、 A． (A)
答案：B                              also 【答案】B, 正确答案 B, (B) at the end of the stem
解析：……                             also 【解析】, explanation:, several lines
(4～6 题共用题干) ……                  a case for questions 4 to 6 (A3)
(7～9 题共用备选答案) A. …… B. ……      options for questions 7 to 9 (B1)
参考答案  1.B 2.C 3.A                 a key at the end
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ming_app.exam.formats.reading import ReadOptions, Row, first_lines
from ming_app.exam.question import TRUE_FALSE, QuestionError

MAX_LINE = 20_000  # characters
_NUMBER = re.compile(r"\s*(?:第\s*(\d{1,5})\s*题[.、．:：]?|[(（](\d{1,5})[)）]|(\d{1,5})\s*([.、．]))\s*(.*)")
_OPTION = re.compile(r"(?:^|(?<=\s)|(?<=[。；;]))[(（]?([A-J])\s*[.、．:：)）]\s*(?=\S)")
_ANSWER = re.compile(
    r"\s*(?:【\s*)?(?:正确|标准|参考)?(?:答案|answer|key)(?:\s*】)?\s*(?:是|为|is)?\s*[:：]?\s*(.+)", re.I
)
_EXPLAIN = re.compile(
    r"\s*(?:【\s*)?(?:答案|试题)?(?:解析|分析|解释|explanation|rationale)(?:\s*】)?\s*[:：]?\s*(.*)", re.I
)
_SHARED = re.compile(
    r"\s*[(（【]?\s*(?:第)?\s*(\d{1,5})\s*[~～\-—–至到]+\s*(\d{1,5})\s*题?\s*共用(题干|备选答案|选项)\s*[)）】]?\s*[:：]?\s*(.*)"
)
_HEADING = re.compile(
    r"\s*[\[【(（]?\s*(?:[一二三四五六七八九十]{1,3}\s*[、．.]|第[一二三四五六七八九十\d]{1,3}[部章节]分?)?\s*"
    r"((?:A[1-4](?:/A[1-4])?|B1?|X)\s*型题?|(?:单项选择|单选|最佳选择|多项选择|多选|不定项选择|判断|标准配伍|配伍选择|配伍)题)"
    r"\s*(?:[\]】)）]|[(（:：，,。].{0,40})?\s*"
)
"""a line that is nothing but the name of a type, with an ordinal before and a remark after it"""
_KEY_TITLE = re.compile(r"\s*(?:参考答案|答案|answers?|answer key)\s*[:：]?\s*$", re.I)
_KEY = re.compile(r"(\d{1,5})\s*[.、．:：]?\s*([A-J]{1,10})(?![A-Za-z])")
_KEYS_IN_A_ROW = re.compile(r"\s*(\d{1,5})\s*[-~～—–至]\s*(\d{1,5})\s*[.、．:：]?\s*([A-J\s]+)$")
_INLINE = re.compile(r"[(（]\s*([A-J](?:[、,，]?[A-J])*)\s*[)）]\s*[。.]?\s*$")
_JUDGED = re.compile(r"[(（]\s*(√|×|对|错|正确|错误)\s*[)）]\s*[。.]?\s*$")


@dataclass
class _Draft:
    line: int
    number: int
    stem: list[str]
    options: dict[str, str] = field(default_factory=dict)
    answer: str = ""
    explanation: list[str] = field(default_factory=list)
    type: str = ""
    section: int = 0
    stage: str = "stem"
    last: str = ""
    """letter of the option that a further line continues"""


@dataclass
class _Shared:
    first: int
    last: int
    kind: str
    line: int
    section: int = 0
    text: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    letter: str = ""


def read(text: str, _options: ReadOptions) -> tuple[Iterator[Row], Mapping[str, str]]:
    """Rows: one for each numbered question, and one for each stretch of text that belongs to none."""
    return _Reader().run(text), {}


class _Reader:
    def __init__(self) -> None:
        self.drafts: list[_Draft] = []
        self.shared: list[_Shared] = []
        self.stray: list[tuple[int, str]] = []
        self.keys: dict[tuple[int, int], str] = {}
        self.section = 0
        self.type = ""
        self.in_key = False
        self.open_shared: _Shared | None = None

    def run(self, text: str) -> Iterator[Row]:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                self._line(number, " ".join(line[:MAX_LINE].split()) if len(line) > 400 else line.strip())
        rows = [self._row(draft) for draft in self.drafts]
        reason = QuestionError("text that belongs to no question", "不属于任何题目的文字")
        rows += [Row(line, reason, text) for line, text in self.stray]
        yield from sorted(rows, key=lambda row: row.line)

    def _line(self, number: int, line: str) -> None:
        draft = self.drafts[-1] if self.drafts else None
        if match := _SHARED.match(line):
            self._restart(int(match[1]))
            kind = "stem" if match[3] == "题干" else "options"
            self.open_shared = _Shared(int(match[1]), int(match[2]), kind, number, self.section)
            self.shared.append(self.open_shared)
            if match[4]:
                self._shared_line(match[4])
            return
        if _KEY_TITLE.match(line):
            self.in_key = True
            return
        if self.in_key and self._keys_of(line):
            return
        if (match := _NUMBER.match(line)) and self._numbers(match, draft):
            at = int(next(filter(None, match.groups()[:3])))
            self.in_key, self.open_shared = False, None
            self._restart(at)
            self.drafts.append(_Draft(number, at, [], type=self.type, section=self.section))
            self._continue(self.drafts[-1], match[5])
            return
        if match := _HEADING.fullmatch(line):
            self.type = _type_in(match[1])
            self.open_shared = None
            return
        if self.open_shared is not None:
            self._shared_line(line)
        elif draft is None:
            self.stray.append((number, line))
        else:
            self._continue(draft, line)

    def _restart(self, number: int) -> None:
        """Numbers that begin again begin another chapter, whose keys and cases are its own."""
        if self.drafts and number <= self.drafts[-1].number and self.drafts[-1].section == self.section:
            self.section += 1

    @staticmethod
    def _numbers(match: re.Match[str], draft: _Draft | None) -> bool:
        """Whether a line that begins with a number is a question: "2.5 mg" is one only where 2 is the next number."""
        if match[4] != "." or not match[5][:1].isdigit():
            return True
        return int(match[3]) == (draft.number + 1 if draft else 1)

    def _keys_of(self, line: str) -> bool:
        """Takes a line of a key at the end: "1.B 2.C", or "1-5 ABCDE"."""
        if match := _KEYS_IN_A_ROW.match(line):
            letters = re.sub(r"\s", "", match[3])
            first, last = int(match[1]), int(match[2])
            if len(letters) == last - first + 1:
                self.keys |= {(self.section, first + i): letter for i, letter in enumerate(letters)}
                return True
        keys = _KEY.findall(line)
        if not keys or _KEY.sub("", line).strip(" ,，;；、.\t"):
            return False
        self.keys |= {(self.section, int(at)): letters for at, letters in keys}
        return True

    def _shared_line(self, line: str) -> None:
        shared = self.open_shared
        assert shared is not None
        before, options = _split(line, next_letter=_next(shared.options))
        if shared.kind == "options" and options:
            shared.options |= options
            shared.letter = list(options)[-1]
        elif shared.letter:
            shared.options[shared.letter] += " " + line
        else:
            shared.text.append(before or line)

    def _continue(self, draft: _Draft, line: str) -> None:
        if not line:
            return
        if (match := _EXPLAIN.fullmatch(line)) and (draft.options or draft.answer):
            draft.stage = "explanation"
            if match[1]:
                draft.explanation.append(match[1])
            return
        if (match := _ANSWER.fullmatch(line)) and draft.stage != "explanation":
            answer, _, rest = match[1].partition("解析")
            draft.answer, draft.stage = answer.strip(" 。.;；，,【"), "answered"
            if rest.strip(" ：:】"):
                draft.explanation.append(rest.strip(" ：:】"))
                draft.stage = "explanation"
            return
        if draft.stage in ("explanation", "answered"):
            draft.explanation.append(line)
            return
        before, options = _split(line, next_letter=_next(draft.options))
        if options:
            if before:
                self._words(draft, before)
            draft.options |= options
            draft.last = list(options)[-1]
            draft.stage = "options"
            self._answer_in_option(draft)
        else:
            self._words(draft, line)

    @staticmethod
    def _answer_in_option(draft: _Draft) -> None:
        """`D. text 答案：B` at the end of the last option."""
        match = re.search(
            r"\s*(?:【\s*)?(?:正确|参考)?答案(?:\s*】)?\s*[:：]?\s*([A-J]+)\s*$", draft.options[draft.last]
        )
        if match:
            draft.options[draft.last] = draft.options[draft.last][: match.start()]
            draft.answer, draft.stage = match[1], "answered"

    @staticmethod
    def _words(draft: _Draft, line: str) -> None:
        if draft.last:
            draft.options[draft.last] += " " + line
        else:
            draft.stem.append(line)

    def _row(self, draft: _Draft) -> Row:
        stem = "\n".join(draft.stem)
        answer = draft.answer or self.keys.get((draft.section, draft.number), "")
        fields: dict[str, Any] = {"type": draft.type, "explanation": "\n".join(draft.explanation)}
        options: dict[str, str] | tuple[str, str] = draft.options
        if not answer and (match := _INLINE.search(stem)):
            stem, answer = f"{stem[: match.start()]}（　）", match[1]
        if not draft.options and (match := _JUDGED.search(stem)):
            stem, answer = stem[: match.start()].strip(), match[1]
        if not draft.options and (draft.type == "TF" or answer in "√×对错正确错误" and answer):
            options, fields["type"] = TRUE_FALSE["zh"], "TF"
        for shared in self.shared:
            if shared.section == draft.section and shared.first <= draft.number <= shared.last:
                fields["group_id"] = f"L{shared.line}"
                if shared.kind == "options":
                    options, fields["type"] = shared.options, "B1"
                else:
                    fields["shared_stem"] = "\n".join(shared.text)
                    fields["type"] = draft.type if draft.type in ("A3", "A4") else "A3"
        fields |= {"id": str(draft.number), "stem": stem, "options": options, "answer": answer}
        return Row(draft.line, fields, first_lines(draft.stem))


def _next(options: Mapping[str, str]) -> str:
    return chr(ord("A") + len(options))


def _split(line: str, next_letter: str = "A") -> tuple[str, dict[str, str]]:
    """Text before the first option, and the options of a line that go on from `next_letter` in order."""
    starts: list[re.Match[str]] = []
    wanted = next_letter
    for match in _OPTION.finditer(line):
        if match[1] == wanted:
            starts.append(match)
            wanted = chr(ord(wanted) + 1)
    if not starts:
        return "", {}
    ends = [match.start() for match in starts[1:]] + [len(line)]
    options = {match[1]: line[match.end() : end].strip() for match, end in zip(starts, ends, strict=True)}
    return line[: starts[0].start()].strip(), options


def _type_in(heading: str) -> str:
    text = unicodedata.normalize("NFKC", heading)
    match = re.search(r"(A1|A2|A3|A4|B1?|X)\s*型", text)
    if match:
        return {"B": "B1"}.get(match[1], match[1])
    return "TF" if "判断" in text else "X" if "多" in text else "B1" if "配伍" in text else ""
