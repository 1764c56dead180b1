"""Losses against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training import losses
from training.losses import head_cross_entropy, router_loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_head_loss_and_gradient_equal_plain_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, bias: bool, weighted: bool
) -> None:
    monkeypatch.setattr(losses, "HEAD_CHUNK", 3)  # several chunks, the last one short
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=bias).requires_grad_(False)
    hidden = torch.randn(8, 16, requires_grad=True)
    targets = torch.randint(50, (8,))
    weights = torch.rand(8) if weighted else None
    plain = F.cross_entropy(head(hidden), targets, reduction="none") @ (torch.ones(8) if weights is None else weights)
    (expected,) = torch.autograd.grad(plain * 0.25, hidden)
    ours = head_cross_entropy(hidden, head, targets, weights)
    (gradient,) = torch.autograd.grad(ours * 0.25, hidden)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient, expected)


def test_router_terms_by_hand() -> None:
    # one router, three tokens of which the last is padding, E = 2, k = 1
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [9.0, 0.0]]])
    result = router_loss([(0, 0, logits)], torch.tensor([True, True, False]), top_k=1)
    p = [[1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))], [1 / (1 + math.exp(1)), 1 / (1 + math.exp(-1))]]
    mean = [(p[0][i] + p[1][i]) / 2 for i in range(2)]
    assert result.balance.item() == pytest.approx(2 * (0.5 * mean[0] + 0.5 * mean[1]))
    assert result.z.item() == pytest.approx((math.log(math.e**2 + 1) ** 2 + math.log(1 + math.e) ** 2) / 2, rel=1e-5)
    assert result.load.tolist() == [[[0.5, 0.5]]]
    entropy = -sum(x * math.log(x) for row in p for x in row) / 2 / math.log(2)
    assert result.entropy.item() == pytest.approx(entropy, rel=1e-5)


def test_balance_is_one_when_even_and_large_when_collapsed() -> None:
    even = 5 * torch.eye(4).repeat(8, 1)[None]
    one = torch.zeros(1, 32, 4)
    one[..., 2] = 20.0
    real = torch.ones(32, dtype=torch.bool)
    assert router_loss([(0, 0, even)], real, 1).balance.item() == pytest.approx(1.0)
    assert router_loss([(0, 0, one)], real, 1).balance.item() == pytest.approx(4.0, rel=1e-3)


def test_router_rows_are_in_layer_and_projection_order() -> None:
    logits = []
    for layer, projection in ((1, 2), (0, 1), (0, 0), (1, 0), (0, 2), (1, 1)):
        row = torch.zeros(1, 1, 8)
        row[..., layer * 3 + projection] = 5.0
        logits.append((layer, projection, row))
    load = router_loss(logits, torch.ones(1, dtype=torch.bool), 1).load
    assert load.shape == (2, 3, 8)
    assert load.flatten(0, 1).argmax(-1).tolist() == list(range(6))


def test_layers_with_different_numbers_of_experts_count_alike() -> None:
    torch.manual_seed(0)
    sizes = (2, 2, 2, 4, 4, 4)
    logits = [(i // 3, i % 3, torch.randn(1, 9, size)) for i, size in enumerate(sizes)]
    real = torch.ones(9, dtype=torch.bool)
    together = router_loss(logits, real, 2)
    alone = [router_loss([(0, 0, row)], real, 2) for _, _, row in logits]
    assert together.load.shape == (2, 3, 4)
    assert together.balance.item() == pytest.approx(sum(a.balance.item() for a in alone) / 6)
    assert together.z.item() == pytest.approx(sum(a.z.item() for a in alone) / 6)
    assert together.load[0, :, 2:].sum() == 0 and together.load.sum(-1).allclose(torch.ones(2, 3))
    assert together.entropy.flatten().tolist() == pytest.approx([a.entropy.item() for a in alone])
