"""What an evaluation found, as Markdown and as one HTML page with pictures; from `evaluation.evaluate`'s result alone."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from training.report import table

KINDS = ("base", "adapter")


def evaluation_text(result: Mapping[str, Any]) -> str:
    """Markdown, base beside adapter."""
    adapter = Path(result["adapter"]).name if result["adapter"] else "none"
    precisions = ", ".join(f"{what} in {precision}" for what, precision in result["precision"].items())
    parts = [f"# {result['model']}\n\nBase: {result['base']}. Adapter: {adapter}. Measured: {precisions}."]
    parts += [_exam_text(file, kinds) for file, kinds in result["exam"].items()]
    parts += [_nlp_text(file, kinds) for file, kinds in result["nlp"].items()]
    parts += [_generation_text(file, kinds) for file, kinds in result["generation"].items()]
    if result["dev"]:
        parts.append(_dev_text(result["dev"]))
    return "\n\n".join(parts) + "\n"


def interval(measured: Mapping[str, Any] | None) -> str:
    """`48.5% (41.7 to 55.4)`; empty for None."""
    if not measured:
        return ""
    low, high = measured["confidence95"]
    return f"{measured['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def _present(kinds: Mapping[str, Any]) -> list[str]:
    return [kind for kind in KINDS if kind in kinds]


def _exam_text(file: str, kinds: Mapping[str, Any]) -> str:
    present = _present(kinds)
    rows: list[Iterable[Any]] = [("all", kinds[present[0]]["n"], *(interval(kinds[kind]) for kind in present))]
    for part in ("by_lang", "by_type", "by_subject"):
        names = sorted({name for kind in present for name in kinds[kind][part]})
        for name in names if len(names) > 1 else ():
            measured = [kinds[kind][part].get(name) for kind in present]
            rows.append((name, next(m["n"] for m in measured if m), *map(interval, measured)))
    text = f"## {file}\n\nAccuracy of the letter by log-probability, 95 % interval (Wilson).\n\n"
    text += table(("", "n", *present), rows)
    rows = [
        ("expected calibration error", *(f"{kinds[kind]['calibration']['ece']:.3f}" for kind in present)),
        ("letters chosen", *(" ".join(f"{k}:{v}" for k, v in kinds[kind]["chosen"].items()) for kind in present)),
    ]
    if "shuffled" in kinds[present[0]]:
        shuffled = [kinds[kind]["shuffled"] for kind in present]
        rows += [
            (f"same option in {shuffled[0]['orders']} orders", *(interval(s["consistent"]) for s in shuffled)),
            ("accuracy in the other orders", *(interval(s["accuracy"]) for s in shuffled)),
        ]
    return f"{text}\n\n" + table(("", *present), rows)


def _nlp_text(file: str, kinds: Mapping[str, Any]) -> str:
    present = _present(kinds)
    rows = [
        (source, task["n"], task["metric"], *(f"{kinds[kind]['tasks'][source]['score']:.1%}" for kind in present))
        for source, task in kinds[present[0]]["tasks"].items()
    ]
    return f"## {file}\n\nGreedy answers.\n\n" + table(("task", "n", "metric", *present), rows)


def _generation_text(file: str, kinds: Mapping[str, Any]) -> str:
    rows = []
    for kind in _present(kinds):
        for lang, figures in kinds[kind].items():
            checks = [interval(figures[name]) for name in ("ended", "in_language", "without_loops")]
            amount = [f"{figures['repetition']:.1%}", f"{figures['tokens']['mean']:.0f}"]
            rows.append((kind, lang, figures["ended"]["n"], *checks, *amount))
    head = ("model", "language", "n", "ended by itself", "in the language asked", "without loops", "repeated", "tokens")
    return f"## {file}\n\nGreedy answers.\n\n" + table(head, rows, left=2)


def _dev_text(dev: Mapping[str, Any]) -> str:
    present = _present(dev)
    rows = [(stream, *(f"{dev[kind]['loss'][stream]:.3f}" for kind in present)) for stream in dev[present[0]]["loss"]]
    text = "## Loss per answer token on held-out rows\n\n" + table(("stream", *present), rows)
    report = dev.get("adapter", {})
    if "smallest_load" in report:
        text += (
            f"\n\nExperts: least used {report['smallest_load']:.1%}, most used {report['largest_load']:.1%} of their router's"
            f" choices, {report['dead_experts']} dead (under 1 %)."
        )
    if "specialisation" in report:
        s = report["specialisation"]
        text += (
            f"\n\nRouting of the streams lies {s['distance']:.4f} from their mean (total variation); with samples dealt to"
            f" streams at random {s['shuffled']['mean']:.4f}, at most {s['shuffled']['largest']:.4f} in"
            f" {s['shuffled']['times']} times."
        )
    return text


def evaluation_page(result: Mapping[str, Any]) -> str:
    """The same as pictures and text in one HTML file that needs no network."""
    parts = []
    for i, figure in enumerate(_figures(result)):
        figure.update_layout(template="plotly_white", height=420)
        parts.append(figure.to_html(include_plotlyjs=i == 0, full_html=False))
    title, text = html.escape(str(result["model"])), html.escape(evaluation_text(result))
    head = f'<!doctype html><meta charset="utf-8"><title>{title}</title>\n'
    return head + "\n".join(parts) + f"\n<pre>{text}</pre>\n"


def _figures(result: Mapping[str, Any]) -> list[Any]:
    import plotly.graph_objects as go

    figures = []
    if result["exam"]:
        bars, curves = go.Figure(), go.Figure()
        for kind in KINDS:
            measured = {file: kinds[kind] for file, kinds in result["exam"].items() if kind in kinds}
            values = [m["accuracy"] for m in measured.values()]
            above = [m["confidence95"][1] - m["accuracy"] for m in measured.values()]
            below = [m["accuracy"] - m["confidence95"][0] for m in measured.values()]
            if measured:
                error = {"type": "data", "array": above, "arrayminus": below}
                bars.add_trace(go.Bar(x=list(measured), y=values, error_y=error, name=kind))
            for file, m in measured.items():
                x = [b["confidence"] for b in m["calibration"]["bins"]]
                y = [b["accuracy"] for b in m["calibration"]["bins"]]
                curves.add_trace(go.Scatter(x=x, y=y, mode="lines+markers", name=f"{kind}, {file}"))
        bars.update_layout(title="Letter accuracy, 95 % intervals", yaxis_tickformat=".0%", barmode="group")
        curves.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", name="calibrated", line={"dash": "dot"}))
        curves.update_layout(title="Calibration", xaxis_title="confidence", yaxis_title="accuracy")
        figures += [bars, curves]
    if result["dev"]:
        loss = go.Figure()
        for kind in _present(result["dev"]):
            streams = result["dev"][kind]["loss"]
            loss.add_trace(go.Bar(x=list(streams), y=list(streams.values()), name=kind))
        loss.update_layout(title="Loss per answer token on held-out rows", barmode="group")
        figures.append(loss)
    return figures
