"""Mock exams as the page offers them: presets by name, what a bank lacks for one, and a plan of one's own."""

from __future__ import annotations

from ming_app.exam.bank import Bank
from ming_app.exam.question import TYPES
from ming_app.exam.sitting import PRESETS, Blueprint, Part, draw
from ming_app.ui.exam import pages
from ming_app.ui.text import t

OWN = "own"
"""the name of a plan of one's own"""


def preset_item(lang: str, plan: Blueprint) -> str:
    return t(lang, "exam.preset_item", title=plan.titles[lang], n=plan.size, minutes=f"{plan.minutes:g}")


def filled(lang: str, bank: Bank, preset: str) -> str:
    """What a mock exam of this bank would be, where it falls short: said before the clock starts."""
    plan = next((plan for plan in PRESETS if plan.name == preset), None)
    if plan is None:
        return ""
    drawn = draw(bank.questions, plan, 0)
    if len(drawn.questions) == plan.size and not drawn.short:
        return ""
    said = pages.short_notice(lang, drawn)
    if len(drawn.questions) < plan.size:
        counts = {"n": len(drawn.questions), "wanted": plan.size, "minutes": round(drawn.minutes)}
        said = t(lang, "exam.preset_fill", **counts)
    return pages.told(lang, said)


def own_blueprint(
    count: float, minutes: float, line: float, types: list[str] | None, subjects: list[str] | None, pause: bool
) -> Blueprint:
    """A mock exam of one's own: the questions spread evenly over the chosen types and subjects."""
    cells = [(kind, subject) for kind in (types or [""]) for subject in (subjects or [""])]
    total = max(1, min(1000, int(count or 1)))
    cells = cells[:total]
    sizes = [total // len(cells) + (at < total % len(cells)) for at in range(len(cells))]
    parts = tuple(
        Part(size, kind if kind in TYPES else "", subject) for size, (kind, subject) in zip(sizes, cells, strict=True)
    )
    titles = {lang: t(lang, "exam.mock") for lang in ("zh", "en")}
    limit, share = max(1.0, min(1000.0, float(minutes or 1))), max(0.0, min(1.0, float(line or 0) / 100))
    return Blueprint(OWN, titles, limit, parts, share, bool(pause))
