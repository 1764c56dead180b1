"""`deploy space`: the folder holds what serving needs and nothing else, secrets are refused, the hub gets just that folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import SpaceCard, SpaceHardware
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from ming_app import cli
from ming_app.deploy import space
from ming_app.deploy.space import HARDWARE, plan, write
from ming_app.deploy.upload import send
from ming_app.errors import MingError, UsageError
from ming_app.models.catalog import default_model
from ming_app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SMALL = "ming-moe-0.5b"
has_git = pytest.mark.skipif(
    subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True).returncode != 0
    if shutil.which("git")
    else True,
    reason="git cannot read this checkout",
)


def names(upload: space.Upload) -> list[str]:
    return [entry.path for entry in upload.files]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout of the right shape, not known to git."""
    root = tmp_path / "checkout"
    for name in ("app.py", "requirements.txt", "README.md", "LICENSE", "Dockerfile", ".dockerignore"):
        put(root, name, (ROOT / name).read_text(encoding="utf-8"))
    for name in ("ming_app/__init__.py", "ming_app/ui/static/page.js", "examples/prompts.toml", "tests/test_a.py"):
        put(root, name, "x = 1\n")
    for name in (
        "README.md",
        "catalog.toml",
        f"{SMALL}/adapter.safetensors",
        f"{SMALL}/config.json",
        "other/config.json",
    ):
        put(root, f"weights/{name}", "weights\n")
    return root


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


def track(root: Path) -> None:
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)


# -- the folder -------------------------------------------------------------------------------------------------------


def test_the_default_space_holds_what_serving_needs_and_nothing_else() -> None:
    upload = plan(ROOT)
    found, own = names(upload), default_model().name
    assert {"app.py", "requirements.txt", "README.md", "LICENSE", "weights/catalog.toml"} <= set(found)
    assert {f"weights/{own}/{name}" for name in ("adapter.safetensors", "config.json", "MODEL_CARD.md")} <= set(found)
    assert {"ming_app/ui/static/page.js", "ming_app/safety/rules/red_flags.toml", "examples/prompts.toml"} <= set(found)
    assert {name.partition("/")[0] for name in found if "/" in name} == {"ming_app", "examples", "weights"}
    assert not [name for name in found if f"weights/{SMALL}/" in name], "an adapter that is not served"
    assert not [name for name in found if re.search(r"(^|/)(tests?|training|\.[^/]*|__pycache__)(/|$)|\.pyc$", name)]
    assert found == sorted(set(found)) and upload.size == sum(entry.size for entry in upload.files)
    modules = {
        path.relative_to(ROOT).as_posix() for room in ("ming_app", "examples") for path in (ROOT / room).rglob("*.py")
    }
    assert {name for name in (*found, *upload.left_out) if name.endswith(".py")} - {"app.py"} == modules


@has_git
def test_without_git_the_same_files_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    upload = plan(ROOT)
    monkeypatch.setattr(space, "_listed", lambda root, *which: None)
    assert names(plan(ROOT)) == sorted({*names(upload), *upload.left_out})


@has_git
def test_untracked_files_stay_here_and_are_named(checkout: Path) -> None:
    put(checkout, ".gitignore", "*.log\n")
    track(checkout)
    for name in ("ming_app/notes.py", "ming_app/.env", "ming_app/a.log", "other.py"):
        put(checkout, name, "mine")
    upload = plan(checkout, model=SMALL)
    assert "ming_app/ui/static/page.js" in names(upload)
    assert not {"ming_app/notes.py", "ming_app/.env", "ming_app/a.log", "other.py"} & set(names(upload))
    assert upload.left_out == ("ming_app/.env", "ming_app/notes.py")


@has_git
def test_a_folder_inside_someone_elses_checkout_is_read_by_the_list(checkout: Path) -> None:
    subprocess.run(["git", "-C", str(checkout.parent), "init", "-q"], check=True)
    assert "ming_app/__init__.py" in names(plan(checkout, model=SMALL))


