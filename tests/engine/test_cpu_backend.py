"""The CPU engine against float32 torch on tiny random models: logits, routing, rows, chunks, cache, bias."""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cpu_tiny import VOCAB, DictSource, llama, qwen2, reference, with_adapter

from ming_app.engine.backends.native import backend as engine
from ming_app.engine.backends.native.backend import NativeBackend
from ming_app.engine.backends.native.build import build_engine
from ming_app.engine.backends.native.kernels import step
from ming_app.engine.types import CacheFullError, Gates
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
MAIN = "qwen2-e4k2r8"
CLOSE = 0.04  # allowed mean |difference| of logits, in units of their standard deviation, with 8-bit weights and activations


@dataclass
class Built:
    """One tiny model, its build and its opened engine."""

    model: object
    injected: InjectedModel | None
    folder: Path
    backend: NativeBackend

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
            made[name] = Built(model, injected, folder, NativeBackend.open(folder, threads=2, max_context=1024))
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


@pytest.mark.parametrize("name", [MAIN, "llama-e6k2r7"])
def test_decode_continues_prefill(build, name):
    built = build(name)
    ids = tokens(30)
    whole = built.whole(ids)
    cache = built.backend.new_cache(1, 64)
    first = built.backend.forward([ids[:20]], cache)
    np.testing.assert_array_equal(first.logits[0], whole.logits[0][19])
    for at in range(20, 30):
        step = built.backend.forward([ids[at : at + 1]], cache)
        np.testing.assert_array_equal(step.logits[0], whole.logits[0][at])
        assert (step.experts[0] == whole.experts[0][at : at + 1]).all()
    assert cache.lengths.tolist() == [30]


def test_chunked_prefill_equals_whole(build, monkeypatch):
    built = build(MAIN)
    ids = tokens(500)
    whole = built.whole(ids)
    monkeypatch.setattr(engine, "CHUNK", 37)
    chunked = built.whole(ids)
    np.testing.assert_array_equal(chunked.logits[0], whole.logits[0])
    assert (chunked.experts[0] == whole.experts[0]).all()
    assert (chunked.weights[0] == whole.weights[0]).all()


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
        np.testing.assert_array_equal(prefill.logits[b], alone.logits[0][:first])
        np.testing.assert_array_equal(extend.logits[b], alone.logits[0][first + second - 1])
        np.testing.assert_array_equal(decode.logits[b], alone.logits[0][-1])
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
    pages, free = cache.tables.copy(), cache.free_tokens
    with pytest.raises(ValueError, match="capacity"):
        built.backend.forward([tokens(2), tokens(2)], cache)
    assert cache.lengths.tolist() == [4, 9]
    np.testing.assert_array_equal(cache.tables, pages)
    assert cache.free_tokens == free
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


def test_some_rows_of_a_cache(build):
    built = build(MAIN)
    cache = built.backend.new_cache(4, 64)
    built.backend.forward([tokens(9), tokens(5, seed=2)], cache, rows=[3, 1])
    step = built.backend.forward([tokens(1, seed=3)], cache, rows=[1])
    np.testing.assert_array_equal(
        step.logits[0], built.whole(np.r_[tokens(5, seed=2), tokens(1, seed=3)]).logits[0][-1]
    )
    assert cache.lengths.tolist() == [0, 6, 0, 9]


def test_shared_pages_are_copied_before_they_are_written(build):
    built = build(MAIN)
    ids, other = tokens(40), tokens(5, seed=8)
    cache = built.backend.new_cache(3, 64, tokens=128)
    built.backend.forward([ids], cache, rows=[0])
    assert cache.share(0, 1, 37) == 32 and cache.lengths.tolist() == [40, 32, 0]
    assert cache.free_tokens == 128 - 48  # three pages in all
    cache.truncate(1, 20)  # inside a page that row 0 holds too
    step = built.backend.forward([other], cache, rows=[1])
    np.testing.assert_array_equal(step.logits[0], built.whole(np.r_[ids[:20], other]).logits[0][-1])
    step = built.backend.forward([other], cache, rows=[0])
    np.testing.assert_array_equal(step.logits[0], built.whole(np.r_[ids, other]).logits[0][-1])
    for row in (0, 1):
        cache.truncate(row, 0)
    assert cache.free_tokens == 128


