"""`python -m ming_app weights list|fetch|show|convert`: results as JSON-ready dicts, and the same for people as text.

`add_weights_parser` describes the words, `run_weights` does the work, `weights_text` prints its result. No torch.
"""

from __future__ import annotations

import argparse
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ming_app.errors import MingError, UsageError
from ming_app.models import catalog
from ming_app.models.catalog import HubFile, HubSnapshot, LocalPath, Model, Source, WheelMirror
from ming_app.models.preflight import available_memory
from ming_app.models.progress import ProgressCallback
from ming_app.models.store import gigabytes
from ming_app.settings import Settings

Text = Callable[[str, str], str]
"""(English, Chinese) -> the one to show."""


def add_weights_parser(
    subparsers: Any, text: Text = lambda en, zh: en, parents: Sequence[argparse.ArgumentParser] = ()
) -> argparse.ArgumentParser:
    """Add the `weights` command; `parents` bring the options common to all commands (--json, --lang, --cache-dir)."""
    summary = text("models: what is here, fetch, convert an adapter", "模型：查看、下载权重，转换适配器")
    parser = subparsers.add_parser("weights", help=summary, description=summary)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, en: str, zh: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text(en, zh), description=text(en, zh), parents=list(parents))

    action("list", "every model the app knows", "列出应用支持的所有模型")
    getting = action("fetch", "download a model, or check the one that is here", "下载模型，或校验已有的模型")
    getting.add_argument(
        "name", nargs="?", metavar="NAME", help=text("default: the model in use", "默认：当前使用的模型")
    )
    showing = action("show", "one model: where it is, its hash, its sources", "查看一个模型：位置、哈希、来源")
    showing.add_argument("name", metavar="NAME")
    converting = action(
        "convert", "an official MING adapter folder into the native form", "将官方 MING 适配器文件夹转换为本应用格式"
    )
    converting.add_argument("src", metavar="SRC", type=Path)
    converting.add_argument("dst", metavar="DST", type=Path)
    return parser


def run_weights(
    args: argparse.Namespace, settings: Settings, progress: ProgressCallback | None = None
) -> dict[str, Any]:
    """Do what `args` ask. Gives {"models": [...], "engines": {...}} for list, one model for fetch and show, the adapter for convert."""
    if args.action == "list":
        models = [_summary(model, settings) for model in catalog.list_models()]
        return {"models": models, "engines": _engines(settings)}
    if args.action == "fetch":
        return fetch_result(args.name or settings.model, settings, progress)
    if args.action == "show":
        return show_result(args.name, settings)
    return convert_result(args.src, args.dst)


def fetch_result(name: str, settings: Settings, progress: ProgressCallback | None = None) -> dict[str, Any]:
    """Fetch a model and say where it is. One that is here already is hashed again, so that this also checks it."""
    from ming_app.models.fetch import fetch, locate, open_store

    model = catalog.find_model(name)
    here = locate(model, settings)
    for path in [here, *here.glob("*.safetensors")] if here else ():
        open_store(settings).doubt(path)
    local = fetch(model, settings, progress)
    return {
        **_summary(model, settings),
        "present": True,
        "base": str(local.base),
        "origin": open_store(settings).origin(local.base) or None,
        "sha256": local.fingerprint,
        "home": str(local.home),
        "adapter": str(local.adapter) if local.adapter else None,
        "adapter_layout": local.adapter_layout,
    }


def show_result(name: str, settings: Settings) -> dict[str, Any]:
    """Everything known about one model, without network."""
    from ming_app.models.fetch import adapter_layout, locate, open_store

    model = catalog.find_model(name)
    base = locate(model, settings)
    adapter = model.adapter_folder
    return {
        **_summary(model, settings),
        "base": str(base) if base else None,
        "origin": (open_store(settings).origin(base) or None) if base else None,
        "sources": [_source(source) for source in model.sources],
        "adapter": str(adapter) if adapter else None,
        "adapter_layout": adapter_layout(adapter) if adapter else None,
        "adapter_source": _source(model.adapter_hub) if model.adapter_hub else None,
        "memory_gb": dict(model.memory_gb),
        "shape": dict(model.shape),
    }


def convert_result(src: Path, dst: Path) -> dict[str, Any]:
    """Turn an adapter in the official layout into the native form at `dst`, which must not hold anything yet."""
    from ming_app.molora.checkpoint import load_adapter, save_adapter

    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UsageError(
            f"{dst} exists already and is not empty; name a new folder.", f"{dst} 已存在且非空；请指定新的文件夹。"
        )
    adapter = load_adapter(src)
    try:
        save_adapter(dst, adapter)
    except OSError as error:
        raise MingError(
            f"The adapter cannot be written to {dst} ({error.strerror}).",
            f"无法将适配器写入 {dst}（{error.strerror}）。",
        ) from error
    return {
        "source": str(src),
        "adapter": str(dst),
        "fingerprint": adapter.fingerprint,
        "config": adapter.config.to_dict(),
    }


def _summary(model: Model, settings: Settings) -> dict[str, Any]:
    from ming_app.models.fetch import locate  # numpy comes with it, and --help must answer at once

    return {
        "name": model.name,
        "title": model.title,
        "default": model.default,
        "kind": model.kind,
        "bytes": model.size,
        "sha256": model.sha256 or None,
        "licence": model.licence,
        "languages": list(model.languages),
        "memory_gb": model.memory_gb.get(model.cpu_precision),
        "present": locate(model, settings) is not None,
    }


