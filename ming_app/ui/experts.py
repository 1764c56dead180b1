"""The expert panel as a Gradio component, and saving the routing record. All drawing happens in the browser.

The component's value is the payload of router/payload.py; its words come as one JSON text, so that a change of
language reaches the panel without drawing anything anew. Its files are router/panel.py's.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import gradio as gr

from ming_app.molora.trace import RouterTrace
from ming_app.router import panel as files
from ming_app.router.payload import empty_payload
from ming_app.router.words import panel_words
from ming_app.ui.record import save_record


def words(lang: str) -> str:
    """The panel's texts as JSON."""
    return json.dumps(panel_words(lang), ensure_ascii=False)


def panel(lang: str, elem_id: str = "ming-panel") -> gr.HTML:
    """The panel, empty. Its `select` event tells layer and matrix when a person chose them. Update it with `gr.update(value=payload)` and `gr.update(words=words(lang))`."""
    return gr.HTML(
        value=empty_payload(),
        html_template=files.template(),
        js_on_load=files.script(),
        apply_default_css=False,
        elem_id=elem_id,
        words=words(lang),
    )


def dated_record(trace: RouterTrace, kind: str, folder: Path) -> Path:
    """Writes the labelled trace as `kind` ("npz" or "json") into `folder` under a name with the time; gives the file."""
    return save_record(trace, folder / f"ming-moe-routing-{time.strftime('%Y%m%d-%H%M%S')}.{kind}")
