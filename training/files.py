"""Text files written whole: to a temporary name first, then renamed."""

from __future__ import annotations

import os
from pathlib import Path

from training.errors import not_written


def write_text(path: Path, text: str) -> Path:
    """Raises TrainingError on a full disk or without permission; the old file then stays."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise not_written(path, error) from error
    return path
