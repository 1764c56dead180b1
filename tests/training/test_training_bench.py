"""The benchmark's variants are what they say: same function where they must be, same tensors of the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ming_app.console import Console
from ming_app.molora.config import MoLoRAConfig
from ming_app.molora.inject import inject_molora
from ming_app.molora.layer import MoLoRALinear
from training.base import load_base
from training.bench import DenseLinear, bench, shared_copy


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MING_CACHE_DIR", str(tmp_path / "cache"))


def test_dense_experts_compute_what_sparse_ones_do(tiny_folder: Path) -> None:
    base = load_base(str(tiny_folder), "cpu", "float32", packing=False)
    config = MoLoRAConfig(num_experts=4, top_k=2, rank=4, alpha=8.0)
    plain = base.model.model.layers[0].mlp.up_proj
    dense = DenseLinear(plain, config)
    sparse = inject_molora(base.model, config).linears[0, "up"]
    assert isinstance(sparse, MoLoRALinear)
    with torch.no_grad():
        for i in range(4):
            dense.B[i].normal_()
            sparse.B[i * 4 : (i + 1) * 4] = dense.B[i].T
            sparse.rank_router.A[1, i * 4 : (i + 1) * 4] = dense.A[i]
        sparse.rank_router.router_weight[1] = dense.router.weight
        sparse.rank_router.router_bias[1] = dense.router.bias
    x = torch.randn(1, 9, 64)
    h = sparse.rank_router(x)
    sparse.rank_router._memo = (x, *h)  # gate is asked first in a model; here it is not asked at all
    torch.testing.assert_close(sparse(x), dense(x), atol=1e-4, rtol=1e-4)


def test_copies_share_the_base(tiny_folder: Path) -> None:
    base = load_base(str(tiny_folder), "cpu", "float32", packing=False)
    other = shared_copy(base.model)
    assert other.lm_head is not base.model.lm_head and other.lm_head.weight is base.model.lm_head.weight


def test_bench_reports_every_variant_and_ratio(tiny_folder: Path) -> None:
    pytest.importorskip("peft")
    result = bench(str(tiny_folder), "float32", 256, 2, (), Console("en", True))
    assert set(result["results"]) == {"molora", "lora", "dense", *(f"molora_E{e}" for e in (2, 4, 8, 16))}
    assert all(r["seconds"] > 0 and r["kept_gb"] > 0 for r in result["results"].values())
    assert result["ratios"]["molora kept / dense kept"] < 1
    assert len(result["ratios"]) == 6
