"""What a Hugging Face Space of this app is made of: the files, the front matter of its README, its variables.

Contract: `plan` reads a checkout and decides, `write` puts the planned files into an empty folder; nothing here knows the
network or a token. Only what serving needs is planned: no tests, no training code, no caches, nothing that git does not
track. Raises MingError for a file that looks like a secret, a link, or a checkout that lacks something.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ming_app.errors import MingError, UsageError
from ming_app.models.catalog import HubFile, HubSnapshot, Model, default_model, find_model, list_models

ROOT = Path(__file__).resolve().parents[2]
FILES = ("app.py", "requirements.txt", "README.md", "LICENSE", "weights/README.md", "weights/catalog.toml")
DOCKER_FILES = ("Dockerfile", ".dockerignore")
FOLDERS = ("ming_app", "examples")
ADAPTER_FILES = ("adapter.safetensors", "config.json")
SUFFIXES = (
    *(".py", ".toml", ".tsv", ".json", ".jsonl", ".yaml", ".md"),
    *(".js", ".css", ".html", ".svg", ".webp", ".sh", ".npz", ".safetensors"),
)
"""what belongs to the app, where git cannot say"""
SDKS = ("gradio", "docker")
PORT = 7860
ROOM = 0.9
"""share of a machine's memory that a model may take"""
SPACES_PYTHON = "3.12.12"
SPACES_TORCH = "torch>=2.8,<=2.11.0      # the versions that ZeroGPU has"
SPACES_PACKAGE = "spaces>=0.51,<1          # lends a GPU of ZeroGPU for one call"


@dataclass(frozen=True)
class Hardware:
    """One kind of machine that the hub offers, and what is served there when nothing else is asked for."""

    flavor: str
    """the hub's name for it"""
    memory_gb: float
    """memory for the model: the GPU's where there is one"""
    model: str
    """name in the catalogue; empty: its default"""
    precision: str


HARDWARE = {
    "cpu": Hardware("cpu-basic", 16, "", "auto"),
    "zerogpu": Hardware("zero-a10g", 48, "ming-moe-7b", "bf16"),
    "gpu": Hardware("l4x1", 24, "ming-moe-7b", "nf4"),
}

SECRET_NAMES = (
    *(".env", ".env.*", "*.env", ".netrc", ".npmrc", ".pypirc", ".git-credentials", ".htpasswd", "secrets.*"),
    *(
        "*.pem",
        "*.key",
        "*.p12",
        "*.pfx",
        "*.jks",
        "*.keystore",
        "*.kdbx",
        "*.ppk",
        "id_rsa*",
        "id_ed25519*",
        "id_ecdsa*",
    ),
    *("token", "token.txt", "*.token", "hf_token*", "credentials", "credentials.*", "*service-account*.json"),
)
SECRET_TEXT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bhf_[A-Za-z0-9]{30,}|\bgh[opsu]_[A-Za-z0-9]{36}|\bgithub_pat_\w{60,}"
    rb"|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{32,}|\bxox[abprs]-[\w-]{20,}"
)
SCANNED_BYTES = 8 << 20
"""larger files are weights"""


@dataclass(frozen=True)
class Entry:
    """One file of the upload: copied from `source`, or written as `data`."""

    path: str
    size: int
    source: Path | None = None
    data: bytes = b""


@dataclass(frozen=True)
class Upload:
    """Everything a Space receives."""

    sdk: str
    hardware: Hardware
    model: str
    front_matter: Mapping[str, Any]
    variables: Mapping[str, str]
    """the Space's variables: which model it serves"""
    files: tuple[Entry, ...]
    """sorted by path"""
    left_out: tuple[str, ...] = ()
    """files among them that git does not track, and that stay here"""

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.files)


