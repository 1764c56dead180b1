"""Folders of a model hub (config, tokenizer, safetensors; adapters) through huggingface_hub, in a child process.

huggingface_hub knows repositories, revisions, tokens and resuming; a child process can be watched and killed, which
its threads cannot. Pickled base weights and code are never asked for. A fetched folder is found again without network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path

from ming_app.models.catalog import HubSnapshot
from ming_app.models.sources import Limits, SourceError, Tick, folder_bytes, hub_offline, run_child
from ming_app.models.store import Store, write_json

BASE_FILES: tuple[str, ...] = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "*.safetensors", "LICENSE*"),
    *("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
)
ADAPTER_FILES: tuple[str, ...] = (
    *("config.json", "adapter_config.json", "adapter.safetensors", "adapter_model.safetensors", "adapter_model.bin"),
    *("non_lora_trainables.bin", "README.md", "MODEL_CARD.md", "LICENSE*"),
)

# argv: repo, revision, cache folder, patterns as JSON; prints the folder. The time-out is for the first contact.
_CHILD = """
import json, sys
from huggingface_hub import snapshot_download
repo, revision, cache, patterns = sys.argv[1:]
print(snapshot_download(repo, revision=revision, cache_dir=cache, allow_patterns=json.loads(patterns), etag_timeout=10))
"""


def find_snapshot(source: HubSnapshot, patterns: tuple[str, ...], store: Store) -> Path | None:
    """The folder of an earlier `fetch_snapshot` of these patterns, if it is still whole. No network."""
    try:
        note = json.loads(_note(source, patterns, store).read_text(encoding="utf-8"))
        folder, sizes = Path(note["folder"]), note["files"]
        if all((folder / name).stat().st_size == size for name, size in sizes.items()) and sizes:
            return folder
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def fetch_snapshot(source: HubSnapshot, patterns: tuple[str, ...], store: Store, limits: Limits, tick: Tick) -> Path:
    """Fetch the files of a repository that match `patterns`; a half-done fetch is taken up again. Raises SourceError."""
    if hub_offline():
        raise SourceError("HF_HUB_OFFLINE is set", "设置了 HF_HUB_OFFLINE（离线）")
    cache = store.folder("hub")
    command = [sys.executable, "-P", "-c", _CHILD, source.repo, source.revision, str(cache), json.dumps(patterns)]
    environment = {
        "HF_HUB_DISABLE_XET": "1",  # plain HTTP: works with hub mirrors, and its bytes can be watched growing
        **os.environ,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    watched = cache / f"models--{source.repo.replace('/', '--')}"
    folder = Path(run_child(command, environment, watched, 1 << 50, limits, tick).strip().splitlines()[-1])
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(_note(source, patterns, store), {"repo": source.repo, "folder": str(folder), "files": sizes})
    return folder


def snapshot_bytes(source: HubSnapshot, store: Store) -> int:
    """Bytes of a repository that are in the cache already, whole or half."""
    return folder_bytes(store.root / "hub" / f"models--{source.repo.replace('/', '--')}")


def _note(source: HubSnapshot, patterns: tuple[str, ...], store: Store) -> Path:
    """One note for each set of patterns: a repository fetched as an adapter is not yet there as a base."""
    name = re.sub(r"[^\w.-]", "--", f"{source.repo}@{source.revision}")
    asked = hashlib.sha256(json.dumps(sorted(patterns)).encode()).hexdigest()[:8]
    return store.folder("snapshots") / f"{name}-{asked}.json"
