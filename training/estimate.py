"""What a run needs, by arithmetic: memory in GB and floating-point operations per token. Estimates, not measurements.

Counted: base weights in the run's precision (linears of the layers; embeddings and head in bf16, or float32); float32
adapter weights, gradients and the two moments of AdamW; activations of one micro-batch, all of them or, where they are
recomputed, each layer's input and one layer whole; one chunk of logits. A token costs two operations per weight of a linear
in the forward pass, two for the gradient of its input (frozen weights have none of their own), two more where the forward
runs again; the head only on the quarter or so of tokens that are learnt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ming_app.molora.checkpoint import Adapter, expected_shapes
from training.losses import HEAD_CHUNK
from training.recipe import Recipe

BYTES = {"auto": 2.0, "float32": 4.0, "bf16": 2.0, "int8": 1.02, "nf4": 0.5625}
"""per weight, scales counted"""
LEARNT = 0.25  # share of tokens that the loss looks at


@dataclass(frozen=True)
class Estimate:
    """GB are 10^9 bytes."""

    base_gb: float
    adapter_gb: float
    activations_gb: float
    flop_per_token: float

    @property
    def memory_gb(self) -> float:
        """All together, without what the runtime itself takes."""
        return self.base_gb + self.adapter_gb + self.activations_gb

    def hours(self, tokens: float, tflops: float) -> float:
        """Hours for so many tokens at `tflops` 10^12 useful operations per second."""
        return tokens * self.flop_per_token / (tflops * 1e12) / 3600


def estimate(recipe: Recipe, shape: Mapping[str, Any]) -> Estimate:
    """Needs of a run on a base of this `shape` (entries of a config.json)."""
    hidden, inner, layers = (shape[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    linears = layers * (2 * hidden * (hidden + kv) + 3 * hidden * inner)
    vocabulary = shape["vocab_size"] * hidden
    exact = 4 if recipe.precision == "float32" else 2
    tables = vocabulary * (1 if shape.get("tie_word_embeddings") else 2)
    experts = sum(math.prod(s) for s in expected_shapes(Adapter(recipe.adapter, layers, {}), shape).values())
    tokens = recipe.budget.batch_tokens
    layer = tokens * (10 * hidden + 8 * inner) * exact
    kept = layer + layers * tokens * hidden * exact if recipe.gradient_checkpointing else layers * layer
    passes = 6 if recipe.gradient_checkpointing else 4
    return Estimate(
        (linears * BYTES[recipe.precision] + tables * exact) / 1e9,
        experts * 16 / 1e9,
        (kept + 2 * HEAD_CHUNK * shape["vocab_size"] * exact) / 1e9,
        passes * (linears + experts) + 4 * vocabulary * LEARNT,
    )


def note(recipe: Recipe, shape: Mapping[str, Any], tflops: float) -> str:
    """One line for the head of a recipe: memory, and hours for its budget of tokens at `tflops`."""
    need = estimate(recipe, shape)
    parts = f"{need.base_gb:.1f} base, {need.adapter_gb:.1f} adapter, {need.activations_gb:.1f} activations"
    hours = need.hours(recipe.budget.tokens, tflops)
    return f"Estimate: {need.memory_gb:.1f} GB ({parts}); {hours:.1f} h at {tflops:.0f} TFLOP/s for {recipe.budget.tokens:,} tokens."
