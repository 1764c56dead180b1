"""A case view: one exam question, answered by the base and by the adapted model side by side, as in the paper's figures 2
and 3: probabilities of the options, reasons, the bank's key over both, and which experts each option's words were sent to.

`study` asks the engine; `case_html` is a fragment for the page, `case_page` one file to print. Both are pure.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from ming_app.engine.types import Intervention, SamplingParams, Start, Token
from ming_app.errors import StoppedError, UsageError
from ming_app.exam.candidate import BASE, probabilities
from ming_app.exam.question import TYPES, Question
from ming_app.exam.wording import ask_for_letter, ask_for_reasons, whole_stem
from ming_app.molora.config import PROJECTIONS
from ming_app.molora.trace import RouterTrace
from ming_app.safety.output import loop_start

REASON_TOKENS = 220
SIDES: dict[str, tuple[Intervention, ...]] = {"base": BASE, "adapted": ()}


@dataclass(frozen=True)
class Side:
    """One model's answer."""

    chances: dict[str, float]
    """letter -> probability among the options"""
    reasons: str

    @property
    def choice(self) -> str:
        return max(self.chances, key=lambda letter: self.chances[letter])


@dataclass(frozen=True)
class Case:
    """A question and what both models made of it. `routes[letter]`: float [L, P, E], mean weight that the tokens of the
    option's line gave each expert."""

    question: Question
    earlier: tuple[Question, ...]
    sides: dict[str, Side]
    routes: dict[str, np.ndarray]
    model: str
    precision: str


def study(
    engine: Any,
    question: Question,
    earlier: Sequence[Question] = (),
    *,
    tokens: int = REASON_TOKENS,
    on_text: Callable[[str, str], None] = lambda side, text: None,
    cancel: threading.Event | None = None,
) -> Case:
    """Asks base and adapted model; `on_text(side, text so far)`. Raises UsageError without an adapter or for a question
    with several right answers, StoppedError when cancelled."""
    if not engine.info.num_experts:
        raise UsageError("This model has no adapter to compare its base with.", "该模型没有适配器，无法与基座对照。")
    if question.kind.multiple:
        raise UsageError(
            "Questions with several right answers have no probabilities to compare.", "多选题没有可对照的选项概率。"
        )
    routes = _routes(engine, question, earlier)
    sides: dict[str, Side] = {}
    for name, changes in SIDES.items():
        chances = probabilities(engine, question, list(question.options), earlier, changes)
        params = SamplingParams(tokens, temperature=0, repetition_penalty=1.05, trace=False, interventions=changes)
        text = ""
        with closing(engine.stream(ask_for_reasons(question, earlier), params, cancel)) as events:
            for event in events:
                if isinstance(event, Token):
                    text += event.text
                    on_text(name, text)
                    start = loop_start(text)
                    if start is not None:  # it only repeats itself from here on
                        text = text[:start]
                        break
        if cancel is not None and cancel.is_set():
            raise StoppedError("Stopped.", "已停止。")
        sides[name] = Side(chances, text.strip())
    return Case(question, tuple(earlier), sides, routes, engine.info.title, engine.info.precision)


def _routes(engine: Any, question: Question, earlier: Sequence[Question]) -> dict[str, np.ndarray]:
    params = SamplingParams(1, temperature=0)
    with closing(engine.stream(ask_for_letter(question, (), earlier), params)) as events:
        start = next((event for event in events if isinstance(event, Start)), None)
    if start is None or start.trace is None:
        return {}
    return option_routes(start.trace, question)


def option_routes(trace: RouterTrace, question: Question) -> dict[str, np.ndarray]:
    """letter -> float [L, P, E]: mean weight of each expert over the tokens of the option's line, from the trace of a
    prompt that lists the options as printed."""
    begins = np.cumsum([0, *(len(token.text) for token in trace.tokens)])[:-1]
    text = "".join(token.text for token in trace.tokens)
    found: dict[str, np.ndarray] = {}
    at = text.find("\nA. ")
    for letter, option in question.options.items():
        line = f"\n{letter}. {option}"
        at = text.find(line, max(at, 0))
        if at < 0:
            return {}
        inside = np.flatnonzero((begins >= at + 1) & (begins < at + len(line)))
        if not len(inside):
            return {}
        weights = np.zeros((*trace.experts.shape[1:3], trace.num_experts))
        for k in range(trace.experts.shape[3]):
            chosen = trace.experts[inside, :, :, k]
            for expert in range(trace.num_experts):
                weights[..., expert] += np.where(chosen == expert, trace.weights[inside, :, :, k].astype(float), 0).sum(
                    0
                )
        found[letter] = weights / len(inside)
    return found


