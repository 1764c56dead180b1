"""The reference backend: a transformers model with MoLoRA injected, on CPU or GPU, in float32, bf16, nf4 or int8.

Rows of different length are padded on the left; a mask keeps every row to its own tokens, so that each row gives what it gives
alone. Keys and values lie in pages.
"""

from __future__ import annotations

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


class TorchCache(PagedCache):
    """Keys and values of every layer, [pages, kv heads, 16, D] each."""

    def __init__(self, layers: int, batch: int, capacity: int, tokens: int | None):
        super().__init__(batch, capacity, tokens)
        self.layers = [_PagedLayer(self.pages) for _ in range(layers)]

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
        self.num_experts = injected.config.num_experts if injected else 0
        self.top_k = injected.config.top_k if injected else 0
        if injected:
            injected.state.capture = True
            injected.state.generator = torch.Generator(loaded.device)

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
            del self._loaded

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
        held = cache.lengths[taking]
        width, pads = int(counts.max()), counts.max() - counts
        tokens = np.zeros((len(ids), width), np.int64)
        positions = np.zeros((len(ids), width), np.int64)
        for row, (row_ids, n) in enumerate(zip(ids, counts, strict=True)):
            tokens[row, width - n :] = row_ids
            positions[row, width - n :] = np.arange(held[row], held[row] + n)
        tables = cache.tables[taking, : -(-int((held + counts).max()) // PAGE)]
        row_of = np.repeat(np.arange(len(ids)), counts)
        column = np.concatenate([np.arange(pad, width) for pad in pads])
        place = positions[row_of, column]
        write_to = torch.from_numpy(tables[row_of, place // PAGE] * PAGE + place % PAGE).to(device)
        write_from = torch.from_numpy(np.stack([row_of, column], 1)).to(device)
        safe_tables = torch.from_numpy(np.maximum(tables, 0)).to(device)
        for layer in cache.layers:
            layer.write_from, layer.write_to, layer.tables = write_from, write_to, safe_tables
        key = torch.arange(tables.shape[1] * PAGE, device=device)
        query = torch.from_numpy(positions).to(device)  # a pad is at position 0 and sees the first token
        allowed = key[None, None, :] <= query[:, :, None]
        mask = torch.zeros(allowed.shape, dtype=self._dtype(), device=device)
        mask = mask.masked_fill_(~allowed, torch.finfo(mask.dtype).min)[:, None]
        if injected:
            injected.state.clear()
            if injected.state.generator and not held.any():  # a request draws its experts alike every time
                injected.state.generator.manual_seed(0)
            injected.state.bias = None if bias is None else torch.from_numpy(np.asarray(bias, np.float32)).to(device)
            injected.state.gates = None if gates is None else _gate_tensors(gates, device)
            injected.state.measure = measure
        out = self._loaded.model(
            input_ids=torch.from_numpy(tokens).to(device),
            attention_mask=mask,
            position_ids=query,
            cache=Cache(layers=list(cache.layers)),
            use_cache=True,
            logits_to_keep=0 if all_logits else 1,
        )
        logits = out.logits.float().cpu().numpy()
        found = [logits[row, pad:] for row, pad in enumerate(pads)] if all_logits else logits[:, -1]
        if injected is None:
            return Step(found, None, None)
        state = injected.state
        experts, weights = (
            self._record(state.experts, torch.uint8, pads),
            self._record(state.weights, torch.float16, pads),
        )
        if not measure:
            return Step(found, experts, weights)
        largest = torch.finfo(torch.float16).max
        cut = {cell: values.clamp_max(largest) for cell, values in state.contributions.items()}
        measured = [self._record(record, torch.float16, pads) for record in (state.probabilities, cut)]
        return Step(found, experts, weights, measured[0], measured[1])

    def _record(
        self, record: Mapping[tuple[int, int], torch.Tensor], dtype: torch.dtype, pads: np.ndarray
    ) -> list[np.ndarray]:
        """What the layers recorded, [B, width, n] each -> [s_b, L, P, n] of every row without its padding."""
        cells = [(layer, p) for layer in range(self.num_layers) for p in range(len(PROJECTIONS))]
        joined = torch.stack([record[cell] for cell in cells], 2).unflatten(2, (self.num_layers, len(PROJECTIONS)))
        rows = joined.to(dtype).cpu().numpy()
        return [rows[row, pad:] for row, pad in enumerate(pads)]

    def _dtype(self) -> torch.dtype:
        return next(self._loaded.model.parameters()).dtype if self.precision == "float32" else torch.bfloat16


def _gate_tensors(gates: Gates, device: torch.device) -> GateTensors:
    arrays = (gates.top_k.astype(np.int64), gates.uniform, gates.strength, gates.attention)
    top_k, uniform, strength, attention = (torch.from_numpy(array).to(device) for array in arrays)
    return GateTensors(top_k, uniform, strength, attention, int(gates.top_k.max()))
