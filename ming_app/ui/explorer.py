"""What the Experts tab looks at and what it shows of it. Knows no gradio.

An `Exhibit` is one trace with a title: an answer of the chat, an opened file, or an answer made again with changed experts.
`Explorer` is one visitor's shelf of them and the choice made on it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from ming_app.engine.inspection import Contrast
from ming_app.engine.types import Message
from ming_app.errors import UsageError
from ming_app.molora.config import PROJECTIONS
from ming_app.molora.trace import RouterTrace
from ming_app.router import views
from ming_app.router.compare import compare
from ming_app.router.groups import groupings
from ming_app.router.payload import empty_payload, trace_payload
from ming_app.router.views import View, Where
from ming_app.router.words import name_of, say
from ming_app.ui.text import refusal, t

MAX_EXHIBITS = 24  # the oldest make way
TITLE_CHARS = 46
MAX_CELLS = 6_000_000  # tokens x layers x projections x experts of one exhibit
VIEWS = ("load", "contribution", "groups", "vocabulary", "together", "flow", "alike", "compare")


@dataclass(frozen=True)
class Exhibit:
    """`messages` led to the answer in the trace; None for a trace from a file, which cannot be answered again."""

    key: str
    title: str
    trace: RouterTrace
    messages: tuple[Message, ...] | None = None
    answer: str = ""


@dataclass(eq=False)
class Explorer:
    """One visitor's shelf."""

    exhibits: list[Exhibit] = field(default_factory=list)
    chosen: str | None = None
    other: str | None = None
    """what the chosen one is compared with"""
    view: str = "load"
    grouping: str = ""
    layer: int | None = None
    """None until something was looked at: then the middle one, with which the panel begins too"""
    projection: int = 0
    answers_only: bool = True
    last_layer: int = -1
    """of the records that the page's numbers of layers stand for"""

    def add(
        self,
        title: str,
        trace: RouterTrace,
        messages: Sequence[Message] | None = None,
        answer: str = "",
        changes: str = "",
    ) -> Exhibit:
        """Puts a trace on the shelf; the newest comes first. `changes`: what was done to the experts, kept in the title.

        Raises UsageError for a trace too large to be drawn for one visitor among many."""
        cells = len(trace) * trace.num_layers * len(trace.projections) * trace.num_experts
        if cells > MAX_CELLS:
            raise UsageError(
                f"The record is too large for the page ({len(trace)} tokens). Use: python -m ming_app trace report FILE --out report.html",
                f"该记录过大（{len(trace)} 个词元），无法在页面中显示。请使用：python -m ming_app trace report FILE --out report.html",
            )
        title = _cut(" ".join(title.split())) + (f" [{_cut(changes)}]" if changes else "")
        key = uuid.uuid4().hex[:12]
        made = Exhibit(key, title, trace, None if messages is None else tuple(messages), answer)
        self.exhibits = [made, *self.exhibits][:MAX_EXHIBITS]
        return made

    def replace(self, old: Exhibit, trace: RouterTrace) -> Exhibit:
        """The same exhibit with a fuller trace, in its place."""
        made = Exhibit(old.key, old.title, trace, old.messages, old.answer)
        self.exhibits = [made if exhibit.key == old.key else exhibit for exhibit in self.exhibits]
        return made

    def find(self, key: str | None) -> Exhibit | None:
        """The exhibit of that key; None when it is gone."""
        return next((exhibit for exhibit in self.exhibits if exhibit.key == key), None)

    @property
    def current(self) -> Exhibit | None:
        """What is looked at: the chosen exhibit, else the newest."""
        return self.find(self.chosen) or (self.exhibits[0] if self.exhibits else None)

    def need(self) -> Exhibit:
        """`current`. Raises MingError when the shelf is empty."""
        current = self.current
        if current is None:
            raise refusal("refuse.no_trace")
        return current

    def choices(self, lang: str) -> list[tuple[str, str]]:
        """(title with its number of tokens, key) of every exhibit, newest first."""
        return [
            (f"{exhibit.title}  ·  {t(lang, 'exp.tokens', n=len(exhibit.trace))}", exhibit.key)
            for exhibit in self.exhibits
        ]

    def others(self, lang: str) -> list[tuple[str, str]]:
        """The choices to compare the current exhibit with."""
        current = self.current
        return [choice for choice in self.choices(lang) if current is None or choice[1] != current.key]

    def look(self, key: str | None) -> None:
        """Chooses an exhibit and keeps layer and matrix where they exist."""
        self.chosen = key
        current = self.current
        if current is not None and (self.layer is None or self.layer >= current.trace.num_layers):
            self.layer = current.trace.num_layers // 2

    def payload(self) -> dict[str, Any]:
        """For the panel."""
        current = self.current
        return (
            trace_payload(current.trace, f"exhibit-{current.key}-{id(current.trace)}") if current else empty_payload()
        )

    def group_choices(self, lang: str) -> list[tuple[str, str]]:
        """(words, kind) of the groupings that the current trace has."""
        return [(name_of(lang, "kind", kind), kind) for kind in self._groupings()]

    def _groupings(self) -> list[str]:
        current = self.current
        return [grouping.kind for grouping in groupings(current.trace)] if current else []

    def show(self, lang: str, similarity: np.ndarray | None) -> View | None:
        """The chosen view of the current exhibit; None when there is nothing to see (`missing` says why)."""
        current = self.current
        if current is None:
            return None
        trace = current.trace
        rows = trace.is_answer() if self.answers_only and trace.is_answer().any() else None
        p, layer = self.projection, min(self.layer or 0, trace.num_layers - 1)
        match self.view:
            case "load":
                return views.load_view(trace, lang, p, rows)
            case "contribution":
                return views.contribution_view(trace, lang, p, rows)
            case "groups":
                found = {grouping.kind: grouping for grouping in groupings(trace)}
                grouping = found.get(self.grouping) or next(iter(found.values()), None)
                return views.specialisation_view(trace, lang, grouping, p, layer) if grouping else None
            case "vocabulary":
                return views.vocabulary_view(trace, lang, Where(layer, p), rows)
            case "together":
                return views.together_view(trace, lang, layer, p, rows) if trace.top_k > 1 else None
            case "flow":
                return views.flow_view(trace, lang, p, layer, rows)
            case "alike":
                fits = similarity is not None and similarity.shape[::2] == (trace.num_layers, trace.num_experts)
                return views.alike_view(similarity, trace, lang, layer, p) if similarity is not None and fits else None
            case _:
                other = self.find(self.other)
                if other is None or other.key == current.key:
                    return None
                return views.compare_view(compare(trace, other.trace), trace, other.trace, lang)

    def missing(self, lang: str) -> str:
        """Why `show` gave nothing."""
        if self.current is None:
            return t(lang, "exp.empty")
        return t(
            lang, f"exp.missing_{self.view}" if self.view in ("contribution", "compare", "alike") else "exp.missing"
        )


