"""Packed rows: nothing is lost, padding is small, and every sample gives what it gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_base

from ming_app.molora.config import MoLoRAConfig
from ming_app.molora.inject import InjectedModel, inject_molora
from training import attention
from training.attention import Part
from training.base import Base, load_base
from training.chat import Encoded
from training.errors import TrainingError
from training.packing import Sample, pack
from training.step import Objective, hidden_states


def sample(*ids: int, learnt: int = 2, stream: str = "a", weight: float = 1.0) -> Sample:
    mask = np.arange(len(ids)) >= len(ids) - learnt
    return Sample(Encoded(np.asarray(ids, np.int32), mask), stream, "source", weight)


def many(count: int = 40, seed: int = 0) -> list[Sample]:
    """Samples that all begin with 5 tokens, most with one of two wordings of 12 more."""
    rng = np.random.default_rng(seed)
    wordings = [list(range(10, 15)) + list(range(20 + 20 * w, 32 + 20 * w)) for w in range(2)] + [list(range(10, 15))]
    rows = []
    for i in range(count):
        body = rng.integers(100, 250, rng.integers(4, 30)).tolist()
        rows.append(sample(*wordings[i % 5 % 3], *body, learnt=3, stream="abc"[i % 3], weight=1.0 + i % 2))
    return rows


def identity(rows: Iterator[Sample] | list[Sample]) -> list[tuple[int, ...]]:
    return sorted(tuple(s.encoded.ids.tolist()) for s in rows)


@pytest.mark.parametrize("share", [True, False])
def test_every_sample_is_packed_once_within_the_budget(share: bool) -> None:
    rows = [*many(), sample(*range(10, 15), *[7] * 300)]
    batches = pack(rows, 200, "seed", share=share)
    assert identity([s for b in batches for s in b.samples]) == identity(rows)
    assert all(len(b.ids) <= 200 or len(b.samples) == 1 for b in batches)
    assert all(sum(part.tokens for part in b.parts) == len(b.ids) for b in batches)
    again = pack(rows, 200, "seed", share=share)
    assert all((a.ids == b.ids).all() for a, b in zip(batches, again, strict=True))
    if not share:
        assert all(len(b.parts) == 1 and b.parts[0].shared == 0 for b in batches)


def test_common_beginnings_are_read_once_and_padding_is_small() -> None:
    rows = many(200)
    batches = pack(rows, 400)
    read = sum(int(b.real.sum()) for b in batches)
    whole = sum(len(s.encoded) for s in rows)
    assert sum(b.tokens for b in batches) == whole
    assert read < 0.7 * whole
    assert sum(len(b.ids) for b in batches) < 1.12 * read
    assert {part.shared for b in batches for part in b.parts} >= {17}


def test_the_loss_looks_at_the_learnt_tokens_with_their_weights() -> None:
    for batch in pack(many(), 300):
        expected = [(int(t), s.loss_weight) for s in batch.samples for t in s.encoded.ids[s.encoded.mask]]
        assert sorted(expected) == sorted(zip(batch.targets.tolist(), batch.weights.tolist(), strict=True))
        assert batch.real[batch.learn_at].all()
        for at, target in zip(batch.learn_at, batch.targets, strict=True):
            if at + 1 < len(batch.ids) and batch.positions[at + 1] == batch.positions[at] + 1:
                assert batch.ids[at + 1] == target or not batch.real[at + 1]


def test_a_beginning_never_takes_the_first_learnt_token_along() -> None:
    same = [sample(1, 2, 3, 4, 5, learnt=2), sample(1, 2, 3, 4, 6, learnt=2)]
    (batch,) = pack(same, 100)
    assert batch.parts == (Part(2, 2, 3),)  # token 3 stands before the first learnt one and stays with each sample
    assert batch.targets.tolist() == [4, 5, 4, 6]
    assert pack([sample(9, 8, learnt=2)], 100)[0].targets.tolist() == [8]  # nothing stands before the very first token


def test_scores_are_not_rounded_to_the_precision_of_the_base() -> None:
    """Qwen's keys have large biases: scores of several hundred, of which bf16 holds steps of two."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 24, 16) for _ in range(3))
    q, k, v = ((x + shift).bfloat16() for x, shift in ((q, 3.0), (k, 40.0), (v, 0.0)))
    parts = (Part(8, 2, 8),)
    ours, _ = attention.packed_attention(None, q, k, v, None, parts=parts)
    exact, _ = attention.packed_attention(None, q.double(), k.double(), v.double(), None, parts=parts)
    assert ours.dtype == torch.bfloat16 and (q @ k.transpose(-1, -2)).abs().max() > 1000
    torch.testing.assert_close(ours.double(), exact, atol=0.03, rtol=0.02)


@pytest.fixture(scope="module", params=["Qwen2", "Llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = write_base(tmp_path_factory.mktemp("packing") / "base", request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MING_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return load_base(str(folder), "cpu", "float32")


@pytest.fixture(scope="module")
def injected(base: Base) -> InjectedModel:
    injected = inject_molora(base.model, MoLoRAConfig(num_experts=4, top_k=2, rank=4, alpha=8.0))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in injected.adapter_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return injected


def gradients(injected: InjectedModel, batches: list) -> tuple[float, list[torch.Tensor]]:
    for parameter in injected.adapter_parameters():
        parameter.grad = None
    objective = Objective(injected.model, injected.state, injected.config.top_k)
    total = 0.0
    for batch in batches:
        loss = objective(batch).loss
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in injected.adapter_parameters()]


@pytest.mark.parametrize("kernel", [False, True])
def test_packed_rows_give_the_states_and_gradients_of_samples_alone(
    injected: InjectedModel, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel:  # what a GPU uses, run here
        monkeypatch.setattr(attention, "_by_products", attention._by_kernel)
    rows = many(25)
    packed = pack(rows, 300)
    assert any(part.shared > 10 for batch in packed for part in batch.parts)
    with torch.no_grad():
        for batch in packed:
            states = hidden_states(injected.model, batch)[torch.from_numpy(batch.learn_at)]
            alone = [hidden_states(injected.model, b)[b.learn_at] for s in batch.samples for b in pack([s], 300)]
            torch.testing.assert_close(states, torch.cat(alone), atol=2e-5, rtol=1e-4)
    loss, ours = gradients(injected, packed)
    expected_loss, expected = gradients(injected, [b for s in rows for b in pack([s], 300)])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_plain_rows_through_the_models_own_attention_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MING_CACHE_DIR", str(tmp_path / "cache"))
    folder = write_base(tmp_path / "base")
    ours, theirs = (load_base(str(folder), "cpu", "float32", packing=packing) for packing in (True, False))
    rows = many(12)
    with torch.no_grad():
        loss = sum(float(Objective(ours.model)(b).loss) for b in pack(rows, 300))
        plain = sum(float(Objective(theirs.model)(b).loss) for b in pack(rows, 300, share=False))
    assert loss == pytest.approx(plain, rel=1e-5)
    with pytest.raises(ValueError, match="packed"):
        hidden_states(theirs.model, next(b for b in pack(rows, 300) if len(b.parts) > 1))


def test_another_kind_of_attention_is_refused_by_name() -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(TrainingError, match="sliding_window"):
        attention.packed_attention(None, q, q, q, None, sliding_window=4)
