"""The house rules that a machine can check: requirements against imports, sizes, forbidden text, and the README's tables
(what else the READMEs say: test_door.py)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import unicodedata
from pathlib import Path

import pytest
import yaml
from huggingface_hub import SpaceHardware

from ming_app.deploy.space import plan
from ming_app.models.catalog import Model, list_models
from ming_app.models.store import gigabytes
from ming_app.settings import BACKENDS, PRECISIONS

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 550
README = (ROOT / "README.md").read_text(encoding="utf-8")
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}  # of a Space's card
README_PRECISIONS = ("4bit", "mix", "8bit", "nf4", "bf16")
DISTRIBUTIONS = {
    "huggingface_hub": "huggingface_hub",
    "ml_dtypes": "ml_dtypes",
    "yaml": "PyYAML",
    "prometheus_client": "prometheus-client",
    "llama_cpp": "llama-cpp-python",
}
"""import name -> distribution, where they differ in more than case"""
IGNORED = re.compile(
    r"(^|/)(\.git|__pycache__|\.venv|\.(pytest|ruff|mypy)_cache|[^/]*\.egg-info)(/|$)|\.pyc$|"
    r"^(runs|build|\.hypothesis|tests/browser/screenshots)/"
)
"""what .gitignore names, for where git does not answer"""


def tracked_files() -> list[Path]:
    """What git would ship: tracked files and new ones that are not ignored. Where git cannot say, what lies here."""
    try:
        words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive, or a checkout that belongs to another user
        listed = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")]
        listed = [name for name in listed if not IGNORED.search(name)]
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str | None:
    """The text of a file, None for a binary one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def front_matter() -> dict:
    return yaml.safe_load(README.split("---")[1])


def requirements(name: str = "requirements.txt") -> dict[str, str]:
    """distribution -> its bounds, files included by -r too."""
    found: dict[str, str] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found |= requirements(line[3:])
        elif line:
            match = re.match(r"([\w.-]+)(.*)", line)
            assert match
            found[match[1]] = match[2].strip()
    return found


# -- README -----------------------------------------------------------------------------------------------------------


def test_the_space_runs_the_gradio_of_the_requirements() -> None:
    assert requirements()["gradio"] == f"=={front_matter()['sdk_version']}"


def test_front_matter_is_what_a_space_needs() -> None:
    values = front_matter()
    assert values["sdk"] == "gradio" and values["license"] == "apache-2.0" and values["python_version"] == "3.12"
    assert (ROOT / values["app_file"]).is_file()
    assert len(values["short_description"]) <= 60  # the hub refuses a longer one
    assert len(values["emoji"]) == 1 and unicodedata.category(values["emoji"]) == "So"
    assert {values["colorFrom"], values["colorTo"]} <= COLOURS
    assert values["suggested_hardware"] in {flavor.value for flavor in SpaceHardware}
    assert re.fullmatch(r"\d+[hm]", values["startup_duration_timeout"])
    assert all(re.fullmatch(r"[a-z0-9-]+", tag) for tag in values["tags"])
    default = next(model for model in list_models() if model.default)
    source = next(s for s in default.sources if hasattr(s, "file") and hasattr(s, "repo"))
    assert values["preload_from_hub"] == [f"{source.repo} {source.file} {source.revision}"]
    assert values["models"] == [source.repo]


def test_the_front_matter_is_that_of_the_default_space() -> None:
    """Pushing this checkout to a Space and `deploy space` give the same Space."""
    assert plan(ROOT).front_matter == front_matter()


def models_table(models: list[Model]) -> str:
    """The README's table of models. Memory in GB, as the catalogue has it."""
    lines = [f"| model | base | download | {' | '.join(README_PRECISIONS)} | base licence |"]
    lines.append(f"|---|---|---:|{'---:|' * len(README_PRECISIONS)}---|")
    for model in models:
        base = model.title.partition("(")[2].rstrip(")")
        memory = " | ".join(f"{model.memory_gb[p]:g}" for p in README_PRECISIONS)
        licence = model.licence.partition(", Apache-2.0 (adapter)")[0].replace(" (base)", "").replace("(base, ", "(")
        lines.append(
            f"| `{model.name}`{' (default)' if model.default else ''} | {base} | {gigabytes(model.size)} | {memory} | {licence} |"
        )
    return "\n".join(lines)


def test_the_models_table_is_the_catalogue() -> None:
    shown = re.search(r"<!-- models:begin.*?-->\n(.*?)\n?<!-- models:end -->", README, re.DOTALL)
    assert shown
    table = models_table(list_models())
    assert shown[1] == table, f"README.md should say:\n{table}"


def test_the_readme_names_every_precision_and_backend() -> None:
    for name in (*PRECISIONS, *BACKENDS):
        assert name == "auto" or f"`{name}`" in README or name in ("cpu", "torch"), name


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install, test = "pip install -r requirements-dev.txt", "python -m pytest"
    assert f"{install} && {test}" in README
    lines = [line.strip().replace("pip install -q ", "pip install ") for line in script.splitlines()]
    assert install in lines and lines[-1] == test


# -- requirements -----------------------------------------------------------------------------------------------------


