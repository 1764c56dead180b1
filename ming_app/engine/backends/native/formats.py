"""Weights as the kernels read them: 4-bit, 5-bit, 6-bit and 8-bit blocks, written from GGUF blocks or from float32.

What a GGUF file holds in Q4_K, Q6_K, Q5_0, Q4_0 or Q8_0 keeps its exact values; anything else is quantised here, to 4 or 8
bits. Layouts: see tiles.py; the GGUF side: https://github.com/ggml-org/ggml (ggml-common.h). numpy on a few threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ming_app.engine.backends.native.layout import (
    B5,
    B8,
    BLOCK,
    HEADER_BYTES,
    K4,
    K6,
    LANES,
    RUN,
    group_bytes,
)

CARRIED = {"Q4_K": K4, "Q6_K": K6, "Q5_0": B5, "Q4_0": B5, "Q8_0": B8}
"""ggml types whose values are kept, and the format that holds them"""
MIDDLE = {K6: 32, B5: 16, B8: 128}
SHRINK = (1.0, 0.93, 0.86, 0.79)  # shares of a 4-bit block's range that are tried; clipping outliers often pays
TINY = np.float32(1e-12)
PIECE = 1 << 19  # weights arranged at a time


@dataclass(frozen=True)
class Blocks:
    """R rows of one format: codes and what scales them. B blocks of 32 inputs per row, S runs of up to 8 blocks."""

    format: int
    codes: np.ndarray
    """uint8 [R, 32 B]"""
    d: np.ndarray
    """float16 [R, S] (k4, k6) or [R, B]"""
    scales: np.ndarray | None = None
    """k4: uint8 [R, B]; k6: int8 [R, 2 B]"""
    m: np.ndarray | None = None
    """k4: float16 [R, S]"""
    minimums: np.ndarray | None = None
    """k4: uint8 [R, B]"""

    def values(self) -> np.ndarray:
        """float32 [R, 32 B]: the weights that these stand for."""
        d, codes = self.d.astype(np.float32), self.codes.astype(np.float32)
        if self.format in (B5, B8):
            return np.repeat(d, BLOCK, 1) * (codes - MIDDLE[self.format])
        blocks = self.codes.shape[1] // BLOCK
        by_block = np.repeat(d, RUN, 1)[:, :blocks]
        assert self.scales is not None
        if self.format == K6:
            scales = np.repeat(by_block, 2, 1) * self.scales
            return np.repeat(scales, BLOCK // 2, 1) * (codes - MIDDLE[K6])
        assert self.m is not None and self.minimums is not None
        less = np.repeat(self.m.astype(np.float32), RUN, 1)[:, :blocks] * self.minimums
        return np.repeat(by_block * self.scales, BLOCK, 1) * codes - np.repeat(less, BLOCK, 1)


def from_gguf(raw: np.ndarray, type_name: str) -> Blocks:
    """uint8 [R, bytes per row] of a type in CARRIED -> the same values."""
    rows = len(raw)
    if type_name == "Q4_K":
        return _from_q4_k(raw.reshape(rows, -1, 144))
    if type_name == "Q6_K":
        return _from_q6_k(raw.reshape(rows, -1, 210))
    size = {"Q5_0": 22, "Q4_0": 18, "Q8_0": 34}[type_name]
    blocks = raw.reshape(rows, -1, size)
    d = _halves(blocks[..., :2])[..., 0]
    if type_name == "Q8_0":
        return Blocks(B8, (blocks[..., 2:] ^ 0x80).reshape(rows, -1), d)
    nibbles = blocks[..., size - 16 :]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], -1)
    if type_name == "Q5_0":
        codes |= np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little") << 4
    else:
        codes += 8  # q - 8 is (q + 8) - 16
    return Blocks(B5, codes.reshape(rows, -1), d)


def _halves(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2")


def _from_q4_k(blocks: np.ndarray) -> Blocks:
    rows = len(blocks)
    both = _halves(blocks[..., :4])
    packed = blocks[..., 4:16]
    low, high, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (last & 15) | (low >> 6 << 4)], -1)
    minimums = np.concatenate([high & 63, (last >> 4) | (high >> 6 << 4)], -1)
    nibbles = blocks[..., 16:].reshape(rows, -1, 4, 1, 32)
    codes = np.concatenate([nibbles & 15, nibbles >> 4], -2)
    return Blocks(
        K4, codes.reshape(rows, -1), both[..., 0], scales.reshape(rows, -1), both[..., 1], minimums.reshape(rows, -1)
    )


def _from_q6_k(blocks: np.ndarray) -> Blocks:
    rows = len(blocks)
    low = blocks[..., :128].reshape(rows, -1, 2, 1, 2, 32)
    high = blocks[..., 128:192].reshape(rows, -1, 2, 1, 32)
    nibbles = np.concatenate([low & 15, low >> 4], -3).reshape(rows, -1, 2, 4, 32)
    pairs = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = nibbles | pairs << 4
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return Blocks(K6, codes.reshape(rows, -1), _halves(blocks[..., 208:])[..., 0], scales.reshape(rows, -1))


def from_float(weight: np.ndarray, bits: int) -> Blocks:
    """float32 [R, K] -> 4 or 8 bits; inputs are padded with zeros to whole blocks."""
    rows, inputs = weight.shape
    weight = np.pad(weight, ((0, 0), (0, -inputs % BLOCK))).reshape(rows, -1, BLOCK)
    if bits == 8:
        d = (np.abs(weight).max(-1) / 127).astype(np.float16)
        step = np.maximum(d.astype(np.float32), TINY)[..., None]
        codes = np.clip(np.rint(weight / step), -127, 127) + 128
        return Blocks(B8, codes.astype(np.uint8).reshape(rows, -1), d)
    scale, less = _best_range(weight)
    d, scales = _shared(scale)
    m, minimums = _shared(less)
    scale, less = _times(d, scales), _times(m, minimums)
    codes = np.clip(np.rint((weight + less[..., None]) / np.maximum(scale, TINY)[..., None]), 0, 15)
    return Blocks(K4, codes.astype(np.uint8).reshape(rows, -1), d, scales, m, minimums)


def _best_range(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum [R, B] of 4-bit blocks w [R, B, 32]: of a few shrunken ranges, each with the least-squares scale and
    minimum for the codes it gives, the one of least squared error."""
    low, high = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    mean = w.mean(-1)
    best: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    for share in SHRINK:
        scale = np.maximum((high - low) * np.float32(share) / 15, TINY)
        less = -low * np.float32(share)
        q = np.clip(np.rint((w + less[..., None]) / scale[..., None]), 0, 15)
        middle = q.mean(-1)
        centred = q - middle[..., None]
        slope = np.einsum("rbi,rbi->rb", centred, w) / np.maximum(np.einsum("rbi,rbi->rb", centred, centred), TINY)
        offset = slope * middle - mean
        fits = (slope > 0) & (offset >= 0)
        scale, less = np.where(fits, slope, scale), np.where(fits, offset, less)
        error = np.square(q * scale[..., None] - less[..., None] - w).sum(-1)
        if best is None:
            best = error, scale, less
            continue
        better = error < best[0]
        for held, new in zip(best, (error, scale, less), strict=True):
            np.copyto(held, new, where=better)
    assert best is not None
    return best[1], best[2]


