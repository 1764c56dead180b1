"""SECURITY.md names tests that exist, for every threat; the audit of packages runs as it says."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (?!threat \|)(?P<threat>[^|]+) \| (?P<deed>[^|]+) \| (?P<tests>[^|]+) \|$", re.M)


def test_every_threat_has_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = list(ROW.finditer(text))
    assert len(rows) >= 30 and len(rows) == sum(line.startswith("| ") for line in text.splitlines()) - 1
    for row in rows:
        named = re.findall(r"`([\w/.]+\.py)::(\w+)`", row["tests"])
        assert named and len(named) == row["tests"].count("`") // 2, row["threat"]
        for file, function in named:
            path = ROOT / "tests" / file
            assert path.is_file(), f"{row['threat']}: {file}"
            source = path.read_text(encoding="utf-8")
            assert re.search(rf"^(async )?def {function}\(", source, re.M), f"{row['threat']}: {file}::{function}"


def test_every_test_of_this_folder_is_named() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    helpers = ("test_valid_", "test_the_visit_", "test_every_threat_", "test_every_test_", "test_places_", "test_log_")
    helpers += ("test_settings_that_take_", "test_what_a_person_names_")
    for path in Path(__file__).parent.glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.M):
            assert name in text or name.startswith(helpers), f"{path.name}::{name} is not in SECURITY.md"


def test_the_audit_runs_weekly_and_strictly() -> None:
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "audit.yml").read_text(encoding="utf-8"))
    when = flow[True]  # YAML reads the word "on" as true
    assert (
        when["schedule"]
        and "requirements*.txt" in when["push"]["paths"]
        and flow["permissions"] == {"contents": "read"}
    )
    steps = [step.get("run", "") for step in flow["jobs"]["audit"]["steps"]]
    assert (
        any("pip-audit" in step and "--strict" in step for step in steps) and "pip install -r requirements.txt" in steps
    )
