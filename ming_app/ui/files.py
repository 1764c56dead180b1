"""A temporary folder for files that visitors download; emptied while the app runs and removed when it ends."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

MAX_AGE = 600.0  # seconds a prepared download is kept; Gradio serves its own copy, which delete_cache removes


class TempFolder:
    """Hands out fresh folders; each is removed MAX_AGE seconds later, and all go with the process."""

    def __init__(self) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="ming-moe-")

    def new(self) -> Path:
        """An empty folder that nobody else has."""
        folder = tempfile.mkdtemp(dir=self._root.name)
        timer = threading.Timer(MAX_AGE, shutil.rmtree, (folder,), {"ignore_errors": True})
        timer.daemon = True  # must not hold up the end of the process, which removes everything anyway
        timer.start()
        return Path(folder)
