"""How alike an adapter's experts are: cosines of their updates B A, without ever making a B A."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ming_app.molora.checkpoint import Adapter, load_adapter
from ming_app.molora.config import PROJECTIONS


def similarity_of(folder: Path) -> np.ndarray:
    """`expert_similarity` of an adapter on disk; experts that only fill a layer up (see `Adapter.padded`) are like none."""
    return expert_similarity(load_adapter(folder).padded())


def expert_similarity(adapter: Adapter) -> np.ndarray:
    """float32 [L, P, E, E]: cosine between the matrices B_i A_i and B_j A_j (Frobenius); 0 for an expert that is zero.

    <B_i A_i, B_j A_j> = sum over r x r of (B_i^T B_j) (A_i A_j^T).
    """
    layers = []
    for layer in range(adapter.num_layers):
        cells = []
        for projection in PROJECTIONS:
            weights = adapter.projection(layer, projection)
            a, b = weights.A.astype(np.float32), weights.B.astype(np.float32)  # (E, r, in), (E, out, r)
            E, r = a.shape[:2]
            flat_a, flat_b = a.reshape(E * r, -1), b.transpose(0, 2, 1).reshape(E * r, -1)
            products = (flat_a @ flat_a.T) * (flat_b @ flat_b.T)
            inner = products.reshape(E, r, E, r).sum((1, 3))
            norm = np.sqrt(np.maximum(np.diag(inner), 0))
            scale = np.outer(norm, norm)
            cells.append(np.divide(inner, scale, out=np.zeros_like(inner), where=scale > 0))
        layers.append(cells)
    return np.array(layers, np.float32)
