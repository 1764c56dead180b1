"""`Question`, the types of questions, and `make_question`, the one gate through which untrusted fields become a Question.

Types are those of the Chinese licensing exams: A1 and A2 (single best answer; A2 with a short case), A3 (several
independent questions on one case), A4 (a case that unfolds: earlier answers lock), B1 (a group shares its options), X
(several right answers), and TF (true or false). USMLE items are A1, A2 and A3.

A question is plain text. Nothing here or later reads markup in it; whoever shows it escapes it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ming_app.errors import LANGS, MingError

LETTERS = "ABCDEFGHIJ"
TAGS = ("subject", "disease_group", "department", "competency", "difficulty", "year")
"""what questions are filtered and counted by; others are kept too"""
MAX_STEM, MAX_OPTION, MAX_EXPLANATION, MAX_SHORT = 8_000, 2_000, 20_000, 300  # characters
MAX_TAGS = 16
MAX_IMAGE = 1 << 20  # bytes of an image, decoded
IMAGES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
"""first bytes -> media type"""
TRUE_FALSE = {"en": ("True", "False"), "zh": ("正确", "错误")}


class QuestionError(MingError):
    """Fields that do not make a question; the message says which and why."""


@dataclass(frozen=True)
class QuestionType:
    """How one type is answered. `en` and `zh`: its name for people."""

    en: str
    zh: str
    multiple: bool = False
    shares: str = ""
    """what a group of it shares: stem, options, or nothing"""
    locks: bool = False
    """an answer locks before the next question of its group shows"""


TYPES: Mapping[str, QuestionType] = {
    "A1": QuestionType("A1, single best answer", "A1 型（单句型最佳选择题）"),
    "A2": QuestionType("A2, short case", "A2 型（病例摘要型最佳选择题）"),
    "A3": QuestionType("A3, questions on one case", "A3 型（病例组型最佳选择题）", shares="stem"),
    "A4": QuestionType("A4, unfolding case", "A4 型（病例串型最佳选择题）", shares="stem", locks=True),
    "B1": QuestionType("B1, shared options", "B1 型（标准配伍题）", shares="options"),
    "X": QuestionType("X, several answers", "X 型（多项选择题）", multiple=True),
    "TF": QuestionType("True or false", "判断题"),
}
ALIASES = {
    "选择": "A1",
    "MCQ": "A1",
    "MULTIPLECHOICE": "A1",
    "SINGLE": "A1",
    "MULTIPLE": "X",
    "MULTI": "X",
    "A": "A1",
    "B": "B1",
    "JUDGE": "TF",
    "TRUEFALSE": "TF",
}
"""names that other programs give them, in capitals"""
WORDS = {
    "不定项": "X",
    "多项选择": "X",
    "多选": "X",
    "单项选择": "A1",
    "单选": "A1",
    "最佳选择": "A1",
    "判断": "TF",
    "病例摘要": "A2",
    "病历摘要": "A2",
    "配伍": "B1",
}
"""and words that their names contain"""


LANGUAGES = {"中文": "zh", "汉语": "zh", "简体中文": "zh", "chinese": "zh", "英文": "en", "英语": "en", "english": "en"}


@dataclass(frozen=True)
class Question:
    """One question. `options` in order of their letters A, B, ...; `answer`: the right letters, sorted."""

    id: str
    lang: str
    """zh or en"""
    type: str
    """a key of TYPES"""
    stem: str
    options: Mapping[str, str]
    answer: tuple[str, ...]
    explanation: str = ""
    reference: str = ""
    group_id: str = ""
    """questions of one group stay together, in their order"""
    shared_stem: str = ""
    """the case of an A3 or A4 group"""
    tags: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    licence: str = ""
    image: str = ""
    """a data: URL of a PNG or JPEG, or nothing"""

    @property
    def kind(self) -> QuestionType:
        return TYPES[self.type]

    @property
    def shared_options(self) -> bool:
        """Whether the group, not the question, owns the options."""
        return self.kind.shares == "options" and bool(self.group_id)

    @cached_property
    def key(self) -> str:
        """16 hex digits of what the question asks, whatever its id and file: progress follows it."""
        parts = [self.shared_stem, self.stem, *sorted(self.options.values()), self.image]
        return hashlib.sha256("\n".join(map(squeezed, parts)).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; empty entries are left out. `make_question` takes it back."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {"options": dict(self.options), "answer": list(self.answer), "tags": dict(self.tags)}
        return {name: value for name, value in values.items() if value}


def squeezed(text: str) -> str:
    """Text without white space, width and case: equal for what reads alike."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text)).casefold()


