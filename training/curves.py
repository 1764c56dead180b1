"""Pictures of a run from its metrics.jsonl: one HTML file that needs no network (plotly inside)."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from ming_app.molora.config import PROJECTIONS
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
    """Writes `curves.html`: losses, learning rate, gradient and router terms by step; then, as they were last recorded,
    the load of every expert, the entropy of every router and how far each stream's routing lies from all streams'."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    metrics = read_metrics(run)
    steps = steps_of(metrics)
    evaluations = [line for line in metrics if line.get("event") == "dev"]
    titles = (
        "Training loss",
        "Dev loss by stream",
        "Learning rate",
        "Gradient norm",
        "Router terms",
        "Expert load over all routers",
    )
    figure = make_subplots(rows=3, cols=2, subplot_titles=titles)
    x = [line["step"] for line in steps]

    def line_of(name: str) -> Any:
        return go.Scatter(x=x, y=[line.get(name) for line in steps], name=name)

    losses = [line["loss"] for line in steps]
    figure.add_trace(go.Scatter(x=x, y=losses, name="loss", mode="lines", opacity=0.35), 1, 1)
    figure.add_trace(go.Scatter(x=x, y=_smooth(losses), name="loss, smoothed"), 1, 1)
    for stream in evaluations[-1]["dev_loss"] if evaluations else ():
        points = [(line["step"], line["dev_loss"].get(stream)) for line in evaluations]
        figure.add_trace(
            go.Scatter(x=[p[0] for p in points], y=[p[1] for p in points], name=stream, mode="lines+markers"), 1, 2
        )
    figure.add_trace(line_of("lr"), 2, 1)
    figure.add_trace(line_of("gradient"), 2, 2)
    for term in ("balance", "z", "router_entropy"):
        figure.add_trace(line_of(term), 3, 1)
    for trace in _load_traces(go, steps):
        figure.add_trace(trace, 3, 2)
    figure.update_layout(title=f"Training run {run.name}", height=1000, template="plotly_white")
    parts = [figure.to_html(include_plotlyjs=True, full_html=False)]
    parts += [table.to_html(include_plotlyjs=False, full_html=False) for table in router_figures(steps, evaluations)]
    page = f'<!doctype html><meta charset="utf-8"><title>{html.escape(run.name)}</title>\n' + "\n".join(parts)
    return write_text(run / "curves.html", page)


def router_figures(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[Any]:
    """Heatmaps of the last records: [expert_load, entropy] of the training steps, stream distances of the dev rows."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figures = []
    recorded = [line for line in steps if "expert_load" in line]
    if recorded:
        load = np.asarray(recorded[-1]["expert_load"])  # (L, P, E)
        titles = [f"{projection}_proj" for projection in PROJECTIONS]
        figure = make_subplots(rows=1, cols=4, subplot_titles=[*titles, "entropy of the routers"])
        for i in range(len(PROJECTIONS)):
            colours = {"coloraxis": "coloraxis", "x": [f"expert {e}" for e in range(load.shape[2])]}
            figure.add_trace(go.Heatmap(z=load[:, i], hovertemplate="layer %{y}, %{x}: %{z:.1%}", **colours), 1, i + 1)
        about: dict[str, Any] = {"x": list(PROJECTIONS), "coloraxis": "coloraxis2"}
        entropy = recorded[-1].get("entropy_by_layer")  # older runs lack it
        figure.add_trace(go.Heatmap(z=entropy, hovertemplate="layer %{y}, %{x}: %{z:.3f}", **about), 1, 4)
        figure.update_layout(
            title=f"Routers around step {recorded[-1]['step']}: share of each expert by layer"
            f" ({recorded[-1]['dead_experts']} dead), entropy in units of log E",
            height=560,
            template="plotly_white",
            coloraxis={
                "colorscale": "Viridis",
                "cmin": 0,
                "colorbar": {"orientation": "h", "x": 0.36, "y": -0.3, "len": 0.7},
            },
            coloraxis2={"colorscale": "Cividis", "cmin": 0, "cmax": 1, "colorbar": {"x": 1.0, "len": 0.9}},
        )
        figures.append(figure)
    if evaluations and evaluations[-1].get("load"):
        distance = stream_distance({name: np.asarray(load) for name, load in evaluations[-1]["load"].items()})
        names = list(distance)
        heat = go.Heatmap(z=[distance[name] for name in names], y=names, colorscale="Viridis", zmin=0)
        figure = go.Figure(heat)
        figure.update_layout(
            title="How far each stream's routing lies from that of all streams, by layer (total variation, mean of projections)",
            xaxis_title="layer",
            height=240 + 34 * len(names),
            xaxis_dtick=1 if len(next(iter(distance.values()))) < 12 else 4,
            template="plotly_white",
        )
        figures.append(figure)
    return figures


def stream_distance(load: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Load [L, P, E] per stream -> per stream and layer the total variation distance from the mean of all streams."""
    mean = np.mean(list(load.values()), axis=0)
    return {name: (np.abs(table - mean).sum(-1) / 2).mean(-1).tolist() for name, table in load.items()}


def _load_traces(go: Any, steps: list[dict[str, Any]]) -> list[Any]:
    """Mean load of each expert index over layers and projections, and the smallest load of any expert."""
    records = [(line["step"], np.asarray(line["expert_load"])) for line in steps if "expert_load" in line]
    if not records:
        return []
    x = [step for step, _ in records]
    means = np.stack([load.mean((0, 1)) for _, load in records])  # (records, E)
    traces = [go.Scatter(x=x, y=means[:, e], name=f"expert {e}") for e in range(means.shape[1])]
    smallest = [float(load[load > 0].min()) for _, load in records]
    return [*traces, go.Scatter(x=x, y=smallest, name="smallest of all", line={"dash": "dot"})]


def _smooth(values: list[float]) -> list[float]:
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else SMOOTHING * smoothed[-1] + (1 - SMOOTHING) * value)
    return smoothed
