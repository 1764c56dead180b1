"""The decoder graph once more, for looking closely and for interventions: same weights, more inputs and outputs.

Written beside the serving graph, which so stays as fast as it can be; opened only when a request measures or intervenes.
Further inputs (B rows, M = 3 L, E experts) and outputs:

    rank_bias float32 [B, M E]: 0 for the ranks that count, very negative for those beyond k, best rank first
    sharpness float32 [B, M]: 1, or 0 where all chosen weigh alike        strength float32 [B, M]: factor of the experts' sum
    attention float32 [B, L]: factor of the attention LoRA

    experts, weights [T, M, E]: all, sorted by logit      router_logits float32 [T, M, E]
    base_square float32 [T, M]: |W0 x|^2                  delta_square float32 [T, M, E]: |s B_i A_i x|^2

The base's own output is never computed apart. With y = W0 x + d, d = s sum w_i B_i A_i x and c = (s B)^T W0 x (a small
matrix made at build time): |W0 x|^2 = |y|^2 - 2 c.(m h) - |d|^2, and |d|^2 and |s B_i A_i x|^2 follow from Gram matrices of B.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from ming_app.engine.backends.onnx_graph import DecoderGraph, RankRows
from ming_app.molora.config import PROJECTIONS

if TYPE_CHECKING:
    from ming_app.molora.checkpoint import ProjectionWeights


class ProbeGraph(DecoderGraph):
    """Writes the probe; the adapter must be there."""

    @property
    def _chosen(self) -> int:
        return self._molora.num_experts

    def _declare_inputs(self) -> None:
        super()._declare_inputs()
        layers = self.shape.layers
        for name, width in (("rank_bias", self._chosen), ("sharpness", 1), ("strength", 1)):
            self._per_row(name, width)
        self.w.input("attention", TensorProto.FLOAT, ["B", layers])
        spread = self.w.node("Gather", ["attention", "row_of"], "attention.spread", axis=0)
        names = [f"{layer}.attention.strength" for layer in range(layers)]
        self.w.node("Split", [spread], *names, axis=1, num_outputs=layers)

    def _declare_records(self) -> None:
        super()._declare_records()
        cells = 3 * self.shape.layers
        for name, what, width in (
            ("router_logits", "logits", self._chosen),
            ("delta_square", "delta", self._chosen),
            ("base_square", "base", 1),
        ):
            self._in_trace_order(name, what, width)
            self.w.output(name, TensorProto.FLOAT, ["T", cells, width])

    def _mixed(self, name: str, values: str, slots: int) -> str:
        w = self.w
        sharp = w.node("Mul", [values, self._apart(name, "sharpness", slots, 1)], f"{name}.sharp")
        ranked = w.node("Add", [sharp, self._apart(name, "rank_bias", slots, self._chosen)], f"{name}.ranked")
        return super()._mixed(name, ranked, slots)

    def _acting(self, name: str, scaled: list[str]) -> list[str]:
        strengths = self._slots(f"{name}.strength", len(scaled))
        return [self.w.node("Mul", [one, by], f"{one}.acting") for one, by in zip(scaled, strengths, strict=True)]

    def _apart(self, name: str, what: str, slots: int, width: int) -> str:
        """A layer's part of a per-row input, [T, slots, width], or [T, width] for one slot."""
        if slots == 1:
            return f"{name}.{what}"
        dims = self.w.constant(f"apart.{slots}.{width}", np.array([-1, slots, width], np.int64))
        return self.w.node("Reshape", [f"{name}.{what}", dims], f"{name}.{what}.apart")

    def _attention_gated(self, layer: int, targets: Sequence[str], x: str, y: str, sizes: Sequence[int]) -> str:
        """y + (a - 1) s B A x: nothing where the factor a is 1."""
        w, name = self.w, f"{layer}.{'qkv' if len(targets) > 1 else 'o'}"
        pairs = [self.adapter.attention(layer, target) if self.adapter else None for target in targets]
        present = [pair for pair in pairs if pair is not None]
        if not present:
            return y

        def down() -> np.ndarray:
            return np.concatenate([a for a, _ in present]).T  # (in, ranks)

        def up() -> np.ndarray:
            blocks, column = np.zeros((len(present) * present[0][0].shape[0], sum(sizes)), np.float32), 0
            used = 0
            for pair, size in zip(pairs, sizes, strict=True):
                if pair is not None:
                    rank = pair[0].shape[0]
                    blocks[used : used + rank, column : column + size] = self._molora.scale * pair[1].T
                    used += rank
                column += size
            return blocks

        ranks = w.node("MatMul", [x, w.constant(f"{name}.lora_a", down)], f"{name}.lora_ranks")
        one = w.constant("one", np.ones((), np.float32))
        less = w.node("Sub", [f"{layer}.attention.strength", one], f"{name}.less")
        scaled = w.node("Mul", [ranks, less], f"{name}.lora_scaled")
        added = w.node("MatMul", [scaled, w.constant(f"{name}.lora_b", up)], f"{name}.lora_change")
        return w.node("Add", [y, added], f"{name}.gated")

    def _ffn_done(
        self,
        layer: int,
        part: str,
        x: str,
        outputs: Sequence[str],
        molora: Sequence[ProjectionWeights],
        ranks: RankRows,
        scaled: Sequence[str],
        weights: Callable[[], list[np.ndarray]],
    ) -> None:
        w, name, slots = self.w, f"{layer}.{part}", len(outputs)
        stacked = [functools.partial(ranks.stack_b, one, self._molora.scale) for one in molora]  # (out, size)

        def crossed() -> np.ndarray:
            return np.concatenate([b().T @ base for b, base in zip(stacked, weights(), strict=True)])

        projections = PROJECTIONS[:2] if slots > 1 else PROJECTIONS[2:]
        biases = [self._bias(f"model.layers.{layer}.mlp.{p}_proj") for p in projections]
        offsets = None
        if any(bias is not None for bias in biases):
            parts = [
                np.zeros(ranks.size) if bias is None else b().T @ bias for b, bias in zip(stacked, biases, strict=True)
            ]
            offsets = np.concatenate(parts).astype(np.float32)
        c = w.linear(f"{name}.C", x, crossed, self.recipe.rank, offsets)
        h_parts, c_parts = self._slots(f"{name}.A", slots), self._slots(c, slots)
        spread = ranks.spread(1)[0]
        to_experts = w.constant(f"gather_ranks.{slots}.{ranks.size}", spread.T)  # (size, E)
        last = w.constant("last_axis", np.array([-1], np.int64))
        bases, deltas = [], []
        for slot, output in enumerate(outputs):
            key = f"{name}.{PROJECTIONS[slot] if slots > 1 else 'down'}"
            gram = w.constant(f"{key}.gram", functools.partial(_gram, stacked[slot]))
            same = spread.T @ spread  # ranks of one expert
            own = w.constant(f"{key}.own_gram", functools.partial(_gram, stacked[slot], same))
            through = w.node("MatMul", [h_parts[slot], own], f"{key}.own")
            products = w.node("Mul", [through, h_parts[slot]], f"{key}.own_products")
            deltas.append(w.node("MatMul", [products, to_experts], f"{key}.delta"))
            delta = w.node("MatMul", [scaled[slot], gram], f"{key}.sum")
            twice = w.node("Add", [c_parts[slot], c_parts[slot]], f"{key}.twice")
            both = w.node("Add", [delta, twice], f"{key}.both")
            change = w.node("ReduceSum", [w.node("Mul", [both, scaled[slot]], f"{key}.change"), last], f"{key}.changed")
            square = w.node("ReduceSumSquare", [output, last], f"{key}.square")
            bases.append(w.node("Sub", [square, change], f"{key}.base"))
        self._records[slots][-1] |= {
            "delta": self._joined(deltas, name, "delta"),
            "base": self._joined(bases, name, "base"),
        }

    def _joined(self, parts: Sequence[str], name: str, what: str) -> str:
        """[T, n] each -> [T, slots n]; the trace order takes it apart."""
        return self.w.node("Concat", list(parts), f"{name}.{what}", axis=1) if len(parts) > 1 else parts[0]


def _gram(b: Callable[[], np.ndarray], mask: np.ndarray | None = None) -> np.ndarray:
    """(s B)^T (s B), float32 [size, size]; 0 where the mask is."""
    stacked = b()
    gram = stacked.T @ stacked
    return gram if mask is None else gram * mask
