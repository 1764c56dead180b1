"""The About page: what this is, what it must not be used for, what happens to the data."""

from __future__ import annotations

from html import escape

from ming_app.ui.text import t

SECTIONS = ("what", "experts", "limits", "privacy")


def about(lang: str) -> str:
    """The page's text as HTML."""
    parts = [
        f"<h2>{escape(t(lang, f'about.{name}_title'))}</h2><p>{escape(t(lang, f'about.{name}'))}</p>"
        for name in SECTIONS
    ]
    return f'<div class="m-about">{"".join(parts)}</div>'
