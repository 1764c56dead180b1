"""`python -m tests.load`: starts a server, lets many visitors at it, prints what was measured as JSON.

`--tiny`: a model with random weights instead of a real one, for a number of visitors that no two cores could serve.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.load.visitors import visit

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument("--visitors", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--model", default="ming-moe-0.5b")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--url", default="", help="a server that runs already")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with serving(asked.url, asked.model, asked.tiny, Path(folder), asked.visitors) as url:
            tally = asyncio.run(visit(url, asked.visitors, asked.seconds))
        print(json.dumps({"visitors": asked.visitors, **tally.summary()}, ensure_ascii=False, indent=1))
    return 1 if tally.wrong else 0


@contextmanager
def serving(url: str, model: str, tiny: bool, folder: Path, visitors: int) -> Iterator[str]:
    """The address of a server that is ready; one is started unless `url` names it."""
    if url:
        yield url
        return
    words = ["--model", model]
    if tiny:
        from ming_app.molora.checkpoint import save_adapter
        from tests.tiny import make_adapter, write_base

        base = write_base(folder / "base")
        words = ["--model", str(base), "--adapter", str(save_adapter(folder / "adapter", make_adapter(base)))]
    names = {
        "MING_DATA_DIR": str(folder / "data"),
        "MING_MAX_QUEUE": str(visitors),
        "MING_PORT": "0",
        "PYTHONPATH": str(ROOT),
    }
    log = folder / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "ming_app", "serve", *words], env={**os.environ, **names}, stderr=out, stdout=out
        )
    try:
        yield _ready(log, server)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
        print(f"the server ended with {code}; its log:", log.read_text(encoding="utf-8")[-2000:], file=sys.stderr)


def _ready(log: Path, server: subprocess.Popen) -> str:
    """Waits until the model can answer."""
    for _ in range(600):
        said = log.read_text(encoding="utf-8")
        if "API: " in said and server.poll() is None:
            url = said.split("API: ")[1].split("/v1")[0]
            if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                return url
        time.sleep(0.5)
    raise SystemExit("the server did not start:\n" + log.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
