"""The MoLoRA linear against a per-token, per-expert reference written straight from the formula."""

import itertools
import math

import pytest
import torch
from torch import nn

from ming_app.molora.config import PROJECTIONS, MoLoRAConfig
from ming_app.molora.inject import inject_molora
from ming_app.molora.layer import GateTensors, LoRALinear, MoLoRALinear, RankRouter, RoutingState, select_experts


def config(**changes) -> MoLoRAConfig:
    return MoLoRAConfig(**{"num_experts": 4, "top_k": 2, "rank": 3, "alpha": 12.0, "attention_targets": (), **changes})


def make(c: MoLoRAConfig, n_in: int = 10, n_out: int = 7, base: nn.Module | None = None) -> MoLoRALinear:
    torch.manual_seed(0)
    linear = MoLoRALinear(
        base or nn.Linear(n_in, n_out), RankRouter(n_in, 1, c), 0, 0, "gate", RoutingState(capture=True)
    )
    nn.init.normal_(linear.B)
    return linear.eval()


def by_the_formula(linear: MoLoRALinear, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """float64, one token and one expert at a time."""
    c, rr = linear.config, linear.rank_router
    a = rr.A[0].double().view(-1, c.rank, x.shape[-1])
    b = linear.B.double().view(-1, c.rank, linear.out_features)
    rows = []
    for token in x.reshape(-1, x.shape[-1]).double():
        logits = (rr.router_weight[0].double() @ token + rr.router_bias[0].double()).detach()
        logits = logits if bias is None else logits + bias
        chosen = sorted(range(c.num_experts), key=lambda e: -float(logits[e]))[: c.top_k]
        total = sum(math.exp(logits[e]) for e in chosen)
        y = linear.base_layer.double()(token)
        for e in chosen:
            y = y + c.scale * math.exp(logits[e]) / total * (b[e].T @ (a[e] @ token))
        for n in range(c.num_shared_experts):
            y = y + c.scale * (b[c.num_experts + n].T @ (a[c.num_experts + n] @ token))
        rows.append(y)
    linear.base_layer.float()
    return torch.stack(rows).view(*x.shape[:-1], -1)


CASES = [
    {},
    {"num_experts": 1, "top_k": 1},
    {"num_experts": 8, "top_k": 8, "rank": 1},
    {"num_experts": 7, "top_k": 3, "rank": 5, "use_rslora": True},
    {"num_shared_experts": 2},
]


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_equals_the_formula_in_dense_and_gathered_form(changes, tokens):
    linear = make(config(**changes))
    x = torch.randn(tokens, 10)
    with torch.no_grad():
        fast = linear(x)
    with torch.enable_grad():
        dense = linear(x)  # with gradients on, the dense form serves even few tokens
        want = by_the_formula(linear, x)
    assert (fast - want).abs().max() < 1e-4
    assert (dense - want).abs().max() < 1e-4


def test_rows_of_a_batch_give_what_they_give_alone():
    linear = make(config())
    x = torch.randn(3, 20, 10)
    with torch.no_grad():
        together = linear(x)
        assert linear._state.experts[0, 0].shape == (3, 20, 2)
        for row in range(3):
            torch.testing.assert_close(together[row], linear(x[row : row + 1])[0])
            torch.testing.assert_close(together[row, 5], linear(x[row, 5:6])[0])


def test_router_bias_bans_and_forces_per_row():
    linear = make(config())
    x = torch.randn(2, 30, 10)
    bias = torch.zeros(2, 1, 3, 4)
    bias[0, 0, 0, 1] = -1e9
    bias[1, 0, 0, 3] = 1e4
    linear._state.bias = bias
    with torch.no_grad():
        y = linear(x)
    experts = linear._state.experts[0, 0]
    assert not (experts[0] == 1).any()
    assert (experts[1, :, 0] == 3).all()
    assert (y[0] - by_the_formula(linear, x[0], bias[0, 0, 0])).abs().max() < 1e-4


def test_weights_are_sorted_by_logit_and_sum_to_one():
    linear = make(config(top_k=3))
    with torch.no_grad():
        linear(torch.randn(40, 10))
    weights = linear._state.weights[0, 0]
    assert weights.dtype == torch.float32
    assert (weights.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(40))


def test_router_runs_in_float32_under_bf16():
    linear = make(config(), base=nn.Linear(10, 7, dtype=torch.bfloat16))
    x = torch.randn(64, 10).bfloat16()
    with torch.no_grad():
        y = linear(x)
    assert y.dtype == torch.bfloat16
    assert linear._state.weights[0, 0].dtype == torch.float32
    logits = x.float() @ linear.rank_router.router_weight[0].T + linear.rank_router.router_bias[0]
    assert (linear._state.experts[0, 0] == logits.topk(2).indices).all()


def test_sampling_draws_by_softmax_without_repeats():
    c = config(expert_selection="sampling")
    linear = make(c)
    linear._state.generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 10).expand(4000, 10)
    with torch.no_grad():
        linear(x)
    experts = linear._state.experts[0, 0]
    assert (experts[:, 0] != experts[:, 1]).all()
    p = (x[:1] @ linear.rank_router.router_weight[0].T + linear.rank_router.router_bias[0]).softmax(-1)[0]
    drawn = torch.stack([(experts == e).any(-1).float().mean() for e in range(4)])
    want = torch.stack([p[e] + sum(p[o] * p[e] / (1 - p[o]) for o in range(4) if o != e) for e in range(4)])
    assert (drawn - want).abs().max() < 0.04


