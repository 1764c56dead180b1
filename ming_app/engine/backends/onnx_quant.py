"""Block quantisation for MatMulNBits: float32 [N, K] -> unsigned 4- or 8-bit values, float32 scales, integer zero points.

    w[n, b, i]  ~  scale[n, b] * (q[n, b, i] - zero[n, b])         b: block of consecutive inputs

Four-bit blocks choose the range that gives the least squared error among a few shrunken ones, then the least-squares scale
for the values chosen. Numpy on a few threads, in pieces that stay in the processor's cache.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ming_app.engine.backends.onnx_spec import Format

SHRINK = (1.0, 0.93, 0.86, 0.79)  # shares of a 4-bit block's range that are tried; clipping outliers often pays
PIECE = 1 << 17  # weights per piece: half a MiB of float32, with its temporaries about the size of an L2 cache
TINY = np.float32(1e-12)

LEVEL_TOLERANCE = 0.1  # of a step; bfloat16 copies of such weights are off by up to 0.06

Levels = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Blocks = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Quantised:
    """Arrays in the layout of com.microsoft.MatMulNBits; B = ceil(K / block)."""

    q: np.ndarray
    """uint8 [N, B, block * bits / 8], low nibble first"""
    scales: np.ndarray
    """float32 [N * B]"""
    zeros: np.ndarray
    """uint8 [N * ceil(B * bits / 8)], low nibble first"""


def quantise(weight: np.ndarray, fmt: Format, threads: int | None = None) -> Quantised:
    """Quantises float32 [N, K] row by row; a last block shorter than `fmt.block` is padded with zeros."""
    rows, inputs = weight.shape
    blocks = -(-inputs // fmt.block)
    q = np.empty((rows, blocks, fmt.block * fmt.bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, -(-blocks * fmt.bits // 8)), np.uint8)
    step = max(1, PIECE // (blocks * fmt.block))

    def piece(start: int) -> None:
        part = slice(start, min(start + step, rows))
        values = weight[part]
        if blocks * fmt.block != inputs:
            values = np.pad(values, ((0, 0), (0, blocks * fmt.block - inputs)))
        quantised = _quantise_blocks(values.reshape(-1, blocks, fmt.block), fmt.bits)
        q[part] = _pack(quantised[0], fmt.bits)
        scales[part] = quantised[1]
        zeros[part] = _pack(quantised[2], fmt.bits)

    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:  # numpy lets go of the GIL
        list(pool.map(piece, range(0, rows, step)))
    return Quantised(q, scales.reshape(-1), zeros.reshape(-1))


def carry_over(weight: np.ndarray, fmt: Format, threads: int | None = None) -> tuple[Quantised, np.ndarray] | None:
    """Float32 [N, K] that already lies on at most 16 even levels per block, as 4-bit GGUF types (Q4_K, Q4_0, Q4_1) leave
    it: the same values again, without loss.

        w[n, b, i] = scale[n, b] * (q[n, b, i] - zero[n, b]) + offset[n, b]

    Gives the quantised part and offset float32 [N, B], or None when the weights are not of that kind.
    """
    rows, inputs = weight.shape
    if fmt.bits != 4 or inputs % fmt.block:
        return None
    sample = weight[:: max(1, rows // 64)].reshape(-1, fmt.block)
    if not _levels(sample)[3].all():
        return None
    blocks = inputs // fmt.block
    packed = Quantised(
        np.empty((rows, blocks, fmt.block // 2), np.uint8),
        np.empty(rows * blocks, np.float32),
        np.empty(rows * -(-blocks // 2), np.uint8),
    )
    scales, zeros = packed.scales.reshape(rows, -1), packed.zeros.reshape(rows, -1)
    offsets = np.empty((rows, blocks), np.float32)
    step = max(1, PIECE // inputs)

    def piece(start: int) -> bool:
        part = slice(start, min(start + step, rows))
        q, scale, low, exact = _levels(weight[part].reshape(-1, fmt.block))
        zero = np.clip(np.rint(-low / scale), 0, 15)
        shape = (-1, blocks)
        packed.q[part] = _pack(q, 4).reshape(-1, blocks, fmt.block // 2)
        scales[part] = scale.reshape(shape)
        zeros[part] = _pack(zero.reshape(shape), 4)
        offsets[part] = (low + scale * zero).reshape(shape)
        return bool(exact.all())

    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        whole = all(pool.map(piece, range(0, rows, step)))
    return (packed, offsets) if whole else None


def _levels(w: np.ndarray) -> Levels:
    """w [n, block] -> q [n, block], scale [n], low [n] with w = scale q + low, and whether that holds, bool [n].

    A block that uses levels 0 to m of its 16 has range m * scale: m is found by trying, the likely ones first.
    """
    low = w.min(-1)
    span = w.max(-1) - low
    scale = np.maximum(span, TINY)
    q = np.zeros_like(w)
    exact = span <= TINY
    for steps in range(15, 0, -1):
        open_ = np.flatnonzero(~exact)
        if not len(open_):
            break
        step = span[open_] / np.float32(steps)
        height = (w[open_] - low[open_, None]) / step[:, None]
        whole = np.rint(height)
        hit = np.abs(height - whole).max(-1) < LEVEL_TOLERANCE
        found = open_[hit]
        q[found], scale[found], exact[found] = whole[hit], step[hit], True
    return q, scale, low, exact


def join(parts: list[Quantised], fmt: Format) -> Quantised:
    """Quantised matrices of the same rows side by side: their blocks in order."""
    rows = parts[0].q.shape[0]
    zeros = [_unpack(p.zeros.reshape(rows, -1), fmt.bits)[:, : p.q.shape[1]] for p in parts]
    return Quantised(
        np.concatenate([p.q for p in parts], axis=1),
        np.concatenate([p.scales.reshape(rows, -1) for p in parts], axis=1).reshape(-1),
        _pack(np.concatenate(zeros, axis=1), fmt.bits).reshape(-1),
    )


def dequantise(quantised: Quantised, fmt: Format, inputs: int) -> np.ndarray:
    """Float32 [N, inputs]: what the weights have become. For tests and for measuring."""
    rows, blocks = quantised.q.shape[:2]
    q = _unpack(quantised.q, fmt.bits).astype(np.float32)
    zeros = _unpack(quantised.zeros.reshape(rows, -1), fmt.bits)[:, :blocks].astype(np.float32)
    values = (q - zeros[..., None]) * quantised.scales.reshape(rows, blocks, 1)
    return values.reshape(rows, -1)[:, :inputs]


def _quantise_blocks(w: np.ndarray, bits: int) -> Blocks:
    """w [n, B, block] -> q [n, B, block], scale [n, B], zero [n, B]; q and zero are whole numbers in float32."""
    top = np.float32((1 << bits) - 1)
    low = np.minimum(w.min(-1), 0)
    span = np.maximum(w.max(-1), 0) - low
    if bits != 4:
        return _round_to(w, low, span, top)
    best_error, best = None, None
    for share in SHRINK:
        q, scale, zero = _round_to(w, low * np.float32(share), span * np.float32(share), top)
        centred = q - zero[..., None]
        norm = np.maximum(np.einsum("nbi,nbi->nb", centred, centred), 1)
        dot = np.einsum("nbi,nbi->nb", centred, w)
        error = -dot * dot / norm  # squared error with the least-squares scale dot / norm, less the constant sum of w^2
        scale = np.where(dot > 0, dot / norm, scale)
        if best_error is None or best is None:
            best_error, best = error, (q, scale, zero)
            continue
        better = error < best_error
        np.copyto(best_error, error, where=better)
        for kept, new in zip(best, (q, scale, zero), strict=True):
            np.copyto(kept, new, where=better[..., None] if new.ndim == 3 else better)
    assert best is not None  # SHRINK is not empty
    return best


def _round_to(w: np.ndarray, low: np.ndarray, span: np.ndarray, top: np.float32) -> Blocks:
    """w in the steps of the range [low, low + span], which holds zero."""
    scale = np.maximum(span / top, TINY)
    zero = np.clip(np.rint(-low / scale), 0, top)
    q = w * (1 / scale)[..., None]
    q += zero[..., None]
    return np.clip(np.rint(q, out=q), 0, top, out=q), scale, zero


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers [..., n] -> uint8 [..., ceil(n * bits / 8)]."""
    whole = values.astype(np.uint8)
    if bits == 8:
        return whole
    if whole.shape[-1] % 2:
        whole = np.concatenate([whole, np.zeros_like(whole[..., :1])], axis=-1)
    return whole[..., 0::2] | (whole[..., 1::2] << 4)


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