def test_caches_and_foreign_files_are_no_part_of_the_app(checkout: Path) -> None:
    for name in ("ming_app/__pycache__/a.py", "ming_app/.mypy_cache/b.json", "ming_app/c.log", "examples/d.tmp"):
        put(checkout, name, "x")
    assert not [
        name
        for name in names(plan(checkout, model=SMALL))
        if name[-5:] in ("/a.py", ".json", "c.log", "d.tmp") and "weights" not in name
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ming_app/.env", "A=1"),
        ("ming_app/server.pem", "x"),
        ("examples/id_rsa", "x"),
        ("examples/token.txt", "x"),
        ("ming_app/config.py", "TOKEN = 'hf_" + "a1" * 17 + "'"),
        ("examples/note.md", "-----BEGIN OPENSSH " + "PRIVATE KEY-----"),
        ("README.md", "see ghp_" + "a1" * 18),
    ],
)
@pytest.mark.parametrize("tracked", [False, pytest.param(True, marks=has_git)])
def test_what_looks_like_a_secret_is_refused_by_name(checkout: Path, name: str, text: str, tracked: bool) -> None:
    put(checkout, name, ((checkout / name).read_text(encoding="utf-8") if (checkout / name).exists() else "") + text)
    if tracked:
        track(checkout)
    with pytest.raises(MingError) as raised:
        plan(checkout, model=SMALL)
    assert name in raised.value.en and name in raised.value.zh
    assert len(text) < 8 or text not in raised.value.en


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_are_refused(checkout: Path, tmp_path: Path) -> None:
    put(tmp_path, "outside.py", "mine")
    (checkout / "ming_app" / "inside.py").symlink_to(tmp_path / "outside.py")
    with pytest.raises(MingError, match=r"ming_app/inside\.py is a link"):
        plan(checkout, model=SMALL)


@pytest.mark.parametrize("name", ["app.py", "LICENSE", f"weights/{SMALL}/adapter.safetensors"])
def test_a_checkout_that_lacks_something_is_refused(checkout: Path, name: str) -> None:
    if name != "app.py" and shutil.which("git"):
        track(checkout)  # git still lists what is gone
    (checkout / name).unlink()
    with pytest.raises(MingError, match=re.escape(name)):
        plan(checkout, model=SMALL)