def test_sampling_never_draws_a_banned_expert():
    c = config(expert_selection="sampling")
    logits = torch.tensor([2.0, -1e9, 0.0, -1e9]).expand(500, 4)
    experts, _ = select_experts(logits, c, torch.Generator().manual_seed(1))
    assert set(experts.flatten().tolist()) == {0, 2}


def test_gradient_reaches_every_adapter_tensor_and_not_the_base():
    linear = make(config(top_k=4)).train()
    linear(torch.randn(20, 10)).pow(2).sum().backward()
    rr = linear.rank_router
    linear.base_layer.requires_grad_(False)
    for tensor in (rr.A, rr.router_weight, rr.router_bias, linear.B):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


def test_wraps_any_linear():
    class Packed(nn.Module):
        in_features, out_features = 10, 7

        def forward(self, x):
            return x[..., :7] * 2

    linear = make(config(), base=Packed())
    nn.init.zeros_(linear.B)
    x = torch.randn(3, 10)
    torch.testing.assert_close(linear(x), x[..., :7] * 2)


def tiny(family: str) -> nn.Module:
    import transformers as tf

    common = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(1)
    if family == "gemma":
        return tf.GemmaForCausalLM(tf.GemmaConfig(**common, head_dim=8)).eval()
    return getattr(tf, f"{family}ForCausalLM")(getattr(tf, f"{family}Config")(**common)).eval()


@pytest.mark.parametrize("family", ["Qwen2", "Llama", "Mistral", "gemma"])
def test_injection_by_structure_leaves_a_fresh_model_unchanged(family):
    model = tiny(family)
    ids = torch.randint(0, 64, (2, 9))
    before = model(ids).logits
    injected = inject_molora(model, config(attention_targets=("q_proj", "v_proj")))
    assert set(injected.linears) == {(layer, p) for layer in range(2) for p in PROJECTIONS}
    torch.testing.assert_close(model(ids).logits, before)
    assert all(not p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in injected.adapter_parameters()}


def test_gate_and_up_share_one_rank_gemm(monkeypatch):
    injected = inject_molora(tiny("Qwen2"), config())
    calls = []
    original = RankRouter.forward
    monkeypatch.setattr(RankRouter, "forward", lambda self, x: calls.append(self.slots) or original(self, x))
    injected.model(torch.randint(0, 64, (1, 5)))
    assert calls == [2, 1, 2, 1]  # per layer: gate and up together, then down


def gates_of(c: MoLoRAConfig, rows: int = 1, **changes) -> GateTensors:
    plain = {
        "top_k": torch.full((rows, 1, 3), c.top_k),
        "uniform": torch.zeros(rows, 1, 3, dtype=torch.bool),
        "strength": torch.ones(rows, 1, 3),
        "attention": torch.ones(rows, 1),
    } | changes
    return GateTensors(**plain, largest_k=int(plain["top_k"].max()))


@pytest.mark.parametrize("tokens", [1, 50])
def test_gates_change_k_weights_and_strength_per_row(tokens):
    c = config()
    linear, x = make(c), torch.randn(4, tokens, 10)
    uniform = torch.tensor([False, False, True, False])[:, None, None].expand(4, 1, 3)
    top_k = torch.tensor([2, 1, 4, 2])[:, None, None].expand(4, 1, 3)
    strength = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None, None].expand(4, 1, 3)
    linear._state.gates = gates_of(c, 4, uniform=uniform, top_k=top_k, strength=strength)
    with torch.no_grad():
        y = linear(x).double()
    weights = linear._state.weights[0, 0]
    assert weights.shape == (4, tokens, 4) and (weights[0, :, 2:] == 0).all() and (weights[1, :, 0] == 1).all()
    assert torch.allclose(y[0], by_the_formula(make(c), x[0]), atol=1e-4)
    assert torch.allclose(y[1], by_the_formula(make(config(top_k=1)), x[1]), atol=1e-4)
    a = linear.rank_router.A[0].view(4, c.rank, 10)
    b = linear.B.view(4, c.rank, 7)
    mean = sum(x[2] @ a[e].T @ b[e] for e in range(4)) / 4
    base = linear.base_layer(x)
    assert torch.allclose(y[2].float(), base[2] + c.scale * mean, atol=1e-4)
    assert torch.allclose(y[3].float(), base[3], atol=1e-6)


def test_contributions_are_the_norms_of_what_each_expert_adds():
    c = config()
    linear, x = make(c), torch.randn(2, 5, 10)
    linear._state.measure = True
    with torch.no_grad():
        linear(x)
        base = linear.base_layer(x)
    state, a, b = linear._state, linear.rank_router.A[0].view(4, c.rank, 10), linear.B.view(4, c.rank, 7)
    for row, token, rank in itertools.product(range(2), range(5), range(2)):
        expert = int(state.experts[0, 0][row, token, rank])
        added = c.scale * state.weights[0, 0][row, token, rank] * (b[expert].T @ (a[expert] @ x[row, token]))
        expected = float((added.norm() / base[row, token].norm()).detach())
        assert float(state.contributions[0, 0][row, token, rank]) == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(state.probabilities[0, 0].sum(-1), torch.ones(2, 5))


def test_attention_lora_follows_its_strength_per_row():
    torch.manual_seed(1)
    c = config(attention_targets=("q_proj",))
    state = RoutingState()
    lora = LoRALinear(nn.Linear(6, 5), c, None, 0, state)
    nn.init.normal_(lora.B)
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        whole, base = lora(x), lora.base_layer(x)
        state.gates = gates_of(c, 2, attention=torch.tensor([[1.0], [0.0]]))
        gated = lora(x)
    assert (
        torch.allclose(gated[0], whole[0])
        and torch.allclose(gated[1], base[1])
        and not torch.allclose(whole[1], base[1])
    )
