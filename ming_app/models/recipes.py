"""Recipes of the CPU engine: the bits of every linear, by name. Data only, no imports of other parts.

The engine builds by this table and the preflight counts bytes by it, so the two cannot drift apart. Weights that a GGUF file
holds in blocks the engine can read keep those, whatever the recipe: see engine/backends/native/formats.py.
"""

from __future__ import annotations

from dataclasses import dataclass

WEIGHT_BYTES = {4: 0.578, 8: 1.0625}
"""bytes per weight, with the scales: decoding is bound by memory and reads them all for every token"""


@dataclass(frozen=True)
class Recipe:
    """Bits of the weights, 4 or 8. Routers stay float32, norms and biases too; the experts have 8 bits."""

    attention: int
    gate_up: int
    down: int
    head: int


RECIPES = {
    "4bit": Recipe(attention=8, gate_up=4, down=4, head=8),
    "mix": Recipe(attention=8, gate_up=4, down=8, head=8),
    "8bit": Recipe(attention=8, gate_up=8, down=8, head=8),
}
"""From fast to faithful. Attention and head stay at 8 bits in all: there 4 bits cost most for the bytes they save."""
