"""The CPU fast path: a built engine run by ONNX Runtime, behind `engine.types.Backend`.

Needs the build folder alone: no base file, no adapter file, no torch. One forward at a time (a lock). Tokens of all rows
travel packed in one list; the KV cache is plain numpy memory, bound by address as past and present of the same call, so
it is updated in place and any run of rows can be used by itself. Decoding reuses its binding: only numbers change.
Requests that measure or intervene run on a second graph over the same weights, opened when the first of them comes and
let go when none came for a while: ONNX Runtime repacks the weights for each, so it takes their memory once more.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ming_app.engine.backends.onnx_build import build_engine
from ming_app.engine.backends.onnx_spec import EMBEDDINGS, GRAPH, PROBE, BaseShape, Manifest, damaged, engine_key
from ming_app.engine.types import Gates, Step

__all__ = ["OnnxBackend", "OnnxCache", "build_engine", "engine_key"]

CHUNK = 256  # tokens per call of the graph: enough for full speed, and it bounds the memory of activations
PADDED = 2 * CHUNK  # places B * S per call: bounds what padding a short row to a long one may cost
PROBE_REST = 300.0  # seconds without use after which the next ordinary request closes the probe
BIAS_LIMIT = np.float32(1e9)  # -inf would become NaN where the graph multiplies logits by nought


class OnnxCache:
    """KV cache of B rows in one array, float32 [L, 2, B, kv heads, capacity, D]; untouched pages cost no memory."""

    def __init__(self, shape: BaseShape, batch: int, capacity: int):
        self.capacity = capacity
        self.lengths = np.zeros(batch, np.int64)
        self.memory = np.zeros((shape.layers, 2, batch, shape.kv_heads, capacity, shape.head_dim), np.float32)
        self._decode: dict[bool, _Call] = {}

    def truncate(self, row: int, length: int) -> None:
        """Forgets all but the first `length` tokens of a row. Raises ValueError when it holds fewer."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"row {row} holds {self.lengths[row]} tokens, cannot keep {length}")
        self.lengths[row] = length


@dataclass
class _Piece:
    """Part of one row's new tokens that goes into one call."""

    row: int
    ids: np.ndarray
    start: int
    """index of the first among the row's new tokens"""


class _Call:
    """One binding of a graph: buffers of fixed sizes for `lengths[i]` new tokens in each of consecutive rows."""

    def __init__(
        self,
        backend: OnnxBackend,
        cache: OnnxCache,
        first: int,
        lengths: Sequence[int],
        wanted: np.ndarray,
        probe: ort.InferenceSession | None,
    ):
        shape, count, tokens, longest = backend.shape, len(lengths), sum(lengths), max(lengths)
        self.rows = slice(first, first + count)
        self.session = probe or backend.session
        self.io = self.session.io_binding()
        self.lengths = np.array(lengths, np.int32)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        place = np.arange(longest)
        pad = np.where(place < self.lengths[:, None], starts[:, None] + place, 0)
        row_of = np.repeat(np.arange(count), lengths)
        self.embeds = np.empty((tokens, shape.hidden), np.float32)
        self.past_lengths = np.empty(count, np.int32)
        self.longest = np.empty((), np.int32)
        self.logits = np.empty((len(wanted), shape.vocab), np.float32)
        inputs: dict[str, np.ndarray] = {
            "embeds": self.embeds,
            "pad": pad.astype(np.int64),
            "unpad": (row_of * longest + np.arange(tokens) - starts[row_of]).astype(np.int64),
            "past_lengths": self.past_lengths,
            "new_lengths": self.lengths,
            "longest": self.longest,
            "cos": backend.cos,
            "sin": backend.sin,
            "wanted": wanted,
        }
        outputs: dict[str, np.ndarray] = {"logits": self.logits}
        if backend.num_experts:
            cells, experts = 3 * shape.layers, backend.num_experts
            chosen = experts if probe else backend.top_k
            self.router_bias = np.empty((count, cells * experts), np.float32)
            self.experts = np.empty((tokens, cells, chosen), np.uint8)
            self.weights = np.empty((tokens, cells, chosen), np.float32)
            inputs |= {"row_of": row_of.astype(np.int64), "router_bias": self.router_bias}
            outputs |= {"experts": self.experts, "weights": self.weights}
        self.gates: dict[str, np.ndarray] = {}
        self.measured: dict[str, np.ndarray] = {}
        if probe:
            widths = {"rank_bias": cells * experts, "sharpness": cells, "strength": cells, "attention": shape.layers}
            self.gates = {name: np.empty((count, width), np.float32) for name, width in widths.items()}
            widths = {"router_logits": experts, "delta_square": experts, "base_square": 1}
            self.measured = {name: np.empty((tokens, cells, width), np.float32) for name, width in widths.items()}
        self._bind(inputs | self.gates, outputs | self.measured, cache)

    def _bind(self, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray], cache: OnnxCache) -> None:
        for name, array in inputs.items():
            self.io.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            self.io.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        memory = cache.memory[:, :, self.rows]
        per_layer = (memory.shape[2], *memory.shape[3:])
        for layer in range(memory.shape[0]):
            for index, kind in enumerate("kv"):
                address = memory[layer, index].ctypes.data
                self.io.bind_input(f"past_{kind}.{layer}", "cpu", 0, np.float32, per_layer, address)
                self.io.bind_output(f"present_{kind}.{layer}", "cpu", 0, np.float32, per_layer, address)
        self._alive = (inputs, outputs, cache.memory)  # the binding holds bare addresses


