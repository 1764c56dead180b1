"""The views of a trace: each a pure function that gives a plotly figure (as plain JSON) and the same as a table.

Figures keep to what an older plotly.js draws too (heatmap, bar, scatter, sankey), with lists for numbers. Text colours are
readable on light and dark; heatmaps use scales that colour-blind people can read. No plotly import here.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ming_app.molora.trace import RouterTrace
from ming_app.router.compare import Comparison
from ming_app.router.groups import Grouping
from ming_app.router.specialisation import CONTEXTS, LIFT, RATE, SEEN, Specialisation, specialisation, vocabulary
from ming_app.router.statistics import Load, coactivation, flow, load
from ming_app.router.words import name_of, percent, say
from ming_app.spreadsheet import safe_cell

PALETTE = ("#4a90d9", "#e69f00", "#12a37c", "#d677ad", "#e0cf3a", "#d55e00", "#7fc6ee", "#8a8f98")
INK, GRID = "#71848b", "rgba(113,132,139,.25)"
FLOW_LAYERS = 8  # that a sankey shows at once
FAVOURITE, EVERYWHERE = (
    3.0,
    5.0,
)  # standard errors that make a favourite: of one router, and where hundreds are searched
MOST_FAVOURITES = 200
Figure = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def to_html(self, limit: int = 400) -> str:
        """An HTML table of at most `limit` rows; every cell is escaped."""
        head = "".join(f'<th scope="col">{html.escape(str(c))}</th>' for c in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(v))}</td>" for v in row) + "</tr>" for row in self.rows[:limit]
        )
        more = f"<p>… {len(self.rows) - limit}</p>" if len(self.rows) > limit else ""
        return f'<table class="xv-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}'

    def to_csv(self) -> str:
        """RFC 4180, with a byte-order mark so that spreadsheets read it as UTF-8. A cell that a spreadsheet would take for
        a formula gets an apostrophe."""
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow([safe_cell(column) for column in self.columns])
        writer.writerows([safe_cell(value) for value in row] for row in self.rows)
        return "\ufeff" + buffer.getvalue()


@dataclass(frozen=True)
class View:
    """One picture with its words. `figure` is None where a table says it better."""

    name: str
    title: str
    note: str
    figure: Figure | None
    table: Table


@dataclass(frozen=True)
class Where:
    """What a view is of: one layer and projection (indices), or all of them (None)."""

    layer: int | None = None
    projection: int | None = None

    def text(self, lang: str, trace: RouterTrace) -> str:
        """For people."""
        if self.projection is None:
            return say(lang, "scope.all")
        matrix = trace.projections[self.projection]
        if self.layer is None:
            return say(lang, "scope.matrix", matrix=matrix)
        return say(lang, "scope.layer", layer=self.layer, matrix=matrix)


def load_view(
    trace: RouterTrace,
    lang: str,
    projection: int = 0,
    rows: np.ndarray | None = None,
    found: Load | None = None,
) -> View:
    """Share of every expert in every layer of one projection, against chance; entropy and Gini in the table. `found`:
    `load`, where it is known."""
    found, E = found or load(trace, rows), trace.num_experts
    share = found.share[:, projection]
    outside = (share < found.low[:, projection]) | (share > found.high[:, projection])
    marks = np.where(outside, "•", "").tolist()
    even = 1 / E
    figure = _heatmap(
        share,
        x=[_expert(lang, e) for e in range(E)],
        y=[str(layer) for layer in range(trace.num_layers)],
        low=0.0,
        high=2 * even,
        diverging=True,
        text=marks,
        hover=f"{say(lang, 'layer')} %{{y}}, %{{x}}: %{{z:.1%}}<extra></extra>",
        axes=("", say(lang, "layer")),
    )
    rows_of_table = [
        (
            layer,
            trace.projections[p],
            e,
            _round(found.share[layer, p, e]),
            _round(found.low[layer, p, e]),
            _round(found.high[layer, p, e]),
            say(lang, "yes")
            if not found.low[layer, p, e] <= found.share[layer, p, e] <= found.high[layer, p, e]
            else "",
            _round(found.gini[layer, p]),
            _round(found.entropy[layer, p]),
        )
        for layer, p, e in np.ndindex(*found.share.shape)
    ]
    columns = _columns(lang, "layer", "matrix", "expert", "share", "low", "high", "outside", "gini", "entropy")
    scope = Where(None, projection).text(lang, trace)
    dead = _dead([cell for cell in found.dead if cell[1] == projection], trace, lang)
    note = say(lang, "load.note", scope=scope, tokens=found.tokens, even=percent(even), dead=dead)
    return View("load", say(lang, "load.title"), note, figure, Table(columns, rows_of_table))


def specialisation_view(
    trace: RouterTrace,
    lang: str,
    grouping: Grouping,
    projection: int = 0,
    layer: int = 0,
    found: Specialisation | None = None,
) -> View | None:
    """Divergence of a grouping by layer, with the band of shuffled labels, over the groups' shares in one layer; None when
    fewer than two groups have tokens. `found`: `specialisation`, where it is known."""
    found = found or specialisation(trace, grouping)
    if found is None:
        return None
    layers = list(range(trace.num_layers))
    own, mean, high = (array[:, projection].tolist() for array in (found.divergence, found.chance, found.chance_high))
    lines = [
        _line(layers, high, say(lang, "chance_high"), INK, dash="dot"),
        _line(layers, mean, say(lang, "chance"), INK, fill=True),
        _line(layers, own, say(lang, "divergence"), PALETTE[0], width=3),
    ]
    shares = _groups_figure(found, lang, layer, projection)
    below = 60 + 26 * len(found.names)
    split = below / (below + 300)
    heat = shares["data"][0] | {"xaxis": "x2", "yaxis": "y2"}
    heat["colorbar"] |= {"y": split / 2, "len": split}
    figure = {
        "data": [*lines, heat],
        "layout": layout(
            300 + below,
            xaxis=axis(say(lang, "layer"), anchor="y"),
            yaxis=axis(say(lang, "divergence"), rangemode="tozero", domain=[split + 0.12, 1]),
            xaxis2=shares["layout"]["xaxis"] | {"anchor": "y2", "domain": [0, 1]},
            yaxis2=shares["layout"]["yaxis"] | {"anchor": "x2", "domain": [0, split - 0.06]},
        ),
    }
    names = [name_of(lang, "name", name) for name in found.names]
    columns = (
        *_columns(lang, "layer", "matrix", "divergence", "chance", "chance_high", "outside"),
        *(f"{name}, {_expert(lang, e)}" for name in names for e in range(trace.num_experts)),
    )
    rows = [
        (
            at,
            trace.projections[p],
            _round(found.divergence[at, p]),
            _round(found.chance[at, p]),
            _round(found.chance_high[at, p]),
            say(lang, "yes") if found.divergence[at, p] > found.chance_high[at, p] else "",
            *(_round(value) for value in found.share[:, at, p].ravel()),
        )
        for at, p in np.ndindex(*found.divergence.shape)
    ]
    kind = name_of(lang, "kind", found.kind)
    note = say(
        lang,
        "spec.note",
        beyond=percent(found.beyond_chance),
        cells=found.divergence.size,
        layer=layer,
        largest=f"{found.largest:.2f}",
        unit=say(lang, "spec.by_text" if found.whole_texts else "spec.by_token"),
    )
    return View(f"specialisation-{found.kind}", say(lang, "spec.title", kind=kind), note, figure, Table(columns, rows))


def _groups_figure(found: Specialisation, lang: str, layer: int, projection: int) -> Figure:
    """Share of every expert for every group, one layer and projection."""
    names = [
        html.escape(f"{name_of(lang, 'name', name)} ({size})")
        for name, size in zip(found.names, found.sizes, strict=True)
    ]
    share = found.share[:, layer, projection]
    return _heatmap(
        share,
        [_expert(lang, e) for e in range(share.shape[1])],
        names,
        0.0,
        float(share.max()),
        hover="%{y}, %{x}: %{z:.1%}<extra></extra>",
    )


def vocabulary_view(trace: RouterTrace, lang: str, where: Where | None = None, rows: np.ndarray | None = None) -> View:
    """The favourite tokens of every expert of one router, or the strongest of all routers (None); a table only."""
    if where is None:
        cells = [(layer, p) for layer, p in np.ndindex(trace.num_layers, len(trace.projections))]
        scope = say(lang, "scope.all")
    else:
        cells, scope = [(where.layer or 0, where.projection or 0)], where.text(lang, trace)
    found = [
        (layer, trace.projections[p], e, favourite)
        for layer, p in cells
        for e, favourites in enumerate(vocabulary(trace, layer, p, rows))
        for favourite in favourites
    ]
    if where is None:
        found.sort(key=lambda row: (-row[-1].lift, -row[-1].times))
    table = [
        (layer, matrix, e, f.text, f.times, f.contexts, _round(f.share), _round(f.usual), round(f.lift, 2))
        for layer, matrix, e, f in found[:MOST_FAVOURITES]
    ]
    note = say(lang, "vocab.note", seen=SEEN, contexts=CONTEXTS, rate=percent(RATE), lift=LIFT, scope=scope)
    columns = _columns(lang, "layer", "matrix", "expert", "token", "times", "contexts", "share", "usual", "lift")
    return View("vocabulary", say(lang, "vocab.title"), note, None, Table(columns, table))


def together_view(
    trace: RouterTrace,
    lang: str,
    layer: int,
    projection: int,
    rows: np.ndarray | None = None,
    found: np.ndarray | None = None,
) -> View:
    """Co-activation of one layer and projection; its table is of that layer. `found`: `coactivation`, where it is known."""
    found, E = coactivation(trace, rows) if found is None else found, trace.num_experts
    matrix = found[layer, projection].astype(object)
    np.fill_diagonal(matrix, None)
    names = [_expert(lang, e) for e in range(E)]
    figure = _heatmap(matrix, names, names, 0.0, 1.0, hover="%{y} → %{x}: %{z:.1%}<extra></extra>", square=True)
    table = [
        (at, trace.projections[p], i, j, _round(found[at, p, i, j]))
        for at, p, i, j in np.ndindex(*found.shape)
        if i != j
    ]
    even = (trace.top_k - 1) / (E - 1) if E > 1 else 0.0
    note = say(lang, "together.note", scope=Where(layer, projection).text(lang, trace), even=percent(even))
    columns = (*_columns(lang, "layer", "matrix", "from", "to"), say(lang, "share"))
    return View("together", say(lang, "together.title"), note, figure, Table(columns, table))


def flow_view(trace: RouterTrace, lang: str, projection: int, first: int = 0, rows: np.ndarray | None = None) -> View:
    """Sankey of the top expert over FLOW_LAYERS layers from `first` on; the table holds all layers."""
    counts, E = flow(trace, projection, rows), trace.num_experts
    first = max(0, min(first, trace.num_layers - FLOW_LAYERS))
    last = min(first + FLOW_LAYERS, trace.num_layers) - 1
    shown = [(layer, i, j) for layer in range(first, last) for i in range(E) for j in range(E) if counts[layer, i, j]]
    span = max(last - first, 1)
    nodes = [(layer, e) for layer in range(first, last + 1) for e in range(E)]
    sankey = {
        "type": "sankey",
        "arrangement": "fixed",
        "node": {
            "label": [str(e) for _, e in nodes],
            "color": [_colour(e) for _, e in nodes],
            "x": [0.001 + 0.998 * (layer - first) / span for layer, _ in nodes],
            "y": [0.001 + 0.998 * (e + 0.5) / E for _, e in nodes],
            "pad": 8,
            "thickness": 12,
            "customdata": [f"{say(lang, 'layer')} {layer}, {_expert(lang, e)}" for layer, e in nodes],
            "hovertemplate": "%{customdata}: %{value}<extra></extra>",
        },
        "link": {
            "source": [(layer - first) * E + i for layer, i, _ in shown],
            "target": [(layer - first + 1) * E + j for layer, _, j in shown],
            "value": [int(counts[cell]) for cell in shown],
            "color": [_faint(_colour(i)) for _, i, _ in shown],
            "hovertemplate": "%{source.label} → %{target.label}: %{value}<extra></extra>",
        },
    }
    matrix = trace.projections[projection]
    table = [(layer, matrix, i, j, int(counts[layer, i, j])) for layer, i, j in np.ndindex(*counts.shape)]
    columns = (*_columns(lang, "layer", "matrix", "from", "to"), say(lang, "tokens"))
    note = say(lang, "flow.note", first=first, last=last, matrix=trace.projections[projection])
    figure = {"data": [sankey], "layout": layout(360)}
    return View("flow", say(lang, "flow.title"), note, figure, Table(columns, table))


def alike_view(similarity: np.ndarray, trace: RouterTrace, lang: str, layer: int, projection: int) -> View:
    """Cosine of the experts' updates, float [L, P, E, E] (molora.similarity), for one layer and projection."""
    E = similarity.shape[-1]
    names = [_expert(lang, e) for e in range(E)]
    apart = ~np.eye(E, dtype=bool)
    span = max(0.1, float(np.abs(similarity[:, :, apart]).max(initial=0)))  # one scale for all layers
    matrix = similarity[layer, projection].astype(object)
    np.fill_diagonal(matrix, None)
    hover = "%{y}, %{x}: %{z:.3f}<extra></extra>"
    figure = _heatmap(matrix, names, names, -span, span, hover=hover, square=True, diverging=True)
    table = [
        (layer, trace.projections[p], i, j, _round(similarity[layer, p, i, j]))
        for p, i, j in np.ndindex(*similarity.shape[1:])
        if i < j
    ]
    columns = (*_columns(lang, "layer", "matrix", "expert", "expert"), "cos")
    note = say(lang, "alike.note", scope=Where(layer, projection).text(lang, trace))
    return View("alike", say(lang, "alike.title"), note, figure, Table(columns, table))


