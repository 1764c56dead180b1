"""The CPU engine behind `engine.types.Backend`: a built folder, memory-mapped, run by threads that live as long as it does.

Needs the build folder alone: no base file, no adapter file, no torch. One forward at a time (a lock). Tokens of all rows
travel packed in one list. The kernels are compiled for this processor on the first use and kept on disk after that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numba import typeof

from ming_app.engine.backends.native import keep_kernels_in, layout
from ming_app.engine.backends.native.build import lora_rows, rank_rows
from ming_app.engine.backends.native.kernels import step
from ming_app.engine.backends.native.layout import BLOCK, LANES, SIDE, TILE, Call, Record, Shape, Store, Work
from ming_app.engine.backends.native.products import read_all
from ming_app.engine.backends.native.spec import EMBEDDINGS, WEIGHTS, Manifest, damaged
from ming_app.engine.backends.native.tiles import multiply
from ming_app.engine.backends.native.vector import SUPPORTED
from ming_app.engine.paging import PagedCache
from ming_app.engine.types import Gates, Step
from ming_app.errors import UsageError
from ming_app.models.progress import Meter, ProgressCallback

CHUNK = 256  # tokens per step: enough for full speed, and it bounds the memory of activations
PHASES = 24  # room for those of a layer: 22 where it measures (a test counts them)
BIAS_LIMIT = np.float32(1e9)  # -inf would become NaN in the difference of two


class NativeBackend:
    """`engine.types.Backend` on the processor's own vector units."""

    name = "cpu"
    device = "cpu"

    def __init__(self, folder: Path, manifest: Manifest, max_context: int, threads: int = 0):
        base, molora = manifest.base, manifest.molora
        self.folder = folder
        self.manifest = manifest
        self.precision = manifest.recipe
        self.num_layers = base.layers
        self.num_experts = molora.num_experts if molora else 0
        self.top_k = molora.top_k if molora else 0
        self.vocab_size = base.vocab
        self.max_context = max_context
        self._shape = Shape(
            layers=base.layers,
            hidden=base.hidden,
            width=_padded(base.hidden),
            ffn=_padded(base.ffn),
            heads=base.heads,
            kv_heads=base.kv_heads,
            head_dim=base.head_dim,
            vocab=base.vocab,
            experts=self.num_experts,
            rank=molora.rank if molora else 0,
            ranks=rank_rows(molora) if molora else 0,
            lora=lora_rows(molora, ("q_proj", "k_proj", "v_proj")) if molora else 0,
            lora_o=lora_rows(molora, ("o_proj",)) if molora else 0,
            eps=base.norm_eps,
        )
        self._store = Store(
            np.memmap(folder / WEIGHTS, np.uint8, "r").view(np.ndarray),
            np.array(manifest.matrices, np.int64),
            np.array(manifest.vectors, np.int64),
            *base.rope.tables(base.head_dim, max_context),
            multiply.address or 0,
        )
        _check_tables(folder, self._store, self._shape)
        self._embeddings = np.load(folder / EMBEDDINGS, mmap_mode="r")
        own = np.asarray(manifest.router_bias, np.float32).reshape(-1) if molora else np.zeros(0, np.float32)
        self._own_bias = own
        self._team = _Team(threads or usable_cores())
        self._work = _new_work(self._shape, self._team.size, max_context)
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        build_dir: str | os.PathLike[str],
        threads: int = 0,
        max_context: int = 4096,
        progress: ProgressCallback | None = None,
    ) -> NativeBackend:
        """Opens a folder made by `build_engine`, ready to run. `threads` 0: one per usable core. `max_context` is capped by
        the base's.

        Raises WeightsError when the build is damaged or incomplete, UsageError for a processor that cannot run it.
        """
        if not SUPPORTED:
            raise UsageError(
                "This processor is too old for the CPU engine: it lacks F16C. Use the torch backend.",
                "该处理器缺少 F16C 指令，无法运行 CPU 引擎。请使用 torch 后端。",
            )
        folder = Path(build_dir)
        manifest = Manifest.read(folder)
        backend = cls(folder, manifest, min(max_context, manifest.base.max_positions), threads)
        if any(keep_kernels_in().rglob("kernels.step-*.nbi")):
            backend.prepare()
            return backend
        meter = Meter(progress, "kernels", 1, "steps")
        meter.update(0, force=True)
        backend.prepare()
        meter.update(1, force=True)
        return backend

    def new_cache(self, batch: int, capacity: int, tokens: int | None = None) -> NativeCache:
        """See `Backend.new_cache`; `capacity` is at most `max_context`. Memory is taken as tokens arrive. Raises ValueError."""
        if batch < 1 or not 1 <= capacity <= self.max_context:
            raise ValueError(f"batch {batch} must be at least 1 and capacity {capacity} in 1..{self.max_context}")
        return NativeCache(self._shape, batch, capacity, tokens)

    def forward(
        self,
        ids: Sequence[np.ndarray],
        cache: NativeCache,
        *,
        rows: Sequence[int] | None = None,
        router_bias: np.ndarray | None = None,
        gates: Gates | None = None,
        all_logits: bool = False,
        measure: bool = False,
    ) -> Step:
        """See `Backend.forward`. The arrays of the result are the caller's to keep."""
        new = [np.asarray(row, np.int64).reshape(-1) for row in ids]
        taking = np.arange(len(cache.lengths)) if rows is None else np.asarray(rows, np.int64)
        self._check(new, taking, router_bias)
        counts = np.array([len(row) for row in new])
        gates = gates or Gates.unchanged(len(new), self.num_layers, 3, self.top_k)
        measure = measure and self.num_experts > 0
        with self._lock:
            cache.reserve(taking, counts)
            flat, row = np.concatenate(new), np.repeat(np.arange(len(new)), counts)
            ends = np.cumsum(counts)
            position = np.arange(len(flat)) - np.repeat(ends - counts - cache.lengths[taking], counts)
            asked = _Asked(
                row, position, cache.tables[taking], cache.pool, self._bias(router_bias, len(new)), gates, measure
            )
            wanted = np.ones(len(flat), bool) if all_logits else np.isin(np.arange(len(flat)), ends - 1)
            parts = [
                self._part(flat, asked, wanted, slice(start, start + CHUNK)) for start in range(0, len(flat), CHUNK)
            ]
            cache.lengths[taking] += counts
        return self._result(parts, ends, all_logits, measure)

    def prepare(self) -> None:
        """Compiles the kernels for this processor, or reads them where an earlier run has kept them."""
        with self._lock:
            cache, gates = self.new_cache(1, 1), Gates.unchanged(1, self.num_layers, 3, self.top_k)
            zero = np.zeros(1, np.int64)
            asked = _Asked(zero, zero, cache.tables, cache.pool, self._bias(None, 1), gates, False)
            call, record = self._arguments(1, asked, np.ones(1, bool), slice(0, 1))
            step.compile(tuple(map(typeof, (0, 1, self._shape, self._store, self._work, call, record))))

    def _part(self, flat: np.ndarray, asked: _Asked, wanted: np.ndarray, tokens: slice) -> Record:
        """Up to CHUNK tokens in one step."""
        ids, work, s = flat[tokens], self._work, self._shape
        count = len(ids)
        work.x[:count, : s.hidden] = self._embeddings[ids]
        work.x[:count, s.hidden :] = 0
        work.sync[:] = 0
        call, record = self._arguments(count, asked, wanted, tokens)
        self._team.run(lambda thread, threads: step(thread, threads, s, self._store, work, call, record))
        return record

    def _arguments(self, count: int, asked: _Asked, wanted: np.ndarray, tokens: slice) -> tuple[Call, Record]:
        """What the kernels read, and room for what they leave, for `count` tokens."""
        s, k = self._shape, int(asked.gates.top_k.max()) if self.num_experts else 0
        cells = 3 * s.layers
        places = np.flatnonzero(wanted[tokens])
        gates, rows = asked.gates, len(asked.tables)
        call = Call(
            asked.row[tokens],
            asked.position[tokens],
            asked.tables,
            asked.pool,
            places,
            asked.bias,
            np.ascontiguousarray(gates.top_k.reshape(rows, -1)),
            (~gates.uniform).reshape(rows, -1).astype(np.float32),
            np.ascontiguousarray(gates.strength.reshape(rows, -1), np.float32),
            np.ascontiguousarray(gates.attention, np.float32),
            asked.measure,
        )
        measured = count if asked.measure else 0
        record = Record(
            np.empty((len(places), -(-s.vocab // (2 * LANES)) * 2 * LANES), np.float32),
            np.empty(len(places), np.float32),
            np.zeros((count, cells, k), np.uint8),
            np.zeros((count, cells, k), np.float32),
            np.zeros((count, cells, self.num_experts), np.float32),
            np.zeros((measured, cells, k), np.float32),
            np.zeros((measured, cells), np.float32),
        )
        return call, record

    def _result(self, parts: Sequence[Record], ends: np.ndarray, all_logits: bool, measure: bool) -> Step:
        logits = _joined([part.logits for part in parts])[:, : self.vocab_size]
        rows: object = np.split(logits, ends[:-1]) if all_logits else logits
        totals = None if all_logits else _joined([part.log_totals for part in parts])
        if not self.num_experts:
            return Step(rows, None, None, log_totals=totals)
        experts, weights = _joined([part.experts for part in parts]), _joined([part.weights for part in parts])

        def by_row(values: np.ndarray) -> list[np.ndarray]:
            return np.split(values.reshape(len(values), self.num_layers, 3, -1), ends[:-1])

        step = Step(rows, by_row(experts), by_row(weights.astype(np.float16)), log_totals=totals)
        if not measure:
            return step
        scores = _joined([part.router_logits for part in parts])
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities = (odds / odds.sum(-1, keepdims=True)).astype(np.float16)
        return replace(step, probabilities=by_row(probabilities), contributions=by_row(_contributions(parts, weights)))

    def _check(self, new: list[np.ndarray], taking: np.ndarray, router_bias: np.ndarray | None) -> None:
        if len(new) != len(taking):
            raise ValueError(f"{len(new)} rows of ids for {len(taking)} rows of the cache")
        for index, row in enumerate(new):
            if not len(row) or row.min() < 0 or row.max() >= self.vocab_size:
                raise ValueError(f"row {index} must hold at least one id, each in 0..{self.vocab_size - 1}")
        expected = (len(new), self.num_layers, 3, self.num_experts)
        if router_bias is not None and self.num_experts and router_bias.shape != expected:
            raise ValueError(f"router_bias has shape {router_bias.shape}, expected {expected}")

    def _bias(self, router_bias: np.ndarray | None, rows: int) -> np.ndarray:
        """The routers' own bias plus the requests', float32 [B, 3 L E]."""
        if router_bias is None or not self.num_experts:
            return np.tile(self._own_bias, (rows, 1))
        return self._own_bias + np.clip(router_bias.astype(np.float32).reshape(rows, -1), -BIAS_LIMIT, BIAS_LIMIT)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a step of one token reads."""
        matrices, experts = self._store.matrices, self.num_experts
        routers = 4 * experts * (2 * self._shape.width + self._shape.ffn) * self.num_layers
        return int((matrices[:, 2] * matrices[:, 4]).sum()) + routers

    def read_weights(self) -> int:
        """Reads all weights once, doing nothing with them, on the engine's threads; how many bytes that is."""
        with self._lock:
            read_all.compile(tuple(map(typeof, (0, 1, self._store.data))))
            self._team.run(lambda thread, threads: read_all(thread, threads, self._store.data))
            return len(self._store.data)

    def close(self) -> None:
        """Ends the threads and lets go of the weights."""
        with self._lock:
            self._team.close()
            for name in ("_store", "_embeddings", "_work"):
                self.__dict__.pop(name, None)

    def __del__(self) -> None:
        """The threads end with an engine that nobody closed."""
        team = self.__dict__.get("_team")
        if team is not None:
            team.close()


class NativeCache(PagedCache):
    """Keys and values as `layout.Call` has them; memory is taken from the system as pages are first used."""

    def __init__(self, s: Shape, batch: int, capacity: int, tokens: int | None):
        super().__init__(batch, capacity, tokens)
        self.pool = np.zeros((self.pages, s.layers, s.kv_heads, 2, layout.PAGE * s.head_dim), np.uint16)

    def copy_page(self, source: int, target: int) -> None:
        self.pool[target] = self.pool[source]


@dataclass(frozen=True)
class _Asked:
    """A forward: every token's row and position, the rows' pages, and what they change and record."""

    row: np.ndarray
    position: np.ndarray
    tables: np.ndarray
    pool: np.ndarray
    bias: np.ndarray
    gates: Gates
    measure: bool


class _Team:
    """Threads that run one function together: `run(f)` calls f(i, n) on each of them, the caller being the first. What they
    run must be compiled: kernels wait for one another, and a thread that fails would leave the rest waiting."""

    def __init__(self, size: int):
        self.size = size
        self._job: Callable[[int, int], object] | None = None
        self._closed = False
        self._begin = [_taken_lock() for _ in range(size - 1)]
        self._ended = [_taken_lock() for _ in range(size - 1)]
        for index in range(size - 1):
            threading.Thread(target=self._serve, args=(index,), name=f"ming-cpu-{index + 1}", daemon=True).start()

    def run(self, job: Callable[[int, int], object]) -> None:
        """Returns when all are done."""
        if self.size == 1:
            job(0, 1)
            return
        self._job = job
        for lock in self._begin:
            lock.release()
        job(0, self.size)
        for lock in self._ended:
            lock.acquire()
        self._job = None  # it holds on to the engine

    def close(self) -> None:
        """Ends the threads."""
        self._closed = True
        for lock in self._begin[: self.size - 1]:
            lock.release()
        self.size = 1

    def _serve(self, index: int) -> None:
        while True:
            self._begin[index].acquire()
            if self._closed or self._job is None:
                return
            self._job(index + 1, self.size)
            self._ended[index].release()


def _taken_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def _padded(n: int) -> int:
    return -(-n // BLOCK) * BLOCK


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _contributions(parts: Sequence[Record], weights: np.ndarray) -> np.ndarray:
    """float16 [T, M, k]: |s w_i B_i A_i x| / |W0 x|."""
    deltas, bases = _joined([part.deltas for part in parts]), _joined([part.bases for part in parts])
    ratio = weights * np.sqrt(np.maximum(deltas, 0) / np.maximum(bases, 1e-12)[..., None])
    return np.minimum(ratio, np.finfo(np.float16).max).astype(np.float16)


def _new_work(s: Shape, threads: int, max_context: int) -> Work:
    heads = _padded(s.heads * s.head_dim)
    widest = max(s.width, s.ffn, heads)
    ranks = max(2 * s.ranks, s.lora, s.lora_o)
    rank_block = max(s.ranks, s.lora, s.lora_o)
    group = s.heads // s.kv_heads
    scratch = max(2 * TILE * LANES * layout.MANY_GROUPS, s.width, ranks, group * (max_context + layout.PAGE))
    return Work(
        x=np.zeros((CHUNK, s.width), np.float32),
        qkv=np.zeros((CHUNK, (s.heads + 2 * s.kv_heads) * s.head_dim), np.float32),
        attended=np.zeros((CHUNK, heads), np.float32),
        inner=np.zeros((CHUNK, s.ffn), np.float32),
        ranks=np.zeros((CHUNK, ranks), np.float32),
        codes=np.zeros(CHUNK * widest, np.uint8),
        side=np.zeros(CHUNK * widest // BLOCK * SIDE, np.uint8),
        rank_codes=np.zeros((2, CHUNK * rank_block), np.uint8),
        rank_side=np.zeros((2, CHUNK * rank_block // BLOCK * SIDE), np.uint8),
        scratch=np.zeros((threads, scratch), np.float32),
        zeros=np.zeros(LANES, np.float32),
        squares=np.zeros((threads, CHUNK, 2), np.float32),
        sync=np.zeros(2 + (s.layers + 1) * PHASES, np.int64),
    )


def _check_tables(folder: Path, store: Store, s: Shape) -> None:
    """The kernels trust these tables: everything must lie in the file and have the sizes of the model. Raises WeightsError."""
    matrices, vectors, size = store.matrices, store.vectors, len(store.data)
    blocks_of = {
        layout.OUT: s.heads * s.head_dim,
        layout.DOWN: s.ffn,
        layout.A_O: s.heads * s.head_dim,
        layout.A_DOWN: s.ffn,
    }
    rank_inputs = {layout.B_Q: s.lora, layout.B_K: s.lora, layout.B_V: s.lora, layout.B_O: s.lora_o}
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    rows_of = {layout.Q: q, layout.B_Q: q, layout.K: kv, layout.B_K: kv, layout.V: kv, layout.B_V: kv}
    rows_of |= dict.fromkeys((layout.GATE, layout.UP, layout.B_GATE, layout.B_UP), s.ffn)
    rows_of |= {layout.A_QKV: s.lora, layout.A_O: s.lora_o, layout.A_IN: 2 * s.ranks, layout.A_DOWN: s.ranks}
    good = matrices.shape == (s.layers * layout.MATRICES + 2, 5) and vectors.shape == (s.layers + 1, layout.VECTORS)
    for index, (offset, format_, groups, blocks, nbytes) in enumerate(matrices if good else ()):
        if not groups:
            continue
        kind = index % layout.MATRICES if index < s.layers * layout.MATRICES else -1
        inputs = blocks_of.get(
            kind, rank_inputs.get(kind, s.ranks if kind in (layout.B_GATE, layout.B_UP, layout.B_DOWN) else s.width)
        )
        rows = s.vocab if kind < 0 else rows_of.get(kind, s.hidden)
        good = good and format_ in layout.BLOCK_BYTES and blocks == -(-inputs // BLOCK) and groups == -(-rows // LANES)
        good = good and nbytes == layout.group_bytes(int(format_), int(blocks))
        good = good and 0 <= offset <= size - groups * nbytes
    good = good and bool((vectors < size).all()) and bool((vectors % 4 != 0).sum() == (vectors == -1).sum())
    if not good:
        raise damaged(folder, "its tables do not fit the model")


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut by the quota of its control group (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control groups, or no quota ("max")
        pass
    return cores
