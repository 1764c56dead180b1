"""Preflight: estimates against known sizes, limits of containers, and refusals that name what would fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ming_app.errors import PreflightError
from ming_app.models.catalog import find_model
from ming_app.models.preflight import PRECISIONS, Machine, available_memory, estimate, measure_machine, preflight
from ming_app.molora.config import MoLoRAConfig
from ming_app.settings import Settings

SMALL, LARGE = find_model("ming-moe-0.5b").shape, find_model("ming-moe-14b").shape
GB = 10**9


def test_larger_precision_context_and_adapter_cost_more():
    for backend, precisions in PRECISIONS.items():
        needs = [estimate(SMALL, backend, precision, 4096).ram for precision in precisions]
        assert needs == sorted(needs, reverse=True)
    bare = estimate(SMALL, "cpu", "4bit", 4096).ram
    assert estimate(SMALL, "cpu", "4bit", 8192).ram - bare == 24 * 2 * 128 * 2 * 4096
    few, many = (estimate(SMALL, "cpu", "4bit", 4096, MoLoRAConfig(num_experts=e, top_k=2)).ram for e in (4, 8))
    assert bare < few < many


def test_weights_are_counted_exactly():
    """float32 of the 0.5B: 4 bytes for each of its 630 million weights (biases and norms are noise)."""
    parameters = 630_167_424
    held = (
        estimate(SMALL, "torch", "float32", 64).ram
        - estimate({**SMALL, "num_hidden_layers": 0, "vocab_size": 0}, "torch", "float32", 64).ram
    )
    assert held == pytest.approx(4 * parameters + 151936 * 896 * 4, rel=0.01)  # and one embedding on its way in


def test_a_gpu_needs_vram_and_a_cpu_does_not():
    assert estimate(SMALL, "torch", "nf4", 4096).vram == 0
    on_gpu = estimate(SMALL, "torch", "nf4", 4096, device="cuda")
    assert GB < on_gpu.vram < 3 * GB


@pytest.mark.parametrize("precision, ffn_bytes", [("4bit", 0.578), ("mix", (2 * 0.578 + 1.0625) / 3), ("8bit", 1.0625)])
def test_recipes_of_the_engine_are_counted(precision, ffn_bytes):
    """One more layer of the 0.5B, counted by hand: 8-bit attention, FFN as the recipe says; no cache at context 0."""
    one, two = (estimate({**SMALL, "num_hidden_layers": n}, "cpu", precision, 0).disk for n in (1, 2))
    attention, ffn = 2 * 896 * (896 + 128), 3 * 896 * 4864
    assert two - one == pytest.approx(attention * 1.0625 + ffn * ffn_bytes, abs=1)


def check(config, backend="cpu", precision="8bit", device="cpu", built=False, kv_tokens=0, **machine):
    free = Machine(**{"disk": 10**15, "ram": 10**15, **machine})
    settings = Settings(kv_tokens=kv_tokens)
    return preflight(config, backend, precision, settings, device=device, machine=free, built=built)


def test_what_fits_passes():
    need = check(SMALL)
    assert 0 < need.ram < 2 * GB and need.disk > 0
    assert check(SMALL, built=True, disk=0).disk == 0
    assert check(SMALL, disk=None, ram=None).ram == need.ram


def test_a_precision_that_fits_is_named():
    with pytest.raises(PreflightError) as caught:
        check(LARGE, precision="8bit", ram=16 * GB)
    assert "memory" in caught.value.en and "16.00 GB" in caught.value.en and "--precision 4bit" in caught.value.en
    assert "内存" in caught.value.zh and "--precision 4bit" in caught.value.zh


def test_a_smaller_model_is_named_when_no_precision_fits():
    with pytest.raises(PreflightError) as caught:
        check(LARGE, precision="4bit", ram=int(2.5 * GB))
    assert "--model ming-moe-1.5b --precision 4bit" in caught.value.en


def test_nothing_fits():
    with pytest.raises(PreflightError) as caught:
        check(SMALL, ram=10**6)
    assert "No model" in caught.value.en and "没有" in caught.value.zh


def test_disk_and_gpu_memory_are_named():
    with pytest.raises(PreflightError, match="disk space"):
        check(SMALL, disk=10**6)
    with pytest.raises(PreflightError) as caught:
        check(LARGE, "torch", "bf16", "cuda", vram=20 * GB)
    assert "GPU memory" in caught.value.en and "--backend torch --precision int8" in caught.value.en


def test_a_close_call_is_let_through():
    need = estimate(SMALL, "cpu", "8bit", 4096).ram  # one context
    assert check(SMALL, ram=int(need * 0.95)).kv_tokens == 4096
    with pytest.raises(PreflightError):
        check(SMALL, ram=int(need * 0.85))


@pytest.mark.parametrize(
    ("backend", "precision", "device", "kind"), [("cpu", "4bit", "cpu", "ram"), ("torch", "nf4", "cuda", "vram")]
)
def test_the_cache_holds_as_many_contexts_as_fit(backend, precision, device, kind):
    """A 14B in nf4 beside four contexts needs 28 GB of a GPU; on one of 24 GB it serves with fewer."""
    needs = {n: getattr(estimate(LARGE, backend, precision, n * 4096, None, device), kind) for n in (1, 2, 3, 4)}
    for n, room in needs.items():
        found = check(LARGE, backend, precision, device, **{kind: room})
        assert found.kv_tokens == n * 4096 and getattr(found, kind) == room
    assert check(LARGE, backend, precision, device, **{kind: needs[4] - 1}).kv_tokens == 3 * 4096


def test_a_cache_that_was_asked_for_is_counted():
    assert check(SMALL, kv_tokens=10_000).kv_tokens == 10_000 and check(SMALL, kv_tokens=5).kv_tokens == 4096
    need = estimate(SMALL, "cpu", "8bit", 100_000).ram
    with pytest.raises(PreflightError, match="memory"):
        check(SMALL, kv_tokens=100_000, ram=int(need * 0.8))


def test_the_context_of_the_model_caps_the_setting():
    config = {**SMALL, "max_position_embeddings": 512}
    assert check(config).ram < check({**SMALL, "max_position_embeddings": 32768}).ram


def test_the_golden_base_fits(golden: Path):
    config = json.loads((golden / "base" / "config.json").read_text())
    assert preflight(config, "torch", "float32", Settings()).ram < 2 * GB


# --------------------------------------------------------------------------------------------------- containers


def cgroup(root: Path, line: str, folder: str, **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(line + "\n")
    place = root / "sys/fs/cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name.replace("__", ".")).write_text(text)
    return root


def test_cgroup_v2_limits_memory(tmp_path):
    root = cgroup(
        tmp_path,
        "0::/a/b",
        "a",
        memory__max="1000000",
        memory__current="600000",
        memory__stat="anon 1\ninactive_file 100000\n",
    )
    cgroup(root, "0::/a/b", "a/b", memory__max="max", memory__current="5", memory__stat="")
    assert available_memory(root) == 500_000


def test_cgroup_v1_limits_memory_even_with_the_path_of_the_host(tmp_path):
    root = cgroup(
        tmp_path,
        "4:cpu,memory:/docker/0123",
        "memory",
        memory__limit_in_bytes="2000000",
        memory__usage_in_bytes="500000",
        memory__stat="total_inactive_file 0\n",
    )
    assert available_memory(root) == 1_500_000


def test_no_limit_and_no_cgroup_give_the_memory_of_the_system(tmp_path):
    system = available_memory(tmp_path)
    root = cgroup(tmp_path, "0::/", "", memory__max="max", memory__current="5", memory__stat="")
    assert system > 10**6 and available_memory(root) > 10**6


def test_measuring_needs_no_cache_folder_and_no_torch(tmp_path):
    machine = measure_machine(tmp_path / "not" / "there", "cuda")
    assert machine.disk and machine.ram