def plan(root: Path = ROOT, *, hardware: str = "cpu", sdk: str = "gradio", model: str = "") -> Upload:
    """The Space for one kind of hardware (a key of HARDWARE). `model`: another name of the catalogue."""
    machine = HARDWARE[hardware]
    if hardware == "zerogpu" and sdk == "docker":
        raise UsageError(
            "ZeroGPU runs Gradio Spaces only. Leave out --sdk docker, or choose --hardware cpu or gpu.",
            "ZeroGPU 仅支持 Gradio Space。请去掉 --sdk docker，或改用 --hardware cpu 或 gpu。",
        )
    served = _served(model or machine.model, machine)
    own = served.adapter_folder.name if served.adapter_folder else ""
    front, readme = front_matter((root / "README.md").read_text(encoding="utf-8"), machine, sdk, served)
    written = {"README.md": readme}
    if hardware == "zerogpu":
        written["requirements.txt"] = _zerogpu_requirements((root / "requirements.txt").read_text(encoding="utf-8"))
    files = []
    names, left_out = chosen_files(root, sdk, own)
    for name in names:
        if name in written:
            data = written[name].encode()
            files.append(Entry(name, len(data), data=data))
        else:
            files.append(Entry(name, (root / name).stat().st_size, source=root / name))
    return Upload(
        sdk=sdk,
        hardware=machine,
        model=served.name,
        front_matter=front,
        variables={"MING_MODEL": served.name, "MING_PRECISION": machine.precision},
        files=tuple(files),
        left_out=tuple(left_out),
    )


def write(upload: Upload, folder: Path) -> None:
    """Puts the files into `folder`, which must be new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is there already and not empty. Name a new folder with --out.",
            f"{folder} 已存在且不为空。请用 --out 指定一个新文件夹。",
        )
    try:
        for entry in upload.files:
            target = folder / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if entry.source is None:
                target.write_bytes(entry.data)
            else:
                shutil.copyfile(entry.source, target)
    except OSError as error:
        raise MingError(
            f"The folder {folder} cannot be written: {error.strerror}. Choose another one with --out.",
            f"无法写入文件夹 {folder}：{error.strerror}。请用 --out 指定其他文件夹。",
        ) from error


# -- which model ------------------------------------------------------------------------------------------------------


def _served(name: str, machine: Hardware) -> Model:
    """The model of the catalogue by that name. UsageError when it is none, or needs more memory than the machine has."""
    model = find_model(name) if name else default_model()
    if not model.listed:
        raise UsageError(
            f"A Space serves a model of the catalogue, which {name!r} is not; see: weights list.",
            f"Space 只能使用模型目录中的模型，而 {name!r} 不在其中；列表见 weights list。",
        )
    if not _fits(model, machine):
        fitting = [other.name for other in list_models() if _fits(other, machine)]
        need = _memory(model, machine)
        raise UsageError(
            f"{model.name} needs {need:g} GB, and {machine.flavor} has {machine.memory_gb:g} GB. These fit: {', '.join(fitting)}.",
            f"{model.name} 需要 {need:g} GB 内存，而 {machine.flavor} 只有 {machine.memory_gb:g} GB。可用的有：{'、'.join(fitting)}。",
        )
    return model


def _memory(model: Model, machine: Hardware) -> float:
    return model.memory_gb[model.cpu_precision if machine.precision == "auto" else machine.precision]


def _fits(model: Model, machine: Hardware) -> bool:
    return _memory(model, machine) <= ROOM * machine.memory_gb


# -- what is written for it -------------------------------------------------------------------------------------------


def front_matter(readme: str, machine: Hardware, sdk: str, model: Model) -> tuple[dict[str, Any], str]:
    """The README's front matter for this Space, and the whole README with it."""
    from huggingface_hub import SpaceCard, SpaceCardData

    card = SpaceCard(readme)
    values = card.data.to_dict()
    sources = [source for source in model.sources if isinstance(source, HubFile | HubSnapshot)]
    values["suggested_hardware"] = machine.flavor
    values["models"] = [source.repo for source in (*sources, model.adapter_hub) if source is not None]
    # what is preloaded is looked for file by file: a repository of many files is fetched at the first start
    values["preload_from_hub"] = [f"{s.repo} {s.file} {s.revision}" for s in sources if isinstance(s, HubFile)]
    if machine is HARDWARE["zerogpu"]:
        values["python_version"] = SPACES_PYTHON
    if sdk == "docker":
        gone = ("sdk_version", "python_version", "app_file", "preload_from_hub")  # the Dockerfile decides these
        values = {key: value for key, value in values.items() if key not in gone}
        values |= {"sdk": "docker", "app_port": PORT}
    if not values.get("preload_from_hub"):
        values.pop("preload_from_hub", None)
    card.data = SpaceCardData(**values)
    text = str(card)
    return SpaceCard(text).data.to_dict(), text


