"""From a `Model` to files on this machine: `fetch` finds or downloads a base and its adapter, and the SHA-256 decides.

Order for a single file: the path a person gives (settings.weights), the cache, the Hugging Face libraries' own cache (where
a Space preloads), then the sources of the catalogue. What is found outside our cache is used where it lies. A download grows as `blobs/<sha256>.partial`, which any source can continue, and is renamed when its hash is right. Bytes
with a wrong hash are removed. Two processes that want the same file wait for each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ming_app.errors import FetchError
from ming_app.models import card
from ming_app.models.catalog import (
    HubFile,
    HubSnapshot,
    LocalPath,
    Model,
    Source,
    WheelMirror,
    existing,
    find_model,
    list_models,
)
from ming_app.models.progress import Meter, ProgressCallback
from ming_app.models.snapshot import ADAPTER_FILES, BASE_FILES, fetch_snapshot, find_snapshot, snapshot_bytes
from ming_app.models.sources import Limits, SourceError, hub_chunks, label, mirror_chunks
from ming_app.models.store import (
    Store,
    disk_full,
    free_bytes,
    remove_stale,
    require_space,
    storage_errors,
    sync,
    sync_folder,
)
from ming_app.models.tensors import weight_files
from ming_app.settings import Settings

LIMITS = Limits()
WAITING = "another process is fetching it / 另一个进程正在下载"


@dataclass(frozen=True)
class LocalModel:
    """A model whose files are all on this machine."""

    name: str
    title: str
    base: Path
    """a .gguf file, or a Hugging Face folder with safetensors"""
    fingerprint: str
    """SHA-256 hex of the base: of the one weights file, or of the list of hashes of its shards"""
    home: Path
    """folder with config.json, tokenizer.json, tokenizer_config.json, generation_config.json"""
    adapter: Path | None
    adapter_layout: str | None
    """"native", "official", or None without an adapter"""


def fetch(
    model: Model, settings: Settings, progress: ProgressCallback | None = None, *, limits: Limits = LIMITS
) -> LocalModel:
    """Bring `model` to this machine, or find it there; its adapter as `settings.adapter` asks.

    `progress` (stage "fetch", bytes) may raise to stop; what came so far is kept for the next time.
    Raises FetchError (what was tried, why it failed, what to do), WeightsError for a damaged base.
    """
    store = open_store(settings)
    if model.kind == "gguf":
        base, fingerprint = _gguf(model, settings, store, progress, limits)
        home = store.home(fingerprint)
        if not card.card_ready(home):
            with store.lock(f"card-{fingerprint[:16]}"):
                if not card.card_ready(home):
                    card.write_card(base, home, fingerprint)
    else:
        base = _folder(model, settings, store, progress, limits)
        fingerprint, home = folder_fingerprint(base, store, progress), base
    adapter = _adapter(model, settings, fingerprint, store, progress, limits)
    layout = adapter_layout(adapter) if adapter else None
    return LocalModel(model.name, model.title, base, fingerprint, home, adapter, layout)


def open_store(settings: Settings) -> Store:
    """The cache that `settings` names."""
    return Store(settings.cache_dir.expanduser().absolute())


def locate(model: Model, settings: Settings) -> Path | None:
    """Where the base of `model` lies on this machine already, without hashing, network, or writing; None if it does not."""
    store = open_store(settings)
    if isinstance(model.sources[0], LocalPath):
        return model.sources[0].path
    if model.kind == "gguf":
        blob = store.root / "blobs" / f"{model.sha256}.gguf"
        return blob if blob.exists() else _preloaded(model)
    return find_snapshot(model.sources[0], BASE_FILES, store) if isinstance(model.sources[0], HubSnapshot) else None


# --------------------------------------------------------------------------------------------- one file, by hash


@dataclass
class _Tried:
    """What was tried and why it failed, for the error that is raised when nothing is left."""

    en: list[str]
    zh: list[str]

    def add(self, what: str, en: str, zh: str) -> None:
        self.en.append(f"{what}: {en}")
        self.zh.append(f"{what}：{zh}")

    def error(self, model: Model) -> FetchError:
        tried_en, tried_zh = "\n  - ".join(["", *self.en]), "\n  - ".join(["", *self.zh])
        give_en = give_zh = ""
        if model.kind == "gguf":
            give_en = (
                f" or put the file {model.file} (SHA-256 {model.sha256}) on this machine and set MING_WEIGHTS to it,"
            )
            give_zh = f"或把文件 {model.file}（SHA-256 {model.sha256}）放到本机并将 MING_WEIGHTS 设为其路径，"
        else:
            give_en = " or set MING_WEIGHTS to a folder that holds the base,"
            give_zh = "或将 MING_WEIGHTS 设为存放基座的文件夹，"
        return FetchError(
            f"The weights of {model.name} could not be obtained. Tried:{tried_en}\n"
            f"Check the network or proxy and try again (the download goes on where it stopped),{give_en} "
            "or set HF_ENDPOINT to a hub mirror that you can reach.",
            f"无法获取 {model.name} 的权重。已尝试：{tried_zh}\n"
            f"请检查网络或代理后重试（会从中断处继续），{give_zh}或将 HF_ENDPOINT 设为可访问的模型库镜像。",
        )


def _gguf(
    model: Model, settings: Settings, store: Store, progress: ProgressCallback | None, limits: Limits
) -> tuple[Path, str]:
    """(the GGUF file, its SHA-256)."""
    local = model.sources[0]
    if isinstance(local, LocalPath):
        meter = Meter(progress, "fetch", local.path.stat().st_size, "bytes")
        return local.path, store.sha256(local.path, meter)
    tried, meter = _Tried([], []), Meter(progress, "fetch", model.size, "bytes")
    given = _given_file(model, settings.weights, store, tried, meter) if settings.weights else None
    found = given or _cached(model, store, meter) or _checked_preload(model, store, tried, meter)
    if found:
        return found, model.sha256
    part = store.partial(model.sha256)

    def waiting() -> None:
        meter.update(part.stat().st_size if part.exists() else 0, WAITING, force=True)

    with store.lock(model.sha256[:16], waiting), storage_errors(part):
        found = _cached(model, store, meter)  # the process waited for may have brought it
        if not found:
            found = _download(model, store, part, tried, meter, limits)
    return found, model.sha256


def _given_file(model: Model, given: str, store: Store, tried: _Tried, meter: Meter) -> Path | None:
    """The file that the person gave, or the one inside the folder given, whose hash is right. Never removed."""
    path = existing(given)
    if path is not None and path.is_dir():
        candidates = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size == model.size]
        if not candidates:
            tried.add(given, f"no file of {model.size} bytes there", f"其中没有大小为 {model.size} 字节的文件")
    elif path is not None and path.is_file():
        candidates = [path]
    else:
        tried.add(given[:200], "there is no such file or folder", "没有这个文件或文件夹")
        candidates = []
    for file in candidates:
        if file.stat().st_size != model.size:
            en, zh = f"it has {file.stat().st_size} bytes instead of {model.size}", "大小不符"
        else:
            digest = store.sha256(file, meter)
            if digest == model.sha256:
                return file.resolve()
            en, zh = _wrong_hash(digest, model.sha256)
        tried.add(str(file), en, zh)
    return None


def _cached(model: Model, store: Store, meter: Meter) -> Path | None:
    """The blob in the cache. One that was changed since it was checked is hashed again, and removed if it is wrong."""
    blob = store.blob(model.sha256)
    if not blob.exists():
        return None
    if blob.stat().st_size == model.size and store.sha256(blob, meter) == model.sha256:
        return blob
    with storage_errors(blob):
        blob.unlink(missing_ok=True)
    return None


def _preloaded(model: Model) -> Path | None:
    """The file in the cache that the Hugging Face libraries share, by repository and revision; its hash is still to be checked."""
    from huggingface_hub import try_to_load_from_cache

    for source in model.sources:
        if isinstance(source, HubFile):
            with contextlib.suppress(OSError, ValueError):  # not readable, or a name that this library refuses
                found = try_to_load_from_cache(source.repo, source.file, revision=source.revision)
                if isinstance(found, str):
                    return Path(found).resolve()
    return None


def _checked_preload(model: Model, store: Store, tried: _Tried, meter: Meter) -> Path | None:
    path = _preloaded(model)
    return _given_file(model, str(path), store, tried, meter) if path else None


def _download(model: Model, store: Store, part: Path, tried: _Tried, meter: Meter, limits: Limits) -> Path:
    """Try the sources in order until the whole has the right hash. Holds the lock of this blob."""
    scratch = store.folder("tmp")
    remove_stale(scratch)
    have = part.stat().st_size if part.exists() else 0
    require_space(part.parent, model.size - have)
    for source in model.sources:
        what = label(source)
        while True:
            try:
                resumed, digest = _append(source, model, part, scratch, meter, limits)
            except SourceError as error:
                if free_bytes(part.parent) < 1 << 20:  # a child process reports a full disk in its own words
                    raise disk_full(part.parent) from error
                tried.add(what, error.en, error.zh)
                break
            if digest == model.sha256:
                return _finish(model, store, part, what)
            part.unlink()
            tried.add(what, *_wrong_hash(digest, model.sha256))
            if not resumed:
                break  # every byte was this source's own; else it gets one clean chance
    raise tried.error(model)


def _append(source: Source, model: Model, part: Path, scratch: Path, meter: Meter, limits: Limits) -> tuple[bool, str]:
    """Let `source` complete `part`. (whether earlier bytes were built upon, SHA-256 of the whole)."""
    what, digest = label(source), hashlib.sha256()
    with part.open("ab+") as file:
        file.seek(0)
        if os.fstat(file.fileno()).st_size > model.size:
            file.truncate(0)
        at = 0
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            at += len(chunk)
            meter.update(at, "SHA-256")
        resumed, shown = at > 0, at
        meter.rest()

        def tick(pending: int) -> None:
            nonlocal shown
            shown = max(shown, min(model.size, at + pending))
            meter.update(shown, what, force=True)

        try:
            for chunk in _chunks(source, at, model.size, limits, scratch, tick):
                file.write(chunk)
                digest.update(chunk)
                at += len(chunk)
                shown = max(shown, at)
                meter.update(shown, what)
        finally:
            sync(file)  # what came is kept for the next source or the next run
    return resumed, digest.hexdigest()


def _chunks(source: Source, offset: int, size: int, limits: Limits, scratch: Path, tick) -> Iterator[bytes]:  # noqa: ANN001
    if offset >= size:
        return iter(())
    if isinstance(source, HubFile):
        return hub_chunks(source, offset, size, limits)
    assert isinstance(source, WheelMirror)
    return mirror_chunks(source, offset, size, limits, scratch, tick)


def _finish(model: Model, store: Store, part: Path, origin: str) -> Path:
    blob = store.blob(model.sha256)
    os.replace(part, blob)
    sync_folder(blob.parent)
    store.remember(blob, model.sha256, origin)
    return blob


def _wrong_hash(found: str, wanted: str) -> tuple[str, str]:
    return (
        f"wrong SHA-256: {found} instead of {wanted}",
        f"SHA-256 不符：得到 {found}，应为 {wanted}",
    )


# ------------------------------------------------------------------------------------------- folders and adapters


def _folder(model: Model, settings: Settings, store: Store, progress: ProgressCallback | None, limits: Limits) -> Path:
    """A Hugging Face folder with the base."""
    tried = _Tried([], [])
    if settings.weights:
        path = existing(settings.weights)
        if path is not None and (path / "config.json").is_file():
            return path.resolve()
        tried.add(settings.weights[:200], "no folder with a config.json", "不是包含 config.json 的文件夹")
    for source in model.sources:
        if isinstance(source, LocalPath):
            weight_files(source.path)
            return source.path
        assert isinstance(source, HubSnapshot)
        folder = _snapshot(source, BASE_FILES, model.size, store, tried, progress, limits)
        if folder:
            weight_files(folder)
            return folder
    raise tried.error(model)


def _snapshot(
    source: HubSnapshot,
    patterns: tuple[str, ...],
    size: int,
    store: Store,
    tried: _Tried,
    progress: ProgressCallback | None,
    limits: Limits,
) -> Path | None:
    found = find_snapshot(source, patterns, store)
    if found:
        return found
    meter, what = Meter(progress, "fetch", size, "bytes"), label(source)
    name = f"snapshot-{source.repo.replace('/', '--')}"
    with store.lock(name, lambda: meter.update(snapshot_bytes(source, store), what, force=True)):
        found = find_snapshot(source, patterns, store)
        if found:
            return found
        require_space(store.root, size - snapshot_bytes(source, store))
        try:
            with storage_errors(store.root):
                return fetch_snapshot(
                    source, patterns, store, limits, lambda there: meter.update(there, what, force=True)
                )
        except SourceError as error:
            if free_bytes(store.root) < 1 << 20:
                raise disk_full(store.root) from error
            tried.add(what, error.en, error.zh)
            return None


def folder_fingerprint(folder: Path, store: Store, progress: ProgressCallback | None = None) -> str:
    """SHA-256 of the weights in a Hugging Face folder: of the one file, or of the lines "<hash>  <name>" of the shards."""
    names = weight_files(folder)
    digests = []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FetchError(f"The folder {folder} lacks the shard {name}.", f"文件夹 {folder} 缺少分片 {name}。")
        digests.append(store.sha256(path, Meter(progress, "fetch", path.stat().st_size, "bytes")))
    if len(digests) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _adapter(
    model: Model,
    settings: Settings,
    fingerprint: str,
    store: Store,
    progress: ProgressCallback | None,
    limits: Limits,
) -> Path | None:
    if settings.adapter.lower() == "none":
        return None
    wanted: Path | HubSnapshot | None
    if settings.adapter:
        wanted = _named_adapter(settings.adapter)
    else:
        # a file given by hand that is a catalogued base, byte for byte, is served as that model
        known = next((m for m in list_models() if m.sha256 and m.sha256 == fingerprint), model)
        wanted = known.adapter_folder or known.adapter_hub
    if isinstance(wanted, HubSnapshot):
        tried = _Tried([], [])
        folder = _snapshot(wanted, ADAPTER_FILES, 0, store, tried, progress, limits)
        if folder is None:
            reasons_en, reasons_zh = "; ".join(tried.en), "；".join(tried.zh)
            raise FetchError(
                f"The adapter {wanted.repo} could not be obtained ({reasons_en}). Set MING_ADAPTER to a folder that holds it, "
                'or to "none" for the bare base.',
                f"无法获取适配器 {wanted.repo}（{reasons_zh}）。请将 MING_ADAPTER 设为存放它的文件夹，或设为 none 只使用基座。",
            )
        wanted = folder
    if wanted is not None and adapter_layout(wanted) is None:
        raise FetchError(
            f"The adapter folder {wanted} does not exist or holds no adapter. Set MING_ADAPTER to a folder that does, "
            'or to "none" for the bare base.',
            f"适配器文件夹 {wanted} 不存在或其中没有适配器。请将 MING_ADAPTER 设为正确的文件夹，或设为 none 只使用基座。",
        )
    return wanted


def _named_adapter(name: str) -> Path | HubSnapshot:
    """The adapter a person names: a folder, a model of the catalogue, or a hub id."""
    path = existing(name)
    if path is not None:
        return path.resolve()
    if name.startswith((".", "/", "~")):
        return Path(os.path.expanduser(name))
    model = find_model(name)
    found = model.adapter_folder or model.adapter_hub
    if found is None and isinstance(model.sources[0], HubSnapshot):
        found = model.sources[0]
    assert found is not None
    return found


def adapter_layout(folder: Path) -> str | None:
    """ "native", "official" (the layout of the released MING models), or None when the folder holds no adapter."""
    if os.path.isfile(folder / "adapter.safetensors"):  # unlike pathlib's, it answers any name
        return "native"
    return "official" if os.path.isfile(folder / "adapter_config.json") else None
