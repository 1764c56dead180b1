"""Measuring and intervening: measured it answers the same, it intervenes as the float32 reference does, and measures what it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cpu_tiny import VOCAB, DictSource, llama, qwen2, with_adapter

from ming_app.engine.backends.native.backend import NativeBackend
from ming_app.engine.backends.native.build import build_engine
from ming_app.engine.types import Gates
from ming_app.molora.config import MoLoRAConfig
from ming_app.molora.layer import GateTensors

CASES = {
    "qwen2": (qwen2, MoLoRAConfig(4, 2, 8, 16.0)),
    "shared": (qwen2, MoLoRAConfig(4, 2, 4, 8.0, num_shared_experts=2)),
    "llama-some-lora": (llama, MoLoRAConfig(3, 1, 5, 10.0, attention_targets=("k_proj", "o_proj"))),
}
LAYERS, CLOSE = 2, 0.04
IDS = np.random.default_rng(1).integers(0, VOCAB, 40)


@pytest.fixture(scope="module", params=CASES)
def built(request, tmp_path_factory):
    make, config = CASES[request.param]
    model = make()
    source = DictSource(model)
    injected, adapter = with_adapter(model, config)
    folder = build_engine(source, adapter, "8bit", tmp_path_factory.mktemp("builds") / "engine")
    return injected, NativeBackend.open(folder, threads=2, max_context=512)


def gates_of(backend: NativeBackend, rows: int = 1, **changes) -> Gates:
    return replace(Gates.unchanged(rows, LAYERS, 3, backend.top_k), **changes)


def run(backend: NativeBackend, gates: Gates | None = None, **more):
    rows = 1 if gates is None else len(gates.top_k)
    return backend.forward([IDS] * rows, backend.new_cache(rows, 128), gates=gates, all_logits=True, **more)


def reference(injected, gates: Gates):
    """Float32 torch with the same gates: logits [T, V], contributions and probabilities [T, L, P, .]."""
    state = injected.state
    state.capture = state.measure = True
    tensors = (torch.from_numpy(np.ascontiguousarray(a)) for a in (gates.uniform, gates.strength, gates.attention))
    k = int(gates.top_k.max())
    state.gates = GateTensors(torch.from_numpy(gates.top_k.astype(np.int64)), *tensors, largest_k=k)
    with torch.no_grad():
        logits = injected.model(torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()
    stacked = [
        np.stack(
            [np.stack([cells[layer, p].numpy().reshape(len(IDS), -1) for p in range(3)], 1) for layer in range(LAYERS)],
            1,
        )
        for cells in (state.contributions, state.probabilities)
    ]
    state.gates, state.measure = None, False
    return logits, *stacked


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean() / b.std())


def test_measuring_changes_nothing(built):
    _, backend = built
    plain, probed = run(backend), run(backend, measure=True)
    np.testing.assert_array_equal(probed.logits[0], plain.logits[0])
    assert (probed.experts[0] == plain.experts[0]).all() and probed.experts[0].shape == plain.experts[0].shape
    np.testing.assert_array_equal(probed.weights[0], plain.weights[0])
    assert plain.probabilities is None and plain.contributions is None


def test_measures_what_each_expert_adds(built):
    injected, backend = built
    step = run(backend, measure=True)
    _, contributions, probabilities = reference(injected, gates_of(backend))
    assert step.contributions[0].dtype == step.probabilities[0].dtype == np.float16
    ours = step.contributions[0].astype(float)
    assert ours.shape == contributions.shape
    assert np.median(np.abs(ours - contributions) / contributions) < 0.04
    assert np.abs(step.probabilities[0].astype(float) - probabilities).mean() < 0.02
    np.testing.assert_allclose(step.probabilities[0].astype(float).sum(-1), 1, atol=5e-3)


@pytest.mark.parametrize("change", ["k1", "all", "uniform", "off", "attention", "base"])
def test_interventions_act_as_in_the_reference(built, change):
    injected, backend = built
    cells, E = (1, LAYERS, 3), backend.num_experts
    gates = {
        "k1": lambda: gates_of(backend, top_k=np.ones(cells, np.uint8)),
        "all": lambda: gates_of(backend, top_k=np.full(cells, E, np.uint8)),
        "uniform": lambda: gates_of(backend, uniform=np.ones(cells, bool)),
        "off": lambda: gates_of(backend, strength=np.array([[[0, 1, 0], [1, 1, 0]]], np.float32)),
        "attention": lambda: gates_of(backend, attention=np.array([[0, 1]], np.float32)),
        "base": lambda: gates_of(
            backend, strength=np.zeros(cells, np.float32), attention=np.zeros((1, LAYERS), np.float32)
        ),
    }[change]()
    step = run(backend, gates, measure=True)
    logits, contributions, _ = reference(injected, gates)
    assert distance(step.logits[0], logits) < CLOSE
    assert step.experts[0].shape[-1] == gates.top_k.max()
    if change in ("off", "base"):
        assert (step.contributions[0][:, gates.strength[0] == 0] == 0).all()
    if not (backend.top_k == 1 and change in ("k1", "uniform")):
        assert distance(run(backend).logits[0], logits) > distance(step.logits[0], logits)


def test_every_row_has_gates_of_its_own(built):
    _, backend = built
    cells = (3, LAYERS, 3)
    strength, attention = np.ones(cells, np.float32), np.ones((3, LAYERS), np.float32)
    strength[1], attention[2] = 0, 0
    together = run(backend, gates_of(backend, 3, strength=strength, attention=attention))
    for row in range(3):
        alone = run(backend, gates_of(backend, strength=strength[row : row + 1], attention=attention[row : row + 1]))
        np.testing.assert_allclose(together.logits[row], alone.logits[0], atol=2e-3)
    np.testing.assert_allclose(together.logits[0], run(backend).logits[0], atol=2e-3)


def test_any_step_can_be_measured(built):
    _, backend = built
    cache = backend.new_cache(1, 128)
    backend.forward([IDS[:20]], cache)
    steps = [backend.forward([IDS[i : i + 1]], cache, measure=i % 2 == 0) for i in range(20, 30)]
    whole = run(backend)
    for at, step in enumerate(steps):
        np.testing.assert_array_equal(step.logits[0], whole.logits[0][20 + at])
        assert (step.probabilities is not None) == (at % 2 == 0)
