"""Writing into the cache: whole or not at all, hashes remembered honestly, the system's refusals in words; progress."""

from __future__ import annotations

import errno
import hashlib
import os
import time

import pytest

from ming_app.errors import FetchError
from ming_app.models import store as store_module
from ming_app.models.progress import Meter, Progress
from ming_app.models.store import Store, free_bytes, gigabytes, remove_stale, replacing, require_space, storage_errors


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_hashes_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    store, path = Store(tmp_path / "cache"), tmp_path / "file"
    path.write_bytes(b"one")
    assert store.sha256(path) == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setattr(store_module, "hash_file", lambda *_: "hashed again")
    assert store.sha256(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert store.sha256(path) == "hashed again"


def test_notes_that_are_damaged_or_cannot_be_written_cost_only_time(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    store = Store(tmp_path / "cache")
    store.sha256(path)
    for text in ("", "[]", '{"seen": 3}', "{"):
        next((tmp_path / "cache" / "checked").iterdir()).write_text(text)
        assert store.sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert Store(path / "no" / "folder").sha256(path) == hashlib.sha256(b"one").hexdigest()


def test_the_origin_is_noted(tmp_path):
    store, path = Store(tmp_path), tmp_path / "file"
    path.write_bytes(b"one")
    assert store.origin(path) == ""
    store.remember(path, "0" * 64, "hub.example/owner/repo")
    assert store.origin(path) == "hub.example/owner/repo"


@pytest.mark.parametrize(
    ("code", "word"), [(errno.ENOSPC, "full"), (errno.EROFS, "cannot be written"), (errno.EACCES, "cannot be written")]
)
def test_refusals_of_the_system_are_put_in_words(tmp_path, code, word):
    with pytest.raises(FetchError) as caught, storage_errors(tmp_path):
        raise OSError(code, os.strerror(code))
    assert word in caught.value.en and "MING_CACHE_DIR" in caught.value.en and "MING_CACHE_DIR" in caught.value.zh


def test_other_errors_pass(tmp_path):
    with pytest.raises(IsADirectoryError), storage_errors(tmp_path):
        open(tmp_path, "wb")  # noqa: SIM115 - it never opens


def test_space(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet") > 0
    require_space(tmp_path, 0)
    with pytest.raises(FetchError) as caught:
        require_space(tmp_path, 1 << 60)
    assert "needed" in caught.value.en and "GB" in caught.value.zh


def test_sizes_for_people():
    assert gigabytes(1_117_320_768) == "1.12 GB" and gigabytes(34_000_000) == "34 MB" and gigabytes(None) == "0 MB"


def test_what_killed_processes_left_is_removed_in_time(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / "old", (time.time() - 100_000,) * 2)
    remove_stale(tmp_path)
    assert os.listdir(tmp_path) == ["new"]
    remove_stale(tmp_path / "missing")


# ----------------------------------------------------------------------------------------------------- progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speed_and_time_left():
    clock, seen = Clock(), []
    meter = Meter(seen.append, "fetch", 1000, "bytes", clock=clock)
    for done in range(0, 501, 100):
        meter.update(done, "file")
        clock.now += 1
    assert seen[-1] == Progress("fetch", 500, 1000, "bytes", "file", 100.0, 5.0)
    assert seen[-1].fraction == 0.5
    meter.update(100)  # begun again: no speed yet
    assert seen[-1].speed == 0 and seen[-1].eta is None


def test_it_calls_back_now_and_then_and_at_the_end():
    clock, seen = Clock(), []
    meter = Meter(seen.append, "fetch", 1000, "bytes", clock=clock)
    for done in range(1001):
        meter.update(done)
        clock.now += 0.001
    assert 5 <= len(seen) <= 8 and seen[-1].done == 1000
    Meter(None, "fetch", 10, "bytes").update(10)


def test_it_names_its_own_detail_unless_told_another():
    seen = []
    meter = Meter(seen.append, "build", 3, "steps", detail="4bit")
    meter.update(0, force=True)
    meter.update(1, "a tensor", force=True)
    assert [step.detail for step in seen] == ["4bit", "a tensor"]


def test_an_unknown_total_has_no_fraction():
    assert Progress("fetch", 5, 0, "bytes").fraction == 0
