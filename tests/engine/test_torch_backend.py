"""The reference backend: official logits, and every row of any batch equal to the row alone."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ming_app.engine.backends.torch import TorchBackend
from ming_app.errors import MingError
from ming_app.models.load import load_torch_model
from ming_app.molora.checkpoint import load_adapter
from tests.tiny import make_adapter, write_base

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "tiny_e4k2"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden checkpoint lies outside the repository (../shared)")


@pytest.fixture(scope="module")
def backend(tmp_path_factory) -> TorchBackend:
    base = write_base(tmp_path_factory.mktemp("base"))
    return TorchBackend(load_torch_model(base, make_adapter(base)))


def prompts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, n) for n in lengths]


@golden
def test_golden_prefill_decode_batched_and_routing():
    want = load_file(GOLDEN / "expected.safetensors")
    backend = TorchBackend(load_torch_model(GOLDEN / "base", load_adapter(GOLDEN / "adapter")))
    rows = list(want["input_ids"])
    together = backend.forward(rows, backend.new_cache(3, 64), all_logits=True)
    for row, ids in enumerate(rows):
        alone = backend.forward([ids], backend.new_cache(1, 64), all_logits=True)
        assert np.abs(alone.logits[0] - want["prefill_logits"][row]).max() < 5e-4
        assert np.abs(together.logits[row] - want["prefill_logits"][row]).max() < 5e-4
    for layer in range(3):
        for p, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            assert (together.experts[0][:, layer, p] == want[f"experts.{layer}.{name}"]).all()
            assert np.abs(together.weights[0][:, layer, p] - want[f"weights.{layer}.{name}"]).max() < 1e-3
    cache = backend.new_cache(1, 64)
    step = backend.forward([rows[0]], cache)
    for i, token in enumerate(want["decode_ids"]):
        assert np.abs(step.logits[0] - want["decode_logits"][i]).max() < 5e-4
        assert step.logits[0].argmax() == token
        step = backend.forward([np.array([token])], cache)


def test_ragged_rows_prefill_and_decode_as_they_do_alone(backend):
    rows, nexts = prompts(9, 1, 23), prompts(4, 7, 1)
    cache = backend.new_cache(3, 64)
    first = backend.forward(rows, cache, all_logits=True)
    second = backend.forward(nexts, cache, all_logits=True)
    assert cache.lengths.tolist() == [13, 8, 24]
    for row in range(3):
        own = backend.new_cache(1, 64)
        for got, ids in ((first, rows[row]), (second, nexts[row])):
            want = backend.forward([ids], own, all_logits=True)
            np.testing.assert_allclose(got.logits[row], want.logits[0], atol=2e-4)
            assert np.array_equal(got.experts[row], want.experts[0])


def test_truncate_forgets(backend):
    ids, tail = prompts(12, 3)
    cache = backend.new_cache(2, 64)
    backend.forward([ids, ids], cache)
    backend.forward([tail, tail], cache)
    cache.truncate(0, 5)
    got = backend.forward([tail, tail[:1]], cache)
    fresh = backend.new_cache(1, 64)
    backend.forward([ids[:5]], fresh)
    want = backend.forward([tail], fresh)
    np.testing.assert_allclose(got.logits[0], want.logits[0], atol=2e-4)
    assert cache.lengths.tolist() == [8, 16]


def test_router_bias_acts_per_row(backend):
    ids = prompts(8)[0]
    bias = np.zeros((2, backend.num_layers, 3, 4), np.float32)
    bias[1, 1, 2, 0] = -1e9
    step = backend.forward([ids, ids], backend.new_cache(2, 64), router_bias=bias)
    plain = backend.forward([ids], backend.new_cache(1, 64))
    assert np.array_equal(step.experts[0], plain.experts[0])
    assert not (step.experts[1][:, 1, 2] == 0).any()


def test_capacity_is_kept(backend):
    cache = backend.new_cache(1, 8)
    backend.forward(prompts(6), cache)
    with pytest.raises(ValueError, match="capacity"):
        backend.forward(prompts(3), cache)
    assert cache.lengths.tolist() == [6]


def test_bare_base_has_no_routing(tmp_path):
    backend = TorchBackend(load_torch_model(write_base(tmp_path), None))
    step = backend.forward(prompts(4), backend.new_cache(1, 8))
    assert step.experts is None and backend.num_experts == 0


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_other_families_load(tmp_path, family):
    base = write_base(tmp_path, family)
    backend = TorchBackend(load_torch_model(base, make_adapter(base)))
    step = backend.forward(prompts(4), backend.new_cache(1, 8))
    assert np.isfinite(step.logits).all() and step.experts[0].shape == (4, 2, 3, 2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["Qwen2", "Llama", "Gemma"])
def test_a_bare_base_gives_what_transformers_gives(tmp_path, family, tied):
    import torch
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path, family, tie_word_embeddings=tied, head_dim=16)
    ids = prompts(11)[0]
    backend = TorchBackend(load_torch_model(base))
    got = backend.forward([ids], backend.new_cache(1, 16), all_logits=True).logits[0]
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        want = reference(torch.from_numpy(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "likeness", "same_expert"), [("bf16", 0.999, 0.97), ("nf4", 0.97, 0.8), ("int8", 0.99, 0.9)]
)
def test_lower_precisions_stay_near_float32(tmp_path, precision, likeness, same_expert):
    base = write_base(tmp_path)
    adapter = make_adapter(base, scale=0.05)
    ids, results = prompts(20), []
    for each in ("float32", precision):
        backend = TorchBackend(load_torch_model(base, adapter, each))
        results.append(backend.forward(ids, backend.new_cache(1, 64), all_logits=True))
    want, got = results
    alike = np.corrcoef(got.logits[0].ravel(), want.logits[0].ravel())[0, 1]
    agree = (got.experts[0][..., 0] == want.experts[0][..., 0]).mean()
    assert alike > likeness and agree > same_expert, (alike, agree)


def test_a_base_with_missing_or_foreign_tensors_is_refused(tmp_path):
    from safetensors.numpy import save_file

    base = write_base(tmp_path)
    tensors = load_file(base / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, base / "model.safetensors")
    with pytest.raises(MingError, match="model.norm.weight"):
        load_torch_model(base)
    save_file({**tensors, "model.layers.0.mlp.extra.weight": np.zeros(3, np.float32)}, base / "model.safetensors")
    with pytest.raises(MingError, match="extra"):
        load_torch_model(base)


def test_steps_of_fixed_shape_give_the_same(backend):
    """As on a GPU, where they are recorded: rows and pages are filled up, and what fills them changes nothing."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, backend.vocab_size, n) for n in (40, 3, 17)]
    bias = np.zeros((3, backend.num_layers, 3, backend.num_experts), np.float32)
    bias[1, :, :, 0] = -1e4
    caches = [backend.new_cache(5, 64, tokens=256) for _ in range(2)]
    try:
        for step in range(12):
            given = None if step % 3 else bias
            ids = rows if step == 0 else [rng.integers(0, backend.vocab_size, 1) for _ in rows]
            found = []
            for fixed, cache in zip((False, True), caches, strict=True):
                backend.fixed_steps = fixed
                found.append(backend.forward(ids, cache, rows=[4, 0, 2], router_bias=given))
            np.testing.assert_allclose(found[0].logits, found[1].logits, atol=2e-5)
            for one, two in zip(found[0].experts, found[1].experts, strict=True):
                np.testing.assert_array_equal(one, two)
        assert {shape[:2] for shape in caches[1].fixed} == {(4, 16)} and not caches[0].fixed
        backend.fixed_steps = True
        caches[1].truncate(4, 20)
        caches[0].truncate(4, 20)
        one = backend.forward([np.array([7])], caches[1], rows=[4])
        backend.fixed_steps = False
        np.testing.assert_allclose(one.logits, backend.forward([np.array([7])], caches[0], rows=[4]).logits, atol=2e-5)
    finally:
        backend.fixed_steps = False
