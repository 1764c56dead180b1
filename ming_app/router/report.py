"""A trace as one HTML file that needs nothing else: the live panel, every view with its choices of layer and matrix, tables.

plotly.js and the panel's script lie inside. The text of tokens is data throughout: escaped in HTML, and inside scripts
written so that it cannot end them.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

import numpy as np

from ming_app.molora.trace import RouterTrace
from ming_app.router import panel, views
from ming_app.router.groups import groupings
from ming_app.router.payload import trace_payload
from ming_app.router.specialisation import specialisation
from ming_app.router.statistics import coactivation, load
from ming_app.router.views import FLOW_LAYERS, Table, View, Where
from ming_app.router.words import name_of, panel_words, say

MAX_PANEL_TOKENS = 6000  # beyond, the strip would be too long to draw at once

STYLE = """
body { margin: 0; background: var(--m-bg); color: var(--m-ink); font: 15px/1.6 var(--m-font); }
main { max-width: 1100px; margin: 0 auto; padding: 22px 18px 60px; }
h1 { font-size: 24px; line-height: 1.3; margin: 0 0 6px; }
.r-card { background: var(--m-surface); border: 1px solid var(--m-line); border-radius: 14px; padding: 14px 18px; margin: 16px 0; }
.r-card label { font-size: 13px; color: var(--m-muted); margin-inline-end: 12px; }
.r-card select { font: inherit; background: var(--m-surface); color: var(--m-ink); border: 1px solid var(--m-line); border-radius: 7px; padding: 2px 6px; margin-inline-start: 5px; max-width: 100%; }
.r-note { color: var(--m-muted); font-size: 13.5px; margin: 3px 0 8px; }
.r-caution { border-inline-start: 3px solid var(--m-accent); padding-inline-start: 12px; }
@media (max-width: 520px) { main { padding: 14px 10px 40px; } .r-card { padding: 11px; } }
"""

SCRIPT = """
const scheme = matchMedia("(prefers-color-scheme: dark)");
const paint = () => document.body.classList.toggle("dark", scheme.matches);
scheme.addEventListener("change", paint);
paint();
const data = JSON.parse(document.getElementById("data").textContent);
for (const [name, variants] of Object.entries(data.views)) {
  const card = document.getElementById(name), choice = card.querySelector("select"), plot = card.querySelector(".r-plot");
  const draw = () => {
    const variant = variants[choice ? choice.value : 0];
    card.querySelector(".r-note").textContent = variant.note;
    if (variant.figure) Plotly.react(plot, variant.figure.data, variant.figure.layout, { responsive: true, displaylogo: false });
  };
  if (choice) choice.onchange = draw;
  draw();
}
if (data.panel) {
  const element = document.getElementById("panel"), props = { value: data.panel, words: JSON.stringify(data.words) };
  ((element, props, trigger, watch) => { PANEL_SCRIPT })(element, props, () => {}, () => {});
}
"""


def report_views(
    trace: RouterTrace, lang: str, similarity: np.ndarray | None = None
) -> dict[str, list[tuple[str, View]]]:
    """Every view of the trace that has something to show: name -> [(choice, view)], one choice per layer or matrix."""
    matrices = list(enumerate(trace.projections))
    found: dict[str, list[tuple[str, View]]] = {}

    def put(choice: str, view: View | None) -> None:
        if view is not None:
            found.setdefault(view.name, []).append((choice, view))

    shares = load(trace)
    for p, matrix in matrices:
        put(matrix, views.load_view(trace, lang, p, found=shares))
    for p, matrix in matrices:
        put(matrix, views.contribution_view(trace, lang, p))
    for grouping in groupings(trace):
        apart = specialisation(trace, grouping)
        for p, matrix in matrices:
            put(matrix, views.specialisation_view(trace, lang, grouping, p, trace.num_layers // 2, apart))
    put(say(lang, "scope.all"), views.vocabulary_view(trace, lang))
    if trace.top_k > 1:
        together = coactivation(trace)
        for layer, p in np.ndindex(trace.num_layers, len(matrices)):
            put(Where(layer, p).text(lang, trace), views.together_view(trace, lang, layer, p, found=together))
    if trace.num_layers > 1:
        for p, matrix in matrices:
            for first in range(0, trace.num_layers - 1, FLOW_LAYERS - 1):
                first = max(0, min(first, trace.num_layers - FLOW_LAYERS))
                last = min(first + FLOW_LAYERS, trace.num_layers) - 1
                put(f"{matrix}, {say(lang, 'layer')} {first}–{last}", views.flow_view(trace, lang, p, first))
    if similarity is not None:
        for layer, p in np.ndindex(trace.num_layers, len(matrices)):
            put(Where(layer, p).text(lang, trace), views.alike_view(similarity, trace, lang, layer, p))
    return found


def whole_table(variants: list[tuple[str, View]]) -> Table:
    """The rows of all choices of a view, each once."""
    rows = dict.fromkeys(row for _, view in variants for row in view.table.rows)
    return Table(variants[0][1].table.columns, list(rows))


def texts_table(trace: RouterTrace, lang: str) -> Table:
    """The texts of a trace: title, labels, tokens."""
    kinds = sorted({kind for segment in trace.segments for kind in segment.labels})
    sizes = np.bincount(trace.segment_of(), minlength=len(trace.segments)).tolist() if len(trace) else []
    rows = [
        (segment.title, *(name_of(lang, "name", segment.labels.get(kind, "")) for kind in kinds), size)
        for segment, size in zip(trace.segments, sizes, strict=True)
    ]
    return Table(
        (say(lang, "report.text"), *(name_of(lang, "kind", kind) for kind in kinds), say(lang, "tokens")), rows
    )


def report_html(trace: RouterTrace, lang: str, found: dict[str, list[tuple[str, View]]]) -> str:
    """The page. `found` is `report_views`'."""
    from plotly.offline import get_plotlyjs

    facts = say(
        lang,
        "report.made",
        tokens=len(trace),
        texts=max(len(trace.segments), 1),
        layers=trace.num_layers,
        experts=trace.num_experts,
        k=trace.top_k,
        precision=trace.config.get("precision", "?"),
    )
    title = say(lang, "report.title", model=trace.model or "MING-MOE")
    shown = len(trace) <= MAX_PANEL_TOKENS
    data = {
        "views": {
            name: [{"note": v.note, "figure": v.figure} for _, v in variants] for name, variants in found.items()
        },
        "panel": trace_payload(trace, "report") if shown else None,
        "words": panel_words(lang),
    }
    texts = _table(texts_table(trace, lang), say(lang, "report.texts")) if trace.segments else ""
    panel_card = f'<section class="r-card" id="panel">{panel.template()}</section>' if shown else ""
    cards = "".join(_card(name, variants, lang) for name, variants in found.items())
    script = SCRIPT.replace("PANEL_SCRIPT", panel.script())
    return f"""<!doctype html>
<html lang="{"zh-CN" if lang.startswith("zh") else "en"}">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>
<style>{panel.style()}{STYLE}</style><script>{get_plotlyjs()}</script></head>
<body><main><h1>{escape(title)}</h1><p>{escape(facts)}</p><p class="r-caution">{escape(say(lang, "caution"))}</p>{texts}
{panel_card}{cards}</main>
<script type="application/json" id="data">{_inside_script(data)}</script><script>{script}</script></body></html>
"""


def _card(name: str, variants: list[tuple[str, View]], lang: str) -> str:
    view = variants[0][1]
    options = "".join(f'<option value="{i}">{escape(choice)}</option>' for i, (choice, _) in enumerate(variants))
    choice = f"<label>{escape(say(lang, 'matrix'))}<select>{options}</select></label>" if len(variants) > 1 else ""
    plot = '<div class="r-plot"></div>' if view.figure else ""
    table = _table(whole_table(variants), say(lang, "table"), unfolded=view.figure is None)
    return f'<section class="r-card xv" id="{escape(name)}"><h3>{escape(view.title)}</h3><p class="r-note"></p>{choice}{plot}{table}</section>'


def _table(table: Table, title: str, unfolded: bool = False) -> str:
    if not table.rows:
        return ""
    return f'<details class="xv"{" open" if unfolded else ""}><summary>{escape(title)}</summary><div class="xv-scroll">{table.to_html()}</div></details>'


def _inside_script(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return (
        json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
