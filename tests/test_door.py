"""The door: what the READMEs, CONTRIBUTING and CHANGELOG name exists, parses and agrees with the program."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ming_app import __version__, cli, entry
from ming_app.console import Console
from ming_app.models.catalog import list_models
from ming_app.settings import Settings
from tests.browser import pictures
from training.cli import _parser as training_parser

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh.md")
PAGES = [
    ROOT / name
    for name in (*READMES, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "training/README.md", "weights/README.md")
] + sorted([*ROOT.glob("examples/**/*.md"), *ROOT.glob("weights/*/*.md")])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
ROOMS = ("ming_app", "training", "weights", "examples", "tests")
PICTURES_BYTES = 300_000


def commands(text: str, program: str) -> list[list[str]]:
    """The words after `program` in every line of code that calls it; brackets of optional parts are left away."""
    code = re.findall(r"^ {4}(.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    found = [line.partition(program + " ")[2] for line in code if program + " " in line]
    return [shlex.split(re.sub(r"\s{2,}#.*|[\[\]]", "", words)) for words in found]


def parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """A line that shows a command's name only, without its arguments, is taken as a mention of it."""
    if len(words) == 1 and words[0] != "bench":
        words = [*words, "--help"]
    try:
        return parser.parse_args([{"zh|en": "zh", "N": "1"}.get(word, word) for word in words])
    except SystemExit as leaving:  # --help
        assert leaving.code == 0, words
        return argparse.Namespace(command=words[0])


