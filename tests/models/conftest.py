"""What the fetch tests share: one tiny GGUF as the payload, a hub, a model that points at it, settings with a fresh cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ming_app.models.catalog import HubFile, Model
from ming_app.models.sources import Limits
from ming_app.settings import Settings
from tests.models.servers import Hub
from tests.models.tiny_gguf import write_gguf

QUICK = Limits(connect=2, read=0.5, child=20, attempts=2, pause=0.01)


@pytest.fixture(scope="session")
def payload(tmp_path_factory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("payload") / "tiny.gguf").read_bytes()


@pytest.fixture
def hub(payload, monkeypatch) -> Iterator[Hub]:
    """A hub that HF_ENDPOINT points to."""
    server = Hub(payload)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.close()


@pytest.fixture
def model(payload) -> Model:
    return Model(
        name="tiny",
        title="Tiny",
        kind="gguf",
        sources=(HubFile("owner/repo", "main", "tiny.gguf"),),
        file="tiny.gguf",
        size=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
    )


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache", adapter="none")


def leftovers(settings: Settings) -> list[str]:
    """Files of the cache that are neither a finished blob, a card, a note nor a lock."""
    found = [path.relative_to(settings.cache_dir) for path in settings.cache_dir.rglob("*")]
    return [
        str(path)
        for path in found
        if path.suffix in (".partial", ".tmp", ".whl") or len(path.parts) > 1 and path.parts[0] == "tmp"
    ]
