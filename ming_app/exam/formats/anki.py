"""`deck`: questions as an Anki deck (.apkg), written by genanki. Front: case, stem, options; back: key and explanation.

Ids come from the questions, so that importing a newer export updates cards and keeps their history.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ming_app.exam.question import Question

MODEL_ID = 1_604_270_901  # of the note type; never changes
CARD_CSS = (
    ".card{font:18px/1.5 system-ui,sans-serif;text-align:left}.key{font-weight:700}.small{font-size:14px;color:#667}"
)


def deck(questions: Sequence[Question], title: str) -> bytes:
    """The .apkg as bytes."""
    import genanki

    model = genanki.Model(
        MODEL_ID,
        "MING-MOE exam question",
        fields=[{"name": name} for name in ("Question", "Options", "Answer", "Explanation", "Reference")],
        templates=[
            {
                "name": "Question",
                "qfmt": "{{Question}}<br>{{Options}}",
                "afmt": '{{FrontSide}}<hr id="answer"><p class="key">{{Answer}}</p><p>{{Explanation}}</p><p class="small">{{Reference}}</p>',
            }
        ],
        css=CARD_CSS,
    )
    made = genanki.Deck(_number(title), title)
    for question in questions:
        front = _html("\n\n".join(filter(None, [question.shared_stem, question.stem])))
        if question.image:
            front += f'<br><img src="{escape(question.image)}">'
        options = "<br>".join(f"{letter}. {_html(text)}" for letter, text in question.options.items())
        answer = "<br>".join(f"{letter}. {_html(question.options[letter])}" for letter in question.answer)
        fields = [front, options, answer, _html(question.explanation), _html(question.reference)]
        tags = [value.replace(" ", "_") for value in (question.type, *question.tags.values())]
        made.add_note(genanki.Note(model, fields, guid=genanki.guid_for(question.key), tags=tags))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deck.apkg"
        genanki.Package(made).write_to_file(path)
        return path.read_bytes()


def _number(title: str) -> int:
    return int(hashlib.sha256(title.encode()).hexdigest()[:7], 16) + (1 << 30)


def _html(text: str) -> str:
    return escape(text).replace("\n", "<br>")
