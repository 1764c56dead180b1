"""The report of a bench run: what it writes, the README's figures made from it, and the guard against falling ratios."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ming_app.bench.cases import CASES
from ming_app.bench.report import QUICK, ROWS, STORED, compare, readme_table, stored, write_report
from ming_app.errors import MingError, UsageError
from ming_app.models.catalog import list_models

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def entry(name: str, median: float, unit: str = "tokens/s", **ratios: float) -> dict[str, Any]:
    return {"name": name, "median": median, "min": median, "max": median, "unit": unit, "ratio_to": ratios}


def report(**changes: Any) -> dict[str, Any]:
    machine = {"cpu": "A <fast> CPU", "threads": 2, "versions": {"llama-cpp-python": "0.3"}}
    results = [
        entry("decode", 20.0, llama=1.0, **{"decode-base": 0.9}),
        entry("first-word-behind-7", 2.0, "s", **{"first-word": 4.0}),
        entry("weight-bytes", 1e9, "bytes"),
        entry("bandwidth", 40e9, "bytes/s"),
    ]
    return {"machine": machine, "model": "ming-moe-0.5b", "repeat": 5, "results": results, **changes}


def test_the_readme_shows_the_stored_reports() -> None:
    models = [model.name for model in list_models() if (STORED / f"{model.name}.json").is_file()]
    assert models[:1] == ["ming-moe-1.5b"]
    shown = re.search(r"<!-- measured:begin.*?-->\n(.*?)\n<!-- measured:end -->", README, re.DOTALL)
    assert shown is not None
    table = readme_table([stored(model) for model in models])
    assert shown[1] == table, f"README.md should say:\n{table}"


def test_every_figure_of_the_table_is_a_case() -> None:
    names = {case.name: case for case in CASES}
    for _, name, against, _ in ROWS:
        assert not against or against == "bandwidth" or against in names[name].against
    assert set(QUICK) <= set(names)


def test_figures_are_shown_as_what_they_are() -> None:
    table = readme_table([report()])
    assert "| decode with MoLoRA and trace, tokens/s | 20 |" in table
    assert "| bytes of weights read per token, MB | 1000 |" in table
    assert "| ... as a share of what memory can deliver | 0.50 |" in table
    assert "| ready from the cache, seconds |  |" in table  # not measured: nothing is said


def test_a_report_is_json_and_a_page_of_its_own(tmp_path: Path) -> None:
    growth = {"startup": {"imports": 0.4}, "context": [(64, 15.0), (512, 17.0)], "memory": [(512, 2.0**30)]}
    page = write_report(report(growth=growth), tmp_path / "new")
    text = page.read_text(encoding="utf-8")
    assert "A &lt;fast&gt; CPU" in text and "<fast>" not in text and "ms per token" in text
    assert not re.search(r'src="https?:', text)
    assert json.loads((tmp_path / "new" / "ming-moe-0.5b.json").read_text())["growth"]["context"][1] == [512, 17.0]
    with pytest.raises(MingError):
        write_report(report(), page)  # a file is no folder


def test_a_ratio_that_fell_beyond_the_noise_is_named() -> None:
    old = report()
    worse = report(results=[entry("decode", 30.0, **{"decode-base": 0.7}), entry("new", 1.0, other=1.0)])
    assert compare(worse, old) == [{"name": "decode", "to": "decode-base", "was": 0.9, "is": 0.7, "ok": False}]
    assert all(one["ok"] for one in compare(report(), old))
    slower = report(results=[entry("first-word-behind-7", 1.0, "s", **{"first-word": 5.0})])
    assert not compare(slower, old)[0]["ok"]  # of seconds, more is worse
    assert compare(slower, old, noise=0.3)[0]["ok"]


def test_a_model_without_a_stored_report_is_told_how_to_make_one() -> None:
    with pytest.raises(UsageError, match="--report"):
        stored("ming-moe-7b")
