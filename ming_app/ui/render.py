"""Small pieces of the page as HTML and Chatbot messages: pure functions of the session, everything escaped."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from html import escape

from ming_app.engine.types import EngineInfo
from ming_app.errors import MingError
from ming_app.models.progress import Progress
from ming_app.safety.notices import assessed, banner
from ming_app.safety.output import note_text
from ming_app.ui.assets import read
from ming_app.ui.chat import MAX_CHARS, Meter, Note, Session, Turn
from ming_app.ui.loader import LoadState
from ming_app.ui.text import TEXTS, duration_text, size_text, t

JOINER = "\u2060"  # invisible; keeps "<" and "!" from opening a tag or an image, in text and in code alike
_OPENS_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_OPENS_IMAGE = re.compile(r"!(?=\[)")


def inert(text: str) -> str:
    """Text for a Markdown view in which no HTML tag and no image can open. `restore` takes it back."""
    return _OPENS_IMAGE.sub("!" + JOINER, _OPENS_TAG.sub("<" + JOINER, text))


def restore(text: str) -> str:
    """What `inert` was given."""
    return text.replace("<" + JOINER, "<").replace("!" + JOINER, "!")


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Chatbot messages, one per turn in the same order."""
    return [{"role": turn.role, "content": inert(turn.text) or "…"} for turn in turns]


def ratings(session: Session) -> list[str | None]:
    """What the person said of each answer, as the Chatbot shows it."""
    signs = {1: "Like", -1: "Dislike", 0: None}
    return [turn.comment or signs[turn.rating] for turn in session.turns if turn.role == "assistant"]


def alert_banner(session: Session, region: str) -> str:
    """The warning of an emergency, above everything the model writes; empty where there is none."""
    lang = session.lang
    shown = assessed(session.danger, lang, region)
    if shown is None and session.urged:
        shown = banner("other", lang, region)
    if shown is None:
        return ""
    return (
        f'<div class="m-alarm" role="alert"><h2>⚠ {escape(shown.title)}</h2><p>{escape(shown.action)}</p>'
        f'<p class="m-alarm-more">{escape(t(lang, "alert.more"))}</p></div>'
    )


def marks(session: Session) -> str:
    """A hidden element from which page.js draws what stands beside the messages: branches, and notes of the checks."""
    lang, found = session.lang, []
    for index, turn in enumerate(session.turns):
        beside = session.talk.branches(turn)
        notes = [note_text(note.check, lang) for note in session.checks.get(turn.id, ())]
        if len(beside) > 1 or notes:
            found.append({"i": index, "n": len(beside), "at": beside.index(turn) + 1, "notes": notes})
    data = json.dumps(found, ensure_ascii=False)
    return f'<span id="ming-marks-data" hidden data-marks="{escape(data)}"></span>'


def brand(lang: str) -> str:
    return f'<div class="m-brand">{read("logo.svg")}<div><h1>{escape(t(lang, "app.name"))}</h1><p>{escape(t(lang, "app.tagline"))}</p></div></div>'


def welcome(lang: str) -> str:
    return f'<div class="m-welcome"><h2>{escape(t(lang, "chat.welcome"))}</h2><p>{escape(t(lang, "chat.welcome_hint"))}</p></div>'


def footer(lang: str) -> str:
    return f'<p class="m-foot"><b>{escape(t(lang, "app.ai_label"))}</b> · {escape(t(lang, "app.disclaimer_short"))}</p>'


def badge(lang: str, info: EngineInfo | None) -> str:
    """Model, precision, backend and device, experts; and the AI label."""
    label = f'<span class="m-pill m-ai">{escape(t(lang, "app.ai_label"))}</span>'
    if info is None:
        return f'<div class="m-badge">{label}</div>'
    if info.num_experts:
        experts = t(lang, "badge.experts", e=info.num_experts, k=info.top_k)
    else:
        experts = t(lang, "badge.no_adapter")
    where = " · ".join(dict.fromkeys((info.backend, info.device)))  # the engine "cpu" runs on the device "cpu"
    parts = [f"<b>{escape(info.title)}</b>", *map(escape, (info.precision, where, experts))]
    pills = "".join(f'<span class="m-pill">{part}</span>' for part in parts)
    return f'<div class="m-badge" aria-label="{escape(t(lang, "badge.label"))}">{label}{pills}</div>'


def status(session: Session, info: EngineInfo | None) -> str:
    """One line: what is happening (announced to screen readers), speed, and how much of the context is used."""
    lang, note = session.lang, session.status
    kind = {"status.error": "m-bad", "status.failed": "m-bad"}.get(
        note.key, "m-on" if session.run is not None or note.key == "status.queued" else ""
    )
    borrowed = info is not None and info.device == "ZeroGPU" and note.key == "status.reading"
    said = escape(t(lang, "status.borrowing" if borrowed else note.key, **note.values))
    spoken = "" if note.key == "status.reading" else said  # a count of seconds would be read out every second
    shown = f'<span class="m-dot"></span><span aria-hidden="true">{said}</span><span class="sr-only" role="status">{spoken}</span>'
    return f'<div class="m-status {kind}">{shown}{_figures(lang, session.meter)}{_context(lang, session.meter, info)}</div>'


def _figures(lang: str, meter: Meter) -> str:
    parts = []
    if meter.tokens_per_second:
        parts.append(t(lang, "meter.speed", rate=f"{meter.tokens_per_second:.1f}"))
    if meter.first_token_seconds:
        parts.append(t(lang, "meter.first", seconds=f"{meter.first_token_seconds:.1f}"))
    return "".join(f"<span>{escape(part)}</span>" for part in parts)


