"""With the weights at hand, a question is answered and its record kept without a single call to anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ming_app.models.catalog import find_model
from ming_app.models.fetch import fetch
from ming_app.settings import Settings

ROOT = Path(__file__).parents[2]
WATCHED = """
import sys
called = []
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.connect", "socket.sendto", "urllib.Request"):
        called.append(f"{event} {arguments}")
sys.addaudithook(watch)
from ming_app import cli
code = cli.main(sys.argv[1:])
print("CALLED", called, file=sys.stderr)
sys.exit(code)
"""


def test_an_answer_of_the_real_model_calls_nobody(tmp_path: Path) -> None:
    fetch(find_model("ming-moe-0.5b"), Settings.load())
    asked = ["ask", "What is anaemia?", "--greedy", "--max-new-tokens", "8", "--model", "ming-moe-0.5b", "--json"]
    command = [sys.executable, "-c", WATCHED, *asked, "--trace", str(tmp_path / "t.npz")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout)["new_tokens"] > 0 and (tmp_path / "t.npz").is_file()
    assert "CALLED []" in run.stderr