def _zerogpu_requirements(text: str) -> str:
    """requirements.txt within what ZeroGPU has: its own versions of torch, and the package that lends the GPU."""
    lines = [SPACES_TORCH if re.match(r"torch\b", line) else line for line in text.splitlines()]
    return "\n".join([*lines, SPACES_PACKAGE]) + "\n"


# -- which files ------------------------------------------------------------------------------------------------------


def chosen_files(root: Path, sdk: str, adapter: str) -> tuple[list[str], list[str]]:
    """(what is uploaded, what is left out because git does not track it): names relative to `root`, sorted.

    `adapter` is the bundled adapter's folder under weights, or empty.
    """
    single = FILES + (DOCKER_FILES if sdk == "docker" else ())
    folders = (*FOLDERS, *([f"weights/{adapter}"] if adapter else []))

    def ours(known: list[str]) -> list[str]:
        return sorted({name for name in known if name in single or name.startswith(tuple(f"{f}/" for f in folders))})

    tracked = _listed(root)
    names = ours(_found(root, folders) + list(single) if tracked is None else tracked)
    needed = {*single, "ming_app/__init__.py", *(f"weights/{adapter}/{name}" for name in ADAPTER_FILES if adapter)}
    missing = sorted(name for name in needed | set(names) if name not in names or not (root / name).is_file())
    if missing:
        raise MingError(
            f"The checkout in {root} lacks {', '.join(missing)}, or git does not track it. A Space is deployed from a whole checkout of this project.",
            f"{root} 中缺少 {'、'.join(missing)}，或它们未被 git 跟踪。请在本项目的完整代码目录中部署 Space。",
        )
    for name in names:
        _refuse_secret(root, name)
    return names, ours(_listed(root, "--others", "--exclude-standard") or [])


def _listed(root: Path, *which: str) -> list[str] | None:
    """What git tracks, or `which` else it lists; None where `root` is not the top of a checkout that git can read."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True).stdout.decode()

    try:
        inside = git("rev-parse", "--show-prefix").strip()  # empty at the top of a checkout
        return None if inside else [name for name in git("ls-files", "-z", *which).split("\0") if name]
    except (OSError, subprocess.CalledProcessError, UnicodeDecodeError):
        return None


def _found(root: Path, folders: tuple[str, ...]) -> list[str]:
    """Files of the app by their endings, and whatever is named like a secret, so that it is refused and not left behind."""
    names = []
    for path in (path for folder in folders for path in (root / folder).rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() or "__pycache__" in name:
            continue
        hidden = any(part.startswith(".") for part in name.split("/"))
        if _named_like_a_secret(name) or (path.suffix in SUFFIXES and not hidden):
            names.append(name)
    return names


def _named_like_a_secret(name: str) -> bool:
    return any(fnmatch(name.rpartition("/")[2].lower(), pattern) for pattern in SECRET_NAMES)


def _refuse_secret(root: Path, name: str) -> None:
    path = root / name
    if any(part.is_symlink() for part in (path, *(root / above for above in Path(name).parents[:-1]))):
        raise MingError(
            f"{name} is a link, which may lead out of the checkout. Replace it by a file, then deploy again.",
            f"{name} 是链接，可能指向项目之外。请换成普通文件后重新部署。",
        )
    small = path.stat().st_size <= SCANNED_BYTES
    if _named_like_a_secret(name) or (small and SECRET_TEXT.search(path.read_bytes())):
        raise MingError(
            f"{name} looks like a secret (a key, a token or a password), so nothing was uploaded. Remove it; a Space keeps secrets in its settings.",
            f"{name} 疑似包含密钥、令牌或密码，因此未上传任何内容。请将其移除；Space 的机密应填写在其设置页中。",
        )
