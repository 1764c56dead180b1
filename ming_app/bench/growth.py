"""How cost grows: time per token against context, batch, E, k and r; memory against tokens held; start-up by phase.

Runs in this process, on the CPU engine, over the base of the settings; adapters of other sizes are random (speed does not
depend on values). Every point is a median of a few steps.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from ming_app.errors import UsageError
from ming_app.settings import Settings

if TYPE_CHECKING:
    from ming_app.engine.types import Backend
    from ming_app.models.fetch import LocalModel

CONTEXTS = (64, 256, 512, 1024, 2048, 3072)
BATCHES = (1, 2, 4, 8, 16)
EXPERTS, ACTIVE, RANKS = (2, 4, 8, 16), (1, 2, 4, 8), (4, 8, 16, 32)
USERS = (1, 2, 4, 8)
STEPS = 12
Note = Callable[[str, str], None]
Points = list[tuple[float, float]]


def growth(settings: Settings, note: Note) -> dict[str, Any]:
    """{"startup": {phase: seconds}, "context", "batch", "experts", "active", "rank": [[x, ms per token]], "memory": [[tokens
    held, bytes]]}. Raises UsageError for a backend other than the CPU engine, and what loading raises."""
    if settings.backend not in ("auto", "cpu"):
        raise UsageError("The report measures the CPU engine.", "报告只测量 CPU 引擎。")
    note("measuring the start ...", "正在测量启动……")
    startup, backend, local = _start(settings)
    vocab = backend.vocab_size
    report: dict[str, Any] = {"startup": startup}
    note("measuring contexts and batches ...", "正在测量上下文与批量……")
    report["context"] = [(context, _step_ms(backend, vocab, 1, context)) for context in CONTEXTS]
    report["batch"] = [(batch, _step_ms(backend, vocab, batch, 64) / batch) for batch in BATCHES]
    report["memory"] = _memory(backend, vocab)
    backend.close()
    for name, sizes in (
        ("experts", [(e, 2, 8) for e in EXPERTS]),
        ("active", [(8, k, 8) for k in ACTIVE]),
        ("rank", [(4, 2, r) for r in RANKS]),
    ):
        varied = {"experts": 0, "active": 1, "rank": 2}[name]
        report[name] = []
        for size in sizes:
            note(f"measuring E, k, r = {size} ...", f"正在测量 E、k、r = {size}……")
            with tempfile.TemporaryDirectory(prefix="ming-bench-") as folder:
                other = _random_engine(local, size, Path(folder) / "engine", settings)
                report[name].append((size[varied], _step_ms(other, vocab, 1, 64)))
                other.close()
    return report


def _start(settings: Settings) -> tuple[dict[str, float], Any, LocalModel]:
    """Seconds per phase of a start from the cache, in order, and what was opened."""
    marks = [("", time.monotonic())]

    def mark(name: str) -> None:
        marks.append((name, time.monotonic()))

    from ming_app.engine.backends.native import keep_kernels_in

    keep_kernels_in(settings.cache_dir)
    from ming_app.engine.backends.native.backend import NativeBackend
    from ming_app.engine.loading import engine_folder
    from ming_app.models.catalog import find_model
    from ming_app.models.fetch import fetch
    from ming_app.molora.checkpoint import load_adapter

    mark("imports")
    model = find_model(settings.model)
    local = fetch(model, settings)
    mark("checking the base")
    adapter = None
    if local.adapter is not None:
        adapter = load_adapter(local.adapter, base_fingerprint=local.fingerprint).padded()
    mark("reading the adapter")
    precision = model.cpu_precision if settings.precision == "auto" else settings.precision
    folder = engine_folder(settings, local, adapter, precision)
    if not folder.is_dir():
        from ming_app.engine.engine import Engine

        Engine.load(settings).close()
        mark("building (once)")
    backend = NativeBackend.open(folder, settings.threads, settings.context)
    mark("opening the engine")
    backend.forward([np.array([1])], backend.new_cache(1, 8))
    mark("kernels and the first token")
    backend.forward([np.array([1])], backend.new_cache(1, 8))
    mark("the second token")
    return {name: now - then for (_, then), (name, now) in zip(marks, marks[1:], strict=False)}, backend, local


def _step_ms(backend: Backend, vocab: int, batch: int, context: int) -> float:
    """Milliseconds of a step of one token for each of `batch` rows that hold `context` tokens."""
    rng = np.random.default_rng(0)
    cache = backend.new_cache(batch, min(context + STEPS + 2, backend.max_context))
    for row in range(batch):
        backend.forward([rng.integers(0, vocab, context)], cache, rows=[row])
    times = []
    for _ in range(STEPS):
        ids = [rng.integers(0, vocab, 1) for _ in range(batch)]
        begin = time.perf_counter()
        backend.forward(ids, cache)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]) * 1000


def _memory(backend: Backend, vocab: int) -> Points:
    """Resident bytes of this process while more and more tokens are held, by users of 512 each."""
    process, rng = psutil.Process(), np.random.default_rng(0)
    cache = backend.new_cache(max(USERS), 512)
    points: Points = []
    for user in range(max(USERS)):
        backend.forward([rng.integers(0, vocab, 512)], cache, rows=[user])
        if user + 1 in USERS:
            points.append((512 * (user + 1), float(process.memory_info().rss)))
    return points


def _random_engine(local: LocalModel, size: Sequence[int], folder: Path, settings: Settings) -> Any:
    """The base with a random adapter of E, k, r on the FFN, built in `folder`."""
    from ming_app.engine.backends.native.backend import NativeBackend
    from ming_app.engine.backends.native.build import build_engine
    from ming_app.models.tensors import open_tensors
    from ming_app.molora.checkpoint import Adapter, expected_shapes
    from ming_app.molora.config import MoLoRAConfig

    experts, active, rank = size
    config = MoLoRAConfig(experts, active, rank, 2.0 * rank, attention_targets=())
    with open_tensors(local) as source:
        layers = int(source.config["num_hidden_layers"])
        shapes = expected_shapes(Adapter(config, layers, {}), source.config)
        adapter = Adapter(config, layers, dict(_random(shapes.items())))
        build_engine(source, adapter, "4bit", folder)
    return NativeBackend.open(folder, settings.threads, settings.context)


def _random(shapes: Any) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for name, shape in shapes:
        yield name, (rng.standard_normal(shape, np.float32) * np.float32(0.02))