def contribution_view(trace: RouterTrace, lang: str, projection: int, rows: np.ndarray | None = None) -> View | None:
    """Mean contribution of every expert by layer; None where contributions were not recorded."""
    if trace.contributions is None:
        return None
    kept = np.arange(len(trace)) if rows is None else np.flatnonzero(rows)
    experts, size = trace.experts[kept].astype(np.int64), trace.contributions[kept].astype(np.float64)
    E, L, P = trace.num_experts, trace.num_layers, len(trace.projections)
    cell = np.arange(L * P).reshape(1, L, P, 1) * E
    flat = (experts + cell).ravel()
    total, times = (np.bincount(flat, weights, minlength=L * P * E) for weights in (size.ravel(), None))
    mean = np.divide(total, times, out=np.full(total.shape, np.nan), where=times > 0).reshape(L, P, E)
    shown = mean[:, projection]
    figure = _heatmap(
        np.where(np.isnan(shown), None, shown.astype(object)),
        [_expert(lang, e) for e in range(E)],
        [str(layer) for layer in range(L)],
        0.0,
        float(np.nanmax(shown)) if np.isfinite(shown).any() else 1.0,
        hover=f"{say(lang, 'layer')} %{{y}}, %{{x}}: %{{z:.1%}}<extra></extra>",
        axes=("", say(lang, "layer")),
    )
    table = [(at, trace.projections[p], e, _round(mean[at, p, e])) for at, p, e in np.ndindex(*mean.shape)]
    columns = (*_columns(lang, "layer", "matrix", "expert"), say(lang, "contribution.title"))
    return View(
        "contribution", say(lang, "contribution.title"), say(lang, "contribution.note"), figure, Table(columns, table)
    )


