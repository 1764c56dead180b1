"""A question file on its way in: its bytes, how the person wants it read, what was found; and the choices that the page
(static/import.js) offers for that. Knows no gradio."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ming_app.exam.formats import FORMATS, Import, ReadOptions
from ming_app.exam.formats.columns import FIELDS, OPTION_FIELDS
from ming_app.exam.formats.reading import Rejected
from ming_app.exam.question import Question
from ming_app.ui.text import t

COUNTS = {"": None, "0": 0, "1": 1}
"""choice -> ReadOptions.count_from"""
LANGS = ("", "zh", "en")
MAX_CHARS = 100_000


@dataclass(eq=False)
class Reading:
    """A file that may be imported."""

    name: str
    data: bytes
    options: ReadOptions = ReadOptions()
    found: Import | None = None
    """what was read last"""

    @property
    def questions(self) -> tuple[Question, ...]:
        return self.found.questions if self.found is not None else ()

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        return self.found.rejected if self.found is not None else ()


def chosen_options(text: str) -> ReadOptions:
    """What the page sent: {"format", "lang", "count_from", "columns": [[name, field], ...]}.

    Raises ValueError, TypeError, KeyError or AttributeError for anything else.
    """
    said = json.loads(text[:MAX_CHARS])
    kind, lang, columns = said["format"], said["lang"], {str(name): field for name, field in said["columns"]}
    if kind not in FORMATS or lang not in LANGS or any(field not in ("", *FIELDS) for field in columns.values()):
        raise ValueError(text)
    return ReadOptions(kind, columns, lang, COUNTS[said["count_from"]])


def reading_choices(options: ReadOptions, found: Import) -> dict[str, Any]:
    """The payload of the page: what is chosen, and what can be."""
    counts = next(word for word, value in COUNTS.items() if value == options.count_from)
    return {
        "format": found.format,
        "lang": options.lang,
        "count_from": counts,
        "columns": [[name, field] for name, field in found.columns.items()],
        "choices": {"format": list(FORMATS), "lang": LANGS, "count_from": list(COUNTS), "columns": FIELDS},
    }


def reading_words(lang: str) -> str:
    """What the choices are called, as JSON: "titles", and for each choice its values."""
    fields = {field: t(lang, f"exam.field.{field}") for field in FIELDS if field not in OPTION_FIELDS}
    fields |= {field: t(lang, "exam.field.option", letter=field[-1].upper()) for field in OPTION_FIELDS}
    auto = {"": t(lang, "exam.reading.auto")}
    named = {
        "titles": {
            name: t(lang, f"exam.reading.{name}") for name in ("how", "format", "lang", "count_from", "columns")
        },
        "format": {name: texts[lang == "zh"] for name, texts in FORMATS.items()},
        "lang": auto | {value: t(lang, f"exam.reading.{value}") for value in ("zh", "en")},
        "count_from": auto | {value: t(lang, f"exam.reading.from_{value}") for value in ("0", "1")},
        "columns": {"": t(lang, "exam.reading.unused"), **fields},
    }
    return json.dumps(named, ensure_ascii=False)
