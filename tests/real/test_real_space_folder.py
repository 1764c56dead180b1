"""The folder of a Space starts by itself: nothing of the checkout but what was planned, no PYTHONPATH, a Space's variables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from ming_app.deploy.space import plan, write

MODEL = "ming-moe-0.5b"
SECONDS = 240


def test_the_folder_of_a_space_starts_by_itself(tmp_path: Path) -> None:
    """It serves its page, loads its model with its own adapter, and ends when told to."""
    folder, upload = tmp_path / "space", plan(model=MODEL)
    write(upload, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"SPACE_ID": "me/ming", "MING_HOST": "127.0.0.1", "MING_PORT": str(port), **upload.variables}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "MING_DATA_DIR": str(tmp_path / "data")}
    process = subprocess.Popen(
        [sys.executable, "app.py", "--model", MODEL, "--lang", "en"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        page = fetch(process, f"http://127.0.0.1:{port}/")
    finally:
        process.terminate()
        said = process.communicate(timeout=60)[0]
    assert "MING-MOE" in page and "Traceback" not in said, said
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        entry.path for entry in upload.files
    }, "serving writes nothing beside the code"
    answer = subprocess.run(
        [sys.executable, "-m", "ming_app", "ask", "What is anaemia?", "--greedy", "--max-new-tokens", "16", "--json"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert answer.returncode == 0 and f'"model": "{MODEL}"' in answer.stdout, answer.stderr


def fetch(process: subprocess.Popen[str], url: str) -> str:
    end = time.monotonic() + SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < end:
        try:
            with opener.open(url, timeout=10) as reply:
                return str(reply.read().decode())
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"the page did not open; exit code {process.poll()}")