def compare_view(found: Comparison, a: RouterTrace, b: RouterTrace, lang: str) -> View:
    """Layers x aligned tokens: how much weight moved to other experts."""
    texts = [_visible(a.tokens[i].text) for i, _ in found.pairs]
    moved = found.moved.mean(-1).T  # (L, n)
    figure = _heatmap(
        moved,
        list(range(len(texts))),
        [str(layer) for layer in range(a.num_layers)],
        0.0,
        1.0,
        hover=f"%{{customdata}}, {say(lang, 'layer')} %{{y}}: %{{z:.0%}}<extra></extra>",
        axes=(say(lang, "token"), say(lang, "layer")),
    )
    labels = [html.escape(text) for text in texts]  # plotly reads labels as HTML
    figure["data"][0]["customdata"] = [labels] * a.num_layers
    figure["layout"]["xaxis"] |= {"tickvals": list(range(len(texts))), "ticktext": labels} if len(texts) <= 80 else {}
    note = say(
        lang, "compare.note", pairs=len(found.pairs), only_a=found.only_a, only_b=found.only_b, same=percent(found.same)
    )
    table = [
        (f"{i}, {j}", text, _round(found.overlap[n].mean()), _round(found.moved[n].mean()))
        for n, ((i, j), text) in enumerate(zip(found.pairs.tolist(), texts, strict=True))
    ]
    columns = _columns(lang, "aligned", "token", "overlap", "moved")
    return View("compare", say(lang, "compare.title"), note, figure, Table(columns, table))