def test_writing_gives_exactly_the_plan_and_never_mixes_with_what_is_there(checkout: Path, tmp_path: Path) -> None:
    upload = plan(checkout, model=SMALL)
    write(upload, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert {name: len(data) for name, data in found.items()} == {entry.path: entry.size for entry in upload.files}
    assert found["app.py"] == (ROOT / "app.py").read_bytes()
    with pytest.raises(UsageError):
        write(upload, tmp_path / "out")


# -- what is served, where --------------------------------------------------------------------------------------------


def test_hardware_has_the_names_of_the_hub_and_room_for_its_model() -> None:
    for name, machine in HARDWARE.items():
        assert machine.flavor in {flavor.value for flavor in SpaceHardware}
        upload = plan(ROOT, hardware=name)
        assert upload.front_matter["suggested_hardware"] == machine.flavor
        assert Settings.load(env=upload.variables).model == upload.model  # the app accepts its variables


def test_zerogpu_gets_the_versions_it_has() -> None:
    upload = plan(ROOT, hardware="zerogpu")
    assert upload.front_matter["python_version"] == "3.12.12"
    text = next(entry.data for entry in upload.files if entry.path == "requirements.txt").decode()
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    assert [line for line in lines if line.startswith("torch")] == ["torch>=2.8,<=2.11.0"]
    assert "spaces>=0.51,<1" in lines
    ordinary = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert "spaces" not in {re.split(r"\W", line)[0] for line in ordinary.splitlines()}
    assert len(text.splitlines()) == len(ordinary.splitlines()) + 1
    assert not [name for name in names(upload) if name.endswith(".safetensors")], "its adapter comes from the hub"
    assert upload.front_matter["models"] == ["Qwen/Qwen1.5-7B-Chat", "BlueZeros/MING-MOE-7B"]


def test_the_readme_of_the_upload_carries_the_front_matter() -> None:
    for hardware in HARDWARE:
        upload = plan(ROOT, hardware=hardware)
        card = SpaceCard(next(entry.data for entry in upload.files if entry.path == "README.md").decode())
        assert card.data.to_dict() == upload.front_matter
        assert isinstance(card.data.python_version, str)
        assert card.text == SpaceCard((ROOT / "README.md").read_text(encoding="utf-8")).text


def test_a_docker_space() -> None:
    upload = plan(ROOT, sdk="docker")
    values = upload.front_matter
    assert values["sdk"] == "docker" and values["app_port"] == 7860
    assert not {"sdk_version", "python_version", "app_file", "preload_from_hub"} & set(values)
    assert {"Dockerfile", ".dockerignore"} <= set(names(upload))
    assert not {"Dockerfile", ".dockerignore"} & set(names(plan(ROOT)))
    with pytest.raises(UsageError, match="Gradio"):
        plan(ROOT, sdk="docker", hardware="zerogpu")


def test_a_model_that_does_not_fit_is_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError, match=r"ming-moe-14b needs .* ming-moe-7b"):
        plan(ROOT, model="ming-moe-14b")
    assert plan(ROOT, hardware="zerogpu", model="ming-moe-14b").variables["MING_MODEL"] == "ming-moe-14b"
    with pytest.raises(UsageError, match="catalogue"):
        plan(ROOT, model="someone/model")


def test_the_space_asks_visitors_to_sign_in_only_where_the_page_does() -> None:
    """Without `hf_oauth` a Space has no client id; a page with a sign-in button would not start there."""
    from ming_app.ui.page import build_page
    from tests.fakes import FakeEngine

    upload = plan(ROOT)
    env = {"SPACE_ID": "me/ming", "MING_PROGRESS": "account", **upload.variables}  # where the page would have a button
    assert not build_page(FakeEngine("yes"), Settings.load(env=env)).expects_oauth
    assert "hf_oauth" not in upload.front_matter


# -- the upload -------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for HfApi: remembers the calls, keeps what the folder held when it was sent."""

    def __init__(self, error: Exception | None = None):
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.received: dict[str, bytes] = {}
        self.variables: dict[str, str] = {}
        self.error = error

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.error:
            raise self.error
        self.calls.append(("create_repo", options))
        return Address(f"me/{repo_id.rpartition('/')[2]}")

    def add_space_variable(self, repo_id: str, key: str, value: str) -> None:
        assert repo_id.startswith("me/")
        self.variables[key] = value

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        assert repo_id.startswith("me/")
        self.calls.append(("upload_folder", options))
        self.received = contents(folder_path)


class Address(str):
    """As huggingface_hub's RepoUrl: a text that knows the repository."""

    def __new__(cls, repo_id: str) -> Address:
        made = super().__new__(cls, f"https://hub.example/spaces/{repo_id}")
        made.repo_id = repo_id
        return made

    repo_id: str


def deploy(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, Any, str]:
    """(exit code, the JSON object, stderr) of the command, with `hub` in place of the real one."""
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **options: hub)
    code = cli.main(["deploy", "space", "--json", *words])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    return code, json.loads(out), err


