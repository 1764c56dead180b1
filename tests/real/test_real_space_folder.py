"""The folder of a Space starts by itself: nothing of the checkout but what was planned, no PYTHONPATH, a Space's variables."""

from __future__ import annotations

import json
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
    """It loads its model with its own adapter, serves its page, and writes nothing beside the code."""
    folder, upload = tmp_path / "space", plan(model=MODEL)
    write(upload, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"SPACE_ID": "me/ming", "MING_HOST": "127.0.0.1", "MING_PORT": str(port), **upload.variables}
    environment |= {"MING_DATA_DIR": str(tmp_path / "data"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["NUMBA_CACHE_DIR"] = str(tmp_path / "kernels")  # kernels are kept by the path of their source

    words = ["ask", "What is anaemia?", "--greedy", "--max-new-tokens", "16", "--json"]
    asked = subprocess.run(
        [sys.executable, "-m", "ming_app", *words], cwd=folder, env=environment, capture_output=True, timeout=SECONDS
    )
    assert asked.returncode == 0, asked.stderr.decode()
    answer = json.loads(asked.stdout)
    assert answer["model"] == MODEL and answer["new_tokens"] == 16

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
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {entry.path for entry in upload.files}


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