def test_a_full_pool_refuses_before_anything_changes(build):
    built = build(MAIN)
    cache = built.backend.new_cache(2, 64, tokens=64)
    built.backend.forward([tokens(30), tokens(30)], cache)
    with pytest.raises(CacheFullError) as caught:
        built.backend.forward([tokens(1), tokens(3)], cache)
    assert caught.value.zh and cache.lengths.tolist() == [30, 30]
    built.backend.forward([tokens(2), tokens(2)], cache)
    cache.truncate(1, 0)
    built.backend.forward([tokens(30)], cache, rows=[0])
    assert cache.lengths.tolist() == [62, 0]


def test_threads_do_not_change_the_result(build):
    built = build(MAIN)
    one = NativeBackend.open(built.folder, threads=1, max_context=1024)
    three = NativeBackend.open(built.folder, threads=3, max_context=1024)
    ids = tokens(70)
    steps = [backend.forward([ids], backend.new_cache(1, 80), all_logits=True) for backend in (one, three)]
    np.testing.assert_array_equal(steps[0].logits[0], steps[1].logits[0])
    np.testing.assert_array_equal(steps[0].logits[0], built.whole(ids).logits[0])
    one.close(), three.close()


@pytest.mark.parametrize("measure", [False, True])
def test_every_phase_has_a_counter(build, monkeypatch, measure):
    """A phase without one would count in memory that is not its own."""
    backend, taken = build(MAIN).backend, []
    monkeypatch.setattr(backend._team, "run", lambda job: taken.append(job(0, 1)))
    backend.forward([tokens(3)], backend.new_cache(1, 16), measure=measure)
    each = 22 if measure else 20
    assert taken[0] == 3 + 2 * each  # of the end, and of two layers
    assert each <= engine.PHASES and len(backend._work.sync) == 2 + 3 * engine.PHASES


def test_everything_runs_on_one_compiled_version(build):
    """Another would be compiled in the middle of an answer, by several threads at once."""
    for name in CASES:
        built = build(name)
        gates = Gates.unchanged(2, 2, 3, built.backend.top_k) if built.backend.num_experts else None
        for options in ({}, {"all_logits": True}, {"measure": True}, {"gates": gates}):
            built.backend.forward([tokens(3), tokens(1)], built.backend.new_cache(3, 64, 96), rows=[2, 0], **options)
    assert len(step.signatures) == 1


@pytest.mark.parametrize("processor", ["haswell", "x86-64"])
def test_other_processors_give_the_same(build, processor):
    """Kernels compiled for a processor without VNNI, and for one without any wide instructions."""
    if platform.machine() != "x86_64":
        pytest.skip("the names are those of x86 processors")
    built, ids = build(MAIN), tokens(9)
    features = "+avx2,+fma,+f16c" if processor == "haswell" else "+avx,+f16c"
    code = (
        "import sys, numpy as np\n"
        "from ming_app.engine.backends.native.backend import NativeBackend\n"
        "from ming_app.engine.backends.native.vector import DOT_KIND\n"
        f"b = NativeBackend.open({str(built.folder)!r}, threads=2)\n"
        f"step = b.forward([np.array({ids.tolist()})], b.new_cache(1, 64), all_logits=True)\n"
        "print(DOT_KIND, file=sys.stderr)\n"
        "np.save(sys.stdout.buffer, step.logits[0])"
    )
    env = os.environ | {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "NUMBA_OPT": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=True)
    assert done.stderr.decode().strip() == ("madd256" if processor == "haswell" else "plain")
    found = np.load(io.BytesIO(done.stdout))
    np.testing.assert_allclose(found, built.whole(ids).logits[0], rtol=1e-4, atol=1e-4)
