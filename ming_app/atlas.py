"""An atlas: many texts read by the model, their routing measured, put together into one trace, a report and tables.

    OUT/traces/<hash>.npz    one measured trace per text; a run that was stopped goes on from them
    OUT/trace.npz            all of them, each text a segment with its labels
    OUT/report.html          every view, in one file (router/report.py)
    OUT/<view>.csv           every view's table

Texts come from TOML (as examples/prompts.toml), JSON lines ({"text", "answer", "title", "lang", "stream"}, or exam questions
with "stem" and "options"), or plain text, one per line. They are read as untrusted input.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ming_app.engine.engine import Engine
from ming_app.engine.inspection import inspect, inspect_given
from ming_app.engine.types import Finish, Message, SamplingParams
from ming_app.errors import TraceError, UsageError
from ming_app.models.progress import Meter, ProgressCallback
from ming_app.molora.trace import RouterTrace, Segment, merge
from ming_app.reading import TooLargeError, read_bounded
from ming_app.router.groups import token_class

MAX_BYTES = 32 * 2**20
MAX_CHARS = 8000  # of one text; longer ones are cut


@dataclass(frozen=True)
class Text:
    """One text to read: what is asked, and what it is called."""

    text: str
    title: str
    labels: dict[str, str]
    answer: str = ""
    """a given answer, which is read instead of one that the model writes"""


def read_texts(path: str | Path, limit: int = 0) -> list[Text]:
    """Texts of a file, at most `limit` (0: all), spread evenly over it. Raises UsageError with the line at fault."""
    path = Path(path)
    try:
        content = read_bounded(path, MAX_BYTES, named=True).decode("utf-8").replace("\r\n", "\n")
    except TooLargeError as error:
        large = f"{path} is larger than {MAX_BYTES >> 20} MiB.", f"{path} 超过 {MAX_BYTES >> 20} MiB。"
        raise UsageError(*large) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", f"无法读取 {path}：{error.strerror}。") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text.", f"{path} 不是 UTF-8 文本。") from error
    texts = _from_toml(path, content) if path.suffix == ".toml" else _from_lines(path, content)
    if not texts:
        raise UsageError(f"{path} holds no text.", f"{path} 中没有文本。")
    count = min(limit or len(texts), len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def trace_texts(
    engine: Engine, texts: Sequence[Text], folder: Path, max_new_tokens: int, progress: ProgressCallback | None = None
) -> RouterTrace:
    """Reads every text, with its own answer or a greedy one of up to `max_new_tokens` (0: none), and merges the measured
    traces. What lies in `folder/traces` already is not made again."""
    meter = Meter(progress, "measure", len(texts), "steps")
    found = []
    for done, text in enumerate(texts):
        found.append(trace_text(engine, text, folder, max_new_tokens))
        meter.update(done + 1, force=done + 1 == len(texts))
    return merge(found)


def trace_text(engine: Engine, text: Text, folder: Path, max_new_tokens: int) -> tuple[RouterTrace, Segment]:
    """One text of `trace_texts`, with the segment that it becomes."""
    path = folder / "traces" / f"{_key(engine, text, max_new_tokens)}.npz"
    trace = _kept(path)
    if trace is None:
        trace = _measured(engine, text, max_new_tokens)
        trace.save(path)
    return trace, Segment(0, text.title, text.labels)


def write_atlas(trace: RouterTrace, folder: Path, lang: str, adapter: Path | None) -> Path:
    """Writes trace, report and tables; gives the report. `adapter`: folder of the experts, for how alike they are."""
    from ming_app.molora.similarity import similarity_of
    from ming_app.router.report import report_html, report_views, texts_table, whole_table

    found = report_views(trace, lang, similarity_of(adapter) if adapter is not None else None)
    tables = {name: whole_table(variants) for name, variants in found.items()}
    files = {f"{name}.csv": table.to_csv() for name, table in {**tables, "texts": texts_table(trace, lang)}.items()}
    files["report.html"] = report_html(trace, lang, found)
    trace.save(folder / "trace.npz")
    for name, content in files.items():
        partial = folder / f"{name}.partial"
        partial.write_text(content, encoding="utf-8")
        partial.replace(folder / name)
    return folder / "report.html"


def _measured(engine: Engine, text: Text, max_new_tokens: int) -> RouterTrace:
    question = [Message("user", text.text)]
    if text.answer or not max_new_tokens:
        return inspect_given(engine, question, text.answer)
    *_, finish = engine.stream(question, SamplingParams(max_new_tokens, temperature=0, repetition_penalty=1.0))
    if not isinstance(finish, Finish) or finish.trace is None:
        raise UsageError("This model has no experts, so there is nothing to trace.", "该模型没有专家，无轨迹可记录。")
    return inspect(engine, finish.trace)


def _key(engine: Engine, text: Text, max_new_tokens: int) -> str:
    parts = [engine.info.fingerprint, engine.info.precision, text.text, text.answer or max_new_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _kept(path: Path) -> RouterTrace | None:
    """A trace of an earlier run; None when there is none or it is damaged."""
    try:
        return RouterTrace.load(path) if path.is_file() else None
    except TraceError:
        return None


def _from_toml(path: Path, content: str) -> list[Text]:
    try:
        tables: dict[str, Any] = tomllib.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}.", f"{path} 不是有效的 TOML：{error}。") from error
    rows = [(lang, row) for lang, entries in tables.items() if isinstance(entries, list) for row in entries]
    return [
        _text({"lang": lang, **row} if isinstance(row, dict) else row, f"{path.name}, [[{lang}]]") for lang, row in rows
    ]


def _from_lines(path: Path, content: str) -> list[Text]:
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        if path.suffix in (".jsonl", ".json"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where}: not JSON.", f"{where}：不是 JSON。") from error
        else:
            row = {"text": line.strip()}
        texts.append(_text(row, where))
    return texts


def _text(row: Any, where: str) -> Text:
    """From {"text"} or an exam question {"stem", "options"}; `title`, `lang`, `stream` as far as they are there."""
    text = None
    if isinstance(row, dict):
        text = row.get("text")
        options = row.get("options")
        if text is None and isinstance(row.get("stem"), str) and isinstance(options, dict):
            text = "\n".join([row["stem"], *(f"{letter}. {option}" for letter, option in options.items())])
    if not isinstance(text, str) or not text.strip():
        raise UsageError(
            f"{where}: a text (or an exam question's stem and options) is needed.",
            f"{where}：需要 text（或试题的 stem 与 options）。",
        )
    text = text[:MAX_CHARS]
    labels = {kind: row[kind] for kind in ("stream", "domain") if isinstance(row.get(kind), str) and row[kind]}
    lang = row.get("lang")
    labels["language"] = lang if isinstance(lang, str) and lang else _language(text)
    title = row.get("title") if isinstance(row.get("title"), str) else text
    answer = row["answer"][:MAX_CHARS] if isinstance(row.get("answer"), str) else ""
    return Text(text, " ".join(title.split())[:80], {kind: value[:80] for kind, value in labels.items()}, answer)


def _language(text: str) -> str:
    """zh where Han characters are at least a tenth of the text."""
    return "zh" if sum(token_class(c) == "han" for c in text) * 10 >= len(text) else "en"
