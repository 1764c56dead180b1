"""Block quantisation against the definition w ~ scale (q - zero)."""

from __future__ import annotations

import numpy as np
import pytest

from ming_app.engine.backends.onnx_quant import carry_over, dequantise, join, quantise
from ming_app.engine.backends.onnx_spec import Format


def weights(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, inputs)).astype(np.float32)


@pytest.mark.parametrize("fmt", [Format(4, 32), Format(4, 16), Format(8, 32), Format(8, 128)], ids=str)
@pytest.mark.parametrize("inputs", [32, 96, 128, 200])
def test_error_is_within_the_step(fmt, inputs):
    w = weights(37, inputs)
    packed = quantise(w, fmt)
    blocks = -(-inputs // fmt.block)
    assert packed.q.shape == (37, blocks, fmt.block * fmt.bits // 8) and packed.q.dtype == np.uint8
    assert packed.scales.shape == (37 * blocks,) and packed.scales.dtype == np.float32
    assert packed.zeros.shape == (37 * -(-blocks * fmt.bits // 8),)
    error = dequantise(packed, fmt, inputs) - w
    assert np.sqrt((error**2).mean()) < (0.11 if fmt.bits == 4 else 0.011)


def test_search_beats_the_plain_range():
    w = weights(64, 256)
    w[:, ::40] *= 4  # outliers
    blocks = w.reshape(64, 8, 32)
    low, high = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    plain = ((np.clip(np.rint(blocks / scale) + zero, 0, 15) - zero) * scale).reshape(w.shape)
    searched = dequantise(quantise(w, Format(4, 32)), Format(4, 32), 256)
    assert ((searched - w) ** 2).sum() < 0.97 * ((plain - w) ** 2).sum()


@pytest.mark.parametrize("fmt", [Format(4, 32), Format(8, 32)], ids=str)
def test_flat_blocks_stay_finite(fmt):
    for value in (0.0, 1e-30, 3.0, -3.0):
        w = np.full((2, 64), value, np.float32)
        np.testing.assert_allclose(dequantise(quantise(w, fmt), fmt, 64), w, rtol=1e-5, atol=1e-10)


def test_threads_do_not_change_the_result():
    w = weights(3000, 256)
    one, two = quantise(w, Format(4, 32), threads=1), quantise(w, Format(4, 32), threads=2)
    for field in ("q", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field))


def levelled(rows: int, inputs: int, most: int = 15, block: int = 32) -> np.ndarray:
    """Weights as a 4-bit GGUF type leaves them: scale * q - minimum, with their own numbers in every block."""
    rng = np.random.default_rng(rows + inputs)
    q = rng.integers(0, most + 1, (rows, inputs // block, block)).astype(np.float32)
    scale = rng.uniform(0.001, 0.1, q.shape[:2]).astype(np.float32)[..., None]
    minimum = rng.uniform(-0.3, 1.2, q.shape[:2]).astype(np.float32)[..., None]
    return (scale * q - minimum).reshape(rows, inputs)


def restored(carried, width: int) -> np.ndarray:
    packed, offsets = carried
    return dequantise(packed, Format(4, 32), width) + np.repeat(offsets, 32, axis=1)


@pytest.mark.parametrize("most", [15, 13, 3, 1])
@pytest.mark.parametrize("inputs", [32, 96, 512])
def test_four_bit_weights_are_carried_over_exactly(most, inputs):
    w = levelled(70, inputs, most)
    carried = carry_over(w, Format(4, 32))
    assert carried is not None
    np.testing.assert_allclose(restored(carried, inputs), w, atol=2e-6)
    worst = np.abs(dequantise(quantise(w, Format(4, 32)), Format(4, 32), inputs) - w).max()
    assert most < 15 or worst > 1e-3  # the plain way would have lost something


def test_flat_blocks_are_carried_over():
    w = levelled(8, 64)
    w[:, :32] = 0
    w[3, 32:] = -0.7
    carried = carry_over(w, Format(4, 32))
    assert carried is not None
    np.testing.assert_allclose(restored(carried, 64), w, atol=1e-6)


def test_bfloat16_copies_are_carried_over_closely():
    rng = np.random.default_rng(5)
    q = rng.integers(0, 16, (64, 8, 32)).astype(np.float32)
    scale = rng.uniform(0.01, 0.1, (64, 8, 1)).astype(np.float32)
    w = (scale * (q - 7.6)).reshape(64, 256)
    rounded = (w.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)
    carried = carry_over(rounded, Format(4, 32))
    assert carried is not None
    assert (np.abs(restored(carried, 256) - rounded) < 0.1 * np.repeat(scale[..., 0], 32, axis=1)).all()


@pytest.mark.parametrize(
    ("w", "fmt"),
    [
        (weights(64, 256), Format(4, 32)),
        (levelled(64, 256, most=31), Format(4, 32)),
        (levelled(64, 256), Format(8, 32)),
        (levelled(64, 256, block=16), Format(4, 32)),
        (levelled(64, 256)[:, :250], Format(4, 32)),
    ],
    ids=["any floats", "5 bits", "8-bit format", "smaller blocks", "odd width"],
)
def test_other_weights_are_not_carried_over(w, fmt):
    assert carry_over(w, fmt) is None


def test_one_row_outside_the_sample_is_enough_to_refuse():
    w = levelled(640, 64)
    w[333] = weights(1, 64)
    assert carry_over(w, Format(4, 32)) is None


@pytest.mark.parametrize("fmt", [Format(4, 32), Format(8, 32)], ids=str)
def test_joined_matrices_lie_side_by_side(fmt):
    parts = [weights(5, 96, seed=1), weights(5, 32, seed=2), weights(5, 20, seed=3)]
    joined = join([quantise(part, fmt) for part in parts], fmt)
    apart = [dequantise(quantise(part, fmt), fmt, part.shape[1]) for part in parts]
    np.testing.assert_array_equal(dequantise(joined, fmt, 148), np.concatenate(apart, axis=1))
