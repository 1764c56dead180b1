"""What `python -m ming_app trace` does beyond one trace: diff, merge, report, atlas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ming_app.console import Console
from ming_app.errors import UsageError
from ming_app.molora.trace import RouterTrace, Segment, merge
from ming_app.settings import Settings

ATLAS_TOKENS = 64  # of each answer, unless --max-new-tokens says otherwise


@dataclass(frozen=True)
class Job:
    """The words of the command line."""

    files: tuple[str, ...]
    out: str | None
    prompts: str | None
    limit: int
    max_new_tokens: int


def diff(job: Job, settings: Settings, console: Console, load_engine: Any) -> dict[str, Any]:
    """How two traces differ; with --out the table of their tokens as CSV."""
    from ming_app.router.compare import compare
    from ming_app.router.views import compare_view

    if len(job.files) != 2:
        raise UsageError("diff takes two trace files.", "diff 需要两个轨迹文件。")
    a, b = (RouterTrace.load(file) for file in job.files)
    found = compare(a, b)
    view = compare_view(found, a, b, console.lang)
    console.line(view.note)
    if job.out:
        write_whole(job.out, view.table.to_csv().encode())
    return {
        "aligned": len(found.pairs),
        "only_a": found.only_a,
        "only_b": found.only_b,
        "same_experts": round(found.same, 4),
        "weight_moved": round(float(found.moved.mean()) if found.moved.size else 0.0, 4),
        "divergence_bits": round(float(found.divergence.mean()), 5),
        "file": job.out,
    }


def merge_files(job: Job, settings: Settings, console: Console, load_engine: Any) -> dict[str, Any]:
    """One trace of several."""
    if len(job.files) < 2 or not job.out:
        raise UsageError("merge takes two trace files or more, and --out.", "merge 需要至少两个轨迹文件以及 --out。")
    merged = merge([(RouterTrace.load(file), Segment(0, Path(file).stem)) for file in job.files])
    merged.save(job.out)
    console.note(f"Written: {job.out}.", f"已写入：{job.out}。")
    return {"file": job.out, "texts": len(merged.segments), "tokens": len(merged)}


def report(job: Job, settings: Settings, console: Console, load_engine: Any) -> dict[str, Any]:
    """A trace as one HTML page."""
    from ming_app.router.report import report_html, report_views

    if len(job.files) != 1 or not job.out:
        raise UsageError("report takes one trace file, and --out.", "report 需要一个轨迹文件以及 --out。")
    trace = RouterTrace.load(job.files[0])
    page = report_html(trace, console.lang, report_views(trace, console.lang))
    write_whole(job.out, page.encode())
    console.note(f"Written: {job.out}.", f"已写入：{job.out}。")
    return {"file": job.out, "tokens": len(trace)}


def atlas(job: Job, settings: Settings, console: Console, load_engine: Any) -> dict[str, Any]:
    """Reads a corpus and writes its atlas; a run that was stopped goes on where it was."""
    from ming_app.atlas import read_texts, trace_texts, write_atlas

    if not job.prompts or not job.out:
        raise UsageError(
            "atlas takes --prompts FILE (or --bank FILE) and --out FOLDER.",
            "atlas 需要 --prompts FILE（或 --bank FILE）与 --out FOLDER。",
        )
    texts, folder = read_texts(job.prompts, job.limit), Path(job.out)
    with closing(load_engine(settings, console.progress)) as engine:
        trace = trace_texts(engine, texts, folder, job.max_new_tokens, console.progress)
        written = write_atlas(trace, folder, console.lang, getattr(engine, "adapter", None))
    console.note(f"Written: {written}.", f"已写入：{written}。")
    return {"folder": str(folder), "report": str(written), "texts": len(texts), "tokens": len(trace)}


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes a file that a command was asked for, under another name first. Raises UsageError where it cannot."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}.", f"无法写入 {path}：{error.strerror}。"
        ) from error


ACTIONS: Mapping[str, Callable[[Job, Settings, Console, Any], dict[str, Any]]] = {
    "diff": diff,
    "merge": merge_files,
    "report": report,
    "atlas": atlas,
}