def heading_html(view: View | None, missing: str) -> str:
    """Title and note of a view, or why there is none; everything escaped."""
    if view is None:
        return f'<p class="xp-empty">{escape(missing)}</p>'
    return f'<div class="xv"><h3>{escape(view.title)}</h3><p class="xp-hint">{escape(view.note)}</p></div>'


def table_html(view: View | None, lang: str) -> str:
    """The table twin of a view and the caution under every one."""
    if view is None:
        return ""
    rows = view.table.to_html() if view.table.rows else f"<p>{escape(t(lang, 'exp.no_rows'))}</p>"
    unfolded = "" if view.figure else " open"
    table = f'<details{unfolded}><summary>{escape(say(lang, "table"))}</summary><div class="xv-scroll">{rows}</div></details>'
    return f'<div class="xv">{table}<p class="xv-caution">{escape(say(lang, "caution"))}</p></div>'


def answers_html(before: str, after: str, lang: str) -> str:
    """Two answers side by side, the first difference marked."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    columns = []
    for key, text in (("exp.before", before), ("exp.after", after)):
        rest = escape(text[same:])
        marked = f"{escape(text[:same])}<mark>{rest[:1]}</mark>{rest[1:]}" if rest and before != after else escape(text)
        if rest.startswith("&"):  # an escaped character is several
            end = rest.index(";") + 1
            marked = f"{escape(text[:same])}<mark>{rest[:end]}</mark>{rest[end:]}" if before != after else escape(text)
        columns.append(f"<section><h4>{escape(t(lang, key))}</h4><p>{marked}</p></section>")
    verdict = t(lang, "exp.same" if before == after else "exp.differ", n=same)
    return f'<div class="xv-pair"><p class="xp-hint" role="status">{escape(verdict)}</p>{"".join(columns)}</div>'


def contrast_view(found: Contrast, options: Sequence[tuple[str, float, float]], lang: str) -> View:
    """KL divergence at every answer token; the table gives probabilities and the likeliest token before and after.

    `options`: (letter, probability before, after) of an exam question's options, if it is one."""
    plain, changed = (
        [token for token in trace.tokens if token.role == "answer"] for trace in (found.plain, found.changed)
    )
    rows = [
        (
            token.text or "·",
            _share(token.logprob),
            _share(other.logprob),
            token.others[0][0] if token.others else "",
            other.others[0][0] if other.others else "",
            round(float(kl), 4),
        )
        for token, other, kl in zip(plain, changed, found.divergence, strict=True)
    ]
    columns = tuple(
        t(lang, f"exp.{key}")
        for key in ("col_token", "col_p_before", "col_p_after", "col_top_before", "col_top_after", "col_kl")
    )
    bars = {
        "type": "bar",
        "x": list(range(len(rows))),
        "y": [row[-1] for row in rows],
        "customdata": [[escape(str(row[i])) for i in (0, 3, 4)] for row in rows],  # plotly reads it as HTML
        "hovertemplate": "%{customdata[0]}: %{y:.3f}<br>%{customdata[1]} → %{customdata[2]}<extra></extra>",
        "marker": {"color": views.PALETTE[0]},
    }
    layout = views.layout(
        260, xaxis=views.axis(t(lang, "exp.col_token")), yaxis=views.axis(t(lang, "exp.col_kl"), rangemode="tozero")
    )
    first = found.first_difference
    note = (
        t(lang, "exp.kl_same")
        if first is None
        else t(lang, "exp.kl_first", n=first + 1, token=(plain[first].text or "·").strip() or "␣")
    )
    mean = float(found.divergence.mean()) if len(found.divergence) else 0.0
    note = f"{t(lang, 'exp.kl_mean', mean=f'{mean:.3f}')} {note}"
    if options:
        shares = "; ".join(f"{letter} {before:.0%} → {after:.0%}" for letter, before, after in options)
        note += f" {t(lang, 'exp.options', shares=shares)}"
    return View(
        "contrast", t(lang, "exp.kl_title"), note, {"data": [bars], "layout": layout}, views.Table(columns, rows)
    )


def selected(event: Any) -> tuple[int, int] | None:
    """(layer, projection) that the panel reports, as JSON; None for anything else."""
    try:
        values = json.loads(event)
        layer, projection = int(values["layer"]), int(values["projection"])
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None
    return (layer, projection) if layer >= 0 and 0 <= projection < len(PROJECTIONS) else None


def _cut(title: str) -> str:
    return title if len(title) <= TITLE_CHARS else title[: TITLE_CHARS - 1] + "…"


def _share(logprob: float | None) -> float:
    return round(float(np.exp(logprob)), 4) if logprob is not None else 0.0
