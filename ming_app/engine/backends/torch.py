"""The reference backend: a transformers model with MoLoRA injected, on CPU or GPU, in float32, bf16, nf4 or int8.

Rows of different length are padded on the left; a mask keeps every row to its own tokens, so that each row gives what it gives
alone. Keys and values lie in pages. On a GPU a step of one token per row runs on fixed shapes, recorded once as a CUDA graph: the
processor then launches one thing per token, and waits for the GPU once, for the results.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ming_app.engine.paging import PAGE, PagedCache
from ming_app.engine.types import Gates, Step
from ming_app.models.load import TorchModel
from ming_app.molora.config import PROJECTIONS
from ming_app.molora.layer import GateTensors

logger = logging.getLogger(__name__)

FIXED_ROWS = 64  # rows of the largest fixed shape
FIXED_PAGES = 16  # shapes grow by so many pages: 256 tokens


class TorchCache(PagedCache):
    """Keys and values of every layer, [pages, kv heads, 16, D] each."""

    def __init__(self, layers: int, batch: int, capacity: int, tokens: int | None):
        super().__init__(batch, capacity, tokens)
        self.layers = [
            _PagedLayer(self.pages + 1) for _ in range(layers)
        ]  # the last page takes what padding rows write
        self.fixed: dict[tuple[int, int, bool], _FixedStep] = {}
        self.scratch: Any = None
        """the memory in which recorded steps work, all in the same: one is read out before the next begins"""

    def copy_page(self, source: int, target: int) -> None:
        for layer in self.layers:
            for pool in layer.pools:
                pool[target] = pool[source]


class _PagedLayer(CacheLayerMixin):
    """One layer, as transformers' attention sees it: `update` writes the new tokens and gives all those of the rows."""

    def __init__(self, pages: int):
        super().__init__()
        self._pages = pages
        self.pools: list[torch.Tensor] = []
        self.write_from: torch.Tensor  # int64 [T, 2]: batch row and column of every new token
        self.write_to: torch.Tensor  # int64 [T]: place in the pool, page * 16 + token
        self.tables: torch.Tensor  # int64 [B, n]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Zeros, for what no row has written is read too, if only to be masked."""
        _, heads, _, size = key_states.shape
        self.pools = [one.new_zeros(self._pages, heads, PAGE, size) for one in (key_states, value_states)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, kv heads, S, D] new -> [B, kv heads, 16 n, D] of the rows' pages."""
        if not self.pools:
            self.lazy_initialization(key_states, value_states)
        found = []
        for pool, states in zip(self.pools, (key_states, value_states), strict=True):
            new = states.transpose(1, 2)[self.write_from[:, 0], self.write_from[:, 1]]
            pool[self.write_to // PAGE, :, self.write_to % PAGE] = new
            pages = pool[self.tables].transpose(1, 2)
            found.append(pages.flatten(2, 3))
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not asked for: masks are given."""
        return self.tables.shape[1] * PAGE, 0

    def get_seq_length(self) -> int:
        """Not asked for: positions are given."""
        return 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1


class _FixedStep:
    """A step of one token for each of `rows` rows that hold at most `pages` pages, always in the same memory."""

    def __init__(self, backend: TorchBackend, cache: TorchCache, rows: int, pages: int, biased: bool):
        device = backend._loaded.device
        self._run = lambda: backend._compute(self._x, cache, False)
        self._spare = cache.pages
        self._x: dict[str, torch.Tensor] = {
            name: torch.zeros(shape, dtype=torch.int64, device=device)
            for name, shape in (
                ("tokens", (rows, 1)),
                ("positions", (rows, 1)),
                ("write_from", (rows, 2)),
                ("write_to", (rows,)),
                ("tables", (rows, pages)),
            )
        }
        self._x["write_from"][:, 0] = torch.arange(rows, device=device)
        if biased:
            self._x["bias"] = torch.zeros(backend._bias_shape(rows), device=device)
        self._graph: Any = None
        self._results: dict[str, torch.Tensor] = {}
        self._recordable = device.type == "cuda"
        self._cache = cache

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Results of all rows; they are overwritten by the next run."""
        count, pages = inputs["tables"].shape
        for name in ("tokens", "positions", "bias"):
            if name in inputs:
                self._x[name][:count].copy_(torch.from_numpy(inputs[name]), non_blocking=True)
        self._x["positions"][count:] = 0
        self._x["tables"].fill_(self._spare)
        self._x["tables"][:count, :pages].copy_(torch.from_numpy(inputs["tables"]), non_blocking=True)
        self._x["write_to"].fill_(self._spare * PAGE)
        self._x["write_to"][:count].copy_(torch.from_numpy(inputs["write_to"]), non_blocking=True)
        if not self._recordable:
            return self._run()
        if self._graph is None:
            self._record()
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._results

    def _record(self) -> None:
        """Runs it until everything it needs is there, then records it. What cannot be recorded runs as it is."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            if self._cache.scratch is None:
                self._cache.scratch = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._cache.scratch):
                self._results = self._run()
        except RuntimeError as error:  # a kernel that waits for the processor
            logger.warning("a step cannot be recorded: %s", str(error).splitlines()[0][:200])
            self._recordable = False
            return
        self._graph = graph


class TorchBackend:
    """Implements `engine.types.Backend` over a `TorchModel`. Calls are serialised by a lock."""

    name = "torch"

    def __init__(self, loaded: TorchModel, max_context: int = 4096, threads: int = 0):
        """`threads`: of torch on the CPU, for the whole process; 0 leaves torch's own choice."""
        if threads:
            torch.set_num_threads(threads)
        config = loaded.config
        self._loaded = loaded
        self._lock = threading.Lock()
        self.precision = loaded.precision
        self.device = str(loaded.device)
        self.num_layers = int(config["num_hidden_layers"])
        self.vocab_size = int(config["vocab_size"])
        self.max_context = min(max_context, int(config.get("max_position_embeddings") or max_context))
        injected = loaded.injected
        self._sampling = injected is not None and injected.config.expert_selection == "sampling"
        self.fixed_steps = loaded.device.type == "cuda" and not self._sampling
        """whether steps of one token per row run on fixed shapes"""
        self.num_experts = injected.config.num_experts if injected else 0
        self.top_k = injected.config.top_k if injected else 0
        if injected:
            injected.state.capture = True

    def new_cache(self, batch: int, capacity: int, tokens: int | None = None) -> TorchCache:
        """See `Backend.new_cache`."""
        return TorchCache(self.num_layers, batch, capacity, tokens)

    def forward(
        self,
        ids: Sequence[np.ndarray],
        cache: TorchCache,
        *,
        rows: Sequence[int] | None = None,
        router_bias: np.ndarray | None = None,
        gates: Gates | None = None,
        all_logits: bool = False,
        measure: bool = False,
    ) -> Step:
        """See `engine.types.Backend.forward`."""
        taking = np.arange(len(cache.lengths)) if rows is None else np.asarray(rows, np.int64)
        counts = np.array([len(row) for row in ids])
        if len(ids) != len(taking) or counts.min() < 1:
            raise ValueError(f"forward takes one non-empty row of ids for each of the {len(taking)} cache rows")
        with self._lock, torch.inference_mode():
            cache.reserve(taking, counts)
            step = self._forward(ids, counts, taking, cache, router_bias, gates, all_logits, measure)
            cache.lengths[taking] += counts
            return step

    def close(self) -> None:
        """Lets go of the model."""
        with self._lock:
            self.__dict__.pop("_loaded", None)

    def _forward(
        self,
        ids: Sequence[np.ndarray],
        counts: np.ndarray,
        taking: np.ndarray,
        cache: TorchCache,
        bias: np.ndarray | None,
        gates: Gates | None,
        all_logits: bool,
        measure: bool,
    ) -> Step:
        device, injected = self._loaded.device, self._loaded.injected
        inputs = _arrange(ids, counts, cache.lengths[taking], cache.tables[taking])
        if bias is not None and injected:
            inputs["bias"] = np.asarray(bias, np.float32)
        if injected:
            if self._sampling and not cache.lengths[taking].any():  # a request draws its experts alike each time
                injected.state.generator = torch.Generator(device).manual_seed(0)
            injected.state.gates = None if gates is None else _gate_tensors(gates, device)
            injected.state.measure = measure
        pads = counts.max() - counts
        if self.fixed_steps and counts.max() == 1 and len(ids) <= FIXED_ROWS and gates is None and not measure:
            results = self._fixed(inputs, cache)
        else:
            on_device = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
            results = self._compute(on_device, cache, all_logits)
        logits = results["logits"].cpu().numpy()
        found = [logits[row, pad:] for row, pad in enumerate(pads)] if all_logits else logits[:, -1]
        if injected is None:
            return Step(found, None, None)
        rows = {name: _rows(results[name], pads) for name in ("experts", "weights")}
        if not measure:
            return Step(found, rows["experts"], rows["weights"])
        largest = torch.finfo(torch.float16).max
        cut = {cell: values.clamp_max(largest) for cell, values in injected.state.contributions.items()}
        measured = [_rows(self._record(record, torch.float16), pads) for record in (injected.state.probabilities, cut)]
        return Step(found, rows["experts"], rows["weights"], measured[0], measured[1])

    def _compute(self, x: Mapping[str, torch.Tensor], cache: TorchCache, all_logits: bool) -> dict[str, torch.Tensor]:
        """A step on the device, which it never waits for. `x`: see `_arrange`."""
        injected = self._loaded.injected
        for layer in cache.layers:
            layer.write_from, layer.write_to, layer.tables = x["write_from"], x["write_to"], x["tables"]
        key = torch.arange(x["tables"].shape[1] * PAGE, device=self._loaded.device)
        allowed = key[None, None, :] <= x["positions"][:, :, None]  # a pad is at position 0 and sees the first token
        mask = torch.zeros(allowed.shape, dtype=self._dtype(), device=self._loaded.device)
        mask = mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)[:, None]
        if injected:
            injected.state.clear()
            injected.state.bias = x.get("bias")
        out = self._loaded.model(
            input_ids=x["tokens"],
            attention_mask=mask,
            position_ids=x["positions"],
            cache=Cache(layers=list(cache.layers)),
            use_cache=True,
            logits_to_keep=0 if all_logits else 1,
        )
        results = {"logits": out.logits.float()}
        if injected:
            results["experts"] = self._record(injected.state.experts, torch.uint8)
            results["weights"] = self._record(injected.state.weights, torch.float16)
        return results

    def _fixed(self, inputs: Mapping[str, np.ndarray], cache: TorchCache) -> dict[str, torch.Tensor]:
        """One token per row, in the smallest fixed shape that holds it: rows and pages are filled up."""
        rows, pages = inputs["tables"].shape
        shape = (1 << (rows - 1).bit_length(), -(-pages // FIXED_PAGES) * FIXED_PAGES, "bias" in inputs)
        if shape not in cache.fixed:
            cache.fixed[shape] = _FixedStep(self, cache, *shape)
        return {name: values[:rows] for name, values in cache.fixed[shape].run(inputs).items()}

    def _bias_shape(self, rows: int) -> tuple[int, int, int, int]:
        return rows, self.num_layers, len(PROJECTIONS), self.num_experts

    def _record(self, record: Mapping[tuple[int, int], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """What the layers recorded, [B, width, n] each -> [B, width, L, P, n]."""
        cells = [(layer, p) for layer in range(self.num_layers) for p in range(len(PROJECTIONS))]
        joined = torch.stack([record[cell] for cell in cells], 2)
        return joined.unflatten(2, (self.num_layers, len(PROJECTIONS))).to(dtype)

    def _dtype(self) -> torch.dtype:
        return next(self._loaded.model.parameters()).dtype if self.precision == "float32" else torch.bfloat16


def _gate_tensors(gates: Gates, device: torch.device) -> GateTensors:
    arrays = (gates.top_k.astype(np.int64), gates.uniform, gates.strength, gates.attention)
    top_k, uniform, strength, attention = (torch.from_numpy(array).to(device) for array in arrays)
    return GateTensors(top_k, uniform, strength, attention, int(gates.top_k.max()))


def _arrange(
    ids: Sequence[np.ndarray], counts: np.ndarray, held: np.ndarray, tables: np.ndarray
) -> dict[str, np.ndarray]:
    """Int64 arrays of a step: tokens and positions [B, S], padded on the left; write_from [T, 2] and write_to [T], see
    `_PagedLayer`; tables [B, n]."""
    width, pads = int(counts.max()), counts.max() - counts
    tokens, positions = np.zeros((2, len(ids), width), np.int64)
    for row, (row_ids, n) in enumerate(zip(ids, counts, strict=True)):
        tokens[row, width - n :] = row_ids
        positions[row, width - n :] = np.arange(held[row], held[row] + n)
    tables = tables[:, : -(-int((held + counts).max()) // PAGE)]
    row_of = np.repeat(np.arange(len(ids)), counts)
    column = np.concatenate([np.arange(pad, width) for pad in pads])
    place = positions[row_of, column]
    return {
        "tokens": tokens,
        "positions": positions,
        "write_from": np.stack([row_of, column], 1),
        "write_to": tables[row_of, place // PAGE] * PAGE + place % PAGE,
        "tables": np.maximum(tables, 0),
    }


def _rows(values: torch.Tensor, pads: np.ndarray) -> list[np.ndarray]:
    """[B, width, ...] -> [s_b, ...] of every row without its padding."""
    array = values.cpu().numpy()
    return [array[row, pad:] for row, pad in enumerate(pads)]