# -- showing ----------------------------------------------------------------------------------------------------------

_WORDS = {
    "title": ("Base and adapted model on one question", "同一道题：基座与适配模型"),
    "base": ("Base", "基座模型"),
    "adapted": ("With the experts (MING-MOE)", "加专家（MING-MOE）"),
    "key": ("Key of the bank", "题库答案"),
    "why": ("Explanation of the bank", "题库解析"),
    "reference": ("Reference", "依据"),
    "chose": ("chooses {letter}", "选择 {letter}"),
    "right": ("as the key", "与答案一致"),
    "wrong": ("not the key: the key stands", "与答案不一致，以题库答案为准"),
    "routes": ("Which experts the words of each option went to", "各选项的词元分配给了哪些专家"),
    "routes_note": (
        "One square per layer, from the first (left) to the last, for the matrix \u201c{projection}\u201d: the expert with most weight, stronger where its share is larger. Colours are numbers of experts, not topics; with {e} experts of which {k} fire, a share of {even} means no preference.",
        "每格为一层（左起第一层），矩阵为“{projection}”：颜色表示权重最大的专家，颜色越深占比越高。颜色只是专家编号，不代表主题；共 {e} 个专家、每次激活 {k} 个，占比 {even} 即无偏好。",
    ),
    "ai": (
        "Reasons and choices were generated by AI and may be wrong. For learning only, not medical advice.",
        "推理与选择由人工智能生成，可能有误，仅供学习参考，不构成医疗建议。",
    ),
    "cut": ("(cut after {n} tokens)", "（截取前 {n} 个词元）"),
}


def _say(lang: str, key: str, **values: object) -> str:
    return _WORDS[key][lang == "zh"].format(**values)


def case_html(case: Case, lang: str) -> str:
    """The case as an HTML fragment; everything escaped."""
    q = case.question
    told = escape(whole_stem(q, case.earlier))
    options = "".join(
        f'<li class="{"ec-key" if letter in q.answer else ""}"><b>{letter}.</b> {escape(text)}</li>'
        for letter, text in q.options.items()
    )
    key = "".join(q.answer)
    head = f'<p class="ec-kind">{escape(getattr(TYPES[q.type], lang))} · {escape(q.tags.get("subject", ""))} · {escape(case.model)}, {escape(case.precision)}</p>'
    colon = "：" if lang == "zh" else ": "
    bank = f"<p><b>{_say(lang, 'key')}{colon}{key}</b></p><p>{escape(q.explanation)}</p>"
    if q.reference:
        bank += f'<p class="ec-small">{_say(lang, "reference")}{colon}{escape(q.reference)}</p>'
    sides = "".join(_side(lang, name, side, q) for name, side in case.sides.items())
    return (
        f'<div class="ec-case">{head}<p class="ec-stem">{told}</p><ol class="ec-options">{options}</ol>{bank}'
        f'<div class="ec">{sides}</div>{_routes_html(lang, case)}<p class="ec-small">{_say(lang, "ai")}</p></div>'
    )


def _side(lang: str, name: str, side: Side, question: Question) -> str:
    right = side.choice in question.answer
    verdict = f"{_say(lang, 'chose', letter=side.choice)} · {_say(lang, 'right' if right else 'wrong')}"
    bars = "".join(
        f'<div class="ec-bar{" ec-is-key" if letter in question.answer else ""}"><b>{letter}</b><span><i style="width:{share:.1%}"></i></span><em>{share:.0%}</em></div>'
        for letter, share in side.chances.items()
    )
    return (
        f'<section><h4>{_say(lang, name)}</h4><p class="{"ec-right" if right else "ec-wrong"}">{escape(verdict)}</p>{bars}'
        f'<p class="ec-reasons">{escape(side.reasons)}</p></section>'
    )


