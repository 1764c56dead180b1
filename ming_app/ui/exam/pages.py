"""Results, statistics and import reports as HTML, and figures as plotly JSON-able objects: pure functions, all escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ming_app.errors import MingError
from ming_app.exam.bank import letters_shown
from ming_app.exam.candidate import Attempt
from ming_app.exam.formats import FORMATS, Import, Rejected
from ming_app.exam.question import TYPES
from ming_app.exam.sitting import Drawn, Sitting
from ming_app.exam.statistics import Result, Share, Statistics
from ming_app.spreadsheet import safe_cell
from ming_app.ui import render
from ming_app.ui.text import duration_text, t

REJECTED_SHOWN = 200
PREVIEW_SHOWN = 5


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def name_of(lang: str, kind: str, name: str) -> str:
    """A value of a tag as people know it."""
    if kind == "type" and name in TYPES:
        return getattr(TYPES[name], lang)
    if kind == "confidence":
        return t(lang, f"exam.card.{name}")
    if kind == "difficulty" and name in ("easy", "medium", "hard"):
        return t(lang, f"exam.difficulty_{name}")
    return name


def shares_table(lang: str, title: str, kind: str, shares: Sequence[Share]) -> str:
    """A table of right answers with bars; nothing for no shares."""
    if not shares:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name_of(lang, kind, share.name))}</td>"
        f'<td><span class="er-bar" aria-hidden="true"><i style="width:{share.share:.0%}"></i></span>{percent(share.share)}</td>'
        f'<td class="er-number">{share.right}/{share.total}</td><td class="er-number">{share.seconds:.0f}</td></tr>'
        for share in shares
    )
    heads = [title, t(lang, "exam.result.share"), t(lang, "exam.result.n"), t(lang, "exam.result.seconds")]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    return f'<table class="er-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def result_page(lang: str, title: str, sitting: Sitting, found: Result) -> str:
    """The result of a finished sitting."""
    mock = sitting.kind == "mock"
    points = f"{round(sitting.pass_share * found.total, 1):g}/{found.total}"
    line = t(
        lang,
        "exam.result.passed" if found.passed else "exam.result.failed",
        points=points,
        line=percent(sitting.pass_share),
    )
    low, high = Share("", found.right, found.total).interval
    if mock:
        score = t(lang, "exam.result.score", score=f"{round(found.score, 2):g}", total=found.total)
    else:
        score = t(lang, "exam.result.practice", right=found.right, done=found.total, n=len(sitting.questions))
    facts = [
        percent(found.right / found.total if found.total else None),
        t(lang, "exam.result.interval", low=percent(low), high=percent(high)),
        t(
            lang,
            "exam.result.time",
            total=duration_text(lang, found.seconds),
            each=duration_text(lang, found.seconds / max(found.total, 1)),
        ),
    ]
    if found.unanswered and mock:
        facts.append(t(lang, "exam.result.unanswered", n=found.unanswered))
    verdict = (
        f'<p class="{"er-passed" if found.passed else "er-failed"}">{escape(line)}</p>'
        if mock and sitting.pass_share
        else ""
    )
    time_up = f'<p class="er-muted">{escape(t(lang, "exam.result.time_up"))}</p>' if sitting.ending == "time" else ""
    tables = "".join(
        shares_table(lang, t(lang, f"exam.result.by_{kind}"), kind, shares)
        for kind, shares in (("subject", found.subjects), ("type", found.types), ("confidence", found.confidence))
    )
    return (
        f'<div class="er" role="status"><h2>{escape(t(lang, "exam.result.title" if mock else "exam.result.title_practice", title=title))}</h2>'
        f'<p class="er-score">{escape(score)}</p>{verdict}{time_up}<p class="er-muted">{escape(" · ".join(facts))}</p>{tables}{_each(lang, sitting)}</div>'
    )


def _each(lang: str, sitting: Sitting) -> str:
    """Every question with answer, key and time, folded away."""
    heads = ("exam.result.number", "exam.result.answer", "exam.result.key", "exam.result.seconds")
    head = "".join(f'<th scope="col">{escape(t(lang, key))}</th>' for key in heads)
    rows = ""
    for at, (question, given) in enumerate(zip(sitting.questions, sitting.grades(), strict=True)):
        response, order = sitting.response(at), sitting.order(at)
        chosen = letters_shown(order, response.chosen) or "–"
        mark = "✓" if given.correct else "✗"
        rows += (
            f'<tr><td class="er-number">{at + 1}</td><td>{mark} {chosen}</td>'
            f'<td>{letters_shown(order, question.answer)}</td><td class="er-number">{response.seconds:.0f}</td></tr>'
        )
    return (
        f'<details><summary>{escape(t(lang, "exam.result.each"))}</summary><div class="er-scroll">'
        f'<table class="er-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
    )


def beside(lang: str, sitting: Sitting, attempts: Mapping[str, Attempt]) -> str:
    """The student's right answers and the model's, counted together."""
    mine = [given.correct for given in sitting.grades()]
    its = [q.key in attempts and attempts[q.key].correct for q in sitting.questions]
    both = sum(a and b for a, b in zip(mine, its, strict=True))
    counts = {"model": sum(its), "you": sum(mine), "n": len(mine), "both": both}
    return t(lang, "exam.result.beside_done", **counts, only_you=sum(mine) - both, only_model=sum(its) - both)


def statistics_page(lang: str, found: Statistics) -> str:
    """Everything but the pictures."""
    if not found.total.total:
        return f'<div class="er"><p>{escape(t(lang, "exam.stat.none"))}</p></div>'
    summary = t(
        lang,
        "exam.stat.summary",
        n=found.total.total,
        share=percent(found.total.share),
        streak=found.streak,
        cards=found.cards,
        recall=percent(found.recall),
        retention=percent(found.retention),
    )
    tables = "".join(
        shares_table(lang, t(lang, f"exam.result.by_{kind}"), kind, shares)
        for kind, shares in (
            ("subject", found.subjects),
            ("difficulty", found.difficulties),
            ("type", found.types),
            ("confidence", found.confidence),
        )
    )
    causes = "".join(
        f'<tr><td>{escape(t(lang, f"exam.card.cause_{cause}"))}</td><td class="er-number">{n}</td></tr>'
        for cause, n in found.causes
    )
    if causes:
        tables += (
            f'<h3>{escape(t(lang, "exam.stat.causes"))}</h3><table class="er-table"><tbody>{causes}</tbody></table>'
        )
    days = "".join(
        f'<tr><td>{escape(day.name)}</td><td class="er-number">{day.right}/{day.total}</td><td class="er-number">{percent(day.share)}</td></tr>'
        for day in reversed(found.days)
    )
    tables += f'<details><summary>{escape(t(lang, "exam.stat.days"))}: {escape(t(lang, "exam.stat.table"))}</summary><div class="er-scroll"><table class="er-table"><tbody>{days}</tbody></table></div></details>'
    return f'<div class="er"><p>{escape(summary)}</p>{tables}</div>'


def days_figure(lang: str, found: Statistics) -> Any:
    """Right answers and how many there were, by day."""
    import plotly.graph_objects as go

    days = [day.name for day in found.days]
    figure = go.Figure()
    figure.add_bar(
        x=days,
        y=[day.total for day in found.days],
        name=t(lang, "exam.stat.answers"),
        yaxis="y2",
        marker_color="#7fc6ee",
        opacity=0.45,
    )
    figure.add_scatter(
        x=days,
        y=[100 * day.share for day in found.days],
        name=t(lang, "exam.result.share") + " (%)",
        mode="lines+markers",
        line_color="#12a37c",
    )
    figure.update_layout(
        title=t(lang, "exam.stat.days"),
        yaxis={"range": [0, 102], "title": "%"},
        yaxis2={"overlaying": "y", "side": "right", "showgrid": False},
        xaxis={"type": "category"},
    )
    return _styled(figure)


def forecast_figure(lang: str, found: Statistics) -> Any:
    """Cards due by the end of today, and on each of the next days."""
    import plotly.graph_objects as go

    figure = go.Figure(go.Bar(x=list(range(len(found.forecast))), y=list(found.forecast), marker_color="#4a90d9"))
    figure.update_layout(title=t(lang, "exam.stat.forecast"), xaxis={"title": t(lang, "exam.stat.day"), "dtick": 1})
    return _styled(figure)


def _styled(figure: Any) -> Any:
    figure.update_layout(
        height=290,
        margin={"l": 44, "r": 40, "t": 42, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#7d9097", "size": 12},
        title_font_size=14,
        legend={"orientation": "h", "y": 1.12, "x": 1, "xanchor": "right"},
    )
    figure.update_xaxes(gridcolor="rgba(128,140,145,.2)")
    figure.update_yaxes(gridcolor="rgba(128,140,145,.2)")
    return figure


def import_page(lang: str, name: str, read: Import) -> str:
    """What a file holds: counts, the first questions, every rejected row (the first ones on the page)."""
    encoding = f", {read.encoding}" if read.encoding else ""
    found = t(
        lang,
        "exam.import_found",
        n=len(read.questions),
        bad=len(read.rejected),
        rows=read.rows,
        format=FORMATS[read.format][lang == "zh"],
        encoding=encoding,
    )
    shown = "".join(
        f"<li>{escape(' '.join((q.shared_stem + ' ' + q.stem).split())[:160])} "
        f'<span class="er-muted">[{q.type} · {escape("".join(q.answer))} · {len(q.options)}]</span></li>'
        for q in read.questions[:PREVIEW_SHOWN]
    )
    preview = f"<h3>{escape(t(lang, 'exam.import_preview'))}</h3><ol>{shown}</ol>" if shown else ""
    return f'<div class="er"><h2>{escape(name)}</h2><p>{escape(found)}</p>{preview}{_rejected(lang, read)}</div>'


def _rejected(lang: str, read: Import) -> str:
    if not read.rejected:
        return ""
    rows = "".join(
        f'<tr><td class="er-number">{row.line}</td><td>{escape(row.reason.message(lang))}</td><td>{escape(row.excerpt)}</td></tr>'
        for row in read.rejected[:REJECTED_SHOWN]
    )
    more = len(read.rejected) - REJECTED_SHOWN
    rest = f'<p class="er-muted">{escape(t(lang, "exam.import_more", n=more))}</p>' if more > 0 else ""
    head = "".join(
        f'<th scope="col">{escape(t(lang, f"exam.import_{key}"))}</th>' for key in ("line", "reason", "text")
    )
    return f'<h3>{escape(t(lang, "exam.import_rejected"))}</h3><div class="er-scroll"><table class="er-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{rest}'


def rejected_csv(lang: str, rejected: Sequence[Rejected]) -> str:
    """Every rejected row, for a spreadsheet."""
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([t(lang, f"exam.import_{key}") for key in ("line", "reason", "text")])
    for row in rejected:
        writer.writerow([row.line, safe_cell(row.reason.message(lang)), safe_cell(row.excerpt)])
    return "\ufeff" + out.getvalue()


def short_notice(lang: str, drawn: Drawn) -> str:
    """What the bank lacked for a mock exam."""
    lines = [
        t(lang, "exam.short", kind=name_of(lang, "type", part.type) or part.subject, have=have, wanted=part.count)
        for part, have in drawn.short
        if part.type or part.subject
    ]
    return " ".join(lines)


def told(lang: str, text: str, error: MingError | None = None) -> str:
    """A short message, or what went wrong."""
    if error is not None:
        return render.alert(error.message(lang))
    return f'<div class="m-notice" role="status">{escape(text)}</div>' if text else ""