@pytest.mark.parametrize("page", TEXTS)
def test_every_command_parses(page: str) -> None:
    """By the real grammars of the app, its command line and the trainer; other modules named with -m exist."""
    text = TEXTS[page]
    shown = {parsed(cli.build_parser(Console("en")), w).command for w in commands(text, "python -m ming_app")}
    for words in commands(text, "python app.py"):
        parsed(entry.build_parser(Console("en")), words)
    for words in commands(text, "python -m training"):
        parsed(training_parser(), words)
    for module in re.findall(r"python -m ((?:training|examples|tests)\.[\w.]+)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
    if page in ("README.md", "examples/README.md"):
        assert shown >= {"ask", "chat", "trace", "exam", "triage", "weights", "verify", "bench"}


@pytest.mark.parametrize("page", TEXTS)
def test_what_a_page_names_exists(page: str) -> None:
    """Links, headings that links lead to, paths in code, MING_ variables."""
    text, folder = TEXTS[page], (ROOT / page).parent
    for target in re.findall(r'(?:\]\(|src=")(?!https?:)([^)"]+)', text):
        name, _, heading = target.partition("#")
        where = (folder / name).resolve() if name else ROOT / page
        assert where.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", where.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, target
    for path in re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w./-]*\w)/?`", text):
        assert (ROOT / path).exists(), path
    fields = {f"MING_{name.upper()}" for name in Settings.__dataclass_fields__}
    assert set(re.findall(r"MING_[A-Z_]+\b(?!<)", text)) - {"MING_"} <= fields


def test_the_readmes_lead_to_each_other_and_begin_alike() -> None:
    for page, other in (READMES, READMES[::-1]):
        start = TEXTS[page].partition("# MING-MOE")[2][:2500]
        assert f"]({other})" in start and ".webp)" in start
        assert "    pip install -r requirements.txt\n    python app.py\n" in start
        assert f"chat-{'zh' if 'zh' in page else 'en'}.webp" in start
    for mark in ("models", "measured"):
        assert f"<!-- {mark}:begin" in TEXTS["README.md"] and f"<!-- {mark}:end -->" in TEXTS["README.md"]
    for model in list_models():
        if model.adapter_folder is not None:  # the Chinese page repeats what is embedded
            row = next(line for line in TEXTS["README.zh.md"].splitlines() if line.startswith(f"| `{model.name}`"))
            assert f"{model.memory_gb[model.cpu_precision]:g} GB" in row


def test_pictures_are_those_of_the_script_and_small() -> None:
    named = {Path(name).name for page in READMES for name in re.findall(r"examples/pictures/[\w.-]+", TEXTS[page])}
    files = {path.name: path for path in pictures.FOLDER.iterdir()}
    assert named == set(files) == {f"{name}.webp" for name in pictures.names()}
    assert sum(path.stat().st_size for path in files.values()) < PICTURES_BYTES
    for name, path in files.items():
        head = path.read_bytes()[:30]
        assert head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X"
        size = tuple(1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
        assert size == (pictures.PHONE if name.startswith("phone") else pictures.DESKTOP)


def test_contributing_is_a_map_of_the_house() -> None:
    text = TEXTS["CONTRIBUTING.md"]
    named = set(re.findall(r"^\| `([\w/]+)`", text, re.MULTILINE))
    packages = {
        file.parent.relative_to(ROOT).as_posix()
        for room in ("ming_app", "training")
        for file in (ROOT / room).rglob("__init__.py")
    } - {"ming_app"}
    assert packages - named == set(), "a package without a line in CONTRIBUTING.md"
    assert named - packages == {"weights", "examples", "tests"}
    assert "`app.py`" in text and ".ci/run" in text


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[([\d.]+)\] - (Unreleased|\d{4}-\d\d-\d\d)$", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert versions[0][0] == __version__
    kinds = set(re.findall(r"^### (.+)$", TEXTS["CHANGELOG.md"], re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_whole_and_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["version"] == __version__ and citation["message"]
    assert citation["license"] == "Apache-2.0" and citation["authors"]
    paper = citation["preferred-citation"]
    authors = " and ".join(f"{one['given-names']} {one['family-names']}" for one in paper["authors"])
    for page in ("README.md", *(name for name in TEXTS if name.endswith("MODEL_CARD.md"))):
        assert f"{{{authors}}}" in TEXTS[page] and f"{{{paper['title']}}}" in TEXTS[page], page
        assert paper["url"].rpartition("/")[2] in TEXTS[page]


# -- examples ---------------------------------------------------------------------------------------------------------


def test_the_index_of_examples_names_each_folder_and_script() -> None:
    index = TEXTS["examples/README.md"]
    folders = {path.name for path in (ROOT / "examples").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(re.findall(r"^\| \[?`(\w+)`", index, re.MULTILINE))
    for script in sorted([*(ROOT / "examples" / "python").glob("*.py"), *(ROOT / "examples" / "api").glob("*.py")]):
        assert f"python -m examples.{script.parent.name}.{script.stem} " in index
        assert len(script.read_text(encoding="utf-8").splitlines()) < 60


def run_example(line: str) -> str:
    """Runs a line of examples/README.md as it stands there."""
    words = next(w for w in commands(TEXTS["examples/README.md"], "python -m") if w[0] == f"examples.python.{line}")
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_trace_is_read_with_numpy_alone() -> None:
    shown = run_example("trace_load")
    rows = {line.split()[0]: re.findall(r"([\d.]+)%", line) for line in shown.splitlines()[2:]}
    assert set(rows) == {"gate", "up", "down"} and "even share 25.0%" in shown
    assert all(abs(sum(map(float, shares)) - 100) < 0.3 for shares in rows.values())


def test_a_text_is_triaged() -> None:
    shown = run_example("triage")
    assert shown.startswith("stroke: ") and "999" in shown


@pytest.mark.real
def test_a_question_is_asked() -> None:
    shown = run_example("ask")
    assert (
        re.search(r"\d+ tokens, [\d.]+ per second, (stop|length)", shown) and "Top expert in layer 12, gate: " in shown
    )


@pytest.mark.real
def test_options_are_scored() -> None:
    shares = re.findall(r"^[ *] [A-E] +([\d.]+)%", run_example("score_options"), re.MULTILINE)
    assert len(shares) == 5 and abs(sum(map(float, shares)) - 100) < 0.3
