"""Hub folders through the real huggingface_hub against a small hub: only what is asked for, found again, pickles refused."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import pytest

from ming_app.errors import FetchError, WeightsError
from ming_app.models import store as store_module
from ming_app.models.catalog import HubSnapshot, LocalPath, Model
from ming_app.models.fetch import adapter_layout, fetch, locate
from ming_app.models.safetensors_file import write_safetensors
from tests.models.conftest import QUICK

COMMIT = "c" * 40


class FakeHub:
    """The part of the hub's interface that snapshot_download uses: the commit, the list of files, the files."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        parts = urlsplit(request.path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        files = self.repos.get("/".join(parts[2:4] if api else parts[:2]))
        if files is None:
            request.send_error(404)
        elif api and "tree" in parts:
            self._json(request, [self._entry(name, data) for name, data in files.items()])
        elif api:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self._json(request, {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings})
        else:
            name = "/".join(parts[4:])
            if body:
                self.asked.append(name)
            self._file(request, files.get(name), body)

    def _entry(self, name: str, data: bytes) -> dict:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        data = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _file(self, request: BaseHTTPRequestHandler, data: bytes | None, body: bool) -> None:
        if data is None:
            request.send_error(404)
            return
        request.send_response(200)
        request.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[FakeHub]:
    server = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.close()


@pytest.fixture
def weights(tmp_path) -> bytes:
    path = tmp_path / "w.safetensors"
    values = np.ones((4, 4), np.float32)
    with path.open("wb") as file:
        list(
            write_safetensors(
                file, {"model.embed_tokens.weight": (4, 4)}, [("model.embed_tokens.weight", values)], "float32"
            )
        )
    return path.read_bytes()


@pytest.fixture
def model(hub, weights) -> Model:
    hub.repos["owner/base"] = {
        "config.json": b'{"model_type": "qwen2"}',
        "model.safetensors": weights,
        "tokenizer.json": b"{}",
        "pytorch_model.bin": b"a pickle",
        "modeling_custom.py": b"raise SystemExit",
    }
    hub.repos["owner/adapter"] = {
        "adapter_config.json": b"{}",
        "adapter_model.bin": b"x",
        "non_lora_trainables.bin": b"y",
        "optimizer.pt": b"z",
    }
    base, adapter = HubSnapshot("owner/base", "main"), HubSnapshot("owner/adapter", "main")
    return Model("m", "M", "folder", (base,), size=len(weights), adapter_hub=adapter)


def get(model: Model, settings):
    return fetch(model, settings, limits=QUICK)


def test_base_and_adapter_come_without_pickles_and_code(hub, model, settings, weights):
    local = get(model, settings.with_(adapter=""))
    assert local.base == local.home
    assert sorted(path.name for path in local.base.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert local.fingerprint == hashlib.sha256(weights).hexdigest()
    assert local.adapter is not None and local.adapter_layout == "official"
    assert not (local.adapter / "optimizer.pt").exists()
    assert not {"pytorch_model.bin", "modeling_custom.py", "optimizer.pt"} & set(hub.asked)


def test_the_second_time_needs_no_network(hub, model, settings, monkeypatch):
    first = get(model, settings)
    hub.repos.clear()
    monkeypatch.setattr(store_module, "hash_file", lambda *_: pytest.fail("hashed again"))
    assert get(model, settings) == first
    assert locate(model, settings) == first.base


def test_a_file_lost_from_the_cache_is_fetched_again(hub, model, settings):
    first = get(model, settings)
    (first.base / "config.json").unlink()
    assert locate(model, settings) is None
    assert get(model, settings) == first


def test_a_repository_fetched_as_a_base_is_fetched_again_as_an_adapter(hub, model, settings, weights):
    hub.repos["owner/base"]["adapter_config.json"] = b"{}"
    local = get(replace(model, adapter_hub=HubSnapshot("owner/base", "main")), settings.with_(adapter=""))
    assert local.adapter is not None and (local.adapter / "adapter_config.json").is_file()
    assert (local.base / "model.safetensors").read_bytes() == weights


def test_a_cache_folder_may_have_any_name(hub, model, settings, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    local = get(model, settings.with_(cache_dir=settings.cache_dir / "缓存 é"))
    assert "缓存 é" in str(local.base) and local.base.is_dir()


def test_a_repository_without_safetensors_is_refused(hub, model, settings):
    del hub.repos["owner/base"]["model.safetensors"]
    with pytest.raises(WeightsError, match="pickled"):
        get(model, settings)


def test_unknown_repositories_and_dead_hubs_are_told(hub, model, settings, monkeypatch):
    del hub.repos["owner/adapter"]
    with pytest.raises(FetchError, match="MING_ADAPTER"):
        get(model, settings.with_(adapter=""))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    other = replace(model, sources=(HubSnapshot("owner/other", "main"),))
    with pytest.raises(FetchError, match="owner/other"):
        get(other, settings)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE"):
        get(other, settings)


def test_a_folder_given_by_hand_is_used_in_place(hub, model, settings, tmp_path, weights):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    assert get(model, settings.with_(weights=str(folder))).base == folder
    local = get(Model("mine", "mine", "folder", (LocalPath(folder),)), settings)
    assert local.base == local.home == folder
    assert local.fingerprint == hashlib.sha256(weights).hexdigest()
    assert not hub.asked


def test_the_fingerprint_of_shards_covers_them_all(settings, tmp_path, weights):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(weights)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    mine = Model("mine", "mine", "folder", (LocalPath(tmp_path),))
    before = get(mine, settings).fingerprint
    (tmp_path / "b.safetensors").write_bytes(weights[:-1] + b"!")
    assert len(before) == 64 and get(mine, settings).fingerprint != before
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FetchError, match="b.safetensors"):
        get(mine, settings)


def test_adapters_by_folder_by_name_and_wrong_ones(hub, model, settings, tmp_path):
    native = tmp_path / "native"
    native.mkdir()
    with pytest.raises(FetchError, match="holds no adapter"):
        get(model, settings.with_(adapter=str(native)))
    (native / "adapter.safetensors").write_bytes(b"")
    local = get(model, settings.with_(adapter=str(native)))
    assert local.adapter == native and local.adapter_layout == "native"
    assert get(model, settings.with_(adapter="owner/adapter")).adapter_layout == "official"
    assert get(model, settings.with_(adapter="NONE")).adapter is None
    with pytest.raises(FetchError, match="does not exist"):
        get(model, settings.with_(adapter="./nowhere"))
    assert adapter_layout(tmp_path) is None
