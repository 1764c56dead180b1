"""The ONNX engine against float32 torch on tiny random models: logits, routing, rows, chunks, cache, bias."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from onnx_tiny import VOCAB, DictSource, llama, on_four_bits, qwen2, reference, with_adapter

from ming_app.engine.backends import onnx as engine
from ming_app.engine.backends.onnx import OnnxBackend, build_engine
from ming_app.molora.config import MoLoRAConfig
from ming_app.molora.inject import InjectedModel

CASES = {
    "qwen2-e4k2r8": (qwen2, MoLoRAConfig(4, 2, 8, 16.0)),
    "qwen2-e8k3r5-rslora": (qwen2, MoLoRAConfig(8, 3, 5, 10.0, use_rslora=True)),
    "qwen2-e1k1r4": (qwen2, MoLoRAConfig(1, 1, 4, 8.0)),
    "qwen2-shared": (qwen2, MoLoRAConfig(4, 2, 4, 8.0, num_shared_experts=2)),
    "llama-e3k3r16-q-only": (llama, MoLoRAConfig(3, 3, 16, 32.0, attention_targets=("q_proj",))),
    "llama-e6k2r7": (llama, MoLoRAConfig(6, 2, 7, 14.0)),
    "qwen2-bare": (qwen2, None),
    "llama-bare": (llama, None),
    "llama-biased": (lambda: llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=False), None),
    "odd-widths": (lambda: qwen2(hidden_size=72, intermediate_size=88, head_dim=16), MoLoRAConfig(4, 2, 8, 16.0)),
}
CASES |= {
    "carried-e4k2r8": (lambda: on_four_bits(qwen2()), MoLoRAConfig(4, 2, 8, 16.0)),
    "carried-e3k1r5-shared": (lambda: on_four_bits(llama()), MoLoRAConfig(3, 1, 5, 10.0, num_shared_experts=1)),
    "carried-bare": (lambda: on_four_bits(qwen2()), None),
    "carried-down-only": (lambda: on_four_bits(qwen2(), projections=("gate", "down")), MoLoRAConfig(4, 2, 8, 16.0)),
}
MAIN = "qwen2-e4k2r8"
CLOSE = 0.04  # allowed mean |difference| of logits, in units of their standard deviation, with 8-bit weights and activations


@dataclass
class Built:
    """One tiny model, its build and its opened engine."""

    model: object
    injected: InjectedModel | None
    folder: Path
    backend: OnnxBackend

    def whole(self, ids: np.ndarray, bias: np.ndarray | None = None):
        """What the engine gives for one row alone, all logits."""
        cache = self.backend.new_cache(1, 600)
        return self.backend.forward([ids], cache, router_bias=None if bias is None else bias[None], all_logits=True)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    made: dict[str, Built] = {}

    def get(name: str) -> Built:
        if name not in made:
            make, config = CASES[name]
            model = make()
            source = DictSource(model)
            injected, adapter = with_adapter(model, config) if config else (None, None)
            folder = build_engine(source, adapter, "8bit", tmp_path_factory.mktemp("builds") / name)
            made[name] = Built(model, injected, folder, OnnxBackend.open(folder, threads=2, max_context=1024))
        return made[name]

    return get


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, count)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean() / b.std())


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float32(build, name):
    built = build(name)
    ids = tokens(60)
    expected = reference(built.model, built.injected, ids)
    step = built.whole(ids)
    assert step.logits[0].dtype == np.float32 and step.logits[0].shape == (60, VOCAB)
    assert distance(step.logits[0], expected.logits) < CLOSE
    if expected.experts is None:
        assert step.experts is None and step.weights is None
        return
    k = expected.experts.shape[-1]
    assert step.experts[0].shape == step.weights[0].shape == (60, 2, 3, k)
    assert step.experts[0].dtype == np.uint8 and step.weights[0].dtype == np.float16
    np.testing.assert_allclose(step.weights[0].astype(np.float32).sum(-1), 1, atol=2e-3)
    assert (np.diff(step.weights[0].astype(np.float32), axis=-1) <= 0).all()  # larger logit first
    same = (np.sort(step.experts[0], -1) == np.sort(expected.experts, -1)).all(-1)
    assert same[:, 0, :2].mean() > 0.97  # the first routers see almost the float32 values
    assert same.mean() > 0.95
    equal = step.experts[0] == expected.experts
    assert np.abs(step.weights[0] - expected.weights)[equal].mean() < 0.02


def test_carried_weights_are_stored_in_four_bits(build):
    sizes = {name: (build(name).folder / "weights.bin").stat().st_size for name in ("carried-bare", "qwen2-bare")}
    assert sizes["carried-bare"] < sizes["qwen2-bare"]
    graph = {name: (build(name).folder / "model.onnx").read_bytes() for name in CASES}
    for name, data in graph.items():
        expected = {"carried-down-only": ("down",)}.get(name, ("gate_up", "down") if "carried" in name else ())
        found = tuple(part for part in ("gate_up", "down") if f"0.{part}.sums".encode() in data)
        assert found == expected, name


@pytest.mark.parametrize("name", [MAIN, "llama-e6k2r7", "carried-e4k2r8"])
def test_decode_continues_prefill(build, name):
    built = build(name)
    ids = tokens(30)
    whole = built.whole(ids)
    cache = built.backend.new_cache(1, 64)
    first = built.backend.forward([ids[:20]], cache)
    np.testing.assert_allclose(first.logits[0], whole.logits[0][19], atol=1e-3)
    for at in range(20, 30):
        step = built.backend.forward([ids[at : at + 1]], cache)
        np.testing.assert_allclose(step.logits[0], whole.logits[0][at], atol=1e-3)
        assert (step.experts[0] == whole.experts[0][at : at + 1]).all()
    assert cache.lengths.tolist() == [30]


def test_chunked_prefill_equals_whole(build, monkeypatch):
    built = build(MAIN)
    ids = tokens(500)
    whole = built.whole(ids)
    monkeypatch.setattr(engine, "CHUNK", 37)
    chunked = built.whole(ids)
    np.testing.assert_allclose(chunked.logits[0], whole.logits[0], atol=2e-3)
    assert (chunked.experts[0] == whole.experts[0]).all()
    assert (chunked.weights[0] == whole.weights[0]).mean() > 0.99


def test_ragged_rows_equal_single_rows(build):
    built = build(MAIN)
    backend = built.backend
    rows = [tokens(n, seed=n) for n in (7, 1, 300, 19, 2)]
    more = [tokens(n, seed=50 + n) for n in (3, 9, 1, 1, 260)]
    cache = backend.new_cache(5, 600)
    prefill = backend.forward(rows, cache, all_logits=True)
    extend = backend.forward(more, cache)
    decode = backend.forward([tokens(1, seed=90 + b) for b in range(5)], cache)
    assert cache.lengths.tolist() == [len(a) + len(b) + 1 for a, b in zip(rows, more, strict=True)]
    for b in range(5):
        alone = built.whole(np.concatenate([rows[b], more[b], tokens(1, seed=90 + b)]))
        first, second = len(rows[b]), len(more[b])
        np.testing.assert_allclose(prefill.logits[b], alone.logits[0][:first], atol=2e-3)
        np.testing.assert_allclose(extend.logits[b], alone.logits[0][first + second - 1], atol=2e-3)
        np.testing.assert_allclose(decode.logits[b], alone.logits[0][-1], atol=2e-3)
        routed = np.concatenate([prefill.experts[b], extend.experts[b], decode.experts[b]])
        assert (routed == alone.experts[0]).all()


def test_bias_bans_and_forces_experts_per_row(build):
    built = build(MAIN)
    ids = tokens(24)
    bias = np.zeros((3, 2, 3, 4), np.float32)
    bias[1, :, :, 0] = -1e9  # expert 0 banned everywhere in row 1
    bias[2, 1, 2, 3] = 1e9  # expert 3 forced in layer 1's down projection of row 2
    step = built.backend.forward([ids] * 3, built.backend.new_cache(3, 64), router_bias=bias, all_logits=True)
    assert (step.experts[0] == 0).any()
    assert not (step.experts[1] == 0).any()
    assert (step.experts[2][:, 1, 2, 0] == 3).all() and (step.weights[2][:, 1, 2, 0] == 1).all()
    for row in range(3):
        expected = reference(built.model, built.injected, ids, bias[row])
        assert distance(step.logits[row], expected.logits) < CLOSE
    unbiased = built.whole(ids)
    np.testing.assert_allclose(step.logits[0], unbiased.logits[0], atol=1e-3)
    banned = built.whole(ids, np.where(bias[1] < 0, -np.inf, bias[1]).astype(np.float32))
    np.testing.assert_allclose(banned.logits[0], step.logits[1], atol=1e-3)


def test_bias_does_not_outlive_its_call(build):
    built = build(MAIN)
    cache = built.backend.new_cache(1, 16)
    ban = np.zeros((1, 2, 3, 4), np.float32)
    ban[..., 1] = -1e9
    assert not (built.backend.forward([np.array([5])], cache, router_bias=ban).experts[0] == 1).any()
    cache.truncate(0, 0)
    free = built.backend.forward([np.array([5])], cache)
    np.testing.assert_array_equal(free.experts[0], built.whole(np.array([5])).experts[0])


def test_truncate_then_continue(build):
    built = build(MAIN)
    ids, other = tokens(20), tokens(6, seed=4)
    cache = built.backend.new_cache(2, 64)
    built.backend.forward([ids, ids], cache)
    cache.truncate(1, 11)
    step = built.backend.forward([other, other], cache)
    np.testing.assert_allclose(step.logits[0], built.whole(np.r_[ids, other]).logits[0][-1], atol=1e-3)
    np.testing.assert_allclose(step.logits[1], built.whole(np.r_[ids[:11], other]).logits[0][-1], atol=1e-3)
    with pytest.raises(ValueError, match="cannot keep"):
        cache.truncate(0, 64)


def test_capacity_is_refused_before_anything_changes(build):
    built = build(MAIN)
    cache = built.backend.new_cache(2, 10)
    built.backend.forward([tokens(4), tokens(9)], cache)
    memory = cache.memory.copy()
    with pytest.raises(ValueError, match="capacity"):
        built.backend.forward([tokens(2), tokens(2)], cache)
    assert cache.lengths.tolist() == [4, 9]
    np.testing.assert_array_equal(cache.memory, memory)
    built.backend.forward([tokens(1), tokens(1)], cache)  # the last place can be used


@pytest.mark.parametrize("ids", [[], [-1], [VOCAB]])
def test_bad_ids_are_refused(build, ids):
    built = build(MAIN)
    with pytest.raises(ValueError, match="id"):
        built.backend.forward([np.array(ids, np.int64)], built.backend.new_cache(1, 8))


def test_results_belong_to_the_caller(build):
    built = build(MAIN)
    cache = built.backend.new_cache(1, 16)
    first = built.backend.forward([np.array([3])], cache)
    kept = [first.logits.copy(), first.experts[0].copy(), first.weights[0].copy()]
    built.backend.forward([np.array([9])], cache)
    for now, then in zip((first.logits, first.experts[0], first.weights[0]), kept, strict=True):
        np.testing.assert_array_equal(now, then)
