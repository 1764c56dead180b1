"""Fetching one file from a hub that truncates, corrupts, stalls, refuses Range, answers 500; cache, resume, locks, disks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ming_app.errors import FetchError, WeightsError
from ming_app.models import fetch as fetch_module
from ming_app.models import store as store_module
from ming_app.models.catalog import HubFile, LocalPath, Model
from ming_app.models.fetch import fetch, locate
from ming_app.settings import Settings
from tests.models.conftest import QUICK, leftovers


def get(model: Model, settings: Settings, progress=None):
    return fetch(model, settings, progress, limits=QUICK)


def failure(model: Model, settings: Settings) -> FetchError:
    with pytest.raises(FetchError) as caught:
        get(model, settings)
    assert any("\u4e00" <= c <= "\u9fff" for c in caught.value.zh)
    return caught.value


def test_fetch_gives_the_file_its_card_and_its_hash(hub, model, settings, payload):
    seen = []
    local = get(model, settings, seen.append)
    assert local.base.read_bytes() == payload
    assert local.fingerprint == model.sha256
    assert {"config.json", "tokenizer.json"} <= {path.name for path in local.home.iterdir()}
    assert local.adapter is None and local.adapter_layout is None
    assert seen[-1].done == seen[-1].total == len(payload) and seen[-1].unit == "bytes" and seen[-1].stage == "fetch"
    assert not leftovers(settings)
    assert locate(model, settings) == local.base


def test_the_second_time_nothing_is_asked_or_hashed(hub, model, settings, monkeypatch):
    first = get(model, settings)
    asked = len(hub.requests)
    monkeypatch.setattr(store_module, "hash_file", lambda *_: pytest.fail("hashed again"))
    assert get(model, settings) == first
    assert len(hub.requests) == asked


def preload(cache: Path, content: bytes, monkeypatch) -> Path:
    """A file in the layout of huggingface_hub's cache, where a Space preloads it; its revision is the catalogue's."""
    repo = cache / "models--owner--repo"
    blob, link = repo / "blobs" / "etag", repo / "snapshots" / ("a" * 40) / "tiny.gguf"
    for path in (blob, link, repo / "refs" / "main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(blob)
    (repo / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return blob


def test_a_preloaded_file_is_used_where_it_lies(hub, model, settings, payload, tmp_path, monkeypatch):
    blob = preload(tmp_path / "hf", payload, monkeypatch)
    assert locate(model, settings) == blob
    assert get(model, settings).base == blob
    assert not hub.requests and not list((settings.cache_dir / "blobs").iterdir())
    other = replace(model, sources=(HubFile("owner/repo", "b" * 40, "tiny.gguf"),))
    assert locate(other, settings) is None  # another revision is another file


def test_a_preloaded_file_with_wrong_bytes_is_passed_by(hub, model, settings, payload, tmp_path, monkeypatch):
    blob = preload(tmp_path / "hf", bytes(len(payload)), monkeypatch)
    local = get(model, settings)
    assert local.base != blob and local.base.read_bytes() == payload
    assert blob.read_bytes() == bytes(len(payload))  # not ours to remove
    hub.faults = [404] * 9
    assert "wrong SHA-256" in failure(model, settings.with_(cache_dir=tmp_path / "other")).en


def test_a_read_only_cache_that_holds_the_model_will_do(hub, model, settings):
    first = get(model, settings)
    for path in [settings.cache_dir, *settings.cache_dir.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert get(model, settings) == first
    finally:
        for path in [settings.cache_dir, *settings.cache_dir.rglob("*")]:
            path.chmod(0o755)


@pytest.mark.parametrize("fault", ["truncate", "stall", 500, 503, 429])
def test_a_passing_fault_is_overcome(hub, model, settings, payload, fault):
    hub.faults = [fault]
    assert get(model, settings).base.read_bytes() == payload
    if fault in ("truncate", "stall"):
        assert hub.sent == len(payload)  # the second request went on where the first broke
        assert hub.requests[1] == f"bytes={len(payload) // 2}-"


def test_a_server_without_range_starts_over(hub, model, settings, payload):
    hub.faults, hub.ranges = ["truncate"], False
    assert get(model, settings).base.read_bytes() == payload


@pytest.mark.parametrize(("fault", "word"), [(500, "500"), ("silence", "sent nothing")])
def test_a_dead_server_is_given_up_soon_and_named(hub, model, settings, fault, word):
    hub.faults = [fault] * 20
    started = time.monotonic()
    error = failure(model, settings)
    assert (
        word in error.en
        and "127.0.0.1/owner/repo" in error.en
        and model.sha256 in error.en
        and "MING_WEIGHTS" in error.zh
    )
    assert time.monotonic() - started < 5
    assert len(hub.requests) == QUICK.attempts


@pytest.mark.parametrize("fault", [401, 403, 404])
def test_a_refusal_is_not_repeated(hub, model, settings, fault):
    hub.faults = [fault] * 5
    assert str(fault) in failure(model, settings).en
    assert len(hub.requests) == 1


@pytest.mark.parametrize("fault", ["wrong size", "odd range"])
def test_an_answer_of_another_file_is_refused(hub, model, settings, fault):
    hub.faults = ["truncate", fault] if fault == "odd range" else [fault]
    failure(model, settings)
    assert locate(model, settings) is None


def test_wrong_bytes_are_removed_and_both_hashes_named(hub, model, settings):
    hub.faults = ["corrupt"]
    error = failure(model, settings)
    assert model.sha256 in error.en and "wrong SHA-256" in error.en and model.sha256 in error.zh
    assert not leftovers(settings) and locate(model, settings) is None


def test_after_wrong_bytes_the_next_source_is_tried(hub, model, settings, payload):
    hub.faults = ["corrupt"]
    both = replace(model, sources=(model.sources[0], HubFile("owner/repo", "main", "tiny.gguf")))
    assert get(both, settings).base.read_bytes() == payload


def test_a_bad_beginning_left_by_another_run_gets_one_clean_chance(hub, model, settings, payload):
    part = settings.cache_dir / "blobs" / f"{model.sha256}.partial"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1000))
    assert get(model, settings).base.read_bytes() == payload
    assert hub.requests == ["bytes=1000-", None]


@pytest.mark.parametrize("extra", [0, 5])
def test_a_partial_that_is_whole_or_too_long(hub, model, settings, payload, extra):
    part = settings.cache_dir / "blobs" / f"{model.sha256}.partial"
    part.parent.mkdir(parents=True)
    part.write_bytes(payload + bytes(extra))
    assert get(model, settings).base.read_bytes() == payload
    assert len(hub.requests) == (1 if extra else 0)


def test_stopping_keeps_what_came_and_the_next_run_goes_on(hub, model, settings, payload):
    hub.slow = 0.04

    def stop(step) -> None:
        if step.done > len(payload) // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(model, settings, stop)
    part = settings.cache_dir / "blobs" / f"{model.sha256}.partial"
    had = part.stat().st_size
    assert 0 < had < len(payload)
    assert get(model, settings).base.read_bytes() == payload
    assert hub.requests == [None, f"bytes={had}-"]
    assert hub.served[1] == len(payload) - had


def test_a_damaged_blob_is_noticed_and_fetched_again(hub, model, settings, payload):
    blob = get(model, settings).base
    blob.write_bytes(payload[:-10])
    assert get(model, settings).base.read_bytes() == payload
    blob.write_bytes(bytes(len(payload)))
    assert get(model, settings).base.read_bytes() == payload


# ------------------------------------------------------------------------------------------- files given by hand


def test_a_given_file_or_folder_is_used_in_place(hub, model, settings, payload, tmp_path):
    given = tmp_path / "usb" / "deep" / "renamed.bin"
    given.parent.mkdir(parents=True)
    given.write_bytes(payload)
    (given.parent / "decoy.gguf").write_bytes(bytes(len(payload)))
    for path in (given, tmp_path / "usb"):
        assert get(model, settings.with_(weights=str(path))).base == given
    assert not hub.requests


def test_a_given_file_with_a_wrong_hash_is_left_alone_and_told(hub, model, settings, payload, tmp_path):
    given = tmp_path / "wrong.gguf"
    given.write_bytes(payload[:-1] + b"?")
    hub.faults = [404]
    error = failure(model, settings.with_(weights=str(given)))
    assert str(given) in error.en and "wrong SHA-256" in error.en
    assert given.exists()
    assert get(model, settings.with_(weights=str(given))).base != given  # the hub is tried next
    hub.faults = [404]
    other = settings.with_(weights=str(tmp_path / "nowhere"), cache_dir=tmp_path / "other")
    assert "no such file" in failure(model, other).en


def test_a_model_named_by_its_file(payload, settings, tmp_path, model):
    path = tmp_path / "mine.gguf"
    path.write_bytes(payload)
    local = get(Model("mine", "mine", "gguf", (LocalPath(path),), "mine.gguf"), settings)
    assert local.base == path and local.fingerprint == model.sha256
    path.write_bytes(b"GGUF nonsense")
    with pytest.raises(WeightsError):
        get(Model("mine", "mine", "gguf", (LocalPath(path),), "mine.gguf"), settings)


# ------------------------------------------------------------------------------------------- no network, no room


def test_no_network_is_told_within_seconds(model, settings, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    error = failure(model, settings)
    assert "cannot be reached" in error.en and "MING_WEIGHTS" in error.en and "HF_ENDPOINT" in error.zh
    assert time.monotonic() - started < 3


def test_an_unknown_host_is_told_within_seconds(model, settings, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    started = time.monotonic()
    assert "cannot be reached" in failure(model, settings).en
    assert time.monotonic() - started < 5


def test_the_offline_switch_of_hugging_face_is_heeded(hub, model, settings, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in failure(model, settings).en
    assert not hub.requests


def test_too_little_room_is_told_before_anything_is_asked(hub, model, settings, monkeypatch):
    monkeypatch.setattr(store_module, "free_bytes", lambda path: 1000)
    error = failure(model, settings)
    assert "full" in error.en and "MING_CACHE_DIR" in error.en and not hub.requests


def test_a_disk_that_fills_up_on_the_way(hub, model, settings, monkeypatch, payload):
    def filling(*_):
        yield payload[:5000]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch_module, "_chunks", filling)
    assert "full" in failure(model, settings).en
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert get(model, settings).base.read_bytes() == payload
    assert hub.requests == ["bytes=5000-"]


def test_a_cache_that_cannot_be_written(hub, model, settings, tmp_path):
    (tmp_path / "file").write_text("")
    error = failure(model, settings.with_(cache_dir=tmp_path / "file" / "cache"))
    assert "cannot be written" in error.en and "MING_CACHE_DIR" in error.en
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o555)
        assert "cannot be written" in failure(model, settings.with_(cache_dir=tmp_path / "locked" / "cache")).en


# ----------------------------------------------------------------------------------------------------- two at once

CHILD = """
import sys
from pathlib import Path
from ming_app.models.catalog import HubFile, Model
from ming_app.models.fetch import fetch
from ming_app.settings import Settings
cache, sha256, size = sys.argv[1:]
model = Model("tiny", "Tiny", "gguf", (HubFile("owner/repo", "main", "tiny.gguf"),), "tiny.gguf", int(size), sha256)
print(fetch(model, Settings(cache_dir=Path(cache), adapter="none")).fingerprint)
"""


def test_two_processes_share_one_download(hub, model, settings, payload):
    hub.slow = 0.05
    command = [sys.executable, "-c", CHILD, str(settings.cache_dir), model.sha256, str(model.size)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [child.communicate(timeout=60)[0].strip() for child in children] == [model.sha256] * 2
    assert hub.sent == len(payload)
    assert not leftovers(settings)


def test_whoever_waits_is_told_why(hub, model, settings, payload):
    hub.slow = 0.05
    details: list[str] = []
    other = threading.Thread(target=lambda: get(model, settings))
    other.start()
    while not hub.requests:
        time.sleep(0.01)
    get(model, settings, lambda step: details.append(step.detail))
    other.join()
    assert any("another process" in detail for detail in details) and hub.sent == len(payload)


def test_a_download_cut_by_a_kill_is_taken_up(hub, model, settings, payload):
    hub.slow = 0.05
    command = [sys.executable, "-c", CHILD, str(settings.cache_dir), model.sha256, str(model.size)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    part: Path = settings.cache_dir / "blobs" / f"{model.sha256}.partial"
    while not (part.exists() and part.stat().st_size > 0) and hub.sent < len(payload):
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert locate(model, settings) is None
    hub.slow = 0
    assert get(model, settings).base.read_bytes() == payload
