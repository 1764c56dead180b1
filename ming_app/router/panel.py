"""The expert panel's files: a template, a script over `element`, `props`, `watch` and `trigger`, and a style sheet.

They run inside gr.HTML on the page and by themselves in a report; the value is payload.py's, `words` is JSON of
words.panel_words.
"""

from __future__ import annotations

from pathlib import Path

STATIC = Path(__file__).parent / "static"


def template() -> str:
    """HTML of an empty panel."""
    return _read("panel.html")


def script() -> str:
    """JavaScript that brings the template to life."""
    return "\n".join(_read(name) for name in ("panel_data.js", "panel_map.js", "panel.js"))


def style() -> str:
    """CSS: colours, the panel, and the views' words and tables."""
    return "\n".join(_read(name) for name in ("colours.css", "panel.css", "views.css"))


def _read(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")
