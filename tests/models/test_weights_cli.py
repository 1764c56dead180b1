"""`python -m ming_app weights`: JSON-ready results, tables for people in both languages, errors and exit codes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ming_app.errors import UsageError
from ming_app.models import catalog
from ming_app.models.weights_cli import add_weights_parser, run_weights, weights_text
from ming_app.molora.checkpoint import load_adapter
from ming_app.settings import Settings


def run(settings: Settings, *words: str) -> dict:
    parser = argparse.ArgumentParser()
    add_weights_parser(parser.add_subparsers())
    result = run_weights(parser.parse_args(["weights", *words]), settings)
    json.dumps(result)
    return result


def zh(en: str, zh: str) -> str:
    return zh


@pytest.fixture
def catalogued(monkeypatch, model):
    """The catalogue with the tiny model of these tests in it."""
    monkeypatch.setattr(catalog, "list_models", lambda: [model])


def test_list(settings):
    models = run(settings, "list")["models"]
    assert [m["name"] for m in models][:2] == ["ming-moe-1.5b", "ming-moe-0.5b"]
    assert models[0]["default"] and not models[0]["present"] and models[0]["sha256"].startswith("cc324af0")
    text = weights_text({"models": models})
    assert "ming-moe-1.5b *" in text and "1.12 GB" in text
    assert "已在本机" in weights_text({"models": models}, zh)


def test_list_tells_what_built_engines_take(settings):
    empty = run(settings, "list")
    assert empty["engines"]["bytes"] == 0 and "engines" not in weights_text(empty)
    folder = settings.cache_dir / "engines"
    (folder / "ab").mkdir(parents=True)
    (folder / "ab" / "weights.bin").write_bytes(bytes(2_000_000))
    full = run(settings, "list")
    assert full["engines"] == {"path": str(folder), "bytes": 2_000_000}
    assert "2 MB" in weights_text(full) and "可随时删除" in weights_text(full, zh)


def test_fetch_and_show(hub, catalogued, model, settings):
    before = run(settings, "show", "tiny")
    assert before["present"] is False and before["sources"][0]["repo"] == "owner/repo"
    fetched = run(settings, "fetch", "tiny")
    assert fetched["present"] and Path(fetched["base"]).is_file() and fetched["sha256"] == model.sha256
    assert fetched["origin"] == "127.0.0.1/owner/repo"
    after = run(settings, "show", "TINY")
    assert after["present"] and after["base"] == fetched["base"] and after["origin"] == fetched["origin"]
    assert model.sha256 in weights_text(after) and "获取自" in weights_text(after, zh)


def test_fetch_checks_what_is_here(hub, catalogued, model, settings, payload):
    blob = Path(run(settings, "fetch", "tiny")["base"])
    seen = blob.stat()
    spoiled = payload[:-1] + bytes([payload[-1] ^ 1])
    blob.write_bytes(spoiled)
    os.utime(blob, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # damage that size and time do not show
    again = run(settings, "fetch", "tiny")
    assert Path(again["base"]).read_bytes() == payload and again["origin"] == "127.0.0.1/owner/repo"
    asked = len(hub.requests)
    assert run(settings, "fetch", "tiny")["origin"] == again["origin"] and len(hub.requests) == asked


def test_fetch_without_a_name_takes_the_model_in_use(hub, catalogued, settings):
    assert run(settings.with_(model="tiny"), "fetch")["name"] == "tiny"


def test_convert(golden, tmp_path, settings):
    result = run(settings, "convert", str(golden / "adapter"), str(tmp_path / "native"))
    first, second = load_adapter(golden / "adapter"), load_adapter(tmp_path / "native")
    assert second.config == first.config and second.fingerprint
    assert result["config"]["num_experts"] == first.config.num_experts
    assert str(tmp_path / "native") in weights_text(result)
    with pytest.raises(UsageError, match="not empty"):
        run(settings, "convert", str(golden / "adapter"), str(tmp_path / "native"))


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ming_app", "weights", *words]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def test_as_a_process(tmp_path):
    done = command("list", "--json", MING_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and len(json.loads(done.stdout)["models"]) >= 6


def test_errors_are_in_the_users_language_with_exit_code_1(tmp_path):
    (tmp_path / "file").write_text("")
    for lang, word in (("en", "Closest"), ("zh", "最接近")):
        done = command("show", "ming-moe-15b", "--lang", lang)
        assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr
    done = command("fetch", "ming-moe-0.5b", "--json", MING_CACHE_DIR=str(tmp_path / "file" / "x"), MING_WEIGHTS="")
    assert done.returncode == 1 and "MING_CACHE_DIR" in json.loads(done.stdout)["error"]["message"]
    assert command("frobnicate").returncode == 2