def _context(lang: str, meter: Meter, info: EngineInfo | None) -> str:
    if info is None:
        return ""
    share = min(1.0, meter.used / max(info.context_limit, 1))
    text = escape(t(lang, "meter.context_used", used=meter.used, limit=info.context_limit))
    bar = (
        f'<span class="m-bar" role="meter" aria-label="{escape(t(lang, "meter.context"))}" aria-valuemin="0" '
        f'aria-valuemax="{info.context_limit}" aria-valuenow="{meter.used}"><i style="width:{share:.1%}"></i></span>'
    )
    full = " m-full" if share > 0.9 else ""
    return (
        f'<span class="m-context{full}"><span>{escape(t(lang, "meter.context"))}</span>{bar}<span>{text}</span></span>'
    )


def notices(session: Session) -> str:
    """Refusal and notices of the last question; empty when there is nothing to say."""
    lang, lines = session.lang, []
    if session.error is not None:
        lines.append(alert(session.error.message(lang)))
    lines += [_notice(lang, note) for note in session.notices]
    return "".join(lines)


def alert(text: str) -> str:
    """Something that could not be done, announced to screen readers at once."""
    return f'<div class="m-notice m-bad" role="alert">{escape(text)}</div>'


def _notice(lang: str, note: Note) -> str:
    return f'<div class="m-notice" role="status">{escape(t(lang, note.key, **note.values))}</div>'


def loading(lang: str, state: LoadState) -> str:
    """Progress of loading, or why it failed; empty when the engine is ready."""
    if state.engine is not None:
        return ""
    if state.error is not None:
        known = isinstance(state.error, MingError)
        why = state.error.message(lang) if isinstance(state.error, MingError) else ""
        why = why if known else t(lang, "load.unexpected", kind=type(state.error).__name__)
        return f'<div class="m-notice m-bad" role="alert"><b>{escape(t(lang, "load.failed"))}</b> {escape(why)}</div>'
    lines = [*_expected(lang, state), t(lang, "load.hint")]
    told = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="m-load" role="status" aria-live="off">{_progress(lang, state.progress)}{told}</div>'


def _expected(lang: str, state: LoadState) -> list[str]:
    """How long the start has taken, what it took before, and why a Space starts at all."""
    lines = []
    if state.began is not None:
        waited = duration_text(lang, time.monotonic() - state.began)
        usual = duration_text(lang, state.usual) if state.usual is not None else ""
        key = "load.usual_first" if state.first else "load.usual"
        lines.append(t(lang, key, waited=waited, usual=usual) if usual else t(lang, "load.waited", waited=waited))
    if state.sleeps:
        lines.append(t(lang, "load.sleeps"))
    return lines


def _progress(lang: str, progress: Progress | None) -> str:
    if progress is None:
        return f'<b>{escape(t(lang, "load.waiting"))}</b><div class="m-bar m-unknown"><i></i></div>'
    key = f"load.{progress.stage}"
    title = escape(t(lang, key if key in TEXTS else "load.waiting"))
    facts = [progress.detail] if progress.detail else []
    if progress.unit == "bytes":
        facts.append(size_text(progress.done) + (f" / {size_text(progress.total)}" if progress.total else ""))
        facts += [f"{size_text(progress.speed)}/s"] if progress.speed else []
    elif progress.total:
        facts.append(f"{progress.done} / {progress.total}")
    if progress.eta is not None and progress.eta >= 1:
        facts.append(t(lang, "load.left", time=duration_text(lang, progress.eta)))
    share = f'<div class="m-bar"><i style="width:{progress.fraction:.1%}"></i></div>'
    bar = share if progress.total else '<div class="m-bar m-unknown"><i></i></div>'
    return f"<b>{title}</b>{bar}<p>{escape(' · '.join(facts))}</p>"


def browser_words(lang: str) -> str:
    """A hidden element from which page.js words the character count and the Chatbot's own small buttons."""
    was = {
        "chat.retry": ["Retry", "重试"],
        "chat.edit": ["Edit", "编辑"],
        "chat.copy": ["Copy message", "复制消息"],
        "chat.copied": ["Copied message", "已复制消息"],
        "chat.cancel": ["Cancel", "取消"],
        "chat.resend": ["Submit", "提交"],
        "chat.scroll": ["Scroll to bottom", "滚动到底部"],
    }
    words = {
        "title": t(lang, "app.title"),
        "was": was,
        "now": {key: t(lang, key) for key in was},
        "log": t(lang, "chat.label"),
        "open": t(lang, "exp.open_answer"),
        "user": t(lang, "chat.input_label"),
        "bot": t(lang, "chat.answer_label"),
        "full_exam": t(lang, "exam.data_full"),
        "full_chat": t(lang, "talk.full"),
        "branch": t(lang, "talk.branch", i="{i}", n="{n}"),
        "branch_back": t(lang, "talk.branch_back"),
        "branch_on": t(lang, "talk.branch_on"),
        "forgotten": t(lang, "exam.data_forgotten"),
        "gone": {
            "away": t(lang, "server.away"),
            "starting": t(lang, "server.starting"),
            "waited": t(lang, "server.waited", waited="{waited}"),
        },
        "sure": {key: t(lang, f"exam.sure_{key}") for key in ("chat", "discard", "remove")},
    }
    count = t(lang, "chat.counter", n="{n}", limit=MAX_CHARS)
    return f'<span id="ming-words" hidden data-count="{escape(count)}" data-words="{escape(json.dumps(words, ensure_ascii=False))}"></span>'
