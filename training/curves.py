"""Pictures of a run from its metrics.jsonl: one HTML file that needs no network (plotly inside)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.errors import DataError
from training.files import write_text

SMOOTHING = 0.9  # weight of the past in the smoothed loss line


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a cut last line (killed process) is left out. Raises DataError when there is none."""
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{run} has no metrics.jsonl.", f"{run} 中没有 metrics.jsonl。") from error
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def steps_of(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Step lines in order; after a resume the later record of a step counts."""
    by_step = {line["step"]: line for line in metrics if "loss" in line and "event" not in line}
    return [by_step[step] for step in sorted(by_step)]


def write_curves(run: Path) -> Path:
    """Writes `curves.html`: loss, dev loss per stream, learning rate and gradient, router terms, expert load."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    metrics = read_metrics(run)
    steps = steps_of(metrics)
    titles = (
        "Training loss",
        "Dev loss by stream",
        "Learning rate",
        "Gradient norm",
        "Router",
        "Expert load, all routers",
    )
    figure = make_subplots(rows=3, cols=2, subplot_titles=titles)
    x = [line["step"] for line in steps]
    losses = [line["loss"] for line in steps]
    figure.add_trace(go.Scatter(x=x, y=losses, name="loss", mode="lines", opacity=0.35), 1, 1)
    figure.add_trace(go.Scatter(x=x, y=_smooth(losses), name="loss, smoothed"), 1, 1)
    evaluations = [line for line in metrics if line.get("event") == "dev"]
    for stream in evaluations[-1]["dev_loss"] if evaluations else ():
        points = [(line["step"], line["dev_loss"].get(stream)) for line in evaluations]
        figure.add_trace(
            go.Scatter(x=[p[0] for p in points], y=[p[1] for p in points], name=stream, mode="lines+markers"), 1, 2
        )
    figure.add_trace(go.Scatter(x=x, y=[line["lr"] for line in steps], name="lr"), 2, 1)
    figure.add_trace(go.Scatter(x=x, y=[line["gradient"] for line in steps], name="gradient"), 2, 2)
    for term in ("balance", "router_entropy"):
        figure.add_trace(go.Scatter(x=x, y=[line[term] for line in steps], name=term), 3, 1)
    for trace in _load_traces(go, steps):
        figure.add_trace(trace, 3, 2)
    figure.update_layout(title=f"Training run {run.name}", height=1000, template="plotly_white")
    return write_text(run / "curves.html", figure.to_html(include_plotlyjs=True, full_html=True))


def _load_traces(go: Any, steps: list[dict[str, Any]]) -> list[Any]:
    """Mean load of each expert index over layers and projections, and the smallest load of any expert."""
    records = [(line["step"], line["expert_load"]) for line in steps if "expert_load" in line]
    if not records:
        return []
    x = [step for step, _ in records]
    rows = [[load for layer in table for load in layer] for _, table in records]
    experts = range(len(rows[0][0]))
    traces = [
        go.Scatter(x=x, y=[sum(r[e] for r in row) / len(row) for row in rows], name=f"expert {e}") for e in experts
    ]
    smallest = [min(min(r) for r in row) for row in rows]
    return [*traces, go.Scatter(x=x, y=smallest, name="smallest of all", line={"dash": "dot"})]


def _smooth(values: list[float]) -> list[float]:
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else SMOOTHING * smoothed[-1] + (1 - SMOOTHING) * value)
    return smoothed
