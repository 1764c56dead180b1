"""The cases of `bench`, their rounds, and the object it reports. Imports neither torch nor a model: peers are processes."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ming_app.bench.fidelity import MEASURES, RECIPES
from ming_app.bench.peers import Peer, Setup, start_and_chat
from ming_app.console import Console
from ming_app.errors import UsageError
from ming_app.settings import Settings

PREFILL_TOKENS = 512
VERSIONS = ("ming-app", "torch", "transformers", "numba", "llama-cpp-python", "numpy")
Note = Callable[[str, str], None]


@dataclass(frozen=True)
class Case:
    """One figure: which peer, what it measures, and the cases it is compared with when they run too."""

    name: str
    peer: str
    """engine, engine-base, llama, generate, exam, safety, fidelity, or "" for a fresh process per measurement"""
    measure: str
    """what the peer is asked for, see serving.py; open-bank (60,000 questions), statistics (100,000 answers) for exam; triage
    (one message); load, rss for a fresh process; kl:mix and the like for fidelity"""
    unit: str
    against: tuple[str, ...] = ()
    on_request: bool = False
    """runs only when named: it needs float32 weights in memory"""


CASES: tuple[Case, ...] = (
    Case("decode", "engine", "decode", "tokens/s", ("decode-no-trace", "decode-base", "llama-decode", "generate-bf16")),
    Case("decode-no-trace", "engine", "decode-no-trace", "tokens/s", ("decode-base",)),
    Case("decode-base", "engine-base", "decode", "tokens/s", ("llama-decode",)),
    Case("llama-decode", "llama", "decode", "tokens/s"),
    Case("generate-bf16", "generate", "decode", "tokens/s"),
    *(
        case
        for context in (700, 2000)
        for case in (
            Case(f"decode-{context}", "engine", f"decode:{context}", "tokens/s", ("decode", f"llama-decode-{context}")),
            Case(f"llama-decode-{context}", "llama", f"decode:{context}", "tokens/s"),
        )
    ),
    Case("prefill512", "engine", "prefill", "tokens/s", ("prefill512-base", "llama-prefill512")),
    Case("prefill512-base", "engine-base", "prefill", "tokens/s", ("llama-prefill512",)),
    Case("llama-prefill512", "llama", "prefill", "tokens/s"),
    *(Case(f"streams-{count}", "engine", f"streams:{count}", "tokens/s", ("decode",)) for count in (4, 8)),
    Case("first-word", "engine", "first:0", "s"),
    Case("first-word-behind-7", "engine", "first:7", "s", ("first-word",)),
    Case("score", "engine", "score", "questions/s", ("score-pairs",)),
    Case("score-pairs", "engine", "score-pairs", "questions/s"),
    Case("weight-bytes", "engine", "weight-bytes", "bytes"),
    Case("bandwidth", "engine", "bandwidth", "bytes/s"),
    Case("load", "", "load", "s"),
    Case("rss", "", "rss", "bytes", ("llama-rss",)),
    Case("llama-rss", "llama", "chat-rss", "bytes"),
    Case("open-bank", "exam", "open-bank", "s"),
    Case("statistics", "exam", "statistics", "s"),
    Case("triage", "safety", "triage", "ms"),
    *(
        Case(f"{measure}-{recipe}", "fidelity", f"{measure}:{recipe}", "nats" if measure == "kl" else "share", (), True)
        for recipe in RECIPES
        for measure in MEASURES
    ),
    *(
        Case(f"{measure}-{kind}", "fidelity-base", f"{measure}:{what}", unit, (), True)
        for kind, what in (("base", "4bit"), ("llama", "llama"))
        for measure, unit in (("kl", "nats"), ("same-token", "share"))
    ),
)


def run_bench(
    settings: Settings, only: Sequence[str], *, repeat: int, tokens: int, prompt_tokens: int, note: Note
) -> dict[str, Any]:
    """The object of `bench --json`. `only` names cases (all when empty); `note` receives (en, zh) remarks.

    Raises UsageError for an unknown case or a count that is not positive, and what loading a model raises.
    """
    cases = choose_cases(only)
    for name, value in (("repeat", repeat), ("tokens", tokens), ("prompt-tokens", prompt_tokens)):
        if value < (2 if name == "tokens" else 1):
            raise UsageError(f"--{name} is {value}; it is too small.", f"--{name} 的值 {value} 过小。")
    threads = settings.threads or psutil.cpu_count(logical=False) or os.cpu_count() or 1
    setup = Setup(settings.with_(threads=threads), tokens, prompt_tokens, PREFILL_TOKENS)
    samples: dict[str, list[float]] = {case.name: [] for case in cases}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        peers: dict[str, Peer] = {}
        for name in dict.fromkeys(case.peer for case in cases if case.peer):
            reason = why_missing(name)
            if reason:
                missing |= {case.name: reason for case in cases if case.peer == name}
                continue
            note(f"loading {name} ...", f"正在加载 {name} ……")
            peers[name] = stack.enter_context(Peer(name, setup))
        resident = [case for case in cases if case.peer in peers]
        for case in resident:  # once unmeasured: pages, caches and thread pools warm up
            peers[case.peer].measure(case.measure)
        for i in range(repeat if resident else 0):
            note(f"round {i + 1}/{repeat}", f"第 {i + 1}/{repeat} 轮")
            for case in resident:
                samples[case.name].append(peers[case.peer].measure(case.measure))
    fresh = [case for case in cases if not case.peer]
    if fresh and "engine" not in peers:
        note("preparing the cache ...", "正在准备缓存……")
        start_and_chat(setup)
    for i in range(repeat if fresh else 0):
        note(f"fresh process {i + 1}/{repeat}", f"新进程 {i + 1}/{repeat}")
        figures = start_and_chat(setup)
        for case in fresh:
            samples[case.name].append(figures[case.measure])
    results = [result(case, samples, missing.get(case.name, "")) for case in cases]
    return {
        "machine": machine(threads),
        "model": settings.model,
        "tokens": tokens,
        "repeat": repeat,
        "results": results,
    }


def choose_cases(only: Sequence[str]) -> list[Case]:
    """The named cases in table order. Raises UsageError with the closest names."""
    names = [case.name for case in CASES]
    for name in only:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3) or names
            raise UsageError(
                f"There is no case {name!r}. Closest: {', '.join(close)}.",
                f"没有名为 {name!r} 的项目。最接近的有：{'、'.join(close)}。",
            )
    return [case for case in CASES if (case.name in only if only else not case.on_request)]


def why_missing(peer: str) -> str:
    """Why a peer cannot run here, "" when it can."""
    if peer in ("llama", "fidelity-base") and importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed (pip install -r requirements-bench.txt)"
    return ""


def result(case: Case, samples: dict[str, list[float]], missing: str) -> dict[str, Any]:
    """One entry of `results`. `ratio_to`: case name -> median over rounds of this case's figure over that one's."""
    values = samples[case.name]
    entry: dict[str, Any] = {
        "name": case.name,
        "median": None,
        "min": None,
        "max": None,
        "unit": case.unit,
        "ratio_to": {},
    }
    if missing or not values:
        return {**entry, "missing": missing or "not measured"}
    entry |= {"median": statistics.median(values), "min": min(values), "max": max(values)}
    for other in case.against:
        if samples.get(other):
            pairs = [a / b for a, b in zip(values, samples[other], strict=True) if b > 0]
            if pairs:
                entry["ratio_to"][other] = round(statistics.median(pairs), 4)
    return entry


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on. `ram` in bytes."""
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": threads,
        "ram": psutil.virtual_memory().total,
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: v for name in VERSIONS if (v := _version(name))},
    }


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or sys.platform


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        from ming_app import __version__

        return __version__ if distribution == "ming-app" else ""


def print_results(report: dict[str, Any], console: Console) -> None:
    """A table for people."""
    m = report["machine"]
    console.line(f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['ram'] / 2**30:.1f} GiB")
    console.line(f"{report['model']}, {report['repeat']} rounds\n")
    for entry in report["results"]:
        if entry["median"] is None:
            console.line(f"{entry['name']:<18} {console.text('missing', '缺失')}: {entry['missing']}")
            continue
        scale, unit = {"bytes": (2**-20, "MiB"), "bytes/s": (1e-9, "GB/s")}.get(entry["unit"], (1.0, entry["unit"]))
        median, low, high = (entry[key] * scale for key in ("median", "min", "max"))
        ratios = "  ".join(f"{value:.2f} x {name}" for name, value in entry["ratio_to"].items())
        console.line(f"{entry['name']:<18} {median:9.2f} {unit:<8} [{low:.2f} .. {high:.2f}]  {ratios}".rstrip())