def test_the_hub_receives_exactly_the_folder_of_the_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub()
    out = tmp_path / "dry"
    code, dry, err = deploy(hub, monkeypatch, capsys, "--repo", "me/ming", "--dry-run", "--out", str(out))
    assert code == 0 and hub.calls == [] and not dry["uploaded"] and "nothing was uploaded" in err
    assert dry["url"].endswith("/spaces/me/ming") and dry["hardware"] == "cpu-basic" and dry["folder"] == str(out)
    assert {file["path"]: file["bytes"] for file in dry["files"]} == {n: len(d) for n, d in contents(out).items()}
    assert dry["bytes"] == sum(file["bytes"] for file in dry["files"])

    code, real, _ = deploy(hub, monkeypatch, capsys, "--repo", "ming", "--private")
    assert code == 0 and real["uploaded"] and real["repo"] == "me/ming" and real["url"].endswith("/spaces/me/ming")
    assert real["folder"] is None and real["files"] == dry["files"] and real["front_matter"] == dry["front_matter"]
    assert hub.received == contents(out)
    (_, created), (_, sent) = hub.calls
    assert created["repo_type"] == sent["repo_type"] == "space" and created["space_sdk"] == "gradio"
    assert created["exist_ok"] is True and created["private"] is True and created["space_hardware"] is None
    assert all(pattern.startswith(("ming_app/", "examples/", "weights/")) for pattern in sent["delete_patterns"])
    assert hub.variables == {"MING_MODEL": default_model().name, "MING_PRECISION": "auto"}


def test_hardware_that_costs_is_never_asked_for(tmp_path: Path) -> None:
    for hardware, asked in (("cpu", None), ("gpu", None), ("zerogpu", "zero-a10g")):
        hub, upload = Hub(), plan(ROOT, hardware=hardware)
        write(upload, tmp_path / hardware)
        send(upload, tmp_path / hardware, "me/ming", api=hub)
        assert hub.calls[0][1]["space_hardware"] == asked
        assert hub.variables["MING_MODEL"] == upload.model


def answer(status: int, said: str = "") -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return HfHubHTTPError(f"{status} for https://hub.example", response=response, server_message=said)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalTokenNotFoundError("no token"), "hf auth login"),
        (answer(401), "hf auth login"),
        (answer(402, "Subscribe"), "paid plan"),
        (answer(403, "You don't have the rights"), "rights"),
        (answer(404), "right to write"),
        (answer(500), "HTTP 500"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (OSError("unreachable"), "network"),
    ],
)
def test_failures_say_what_to_do(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "secret" * 6)
    code, values, err = deploy(Hub(error), monkeypatch, capsys, "--repo", "me/ming", "--model", SMALL)
    assert code == 1 and said in values["error"]["en"] and values["error"]["zh"]
    assert "Traceback" not in err and "secret" not in err + json.dumps(values)


def test_the_real_client_without_network_fails_politely(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.create_repo", _unreachable)
    code = cli.main(["deploy", "space", "--repo", "me/ming", "--model", SMALL, "--lang", "zh"])
    assert code == 1 and "无法连接" in capsys.readouterr().err


def _unreachable(*words: Any, **options: Any) -> None:
    from huggingface_hub.utils import get_session

    get_session().get("http://127.0.0.1:9/")


@pytest.mark.parametrize(
    "words",
    [
        ["deploy"],
        ["deploy", "space"],
        ["deploy", "space", "--repo", "a/b/c", "--dry-run"],
        ["deploy", "space", "--repo", "me/..", "--dry-run"],
        ["deploy", "space", "--repo", "me/ming", "--hardware", "tpu", "--dry-run"],
        ["deploy", "space", "--repo", "me/ming", "--model", "ming-moe-99b", "--dry-run"],
        ["deploy", "space", "--repo", "me/ming", "--dry-run", "--out", str(ROOT)],
    ],
)
def test_wrong_use(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == (1 if "ming-moe-99b" in words else 2)
    assert "Traceback" not in capsys.readouterr().err


def test_people_see_every_file_and_the_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["deploy", "space", "--repo", "me/ming", "--dry-run", "--model", SMALL, "--out", str(tmp_path / "x")]
    assert cli.main([*words, "--lang", "zh"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == len(contents(tmp_path / "x")) + 1
    assert f"共 {len(lines) - 1} 个文件" in lines[-1] and "试运行" in err
    assert re.search(r"^ +[\d,]+  app\.py$", out, re.MULTILINE)
