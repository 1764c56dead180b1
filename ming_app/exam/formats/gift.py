"""Reads Moodle's GIFT: multiple choice (one or several right) and true/false; other kinds are rejected by name.

// comment            $CATEGORY: $course$/Cardiology
::title::[html]Stem {=right#why ~wrong#why not ####general feedback}
Statement. {T}        Several. {~%50%one ~%50%two ~%-100%wrong}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ming_app.exam.formats.reading import ReadOptions, Row, unsupported
from ming_app.exam.formats.text import plain_text
from ming_app.exam.question import TRUE_FALSE, QuestionError, language_of

_SPECIAL = r"~=#{}:"
_ESCAPED = {char: chr(0xE000 + at) for at, char in enumerate(_SPECIAL + "\\n")}  # private use while parsing
_JUDGED = re.compile(r"\s*(T|F|TRUE|FALSE)\s*((?:#[^#].*)?)$", re.I | re.S)
_GENERAL = "####"


def looks_like(text: str) -> bool:
    """Whether a text has an answer block of choices."""
    blocks = (block.strip() for block in re.findall(r"\{([^{}]*)\}", text))
    return any(
        _JUDGED.match(block) or (block[:1] in "=~" and re.search("[=~]", block[1:])) for block in blocks if block
    )


def read(text: str, _options: ReadOptions) -> tuple[Iterator[Row], Mapping[str, str]]:
    """Rows: blocks of text between blank lines."""
    return _rows(text), {}


def _rows(text: str) -> Iterator[Row]:
    category = ""
    for line, block in _blocks(text):
        if match := re.match(r"\s*\$CATEGORY:\s*(.*)", block):
            category = match[1].strip().rpartition("/")[2]
            block = block[match.end() :]
        if block.strip():
            yield _row(line, block, category)


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of what stands between blank lines, comments left out."""
    lines: list[str] = []
    start = 1
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.lstrip().startswith("//"):
            continue
        if not line.strip():
            if lines:
                yield start, "\n".join(lines)
            lines = []
            continue
        if not lines:
            start = number
        lines.append(line)
        if line.lstrip().startswith("$CATEGORY"):
            yield start, "\n".join(lines)
            lines = []


def _row(line: int, block: str, category: str) -> Row:
    hidden = re.sub(r"\\([~=#{}:\\n])", lambda match: _ESCAPED[match[1]], block)
    start, end = hidden.find("{"), hidden.rfind("}")
    answers = hidden[start + 1 : end]
    if not 0 <= start < end or "{" in answers or "}" in answers:
        reason = QuestionError("no answer in braces, or braces that do not match", "没有大括号中的答案，或大括号不匹配")
        return Row(line, reason, block)
    title, stem, after = "", hidden[:start].lstrip(), hidden[end + 1 :]
    if stem.startswith("::") and "::" in stem[2:]:
        title, _, stem = stem[2:].partition("::")
    markup, stem = _markup(stem + (" _____ " + after if after.strip() else ""))
    answers, _, general = answers.partition(_GENERAL)
    fields: dict[str, object] = {
        "id": _text(title, ""),
        "stem": _text(stem, markup),
        "explanation": _text(general, markup),
    }
    if category:
        fields["tags"] = {"subject": _text(category, "")}
    judged = _JUDGED.fullmatch(answers)
    if judged:
        lang = language_of(stem)
        fields |= {"type": "TF", "options": TRUE_FALSE[lang], "answer": "AB"[judged[1][0].upper() == "F"]}
        notes = [_text(note, markup) for note in judged[2].split("#") if note.strip()]
        fields["explanation"] = "\n".join(filter(None, [str(fields["explanation"]), *notes]))
        return Row(line, fields, block)
    kind = _other_kind(answers)
    if kind:
        return Row(line, unsupported(kind), block)
    return _choices(line, block, answers, markup, fields)


def _other_kind(answers: str) -> str:
    if not answers.strip():
        return "essay"
    if answers.lstrip().startswith("#"):
        return "numerical"
    if "->" in answers:
        return "matching"
    if "~" not in answers:
        return "short answer"
    return ""


def _choices(line: int, block: str, answers: str, markup: str, fields: dict[str, object]) -> Row:
    options: list[str] = []
    weights: list[float] = []
    notes: list[str] = [str(fields["explanation"])] if fields["explanation"] else []
    for sign, body in re.findall(r"([=~])([^=~]*)", answers):
        weight = re.match(r"\s*%(-?\d+(?:\.\d+)?)%", body)
        text, _, note = body[weight.end() if weight else 0 :].partition("#")
        weights.append(float(weight[1]) if weight else 100.0 * (sign == "="))
        options.append(_text(_markup(text)[1], markup))
        if note.strip():
            notes.append(f"{options[-1]}: {_text(note, markup)}")
    # an option of full weight alone is right, the others of some weight are near misses; without one, those share it
    full = 100.0 if max(weights) >= 100 else 0.0
    right = [chr(ord("A") + at) for at, w in enumerate(weights) if w >= full and w > 0]
    several = len(right) > 1 or bool(right) and not full
    fields |= {"options": options, "answer": right, "explanation": "\n".join(notes)}
    return Row(line, fields | ({"type": "X"} if several else {}), block)


def _markup(text: str) -> tuple[str, str]:
    match = re.match(r"\s*\[(html|moodle|plain|markdown)\]", text)
    return (match[1], text[match.end() :]) if match else ("", text)


def _text(text: str, markup: str) -> str:
    for char, hidden in _ESCAPED.items():
        text = text.replace(hidden, "\n" if char == "n" else char)
    return plain_text(text) if markup == "html" else text.strip()