def language_of(text: str) -> str:
    """zh for a text with a CJK ideograph, else en."""
    return "zh" if any("\u4e00" <= char <= "\u9fff" for char in text) else "en"


# -- untrusted fields -------------------------------------------------------------------------------------------------

_BAD = re.compile(
    # control characters, surrogates, noncharacters, and marks that turn the direction of the text around them
    "[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)


def clean(value: Any, what: str, most: int) -> str:
    """A field as plain text: numbers are written out, control characters and direction marks dropped, ends trimmed.

    Raises QuestionError for anything but text and numbers, and for more than `most` characters.
    """
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():  # a spreadsheet's whole number
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise QuestionError(f"{what} is not text", f"{what}不是文本")
    text = str(value)
    if len(text) > 4 * most:  # before any work on it
        raise _too_long(what, len(text), most)
    text = _BAD.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    if len(text) > most:
        raise _too_long(what, len(text), most)
    return text


def _too_long(what: str, size: int, most: int) -> QuestionError:
    return QuestionError(f"{what} has {size} characters, more than {most}", f"{what}有 {size} 个字符，超过上限 {most}")


def make_question(fields: Mapping[str, Any]) -> Question:
    """A Question from the fields of a row. Raises QuestionError that names the field at fault.

    `options`: a mapping of letters in order, or a list. `answer`: letters in any common writing ("B", "ABD", "A, C",
    ["A"]), the text of an option, or true/false in either language. Missing `lang` and `type` are told from the text and
    the answer; A3, A4 and B1 without a group become the single question that they are alone (A2, A1).
    """
    stem = clean(fields.get("stem"), "stem/题干", MAX_STEM)
    if not stem:
        raise QuestionError("the stem is empty", "题干为空")
    said = clean(fields.get("lang"), "lang/语言", MAX_SHORT).lower()
    lang = LANGUAGES.get(said, said[:2]) or language_of(stem)
    if lang not in LANGS:
        raise QuestionError(f"language {lang!r} is neither zh nor en", f"语言 {lang!r} 不是 zh 或 en")
    named = _type_of(clean(fields.get("type"), "type/题型", MAX_SHORT))
    options = _options(fields.get("options"), lang, named)
    answer = _answer(fields.get("answer"), options, named)
    group = clean(fields.get("group_id"), "group_id/题组", MAX_SHORT)
    shared = clean(fields.get("shared_stem"), "shared_stem/共用题干", MAX_STEM)
    texts = {
        name: clean(fields.get(name), name, most)
        for name, most in (
            ("explanation", MAX_EXPLANATION),
            ("reference", MAX_STEM),
            ("source", MAX_SHORT),
            ("licence", MAX_SHORT),
            ("id", MAX_SHORT),
        )
    }
    if shared and not group:  # nobody shares it
        stem, shared = f"{shared}\n{stem}", ""
    return Question(
        lang=lang,
        type=_settled_type(named, answer, options, group),
        stem=stem,
        options=options,
        answer=answer,
        group_id=group,
        shared_stem=shared,
        tags=_tags(fields.get("tags")),
        image=_image(fields.get("image")),
        **texts,
    )


def _type_of(name: str) -> str:
    """A key of TYPES, or "" where the row names none. `A1型题` and `single` are understood."""
    if not name:
        return ""
    short = re.sub(r"\s|型题?|题$|-?type|_", "", name, flags=re.I).upper().replace("A3/A4", "A3")
    found = ALIASES.get(short, short)
    if found not in TYPES:
        found = next((kind for word, kind in WORDS.items() if word in name), "")
    if not found:
        raise QuestionError(
            f"type {name[:40]!r} is not one of {', '.join(TYPES)}", f"题型 {name[:40]!r} 不是 {'、'.join(TYPES)} 之一"
        )
    return found


def _settled_type(named: str, answer: tuple[str, ...], options: Mapping[str, str], group: str) -> str:
    if len(answer) > 1:
        if named not in ("", "X", "A1"):  # A1 is what many banks call anything with options
            raise QuestionError(
                f"type {named} has one right answer, the key has {len(answer)}",
                f"{named} 型题只有一个正确答案，而答案有 {len(answer)} 个",
            )
        return "X"
    if not named:
        words = tuple(options.values())
        return "TF" if words in TRUE_FALSE.values() else "A1"
    if not group:
        return {"A3": "A2", "A4": "A2", "B1": "A1"}.get(named, named)
    return named


def _options(value: Any, lang: str, named: str) -> dict[str, str]:
    if not value and named == "TF":
        value = TRUE_FALSE[lang]
    if isinstance(value, Mapping):
        letters = [str(letter).strip().upper().rstrip(".、．) ") for letter in value]
        texts = list(value.values())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        texts = list(value)[:100]
        letters = [chr(ord("A") + at) for at in range(len(texts))]
    else:
        raise QuestionError("there are no options", "没有选项")
    options = {
        letter: clean(text, f"option/选项 {letter[:3]}", MAX_OPTION)
        for letter, text in zip(letters, texts, strict=False)
    }
    while options and not list(options.values())[-1]:  # columns that this question does not use
        options.popitem()
    if not 2 <= len(options) <= len(LETTERS):
        raise QuestionError(
            f"there are {len(options)} options; 2 to {len(LETTERS)} make a question",
            f"共有 {len(options)} 个选项，应为 2 至 {len(LETTERS)} 个",
        )
    if list(options) != list(LETTERS[: len(options)]):
        raise QuestionError("the options are not lettered A, B, C, ... in order", "选项未按 A、B、C…… 顺序编号")
    if not all(options.values()):
        raise QuestionError("an option is empty", "有选项为空")
    same = {re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)) for text in options.values()}  # AA is not Aa
    if len(same) < len(options):
        raise QuestionError("two options say the same", "有两个选项相同")
    return options


