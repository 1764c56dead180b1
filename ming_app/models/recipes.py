"""Recipes of the ONNX engine: the precision of every linear, by name. Data only, no imports of other parts.

The engine builds by this table and the preflight counts bytes by it, so the two cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """Precision of one kind of linear: `bits` per weight, one float32 scale and a zero point per `block` inputs."""

    bits: int
    block: int

    @property
    def weight_bytes(self) -> float:
        """Bytes read per weight: with each block go a scale and a zero-point product, both float32."""
        return self.bits / 8 + 8 / self.block


@dataclass(frozen=True)
class Recipe:
    """Precision of every linear of the decoder. Routers stay float32, norms and biases too.

    Decoding is bound by memory: a CPU reads `Format.weight_bytes` per weight and token. 8 bits lose next to nothing
    even with large blocks.
    """

    attention: Format
    gate_up: Format
    down: Format
    head: Format
    rank: Format = Format(8, 128)
    """the A matrices of the experts"""
    carry: Format | None = None
    """FFN weights that are 4-bit blocks in the base file already (Q4_K) keep their exact values, in this format"""


_FINE = Format(8, 128)
RECIPES = {
    "4bit": Recipe(attention=_FINE, gate_up=Format(4, 64), down=Format(4, 64), head=_FINE),
    "mix": Recipe(attention=_FINE, gate_up=Format(4, 32), down=Format(4, 32), head=_FINE, carry=Format(4, 32)),
    "8bit": Recipe(attention=_FINE, gate_up=_FINE, down=_FINE, head=_FINE, carry=Format(4, 32)),
}
"""From fast to faithful. Attention and head stay at 8 bits in all: there 4 bits cost most for the bytes they save."""
