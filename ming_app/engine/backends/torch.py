"""The reference backend: a transformers model with MoLoRA injected, on CPU or GPU, in float32, bf16, nf4 or int8.

Rows of different length are left-padded into new columns of one cache; a mask keeps every row to its own tokens, so that
each row gives what it gives alone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import DynamicCache

from ming_app.engine.types import Gates, Step
from ming_app.models.load import TorchModel
from ming_app.molora.config import PROJECTIONS
from ming_app.molora.layer import GateTensors


class TorchCache:
    """KV cache of B rows over shared columns; `valid` bool [B, columns] says which columns are a row's own."""

    def __init__(self, batch: int, capacity: int, device: torch.device):
        self.capacity = capacity
        self.lengths = np.zeros(batch, np.int64)
        self.past = DynamicCache()
        self.valid = torch.zeros(batch, 0, dtype=torch.bool, device=device)

    def truncate(self, row: int, length: int) -> None:
        """Forgets all but the first `length` tokens of a row; columns that no row needs any more are freed."""
        keep = torch.ones_like(self.valid)
        keep[row] = self.valid[row].cumsum(0) <= length
        self.valid = self.valid & keep
        self.lengths[row] = min(int(self.lengths[row]), length)
        used = self.valid.any(0).nonzero()
        columns = int(used[-1]) + 1 if len(used) else 0
        surplus = self.valid.shape[1] - columns
        if surplus:
            self.valid = self.valid[:, :columns]
            if columns:
                self.past.crop(-surplus)
            else:
                self.past = DynamicCache()


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

    def new_cache(self, batch: int, capacity: int) -> TorchCache:
        """Room for `batch` rows of up to `capacity` tokens."""
        return TorchCache(batch, capacity, self._loaded.device)

    def forward(
        self,
        ids: Sequence[np.ndarray],
        cache: TorchCache,
        *,
        router_bias: np.ndarray | None = None,
        gates: Gates | None = None,
        all_logits: bool = False,
        measure: bool = False,
    ) -> Step:
        """See `engine.types.Backend.forward`."""
        lengths = np.array([len(row) for row in ids])
        if len(ids) != len(cache.lengths) or lengths.min() < 1:
            raise ValueError(f"forward takes one non-empty row of ids for each of the {len(cache.lengths)} cache rows")
        if (cache.lengths + lengths > cache.capacity).any():
            raise ValueError(f"a row would exceed the cache's capacity of {cache.capacity} tokens")
        with self._lock, torch.inference_mode():
            return self._forward(ids, lengths, cache, router_bias, gates, all_logits, measure)

    def close(self) -> None:
        """Lets go of the model."""
        with self._lock:
            del self._loaded

    def _forward(
        self,
        ids: Sequence[np.ndarray],
        lengths: np.ndarray,
        cache: TorchCache,
        bias: np.ndarray | None,
        gates: Gates | None,
        all_logits: bool,
        measure: bool,
    ) -> Step:
        device, injected = self._loaded.device, self._loaded.injected
        width = int(lengths.max())
        tokens = np.zeros((len(ids), width), np.int64)
        new = np.zeros((len(ids), width), bool)
        positions = np.zeros((len(ids), width), np.int64)
        for row, (row_ids, n) in enumerate(zip(ids, lengths, strict=True)):
            tokens[row, width - n :] = row_ids
            new[row, width - n :] = True
            positions[row, width - n :] = np.arange(cache.lengths[row], cache.lengths[row] + n)
        valid = torch.cat([cache.valid, torch.from_numpy(new).to(device)], dim=1)
        if injected:
            injected.state.clear()
            if injected.state.generator and not cache.lengths.any():  # a request draws its experts alike every time
                injected.state.generator.manual_seed(0)
            injected.state.bias = None if bias is None else torch.from_numpy(np.asarray(bias, np.float32)).to(device)
            injected.state.gates = None if gates is None else _gate_tensors(gates, device)
            injected.state.measure = measure
        out = self._loaded.model(
            input_ids=torch.from_numpy(tokens).to(device),
            attention_mask=_mask(valid, width, self._dtype()),
            position_ids=torch.from_numpy(positions).to(device),
            cache=cache.past,
            use_cache=True,
            logits_to_keep=0 if all_logits else 1,
        )
        cache.valid = valid
        cache.lengths = cache.lengths + lengths
        logits = out.logits.float().cpu().numpy()
        rows = [logits[row, width - n :] for row, n in enumerate(lengths)] if all_logits else logits[:, -1]
        if injected is None:
            return Step(rows, None, None)
        state, pads = injected.state, width - lengths
        experts, weights = (
            self._record(state.experts, torch.uint8, pads),
            self._record(state.weights, torch.float16, pads),
        )
        if not measure:
            return Step(rows, experts, weights)
        largest = torch.finfo(torch.float16).max
        cut = {cell: values.clamp_max(largest) for cell, values in state.contributions.items()}
        measured = [self._record(record, torch.float16, pads) for record in (state.probabilities, cut)]
        return Step(rows, experts, weights, *measured)

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


def _mask(valid: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask [B, 1, width, columns]: own earlier tokens only. A padding query sees just itself: a row
    of -inf alone would give NaN values, which even a zero weight spreads."""
    columns = valid.shape[1]
    query = torch.arange(columns - width, columns, device=valid.device)
    key = torch.arange(columns, device=valid.device)
    causal = key[None, :] <= query[:, None]
    own = key[None, :] == query[:, None]
    allowed = (valid[:, None, :] & causal[None]) | own[None]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=valid.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
