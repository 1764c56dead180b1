"""Routing records as files: a trace with the label that its text is AI-generated (as rules for AI-made content ask)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ming_app.molora.trace import RouterTrace
from ming_app.ui.text import t


def save_record(trace: RouterTrace, path: str | Path) -> Path:
    """Writes the labelled trace to `path` (.npz or .json) and gives it. Raises TraceError as RouterTrace.save does."""
    label = {"ai_generated": True, "notice": t("en", "app.disclaimer"), "notice_zh": t("zh", "app.disclaimer")}
    return replace(trace, config={**trace.config, **label}).save(path)