def third_party_imports(*roots: str) -> dict[str, Path]:
    """Top-level import name -> a file that imports it, for what is neither ours nor Python's."""
    own = {"ming_app", "training", "tests", "examples", "app"} | {file.stem for file in (ROOT / "tests").rglob("*.py")}
    found: dict[str, Path] = {}
    files = [f for root in roots for f in ([ROOT / root] if root.endswith(".py") else (ROOT / root).rglob("*.py"))]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in (n.partition(".")[0] for n in names):
                if name not in own and name not in sys.stdlib_module_names:
                    found[name] = file
    return found


def normal(name: str) -> str:
    return DISTRIBUTIONS.get(name, name).lower().replace("_", "-")


@pytest.mark.parametrize(
    ("roots", "files"),
    [
        (("ming_app", "app.py"), ("requirements-bench.txt", "requirements-mcp.txt", "requirements-scale.txt")),
        (("training",), ("requirements-eval.txt",)),
        (("tests", "examples"), ("requirements-dev.txt", "requirements-scale.txt")),
    ],
)
def test_every_import_is_required(roots: tuple[str, ...], files: tuple[str, ...]) -> None:
    required = {normal(name) for file in files for name in requirements(file)}
    for name, where in third_party_imports(*roots).items():
        assert normal(name) in required, f"{where.relative_to(ROOT)} imports {name}, which {files} lack"


def test_every_requirement_is_imported_and_explained() -> None:
    code = "\n".join(text_of(f) or "" for root in ("ming_app", "training") for f in (ROOT / root).rglob("*.py"))
    for name in requirements():  # by text: one import runs in a child process, as a string
        module = next((m for m, d in DISTRIBUTIONS.items() if d == name), name)
        assert re.search(rf"^\s*(import|from) {module}\b", code, re.MULTILINE), f"nothing imports {name}"
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        assert not line or "#" in line, f"why is {line} needed?"


def test_extras_are_imported_where_they_are_compared_with() -> None:
    imports = third_party_imports("training")
    assert imports["lm_eval"] == ROOT / "training" / "harness.py" and imports["peft"] == ROOT / "training" / "bench.py"
    assert not {"lm-eval", "peft"} & set(requirements())


def test_only_the_benchmark_imports_llama() -> None:
    importing = third_party_imports("ming_app", "training", "app.py")["llama_cpp"]
    assert importing.parent == ROOT / "ming_app" / "bench"
    assert not any("llama" in name for name in requirements())


def test_only_the_tool_server_imports_mcp() -> None:
    assert third_party_imports("ming_app", "training", "app.py")["mcp"] == ROOT / "ming_app" / "mcp_server.py"
    assert "mcp" not in requirements()


def test_only_many_machines_import_ray() -> None:
    folders = {ROOT / "ming_app" / "scale", ROOT / "examples" / "scale"}
    files = [f for root in ("ming_app", "training", "examples") for f in (ROOT / root).rglob("*.py")]
    importing = {f.parent for f in files if re.search(r"^\s*(import|from) ray\b", text_of(f) or "", re.MULTILINE)}
    assert importing == folders and "ray" not in requirements() and "ray" in requirements("requirements-scale.txt")


# -- files ------------------------------------------------------------------------------------------------------------


def test_no_file_is_too_long() -> None:
    long = {
        str(path.relative_to(ROOT)): len(text.splitlines())
        for path in tracked_files()
        if path.suffix in (".py", ".js", ".html", ".css") and (text := text_of(path)) is not None
    }
    assert {name: n for name, n in long.items() if n > MAX_LINES} == {}


def test_every_module_states_its_contract() -> None:
    missing = [
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if path.suffix == ".py" and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert missing == []


def test_no_registry_host_and_no_local_path_in_any_text() -> None:
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "npmjs" + ".org", "debian" + ".org", "anaconda" + ".org"]
    folders = [f"{start}{name}" for name in ("/work/", "/root/", "/home/") for start in (" ", '"', "'", "`", "(", "=")]
    for path in tracked_files():
        text = text_of(path)
        if text is not None and path != Path(__file__):
            assert [part for part in (*hosts, *folders) if part in text] == [], path


def test_imports_run_one_way() -> None:
    """molora <- models <- engine <- router, exam <- ui, bench <- serve <- scale; and nothing but ui imports gradio."""
    order = {"molora": 0, "models": 1, "engine": 2, "router": 3, "exam": 3, "ui": 4, "bench": 4, "serve": 5, "scale": 6}
    for path in (ROOT / "ming_app").rglob("*.py"):
        room = path.relative_to(ROOT / "ming_app").parts[0]
        text = path.read_text(encoding="utf-8")
        assert room == "ui" or not re.search(r"^\s*(import|from) gradio", text, re.MULTILINE), path
        assert not re.search(r"^\s*(import|from) training", text, re.MULTILINE), path
        for other in re.findall(r"from ming_app\.(\w+)", text):
            if room in order and other in order and room != other:
                assert order[room] > order[other], f"{path.relative_to(ROOT)} imports {other}"


def test_pyproject_and_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert project["requires-python"] == ">=3.11,<3.13"
