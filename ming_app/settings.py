"""One typed `Settings`, read from MING_* environment variables and overridden by flags.

Nothing else in the project reads the environment for its own configuration. No heavy imports here.
"""

from __future__ import annotations

import contextlib
import locale
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ming_app.errors import UsageError

BACKENDS = ("auto", "cpu", "torch")
PRECISIONS = ("auto", "4bit", "mix", "8bit", "float32", "bf16", "nf4", "int8")  # first three cpu, the rest torch


PROGRESS = ("auto", "disk", "browser", "account")
REGIONS = ("auto", "cn", "us", "uk", "eu", "hk", "tw", "world")


def default_cache_dir() -> Path:
    """The platform's cache folder for this app: XDG on Linux, ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "ming-app"


def default_data_dir() -> Path:
    """The platform's folder for this app's user data: XDG on Linux, ~/Library/Application Support, %APPDATA%."""
    if sys.platform == "win32":
        root = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Application Support"
    else:
        root = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return root / "ming-app"


TRUE = ("1", "t", "true")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Every knob of the app. Environment: MING_<FIELD IN CAPITALS>, e.g. MING_CACHE_DIR, MING_MODEL."""

    model: str = "ming-moe-1.5b"
    """A name of weights/catalog.toml, a local folder, or a hub id."""
    adapter: str = ""
    """Adapter to use in place of the catalogue's: a folder, a name of the catalogue, or a hub id; "none" serves the bare base."""
    weights: str = ""
    """A file or folder that holds the base weights already (tried before any download; its hash still decides)."""
    cache_dir: Path = field(default_factory=default_cache_dir)
    """Where downloads and built engines live; MING_CACHE_DIR moves it."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Where conversations, exam progress and imported banks are kept; MING_DATA_DIR moves it."""
    progress: str = "auto"
    """Who keeps exam progress: "disk" (this machine, for whoever opens the page), "browser" (each visitor's own), "auto"
    (disk where only this machine can reach the page, else browser), "account" (this machine, apart for every visitor who
    has signed in; browser for the others)."""
    backend: str = "auto"
    precision: str = "auto"
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""
    threads: int = 0
    """CPU threads of the engine; 0: one for each core that the process may use."""
    context: int = 4096
    """Context limit in tokens (prompt + answer), capped by the model's own."""
    host: str = "127.0.0.1"
    port: int = 7860
    hosts: str = ""
    """Further names, separated by commas, by which a page that listens on this machine only may be asked for: a proxy in
    front of it may keep the name it is reached by."""
    lang: str = ""
    """Language of messages on the command line: "zh" or "en"; empty follows the locale."""
    region: str = "auto"
    """Whose emergency numbers a warning names: "cn", "us", "uk", "eu", "hk", "tw", "world"; "auto" follows the language."""
    space: str = ""
    """Id of the Hugging Face Space this runs on, as the Space says itself; empty elsewhere."""
    sign_in: str = ""
    """The Space's sign-in (its OAuth client id), where its README has `hf_oauth: true`."""
    zerogpu: bool = False
    """Whether this is a ZeroGPU Space, as the Space says itself (SPACES_ZERO_GPU): see engine/zerogpu.py."""
    streams: int = 8
    """Answers that are written at the same time; more wait."""
    kv_tokens: int = 0
    """Tokens of all conversations together that the KV cache holds; 0: as many contexts as there is room for,
    one to four. Bounds its memory."""
    max_queue: int = 32
    """Requests that may wait for their turn; one more is refused politely."""
    api_keys: str = field(default="", repr=False)
    """Keys of the HTTP API, separated by commas, or "@" and the path of a file with one a line; "": this machine only."""
    drain_seconds: int = 30
    """Seconds that answers have to end when the server is stopped; what is written by then is kept."""
    per_visitor: int = 4
    """Unfinished requests that one visitor of the page, or one key of the API (or `user` of it), may have; 0: any number."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("backend", BACKENDS),
            ("precision", PRECISIONS),
            ("device", ("auto", "cpu", "cuda")),
            ("progress", PROGRESS),
            ("region", REGIONS),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.",
                    f"{name} 的值是 {getattr(self, name)!r}；请从 {'、'.join(allowed)} 中选择。",
                )
        for name, low, high in (
            ("threads", 0, 1024),
            ("context", 256, 1 << 20),  # less leaves no room for a question beside the system turn and an answer
            ("port", 0, 65535),
            ("streams", 1, 256),
            ("kv_tokens", 0, 1 << 26),
            ("max_queue", 1, 100_000),
            ("per_visitor", 0, 100_000),
            ("drain_seconds", 0, 3600),
        ):
            if not low <= getattr(self, name) <= high:
                raise UsageError(
                    f"{name} is {getattr(self, name)}; it must be between {low} and {high}.",
                    f"{name} 的值是 {getattr(self, name)}；应在 {low} 到 {high} 之间。",
                )

    @classmethod
    def load(cls, overrides: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None) -> Settings:
        """Settings from the environment, then from `overrides` (entries that are None are ignored).

        Raises UsageError for a value that cannot be read.
        """
        env = os.environ if env is None else env
        values: dict[str, Any] = {}
        for entry in fields(cls):
            text = env.get(f"MING_{entry.name.upper()}")
            if text:
                values[entry.name] = _parse(entry.name, str(entry.type), text)
        if env.get("SPACE_ID"):  # a Hugging Face Space is reached from outside, on this port
            own = {"space": env["SPACE_ID"], "sign_in": env.get("OAUTH_CLIENT_ID", "")}
            values = {"host": "0.0.0.0", "port": 7860, **own, **values}
        if env.get("SPACES_ZERO_GPU", "").lower() in TRUE:
            values = {"zerogpu": True, **values}
        values.update({k: v for k, v in (overrides or {}).items() if v is not None})
        return cls(**values)

    def with_(self, **changes: Any) -> Settings:
        """A copy with some fields changed."""
        return replace(self, **changes)

    @property
    def keeps_progress(self) -> bool:
        """Whether exam progress is kept on this machine's disk, for whoever opens the page."""
        return self.progress == "disk" or (self.progress == "auto" and self.host in LOOPBACK)

    def message_lang(self) -> str:
        """ "zh" or "en": the `lang` setting, else the locale of the process."""
        if self.lang:
            return "zh" if self.lang.lower().startswith("zh") else "en"
        name = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG") or ""
        if not name:  # Windows sets none of these; its own names read "Chinese (Simplified)_China"
            with contextlib.suppress(ValueError):  # a locale that Python cannot name
                name = locale.getlocale()[0] or ""
        return "zh" if name.lower().startswith(("zh", "chinese")) else "en"


def _parse(name: str, kind: str, text: str) -> Any:
    if kind == "Path":
        return Path(os.path.expanduser(text))
    if kind == "bool":
        return text.lower() in TRUE
    if kind != "int":
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"MING_{name.upper()} must be a whole number, not {text!r}.",
            f"环境变量 MING_{name.upper()} 应为整数，而不是 {text!r}。",
        ) from None