# -- pieces of figures ----------------------------------------------------------------------------------------------------


def _heatmap(
    z: Any,
    x: Sequence[Any],
    y: Sequence[Any],
    low: float,
    high: float,
    *,
    hover: str,
    text: Any = None,
    axes: tuple[str, str] = ("", ""),
    square: bool = False,
    diverging: bool = False,
) -> Figure:
    scale: Any = [[0, "#b35806"], [0.5, "#f4f4f4"], [1, "#542788"]] if diverging else "Cividis"
    trace = {
        "type": "heatmap",
        "z": _plain(z),
        "x": list(x),
        "y": list(y),
        "zmin": low,
        "zmax": high or 1.0,
        "colorscale": scale,
        "hovertemplate": hover,
        "xgap": 1 if len(x) <= 64 else 0,
        "ygap": 1,
        "colorbar": {"thickness": 12, "outlinewidth": 0, "tickfont": {"color": INK}},
    }
    if text is not None:
        trace |= {"text": text, "texttemplate": "%{text}", "textfont": {"size": 13}}
    height = 340 if square else 110 + 17 * len(y)
    yaxis = axis(axes[1], autorange="reversed", type="category")
    if square:
        yaxis |= {"scaleanchor": "x", "constrain": "domain"}
    named = bool(x) and isinstance(x[0], str)
    xaxis = axis(axes[0], constrain="domain", **({"type": "category"} if named else {}))
    return {"data": [trace], "layout": layout(height, xaxis=xaxis, yaxis=yaxis)}


