"""The cache on disk: where things lie, and writing them so that a crash, a full disk or a second process does no harm.

<cache>/blobs/<sha256>.gguf      a downloaded base, named by its content; .partial while it grows
<cache>/bases/<sha256[:16]>/     config.json, tokenizer, and (torch only) model.safetensors converted from it
<cache>/hub/                     folders fetched from a model hub, in huggingface_hub's own layout
<cache>/checked/                 what was hashed: size, time and hash of a file, so that it is not hashed at every start
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ming_app.errors import FetchError
from ming_app.models.progress import Meter

CHUNK = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


class Store:
    """Paths of the cache under `root`. Folders are made when first needed."""

    def __init__(self, root: Path):
        self.root = root

    def blob(self, sha256: str) -> Path:
        return self.folder("blobs") / f"{sha256}.gguf"

    def partial(self, sha256: str) -> Path:
        return self.folder("blobs") / f"{sha256}.partial"

    def home(self, sha256: str) -> Path:
        return self.folder("bases", sha256[:16])

    def folder(self, *parts: str) -> Path:
        """A folder of the cache, made if need be. Raises FetchError when the cache cannot be written."""
        path = self.root.joinpath(*parts)
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def sha256(self, path: Path, meter: Meter | None = None) -> str:
        """SHA-256 of a file, hashed once and then remembered for as long as its size and times stay the same."""
        known = self._recall(path)
        if known and known.get("seen") == _identity(path) and isinstance(known.get("sha256"), str):
            return str(known["sha256"])
        digest = hash_file(path, meter)
        self.remember(path, digest)
        return digest

    def remember(self, path: Path, sha256: str, origin: str = "") -> None:
        """Note the hash of a file, and where it came from. Not being able to only costs hashing again."""
        self._write(path, {"seen": _identity(path), "sha256": sha256, "origin": origin or self.origin(path)})

    def doubt(self, path: Path) -> None:
        """Have a file hashed anew the next time, whatever was noted."""
        if self._recall(path):
            self._write(path, {"origin": self.origin(path)})

    def origin(self, path: Path) -> str:
        """Where a file came from, as noted when it was fetched; empty when not known."""
        return str((self._recall(path) or {}).get("origin") or "")

    def _write(self, path: Path, note: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._note(path).parent.mkdir(parents=True, exist_ok=True)
            write_json(self._note(path), note)

    def _recall(self, path: Path) -> dict[str, Any] | None:
        try:
            note = json.loads(self._note(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return note if isinstance(note, dict) else None

    def _note(self, path: Path) -> Path:
        return self.root / "checked" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"

    @contextlib.contextmanager
    def lock(self, name: str, waiting: Callable[[], Any] | None = None) -> Iterator[None]:
        """Hold the cache-wide lock `name`; while another process holds it, `waiting` is called twice a second."""
        path = self.folder("locks") / f"{name}.lock"
        lock = FileLock(path)
        with storage_errors(path):
            while True:
                try:
                    lock.acquire(timeout=0.5 if waiting else -1)
                    break
                except Timeout:
                    assert waiting is not None
                    waiting()
        try:
            yield
        finally:
            lock.release()


def _identity(path: Path) -> list[Any]:
    """What changes when a file does."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def hash_file(path: Path, meter: Meter | None = None) -> str:
    """SHA-256 of a file, lower-case hex."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if meter:
                meter.update(done, f"SHA-256 {path.name}")
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file written beside `path` that takes its place, durably and at once, only when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            sync(file)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with replacing(path) as file:
        file.write((json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def sync(file: BinaryIO) -> None:
    """Push a file's bytes to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable; systems that cannot (Windows) are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def free_bytes(path: Path) -> int:
    """Bytes free for us where `path` (which need not exist yet) will lie."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(path: Path, needed: int) -> None:
    """Raise FetchError when fewer than `needed` bytes are free under `path`."""
    with storage_errors(path):
        free = free_bytes(path)
    if free < needed:
        raise disk_full(path, needed, free)


def disk_full(path: Path, needed: int | None = None, free: int | None = None) -> FetchError:
    en = f" ({gigabytes(needed)} needed, {gigabytes(free)} free)" if needed is not None and free is not None else ""
    zh = f"（需要 {gigabytes(needed)}，剩余 {gigabytes(free)}）" if needed is not None and free is not None else ""
    return FetchError(
        f"The disk that holds {path} is full{en}. Free some space, or set MING_CACHE_DIR to a folder on another disk.",
        f"{path} 所在的磁盘空间不足{zh}。请清理空间，或把环境变量 MING_CACHE_DIR 设为其他磁盘上的文件夹。",
    )


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write at `path` into FetchError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(path) from error
        if error.errno in _UNWRITABLE:
            raise FetchError(
                f"The cache folder {path} cannot be written ({error.strerror}). "
                "Set MING_CACHE_DIR to a folder where you may write.",
                f"无法写入缓存文件夹 {path}（{error.strerror}）。请把环境变量 MING_CACHE_DIR 设为可写的文件夹。",
            ) from error
        raise


def gigabytes(count: int | None) -> str:
    """Bytes for people: "1.12 GB", "34 MB"."""
    count = count or 0
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def remove_stale(folder: Path, older_than: float = 86_400.0) -> None:
    """Remove temporary folders that a killed process left behind."""
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than:
                shutil.rmtree(path, ignore_errors=True)
