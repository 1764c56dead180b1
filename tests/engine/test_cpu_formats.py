"""Weights in blocks: exact where a GGUF has them, close otherwise, and arranged so that the kernels read them right."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numba import njit

from ming_app.engine.backends.native import tiles, vector
from ming_app.engine.backends.native.formats import CARRIED, Blocks, arrange, arranged, from_float, from_gguf
from ming_app.engine.backends.native.layout import BLOCK, LANES, SIDE, group_bytes


def weights(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, inputs)).astype(np.float32)


def stored(kind: str, rows: int, inputs: int) -> np.ndarray:
    """Blocks of a ggml type: random bytes, with sound scales."""
    size, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if kind in ("Q5_0", "Q4_0", "Q8_0"):
        return quantize(weights(rows, inputs), GGMLQuantizationType[kind])
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (rows, inputs // size, nbytes), np.uint8)
    scales = rng.uniform(1e-4, 1e-2, (rows, inputs // size, 2)).astype("<f2").view(np.uint8)
    at = slice(0, 4) if kind == "Q4_K" else slice(208, 210)
    blocks[..., at] = scales[..., : at.stop - at.start]
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", CARRIED)
def test_what_a_gguf_holds_is_kept_exactly(kind):
    raw = stored(kind, 21, 512)
    ours = from_gguf(raw, kind)
    np.testing.assert_array_equal(ours.values(), dequantize(raw, GGMLQuantizationType[kind]))


@pytest.mark.parametrize("inputs", [32, 96, 200, 704])
@pytest.mark.parametrize(("bits", "error"), [(4, 0.09), (8, 0.007)])
def test_floats_are_quantised_within_the_step(bits, error, inputs):
    w = weights(37, inputs)
    values = from_float(w, bits).values()
    assert values.shape == (37, -(-inputs // BLOCK) * BLOCK)
    assert np.sqrt(np.square(values[:, :inputs] - w).mean()) < error


def test_four_bits_fit_better_than_the_plain_range():
    w = weights(64, 256)
    w[:, ::40] *= 4  # outliers
    blocks = w.reshape(64, 8, 32)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    scale = (high - low) / 15
    plain = (np.rint((blocks - low) / scale) * scale + low).reshape(w.shape)
    assert np.square(from_float(w, 4).values() - w).sum() < 0.97 * np.square(plain - w).sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_flat_blocks_stay_finite(bits):
    for value in (0.0, 1e-30, 3.0, -3.0):
        values = from_float(np.full((2, 64), value, np.float32), bits).values()
        np.testing.assert_allclose(values, value, rtol=2e-3, atol=1e-6)


def product(groups: np.ndarray, blocks: Blocks, x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(16 rows of the group times x [m, K], as the kernel gives it; the x that it read)."""
    m, inputs = x.shape
    count = inputs // BLOCK
    codes, side = np.zeros(m * inputs, np.uint8), np.zeros((count, m, SIDE), np.uint8)
    for t in range(m):
        for b in range(count):
            at = x.ctypes.data + 4 * (t * inputs + b * BLOCK)
            quantise(at, codes.ctypes.data + b * BLOCK * m + 4 * t, 4 * m, side.ctypes.data + (b * m + t) * SIDE)
    out, base = np.zeros((m, LANES), np.float32), np.full((m, LANES), 0.5, np.float32)
    addresses = (a.ctypes.data for a in (groups[group], codes, side))
    multiply(blocks.format, m, *addresses, count, base.ctypes.data, 64, out.ctypes.data, 64)
    read = codes.reshape(count, 8, m, 4).transpose(2, 0, 1, 3).reshape(m, count, BLOCK).view(np.int8)
    return out - 0.5, (read * side.view(np.float32)[..., 0].T[..., None]).reshape(m, inputs)


@njit
def quantise(x, codes, step, side):
    vector.quantise(x, codes, step, side)


@njit
def multiply(format_, m, w, x, side, blocks, base, base_step, out, step):
    vector.call_ten(ADDRESS, format_, m, w, x, side, blocks, base, base_step, out, step)


ADDRESS = tiles.multiply.address


@pytest.mark.parametrize("m", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [*CARRIED, "float4", "float8"])
def test_kernels_multiply_what_was_written(kind, m):
    if kind.startswith("float"):
        blocks = from_float(weights(40, 352), int(kind[-1]))  # a run that is not full
    else:
        blocks = from_gguf(stored(kind, 40, 768), kind)
    groups = arrange(blocks)
    inputs = blocks.codes.shape[1]
    assert groups.shape == (3, group_bytes(blocks.format, inputs // BLOCK))
    x = weights(m, inputs, seed=m)
    got, read = product(groups, blocks, x, 1)
    assert np.abs(read - x).max() < 0.03
    want = read.astype(np.float64) @ blocks.values()[16:32].T.astype(np.float64)
    np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())
    last, _ = product(groups, blocks, x, 2)
    assert not last[:, 8:].any()  # rows that only fill the group up


def test_pieces_come_in_order(monkeypatch):
    monkeypatch.setattr("ming_app.engine.backends.native.formats.PIECE", 5000)
    w, parts = weights(333, 96), []
    arranged(333, 96, lambda start, stop: from_float(w[start:stop], 4), lambda data: parts.append(np.array(data)))
    assert len(parts) > 3
    np.testing.assert_array_equal(np.concatenate(parts), arrange(from_float(w, 4)))