def _shared(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positive [R, B] as float16 [R, S] times uint8 [R, B]."""
    rows, blocks = values.shape
    runs = np.pad(values, ((0, 0), (0, -blocks % RUN))).reshape(rows, -1, RUN)
    d = (runs.max(-1) / 255).astype(np.float16)
    codes = np.clip(np.rint(runs / np.maximum(d.astype(np.float32), TINY)[..., None]), 0, 255)
    return d, codes.astype(np.uint8).reshape(rows, -1)[:, :blocks]


def _times(d: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.repeat(d.astype(np.float32), RUN, 1)[:, : codes.shape[1]] * codes


def arrange(blocks: Blocks) -> np.ndarray:
    """uint8 [G, group_bytes]: the rows in groups of 16, the last filled up with zeros."""
    format_, count = blocks.format, blocks.codes.shape[1] // BLOCK
    codes = _lanes(blocks.codes).reshape(-1, LANES, count, 8, 4).transpose(0, 2, 3, 1, 4)
    codes = np.ascontiguousarray(codes).reshape(-1, count, 8, 4 * LANES)
    groups = len(codes)
    parts: list[np.ndarray] = []  # of a block, [G, B, bytes]
    if format_ in (B5, B8):
        parts.append(_by_lane(blocks.d, count))
    if format_ == B5:
        parts.append(_planes(codes >> 4, 1))
    parts.append(codes.reshape(groups, count, -1) if format_ == B8 else _nibbles(codes))
    if format_ == K6:
        parts.append(_planes(codes >> 4, 2))
    body = np.concatenate(parts, -1)
    if not HEADER_BYTES[format_]:
        return body.reshape(groups, -1)
    header = _headers(blocks, count, groups)
    out = np.empty((groups, group_bytes(format_, count)), np.uint8)
    at = 0
    for run in range(header.shape[1]):
        out[:, at : at + header.shape[2]] = header[:, run]
        at += header.shape[2]
        piece = body[:, run * RUN : (run + 1) * RUN].reshape(groups, -1)
        out[:, at : at + piece.shape[1]] = piece
        at += piece.shape[1]
    return out


def _headers(blocks: Blocks, count: int, groups: int) -> np.ndarray:
    """[G, S, header bytes]"""
    runs = -(-count // RUN)
    assert blocks.scales is not None
    parts = [_by_lane(blocks.d, runs)]
    if blocks.format == K4:
        assert blocks.m is not None and blocks.minimums is not None
        parts.append(_by_lane(blocks.m, runs))
        pair = np.stack([blocks.scales, blocks.minimums], -1)  # [R, B, 2]
    else:
        pair = blocks.scales.view(np.uint8).reshape(len(blocks.scales), count, 2)
    padded = _lanes(np.pad(pair, ((0, 0), (0, runs * RUN - count), (0, 0))))
    by_lane = padded.reshape(groups, LANES, runs, RUN, 2).transpose(0, 2, 3, 4, 1)
    parts.append(by_lane.reshape(groups, runs, -1))
    return np.concatenate(parts, -1)


def _lanes(rows: np.ndarray) -> np.ndarray:
    """Filled up to a multiple of LANES rows."""
    more = -len(rows) % LANES
    return np.pad(rows, ((0, more), *(((0, 0),) * (rows.ndim - 1)))) if more else rows


def _by_lane(halves: np.ndarray, count: int) -> np.ndarray:
    """float16 [R, n] -> uint8 [G, n, 32]"""
    turned = np.ascontiguousarray(_lanes(halves).reshape(-1, LANES, count).transpose(0, 2, 1))
    return turned.view(np.uint8).reshape(-1, count, 2 * LANES)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    low = codes & 15
    return (low[:, :, 0::2] | low[:, :, 1::2] << 4).reshape(*codes.shape[:2], -1)


def _planes(high: np.ndarray, bits: int) -> np.ndarray:
    """The upper bits of the codes [G, B, 8, 64], 8 / bits vectors to a byte."""
    per_byte = 8 // bits
    shifts = (np.arange(8, dtype=np.uint8) % per_byte * bits)[:, None]
    planes = (high << shifts).reshape(*high.shape[:2], bits, per_byte, -1)
    return np.bitwise_or.reduce(planes, axis=-2).reshape(*high.shape[:2], -1)


def arranged(rows: int, inputs: int, make: Callable[[int, int], Blocks], write: Callable[[memoryview], object]) -> None:
    """Arranges `make(start, stop)` piece by piece on a few threads; `write` gets the groups in order."""
    step = max(LANES, PIECE // max(inputs, 1) // LANES * LANES)
    starts = range(0, rows, step)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # numpy lets go of the GIL
        for first in range(0, len(starts), 16):  # a few at a time: what is made waits in memory
            batch = starts[first : first + 16]
            for groups in pool.map(lambda start: arrange(make(start, min(start + step, rows))), batch):
                write(groups.data)