def _routes_html(lang: str, case: Case) -> str:
    if not case.routes:
        return ""
    projection = len(PROJECTIONS) - 1
    first = next(iter(case.routes.values()))
    experts = first.shape[-1]
    fired = round(float((first[0, 0] > 0).sum()))
    rows = ""
    for letter, weights in case.routes.items():
        cells = ""
        for layer in weights[:, projection]:
            best = int(layer.argmax())
            cells += f'<i style="--c:var(--x{best % 8});--s:{float(layer[best]):.2f}" title="{best}: {float(layer[best]):.0%}"></i>'
        rows += f'<tr><th scope="row">{letter}</th><td><div class="ec-strip">{cells}</div></td></tr>'
    note = _say(
        lang, "routes_note", projection=PROJECTIONS[projection], e=experts, k=min(fired, 2), even=f"{1 / experts:.0%}"
    )
    legend = " ".join(f'<span><i style="--c:var(--x{e % 8});--s:1"></i> {e}</span>' for e in range(experts))
    return f'<h4>{_say(lang, "routes")}</h4><p class="ec-small">{escape(note)}</p><p class="ec-legend">{legend}</p><table class="ec-routes">{rows}</table>'


def case_page(case: Case, lang: str) -> str:
    """One HTML file of its own, to keep and to print."""
    from ming_app.router import panel

    title = _say(lang, "title")
    return (
        f'<!doctype html><html lang="{"zh-CN" if lang == "zh" else "en"}"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title><style>{panel.style()}{STYLE}'
        "body{font-family:var(--m-font);color:var(--m-ink);max-width:1000px;margin:24px auto;padding:0 18px;line-height:1.6}"
        "@media print{body{margin:0;max-width:none;font-size:12px}.ec section,.ec-routes{break-inside:avoid}}"
        f"</style></head><body><h1>{escape(title)}</h1>{case_html(case, lang)}</body></html>"
    )


STYLE = """
.ec { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin: 12px 0; }
.ec section { border: 1px solid var(--m-line); border-radius: 12px; padding: 10px 14px; min-width: 0; }
.ec-case h4 { font-size: 14px; font-weight: 650; margin: 10px 0 4px; }
.ec-case p { margin: 0 0 6px; }
.ec-case :is(.ec-stem, .ec-reasons) { white-space: pre-wrap; overflow-wrap: anywhere; }
.ec-case .ec-stem { font-size: 16px; }
.ec-case .ec-reasons { margin-top: 8px; font-size: 14px; }
.ec-case :is(.ec-kind, .ec-small) { font-size: 12.5px; color: var(--m-muted); }
.ec-options { list-style: none; padding: 0; margin: 0 0 8px; }
.ec-options li { padding: 2px 8px; border-radius: 7px; }
.ec-options .ec-key { background: color-mix(in srgb, #2e8b57 16%, var(--m-surface)); font-weight: 600; }
.ec-case .ec-right { color: #1d7a48; font-weight: 600; }
.dark .ec-case .ec-right { color: #7fd6a4; }
.ec-case .ec-wrong { color: var(--m-bad); font-weight: 600; }
.ec-bar { display: grid; grid-template-columns: 1.2em 1fr 3em; gap: 8px; align-items: center; font-size: 13px; font-variant-numeric: tabular-nums; }
.ec-bar span { height: 8px; border-radius: 4px; background: var(--m-line); overflow: hidden; }
.ec-bar i { display: block; height: 100%; background: var(--m-muted); }
.ec-bar.ec-is-key i { background: #2e8b57; }
.ec-bar em { font-style: normal; text-align: end; }
.ec-routes { border-collapse: collapse; }
.ec-routes th { padding: 2px 8px 2px 0; font-size: 13px; }
.ec-strip { display: flex; gap: 2px; flex-wrap: wrap; }
:is(.ec-strip, .ec-legend) i { display: inline-block; width: 14px; height: 14px; border-radius: 3px; background: color-mix(in srgb, var(--c) calc(var(--s) * 100%), var(--m-line)); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.ec-legend { font-size: 12.5px; display: flex; gap: 12px; }
@media (max-width: 760px) { .ec { grid-template-columns: 1fr; } }
"""
