"""The page's own files in static/, and what of them goes into <head>. Imports nothing of gradio."""

from __future__ import annotations

from pathlib import Path

from ming_app import case_view
from ming_app.router import panel

STATIC = Path(__file__).parent / "static"
LOGO = STATIC / "logo.svg"


def read(name: str) -> str:
    """Text of a file in static/."""
    return (STATIC / name).read_text(encoding="utf-8")


def head() -> str:
    """HTML for <head>: our style sheets and the page's scripts, inline so that they are there before the first paint."""
    styles = "\n".join([panel.style(), read("page.css"), read("exam.css"), read("talks.css"), case_view.STYLE])
    scripts = "\n".join([read("server.js"), read("page.js"), read("keep.js")])
    return f"<style>\n{styles}\n</style>\n<script>\n{scripts}\n</script>"