def _line(
    x: Sequence[int],
    y: Sequence[float],
    name: str,
    colour: str,
    *,
    width: int = 1,
    dash: str = "solid",
    fill: bool = False,
) -> dict[str, Any]:
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": [_round(v) for v in y],
        "name": name,
        "line": {"color": colour, "width": width, "dash": dash},
    }
    return {**line, "fill": "tonexty", "fillcolor": "rgba(113,132,139,.18)"} if fill else line


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """A plotly axis in our colours."""
    return {"title": {"text": title}, "gridcolor": GRID, "zeroline": False, "automargin": True, **more}


def layout(height: int, **more: Any) -> dict[str, Any]:
    """A plotly layout of that height in pixels, on a clear ground."""
    return {
        "height": height,
        "margin": {"l": 50, "r": 20, "t": 20, "b": 45},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK, "size": 12},
        "legend": {"orientation": "h", "y": 1.12},
        **more,
    }


def _plain(z: Any) -> list[list[float | None]]:
    return [[None if value is None else _round(value) for value in row] for row in np.asarray(z).tolist()]


def _round(value: Any) -> float:
    return round(float(value), 4)


def _colour(expert: int) -> str:
    return PALETTE[expert % len(PALETTE)]


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},.4)"


def _expert(lang: str, expert: int) -> str:
    return f"{say(lang, 'expert')} {expert}"


def _columns(lang: str, *keys: str) -> tuple[str, ...]:
    return tuple(say(lang, key) for key in keys)


def _visible(text: str) -> str:
    return text.strip() or {"\n": "↵"}.get(text.strip(" ")[:1], "␣") if text else "·"


def _dead(dead: Iterable[tuple[int, int, int]], trace: RouterTrace, lang: str) -> str:
    cells: dict[tuple[int, int], list[int]] = {}
    for layer, p, e in dead:
        cells.setdefault((layer, p), []).append(e)
    if not cells:
        return say(lang, "load.none_dead")
    named = [
        say(lang, "load.cell", layer=layer, matrix=trace.projections[p], experts=", ".join(map(str, experts)))
        for (layer, p), experts in sorted(cells.items())
    ]
    more = "; …" if len(named) > 8 else ""
    return say(lang, "load.dead", names="; ".join(named[:8]) + more)


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