def _engines(settings: Settings) -> dict[str, Any]:
    """The folder of built engines and its size: one stays for every adapter and precision ever served."""
    from ming_app.models.sources import folder_bytes

    folder = settings.cache_dir.expanduser().absolute() / "engines"
    return {"path": str(folder), "bytes": folder_bytes(folder)}


def _source(source: Source) -> dict[str, Any]:
    if isinstance(source, HubFile):
        return {"type": "hub", "repo": source.repo, "revision": source.revision, "file": source.file}
    if isinstance(source, HubSnapshot):
        return {"type": "snapshot", "repo": source.repo, "revision": source.revision}
    if isinstance(source, WheelMirror):
        return {"type": "pypi", "project": source.project, "version": source.version, "parts": source.parts}
    assert isinstance(source, LocalPath)
    return {"type": "local", "path": str(source.path)}


# ---------------------------------------------------------------------------------------------------- for people


def weights_text(result: dict[str, Any], text: Text = lambda en, zh: en) -> str:
    """A result of `run_weights` for a terminal."""
    if "models" in result:
        return "\n".join([_table_text(result["models"], text), *_engines_text(result.get("engines"), text)])
    labels = {
        "name": ("model", "模型"),
        "title": ("title", "名称"),
        "present": ("here", "已在本机"),
        "base": ("base", "基座"),
        "origin": ("came from", "获取自"),
        "bytes": ("size", "大小"),
        "sha256": ("SHA-256", "SHA-256"),
        "licence": ("licence", "许可"),
        "languages": ("languages", "语言"),
        "memory_gb": ("memory", "所需内存"),
        "sources": ("sources", "来源"),
        "home": ("tokenizer, config", "分词器与配置"),
        "adapter": ("adapter", "适配器"),
        "adapter_source": ("adapter from", "适配器来源"),
        "adapter_layout": ("layout", "格式"),
        "source": ("from", "来自"),
        "fingerprint": ("fingerprint", "指纹"),
    }
    rows = [
        (text(*labels[key]), _plain(key, value, text))
        for key, value in result.items()
        if key in labels and value not in (None, "")
    ]
    width = max(_width(label) for label, _ in rows)
    return "\n".join(f"{_pad(label, width)}  {value}" for label, value in rows)


def _plain(key: str, value: Any, text: Text) -> str:
    if key == "bytes":
        return gigabytes(value)
    if key == "present":
        return text("yes", "是") if value else text("no", "否")
    if key == "memory_gb":
        return ", ".join(f"{k} {v:g} GB" for k, v in value.items()) if isinstance(value, dict) else f"{value:g} GB"
    if key == "sources":
        return "; ".join(_plain("source", source, text) for source in value)
    if isinstance(value, dict):
        return " ".join(str(v) for v in value.values())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _table_text(models: list[dict[str, Any]], text: Text) -> str:
    rows = [
        [
            text("model", "模型"),
            text("download", "下载量"),
            text("memory", "内存"),
            text("languages", "语言"),
            text("here", "已在本机"),
            text("licence", "许可"),
        ]
    ]
    for model in models:
        name = f"{model['name']}{' *' if model['default'] else ''}"
        here = text("yes", "是") if model["present"] else text("no", "否")
        memory = f"{model['memory_gb']:g} GB"
        rows.append([name, gigabytes(model["bytes"]), memory, "/".join(model["languages"]), here, model["licence"]])
    widths = [max(_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(_pad(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    free = available_memory()
    note = text("* the default. Memory: to serve on a CPU", "* 默认模型。内存：在 CPU 上运行所需")
    have = text(f"; {gigabytes(free)} free here.", f"；本机可用 {gigabytes(free)}。") if free else "."
    return "\n".join([*lines, "", note + have])


def _engines_text(engines: dict[str, Any] | None, text: Text) -> list[str]:
    if not engines or not engines["bytes"]:
        return []
    size, path = gigabytes(engines["bytes"]), engines["path"]
    en = f"Built engines take {size} in {path}; any of them may be deleted and is built again when needed."
    return [text(en, f"已构建的引擎占用 {size}：{path}；可随时删除，需要时会重新构建。")]


def _width(text: str) -> int:
    """Columns in a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def readme_table(models: Sequence[Model]) -> str:
    """The table of weights/README.md (Markdown)."""
    lines = ["| name | base | download | SHA-256 | memory (GB) by precision, context 4096 | languages | licence |"]
    lines.append("|---|---|---:|---|---|---|---|")
    for model in models:
        sources = [source for source in model.sources if isinstance(source, HubFile | HubSnapshot)]
        base = ", ".join(f"{source.repo}@{source.revision[:8]}" for source in sources)
        memory = ", ".join(f"{name} {value:g}" for name, value in model.memory_gb.items())
        name = f"`{model.name}`{' (default)' if model.default else ''}"
        digest = f"`{model.sha256}`" if model.sha256 else "-"
        cells = (name, base, gigabytes(model.size), digest, memory, ", ".join(model.languages), model.licence)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