class OnnxBackend:
    """`engine.types.Backend` on ONNX Runtime's CPU provider."""

    name = "onnx"
    device = "cpu"

    def __init__(
        self, folder: Path, manifest: Manifest, session: ort.InferenceSession, max_context: int, threads: int = 0
    ):
        shape, molora = manifest.base, manifest.molora
        self.folder = folder
        self.manifest = manifest
        self.session = session
        self.shape = shape
        self.precision = manifest.recipe
        self.num_layers = shape.layers
        self.num_experts = molora.num_experts if molora else 0
        self.top_k = molora.top_k if molora else 0
        self.vocab_size = shape.vocab
        self.max_context = max_context
        self.cos, self.sin = shape.rope.tables(shape.head_dim, max_context)
        self._embeddings = np.load(folder / EMBEDDINGS, mmap_mode="r")
        self._own_bias = np.asarray(manifest.router_bias, np.float32).reshape(-1) if molora else None
        self._threads = threads
        self._probe: ort.InferenceSession | None = None
        self._probed = 0.0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, build_dir: str | os.PathLike[str], threads: int = 0, max_context: int = 4096) -> OnnxBackend:
        """Opens a folder made by `build_engine`. `threads` 0: one per usable core. `max_context` is capped by the base's.

        Raises WeightsError when the build is damaged, incomplete, or made for another version of ONNX Runtime.
        """
        folder = Path(build_dir)
        manifest = Manifest.read(folder)
        session = _session(folder, GRAPH, threads)
        return cls(folder, manifest, session, min(max_context, manifest.base.max_positions), threads)

    def new_cache(self, batch: int, capacity: int) -> OnnxCache:
        """Room for `batch` rows of up to `capacity` tokens, at most `max_context`; memory is taken as tokens arrive."""
        if batch < 1 or not 1 <= capacity <= self.max_context:
            raise ValueError(f"batch {batch} must be at least 1 and capacity {capacity} in 1..{self.max_context}")
        return OnnxCache(self.shape, batch, capacity)

    def forward(
        self,
        ids: Sequence[np.ndarray],
        cache: OnnxCache,
        *,
        router_bias: np.ndarray | None = None,
        gates: Gates | None = None,
        all_logits: bool = False,
        measure: bool = False,
    ) -> Step:
        """See `Backend.forward`. The arrays of the result are the caller's to keep."""
        rows = [np.asarray(row, np.int64).reshape(-1) for row in ids]
        self._check(rows, cache, router_bias)
        asked = _Asked(self._full_bias(router_bias, len(rows)), None, measure)
        with self._lock:
            if self.num_experts and (gates is not None or measure):
                if self._probe is None:
                    self._probe = _session(self.folder, PROBE, self._threads)
                gates = gates or Gates.unchanged(len(rows), self.num_layers, 3, self.top_k)
                asked = _Asked(asked.bias, gates, measure)
                self._probed = time.monotonic()
            elif self._probe is not None and time.monotonic() - self._probed > PROBE_REST:
                self._probe = None
            if not all_logits and all(len(row) == 1 for row in rows) and len(rows) <= CHUNK:
                return self._decode(np.concatenate(rows), cache, asked)
            return self._extend(rows, cache, asked, all_logits)

    def close(self) -> None:
        """Lets go of the sessions, their weights and the embeddings."""
        with self._lock:
            del self.session, self._probe, self._embeddings

    def _check(self, rows: list[np.ndarray], cache: OnnxCache, router_bias: np.ndarray | None) -> None:
        if len(rows) != len(cache.lengths):
            raise ValueError(f"{len(rows)} rows of ids for a cache of {len(cache.lengths)}")
        for index, row in enumerate(rows):
            if not len(row) or row.min() < 0 or row.max() >= self.vocab_size:
                raise ValueError(f"row {index} must hold at least one id, each in 0..{self.vocab_size - 1}")
            if cache.lengths[index] + len(row) > cache.capacity:
                held = cache.lengths[index]
                raise ValueError(
                    f"row {index}: {held} tokens and {len(row)} more exceed the capacity of {cache.capacity}"
                )
        expected = (len(rows), self.num_layers, 3, self.num_experts)
        if router_bias is not None and self.num_experts and router_bias.shape != expected:
            raise ValueError(f"router_bias has shape {router_bias.shape}, expected {expected}")

    def _full_bias(self, router_bias: np.ndarray | None, rows: int) -> np.ndarray | None:
        """The routers' own bias plus the request's, float32 [B or 1, L P E]."""
        if self._own_bias is None or router_bias is None:
            return self._own_bias
        asked = np.clip(router_bias.astype(np.float32).reshape(rows, -1), -BIAS_LIMIT, BIAS_LIMIT)
        return self._own_bias + asked

    def _run(self, call: _Call, ids: np.ndarray, cache: OnnxCache, asked: _Asked) -> None:
        np.copyto(call.embeds, self._embeddings[ids])
        held = cache.lengths[call.rows]
        np.add(held, call.lengths - 1, out=call.past_lengths, casting="same_kind")
        call.longest[...] = call.past_lengths.max() + 1
        if asked.bias is not None:
            call.router_bias[...] = asked.bias if asked.bias.ndim == 1 else asked.bias[call.rows]
        if asked.gates is not None:
            for name, values in asked.inputs(self.num_experts).items():
                call.gates[name][...] = values[call.rows]
        call.session.run_with_iobinding(call.io)
        held += call.lengths

    def _call(self, cache: OnnxCache, first: int, lengths: Sequence[int], wanted: np.ndarray, asked: _Asked) -> _Call:
        return _Call(self, cache, first, lengths, wanted, self._probe if asked.gates is not None else None)

    def _decode(self, ids: np.ndarray, cache: OnnxCache, asked: _Asked) -> Step:
        """One token for every row, through the binding that the cache keeps."""
        probing = asked.gates is not None
        call = cache._decode.get(probing)
        if call is None:
            call = cache._decode[probing] = self._call(cache, 0, [1] * len(ids), np.arange(len(ids)), asked)
        self._run(call, ids, cache, asked)
        if not self.num_experts:
            return Step(call.logits.copy(), None, None)
        return Step(call.logits.copy(), *(list(record[:, None]) for record in self._routing(call, asked)))

    def _routing(self, call: _Call, asked: _Asked) -> list[np.ndarray]:
        """Copies [T, L, P, .] of what a call recorded: experts uint8, weights float16, and as measured, float16,
        probabilities and contributions."""
        cells = (-1, self.num_layers, 3)
        k = self.top_k if asked.gates is None else int(asked.gates.top_k.max())
        experts, weights = call.experts[..., :k], call.weights[..., :k]
        records: list[np.ndarray] = [experts.copy(), weights.astype(np.float16)]
        if asked.measure:
            logits = call.measured["router_logits"]
            odds = np.exp(logits - logits.max(-1, keepdims=True))
            records.append((odds / odds.sum(-1, keepdims=True)).astype(np.float16))
            records.append(self._contributions(call, asked, experts, weights))
        return [record.reshape(*cells, record.shape[-1]) for record in records]

    def _contributions(self, call: _Call, asked: _Asked, experts: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """float16 [T, M, k]: |s w_i B_i A_i x| / |W0 x|."""
        assert asked.gates is not None  # measuring runs on the probe
        deltas = np.take_along_axis(call.measured["delta_square"], experts.astype(np.int64), axis=-1)
        base = np.maximum(call.measured["base_square"], 1e-12)
        ratio = weights * np.sqrt(np.maximum(deltas, 0) / base)
        rows = np.repeat(np.arange(len(call.lengths)), call.lengths)
        strength = asked.gates.strength[call.rows][rows].reshape(len(ratio), -1)
        return np.minimum(ratio * strength[..., None], np.finfo(np.float16).max).astype(np.float16)

    def _extend(self, rows: list[np.ndarray], cache: OnnxCache, asked: _Asked, all_logits: bool) -> Step:
        """Any number of tokens per row, in calls of at most CHUNK tokens."""
        logits = [np.empty((len(row) if all_logits else 1, self.vocab_size), np.float32) for row in rows]
        records: list[list[np.ndarray]] = [[] for _ in rows]  # by row: what each of its pieces recorded, end to end
        for pieces in _plan(rows):
            lengths = [len(piece.ids) for piece in pieces]
            ends = np.cumsum(lengths)
            wanted = np.arange(ends[-1]) if all_logits else ends - 1
            call = self._call(cache, pieces[0].row, lengths, wanted, asked)
            self._run(call, np.concatenate([piece.ids for piece in pieces]), cache, asked)
            routing = self._routing(call, asked) if self.num_experts else []
            for index, piece in enumerate(pieces):
                begin, end = ends[index] - lengths[index], ends[index]
                if all_logits:
                    logits[piece.row][piece.start : piece.start + lengths[index]] = call.logits[begin:end]
                else:
                    logits[piece.row][0] = call.logits[index]
                part = [record[begin:end] for record in routing]
                held = records[piece.row]
                records[piece.row] = [np.concatenate(both) for both in zip(held, part, strict=True)] if held else part
        out = logits if all_logits else np.concatenate(logits)
        if not self.num_experts:
            return Step(out, None, None)
        return Step(out, *(list(record) for record in zip(*records, strict=True)))


@dataclass(frozen=True)
class _Asked:
    """What a forward changes and records. `bias` float32 [B or 1, L P E]; with `gates` it runs on the probe."""

    bias: np.ndarray | None
    gates: Gates | None
    measure: bool

    def inputs(self, experts: int) -> dict[str, np.ndarray]:
        """The probe's inputs, float32 [B, .]."""
        assert self.gates is not None
        rows = len(self.gates.top_k)
        beyond = np.arange(experts) >= self.gates.top_k[..., None]
        return {
            "rank_bias": np.where(beyond, -BIAS_LIMIT, np.float32(0)).reshape(rows, -1),
            "sharpness": (~self.gates.uniform).astype(np.float32).reshape(rows, -1),
            "strength": self.gates.strength.reshape(rows, -1),
            "attention": self.gates.attention,
        }


def _session(folder: Path, graph: str, threads: int) -> ort.InferenceSession:
    """Opens a graph of a build. Raises WeightsError when it is damaged."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    try:
        return ort.InferenceSession(str(folder / graph), options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise
    except Exception as error:  # the runtime's exceptions share no base class
        raise damaged(folder, str(error).splitlines()[0][:200]) from error


def _plan(rows: Sequence[np.ndarray]) -> list[list[_Piece]]:
    """Calls: long rows alone in chunks; consecutive short rows together as long as they and their padding fit."""
    calls: list[list[_Piece]] = []
    for index, row in enumerate(rows):
        if len(row) > CHUNK:
            calls += [[_Piece(index, row[at : at + CHUNK], at)] for at in range(0, len(row), CHUNK)]
            calls.append([])  # nobody joins a long row's last chunk
            continue
        last = calls[-1] if calls else []
        lengths = [len(piece.ids) for piece in last] + [len(row)]
        if last and sum(lengths) <= CHUNK and max(lengths) * len(lengths) <= PADDED:
            last.append(_Piece(index, row, 0))
        else:
            calls.append([_Piece(index, row, 0)])
    return [call for call in calls if call]


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut by the quota of its control group (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control groups, or no quota ("max")
        pass
    return cores