_TRUE = {"true", "t", "正确", "对", "√", "是", "yes", "right"}
_FALSE = {"false", "f", "错误", "错", "×", "x", "否", "no", "wrong"}


def _answer(value: Any, options: Mapping[str, str], named: str) -> tuple[str, ...]:
    if isinstance(value, bool):
        value = "true" if value else "false"
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = "".join(clean(part, "answer/答案", MAX_OPTION) for part in value)
    text = clean(value, "answer/答案", MAX_OPTION)
    if not text:
        raise QuestionError("there is no answer", "没有答案")
    letters = re.sub(r"[\s,，、;；.。/&+]|和|and", "", unicodedata.normalize("NFKC", text), flags=re.I).upper()
    judged = tuple(options.values()) in TRUE_FALSE.values() or named == "TF"
    if judged and text.casefold() in _TRUE | _FALSE:
        return ("A",) if (text.casefold() in _TRUE) == (squeezed(options["A"]) in _TRUE) else ("B",)
    if letters and set(letters) <= set(options):
        if len(set(letters)) < len(letters):
            raise QuestionError(f"the answer {text[:40]!r} names an option twice", f"答案 {text[:40]!r} 中有重复选项")
        return tuple(sorted(letters))
    found = [letter for letter, option in options.items() if squeezed(option) == squeezed(text)]
    if found:
        return (found[0],)
    raise QuestionError(f"the answer {text[:40]!r} is none of the options", f"答案 {text[:40]!r} 不在选项之中")


def _tags(value: Any) -> dict[str, str]:
    if value is None or value == "":
        return {}
    if not isinstance(value, Mapping) or len(value) > MAX_TAGS:
        raise QuestionError(f"tags must be up to {MAX_TAGS} named values", f"标签应为至多 {MAX_TAGS} 个键值")
    found: dict[str, str] = {}
    for name, tag in value.items():
        if isinstance(tag, Sequence) and not isinstance(tag, str):
            tag = ", ".join(str(part) for part in tag[:20])
        text = clean(tag, f"tag/标签 {str(name)[:20]}", MAX_SHORT)
        if text:
            found[clean(name, "tag/标签", 60)] = text
    return found


def _image(value: Any) -> str:
    """A data: URL whose bytes are what its media type says, or "". Anything else (a path, a web address) is refused."""
    if value is None or value == "":
        return ""
    head, _, body = value.partition(",") if isinstance(value, str) else ("", "", "")
    match = re.fullmatch(r"data:(image/(?:png|jpeg));base64", head)
    if not match or len(body) > MAX_IMAGE * 4 // 3 + 4:
        raise QuestionError(
            "the image is not a data: URL of a PNG or JPEG up to 1 MiB",
            "图片应为不超过 1 MiB 的 PNG 或 JPEG 的 data: URL",
        )
    try:
        raw = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not any(raw.startswith(magic) and media == match[1] for magic, media in IMAGES.items()):
        raise QuestionError("the image is not what its type says", "图片内容与其类型不符")
    return value
