"""The report of a bench run: JSON beside one HTML page that needs no network, the README's table, and the guard that compares
a run with the stored ones.

`examples/bench/<model>.json` are the stored reports: the README's figures are made from them, and `bench --quick` fails where a
ratio has fallen below what they say by more than NOISE.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ming_app.console import Console
from ming_app.errors import MingError, UsageError

STORED = Path(__file__).resolve().parents[2] / "examples" / "bench"
NOISE = 0.15
QUICK = (
    "decode",
    "decode-no-trace",
    "decode-base",
    "decode-2000",
    "prefill512",
    "prefill512-base",
    "streams-8",
    "llama-decode",
    "llama-prefill512",
)
PLOTS = {
    "context": ("context, tokens", "ms per token"),
    "batch": ("answers at a time", "ms per token of all"),
    "experts": ("experts E (k = 2, r = 8)", "ms per token"),
    "active": ("active experts k (E = 8, r = 8)", "ms per token"),
    "rank": ("rank r (E = 4, k = 2)", "ms per token"),
    "memory": ("tokens held, 512 per user", "resident MiB"),
}
ROWS = (
    ("decode with MoLoRA and trace, tokens/s", "decode", "", 0),
    ("... as a share of the same engine without adapter", "decode", "decode-base", 2),
    ("... as a share of llama.cpp's bare base", "decode", "llama-decode", 2),
    ("... the same after 2,000 tokens", "decode-2000", "llama-decode-2000", 2),
    ("... against transformers `generate()` in bf16 with the same adapter", "decode", "generate-bf16", 1),
    ("prefill of 512 tokens, tokens/s", "prefill512", "", 0),
    ("... as a share of llama.cpp's bare base", "prefill512", "llama-prefill512", 2),
    ("four answers at a time, times the tokens/s of one", "streams-4", "decode", 1),
    ("eight answers at a time", "streams-8", "decode", 1),
    ("exam questions scored, per second", "score", "", 1),
    ("... times what reading every question and letter by itself gives", "score", "score-pairs", 1),
    ("ready from the cache, seconds", "load", "", 1),
    ("peak memory of a short chat, GB", "rss", "", 2),
    ("... as a share of llama.cpp's", "rss", "llama-rss", 2),
    ("bytes of weights read per token, MB", "weight-bytes", "", 0),
    ("... as a share of what memory can deliver", "decode", "bandwidth", 2),
)


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Writes `<model>.json` and `<model>.html`; the path of the page. Raises MingError when the folder cannot be written."""
    name = Path(str(report["model"])).name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        page = folder / f"{name}.html"
        page.write_text(_page(report), encoding="utf-8")
    except OSError as error:
        raise MingError(
            f"{folder} cannot be written: {error.strerror}.", f"无法写入 {folder}：{error.strerror}。"
        ) from error
    return page


def _page(report: Mapping[str, Any]) -> str:
    import plotly.graph_objects as go

    machine = report["machine"]
    title = f"{report['model']} on {machine['cpu']}, {machine['threads']} threads"
    figures = []
    for name, (x, y) in PLOTS.items():
        points = report.get("growth", {}).get(name, [])
        scale = 2**-20 if name == "memory" else 1.0
        trace = go.Scatter(x=[p[0] for p in points], y=[p[1] * scale for p in points], mode="lines+markers")
        layout = {"xaxis_title": x, "yaxis_title": y, "yaxis_rangemode": "tozero"}
        figures.append(go.Figure(trace, layout))
    startup = report.get("growth", {}).get("startup", {})
    bar = go.Figure(go.Bar(x=list(startup.values()), y=list(startup), orientation="h"), {"xaxis_title": "seconds"})
    figures.append(bar)
    parts = []
    for i, figure in enumerate(figures):
        figure.update_layout(template="plotly_white", height=380)
        parts.append(figure.to_html(include_plotlyjs=i == 0, full_html=False))
    rows = "".join(
        f"<tr><td>{html.escape(label)}</td><td>{html.escape(value)}</td></tr>"
        for label, value in ((row[0], _cell(report, *row[1:])) for row in ROWS)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>body{{font-family:sans-serif;max-width:960px;margin:2em auto}}td{{padding:2px 1em}}</style>"
        f"<h1>{html.escape(title)}</h1><table>{rows}</table>{''.join(parts)}</html>\n"
    )


def _cell(report: Mapping[str, Any], name: str, against: str, digits: int) -> str:
    """One figure of the table, "" where it was not measured."""
    by_name = {entry["name"]: entry for entry in report["results"]}
    entry = by_name.get(name)
    if entry is None or entry["median"] is None:
        return ""
    if against == "bandwidth":
        parts = [by_name.get(one, {}).get("median") for one in ("weight-bytes", "bandwidth")]
        value = entry["median"] * parts[0] / parts[1] if all(parts) else None
    elif against:
        value = entry["ratio_to"].get(against)
    else:
        value = entry["median"] / {"rss": 1e9, "weight-bytes": 1e6}.get(name, 1)
    return "" if value is None else f"{value:.{digits}f}"


def readme_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """The README's table of measured figures, from stored reports."""
    machine = reports[0]["machine"]
    llama = machine["versions"].get("llama-cpp-python", "")
    lines = [
        f"Measured by `python -m ming_app bench --report bench-report` on {machine['threads']} cores of an {machine['cpu']},",
        f"medians of {reports[0]['repeat']} interleaved rounds; llama.cpp (llama-cpp-python {llama}) runs the same GGUF without any adapter:",
        "",
        f"| | {' | '.join(report['model'].removeprefix('ming-moe-').upper() for report in reports)} |",
        f"|---|{'---:|' * len(reports)}",
    ]
    lines += [f"| {row[0]} | {' | '.join(_cell(report, *row[1:]) for report in reports)} |" for row in ROWS]
    return "\n".join(lines)


def stored(model: str) -> dict[str, Any]:
    """The stored report of a model. Raises UsageError when there is none."""
    path = STORED / f"{model}.json"
    if not path.is_file():
        raise UsageError(
            f"There is no stored report for {model}; make one with bench --report {STORED}.",
            f"没有 {model} 的已存报告；可用 bench --report {STORED} 生成。",
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def compare(report: Mapping[str, Any], old: Mapping[str, Any], noise: float = NOISE) -> list[dict[str, Any]]:
    """Every ratio that both have: {"name", "to", "was", "is", "ok"}; worse by more than `noise` is not ok."""
    was = {entry["name"]: entry for entry in old["results"]}
    found = []
    for entry in report["results"]:
        for other, ratio in entry["ratio_to"].items():
            before = was.get(entry["name"], {}).get("ratio_to", {}).get(other)
            if before:
                better_is_more = entry["unit"].endswith("/s")
                change = ratio / before if better_is_more else before / ratio
                found.append(
                    {"name": entry["name"], "to": other, "was": before, "is": ratio, "ok": change >= 1 - noise}
                )
    return found


def print_comparison(compared: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A line per ratio."""
    for one in compared:
        verdict = "" if one["ok"] else console.text("  WORSE", "  变差")
        console.line(f"{one['name']:<18} / {one['to']:<18} {one['was']:7.2f} -> {one['is']:7.2f}{verdict}")
