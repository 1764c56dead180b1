"""`write_bank`: questions -> bytes of a file for other programs, or for us again.

JSON lines keep everything, CSV all but tags of other names than ours; GIFT and Moodle XML keep what their formats know, with groups and tags as Moodle tags;
Anki decks are for cards. In CSV no cell can be a formula: one that begins like one gets an apostrophe, which reading
takes off again.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from xml.sax.saxutils import escape, quoteattr

from ming_app.exam.formats.columns import TAG_FIELDS
from ming_app.exam.question import LETTERS, Question
from ming_app.spreadsheet import safe_cell

CSV_FIELDS = ("id", "lang", "type", "group_id", "shared_stem", "stem")


def write_bank(questions: Sequence[Question], kind: str, title: str = "MING-MOE") -> bytes:
    """The file as bytes. `kind`: a key of WRITERS."""
    return WRITERS[kind](questions, title)


def _jsonl(questions: Sequence[Question], _title: str) -> bytes:
    lines = (json.dumps(question.to_dict(), ensure_ascii=False) for question in questions)
    return "".join(line + "\n" for line in lines).encode()


def _csv(questions: Sequence[Question], _title: str) -> bytes:
    """With a byte-order mark, without which spreadsheet programs show Chinese as noise."""
    width = max((len(question.options) for question in questions), default=2)
    letters, tags = LETTERS[:width], sorted({name for q in questions for name in q.tags if name in TAG_FIELDS})
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    texts = ("answer", "explanation", "reference", *tags, "source", "licence", "image")
    writer.writerow([*CSV_FIELDS, *letters, *texts])
    for question in questions:
        values = {name: getattr(question, name, "") for name in (*CSV_FIELDS, *texts)}
        values |= {"answer": "".join(question.answer)} | {name: question.tags.get(name, "") for name in tags}
        row = [values[name] for name in CSV_FIELDS]
        row += [question.options.get(letter, "") for letter in letters] + [values[name] for name in texts]
        writer.writerow(map(safe_cell, row))
    return b"\xef\xbb\xbf" + out.getvalue().encode()


def _gift(questions: Sequence[Question], _title: str) -> bytes:
    parts = ["// GIFT\n"]
    subject = ""
    for question in questions:
        own = question.tags.get("subject", "")
        if own != subject:
            subject = own
            parts.append(f"$CATEGORY: {_gift_text(own) or '$course$'}\n")
        stem = "\n\n".join(filter(None, [question.shared_stem, question.stem]))
        feedback = _gift_text("\n".join(filter(None, [question.explanation, question.reference])))
        general = f"\n####{feedback}" if feedback else ""
        if question.type == "TF":
            answers = "TF"[question.answer != ("A",)]
        else:
            answers = "".join(
                f"\n{_gift_sign(question, letter)}{_gift_text(t)}" for letter, t in question.options.items()
            )
        parts.append(f"::{_gift_text(question.id)}::{_gift_text(stem)} {{{answers}{general}\n}}\n")
    return "\n".join(parts).encode()


def _gift_sign(question: Question, letter: str) -> str:
    if not question.kind.multiple:
        return "=" if letter in question.answer else "~"
    return f"~%{_share(question, letter)}%"


def _share(question: Question, letter: str) -> str:
    """Moodle's weight of an option in percent: right ones share 100, a wrong one takes all."""
    return f"{100 / len(question.answer):.5f}".rstrip("0").rstrip(".") if letter in question.answer else "-100"


def _gift_text(text: str) -> str:
    return re.sub(r"([~=#{}:\\])", r"\\\1", text).replace("\n", "\\n")


def _moodle(questions: Sequence[Question], _title: str) -> bytes:
    parts = ['<?xml version="1.0" encoding="UTF-8"?>\n<quiz>\n']
    parts += [_moodle_question(question) for question in questions]
    return "".join([*parts, "</quiz>\n"]).encode()


def _moodle_question(question: Question) -> str:
    judged = question.type == "TF"
    tags = {"type": question.type, "lang": question.lang} | dict(question.tags)
    tags |= {name: getattr(question, name) for name in ("group_id", "shared_stem", "reference", "source", "licence")}
    picture = ""
    html = _html(question.stem)
    if question.image:
        media, _, body = question.image.partition(";base64,")
        name = f"image.{'png' if media.endswith('png') else 'jpg'}"
        html += f'<p><img src="@@PLUGINFILE@@/{name}" alt=""/></p>'
        picture = f'<file name="{name}" path="/" encoding="base64">{body}</file>'
    lines = [
        f"<question type={quoteattr('truefalse' if judged else 'multichoice')}>",
        f"<name><text>{escape(question.id)}</text></name>",
        f'<questiontext format="html"><text>{escape(html)}</text>{picture}</questiontext>',
        f'<generalfeedback format="html"><text>{escape(_html(question.explanation))}</text></generalfeedback>',
    ]
    if not judged:
        lines.append(f"<single>{str(not question.kind.multiple).lower()}</single>")
    for letter, text in question.options.items():
        share = _share(question, letter) if question.kind.multiple else "100" if letter in question.answer else "0"
        words = ("true" if letter == "A" else "false") if judged else _html(text)
        lines.append(f'<answer fraction="{share}" format="html"><text>{escape(words)}</text></answer>')
    labels = "".join(f"<tag><text>{escape(f'{name}: {value}')}</text></tag>" for name, value in tags.items() if value)
    return "\n".join([*lines, f"<tags>{labels}</tags>", "</question>\n"])


def _html(text: str) -> str:
    return escape(text).replace("\n", "<br/>")


def _apkg(questions: Sequence[Question], title: str) -> bytes:
    from ming_app.exam.formats.anki import deck

    return deck(questions, title)


WRITERS: Mapping[str, Callable[[Sequence[Question], str], bytes]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "gift": _gift,
    "moodle": _moodle,
    "apkg": _apkg,
}
"""format -> writer"""
ENDINGS = {"jsonl": "jsonl", "csv": "csv", "gift": "gift", "moodle": "xml", "apkg": "apkg"}
