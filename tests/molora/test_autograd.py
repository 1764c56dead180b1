"""The written-out gradients against autograd through the plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from ming_app.molora import autograd
from ming_app.molora.autograd import AddExperts, AddLoRA, RankAndRoute, rank_and_route
from ming_app.molora.config import MoLoRAConfig
from ming_app.molora.layer import LoRALinear

T, IN, OUT, E, R = 13, 10, 7, 4, 3


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def same_gradients(ours: torch.Tensor, plain: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, plain)
    weight = torch.randn_like(plain)
    for got, want in zip(
        torch.autograd.grad((ours * weight).sum(), leaves, retain_graph=True),
        torch.autograd.grad((plain * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_rank_and_route() -> None:
    torch.manual_seed(0)
    x, a, router, bias = leaf(T, IN), leaf(E * R, IN), leaf(E, IN), leaf(E)
    ours = torch.cat(RankAndRoute.apply(x, a, router, bias), dim=-1)
    plain = torch.cat([F.linear(x, a), F.linear(x, router, bias)], dim=-1)
    same_gradients(ours, plain, [x, a, router, bias])


@pytest.mark.parametrize("lead", [(T,), (1, T)])
def test_add_experts(lead: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    y, h, gate, b = leaf(*lead, OUT), leaf(T, E * R), leaf(T, E), leaf(E * R, OUT)
    scaled = (h.view(T, E, R) * gate[..., None]).flatten(1)
    same_gradients(AddExperts.apply(y * 1, h, gate, b), y + (scaled @ b).view(y.shape), [y, h, gate, b])


def test_add_lora() -> None:
    torch.manual_seed(2)
    y, x, a, b = leaf(1, T, OUT), leaf(T, IN), leaf(R, IN), leaf(OUT, R)
    same_gradients(AddLoRA.apply(y * 1, x, a, b, 1.5), y + 1.5 * (x @ a.T @ b.T), [y, x, a, b])


def test_lora_dropout_acts_in_training_only() -> None:
    torch.manual_seed(3)
    config = MoLoRAConfig(rank=R, lora_dropout=0.5)
    lora = LoRALinear(torch.nn.Linear(IN, OUT), config)
    torch.nn.init.normal_(lora.B)
    x = torch.randn(T, IN)
    assert torch.equal(lora.eval()(x), lora(x))
    assert not torch.equal(lora.train()(x), lora(x))


def test_router_logits_are_float32_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "CPU_CHUNK", 3 * IN)  # three rows at a time
    torch.manual_seed(4)
    x = torch.randn(2, T, IN).bfloat16()
    a, router, bias = torch.randn(E * R, IN), torch.randn(E, IN), torch.randn(E)
    h, logits = rank_and_route(x, a, router, bias)
    assert h.dtype == torch.bfloat16 and logits.shape == (2, T, E)
    torch.testing.assert_close(logits, F.linear(x.float(), router, bias), atol=1e-5, rtol=1e-5)
