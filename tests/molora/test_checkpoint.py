"""Adapters on disk: round trips, the official layout, and everything that must be refused by name."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ming_app.errors import AdapterError
from ming_app.molora.checkpoint import Adapter, check_tensors, expected_shapes, load_adapter, save_adapter
from ming_app.molora.config import MoLoRAConfig

BASE = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "model_type": "qwen2",
}
SHARED = Path(__file__).parents[3] / "shared" / "golden" / "tiny_e4k2"


def random_adapter(**changes) -> Adapter:
    config = MoLoRAConfig(**{"num_experts": 3, "top_k": 2, "rank": 4, "alpha": 8.0, **changes})
    rng = np.random.default_rng(0)
    blank = Adapter(config, 2, {})
    shapes = expected_shapes(blank, BASE)
    return Adapter(
        config, 2, {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}, "f" * 64, {"tokens": 5}
    )


def write_official(folder: Path, adapter: Adapter, *, binary: bool = False, prefix: str = "base_model.model.") -> Path:
    """The layout of the released models, written independently of the reader."""
    folder.mkdir(parents=True)
    c = adapter.config
    ffn, attention = {}, {}
    for name, array in adapter.tensors.items():
        _, layer, kind, linear, *part = name.split(".")
        value = torch.from_numpy(array)
        if kind == "attention":
            attention[f"base_model.model.model.layers.{layer}.self_attn.{linear}.lora_{part[0]}.weight"] = value.clone()
            continue
        stem = f"{prefix}model.layers.{layer}.mlp.{linear}_proj"
        if part[0] == "router":
            ffn[f"{stem}.switch.{part[1]}"] = value
        elif part[0] == "shared":
            ffn[f"{stem}.share_experts.lora_{part[1]}.weight"] = value
        else:
            for i in range(c.num_experts):
                ffn[f"{stem}.experts.{i}.lora_{part[0]}_{i}.weight"] = value[i].clone()
    torch.save(ffn, folder / "non_lora_trainables.bin")
    if binary:
        torch.save(attention, folder / "adapter_model.bin")
    else:
        save_file(attention, folder / "adapter_model.safetensors")
    model = {
        **BASE,
        "num_experts": c.num_experts,
        "num_experts_per_token": c.top_k,
        "expert_selection": c.expert_selection,
    }
    peft = {
        "peft_type": "LORA",
        "r": c.rank,
        "lora_alpha": c.alpha,
        "lora_dropout": c.lora_dropout,
        "use_rslora": c.use_rslora,
        "bias": "none",
        "target_modules": list(c.attention_targets),
    }
    (folder / "config.json").write_text(json.dumps(model))
    (folder / "adapter_config.json").write_text(json.dumps(peft))
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_bin(path: Path, change) -> None:
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


def same(a: Adapter, b: Adapter) -> bool:
    return set(a.tensors) == set(b.tensors) and all(np.array_equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


@pytest.mark.parametrize("changes", [{}, {"num_shared_experts": 2}, {"attention_targets": ()}, {"use_rslora": True}])
def test_native_round_trip(tmp_path, changes):
    adapter = random_adapter(**changes)
    save_adapter(tmp_path / "a", adapter, dtype="float32")
    back = load_adapter(tmp_path / "a", base_fingerprint="f" * 64, base_config=BASE)
    assert same(adapter, back) and back.config == adapter.config
    assert back.summary == {"tokens": 5} and back.fingerprint == adapter.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["a"]  # nothing half-written stays


def test_native_bfloat16_is_half_the_size_and_close(tmp_path):
    adapter = random_adapter()
    save_adapter(tmp_path / "a", adapter)
    back = load_adapter(tmp_path / "a")
    name = "layers.0.mlp.gate.A"
    assert np.abs(back.tensors[name] - adapter.tensors[name]).max() <= np.abs(adapter.tensors[name]).max() * 2**-8


def test_saving_over_a_folder_keeps_its_other_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "MODEL_CARD.md").write_text("card")
    save_adapter(tmp_path / "a", random_adapter())
    assert (tmp_path / "a" / "MODEL_CARD.md").read_text() == "card"


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("prefix", ["base_model.model.", "", "base_model."])
def test_official_layout(tmp_path, binary, prefix):
    adapter = random_adapter()
    back = load_adapter(write_official(tmp_path / "o", adapter, binary=binary, prefix=prefix), base_config=BASE)
    assert same(adapter, back) and back.config == adapter.config


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 8, "top_k": 3, "rank": 2},
        {"use_rslora": True},
        {"num_shared_experts": 2},
        {"num_experts": 1, "top_k": 1},
    ],
)
def test_official_variants(tmp_path, changes):
    adapter = random_adapter(**changes)
    assert same(adapter, load_adapter(write_official(tmp_path / "o", adapter), base_config=BASE))


def test_official_defaults_when_config_is_silent(tmp_path):
    folder = write_official(tmp_path / "o", random_adapter(num_experts=4))
    (folder / "config.json").write_text(json.dumps(BASE))
    config = load_adapter(folder).config
    assert (config.num_experts, config.top_k, config.expert_selection, config.use_rslora) == (4, 2, "top_k", False)


def test_rslora_may_stand_in_either_file_and_conflict_is_refused(tmp_path):
    folder = write_official(tmp_path / "o", random_adapter())
    peft = json.loads((folder / "adapter_config.json").read_text())
    peft.pop("use_rslora")
    (folder / "adapter_config.json").write_text(json.dumps(peft))
    edit_json(folder / "config.json", use_rslora=True)
    assert load_adapter(folder).config.use_rslora
    edit_json(folder / "adapter_config.json", use_rslora=False)
    with pytest.raises(AdapterError, match="use_rslora"):
        load_adapter(folder)


SWITCH = "base_model.model.model.layers.1.mlp.up_proj.switch.weight"
EXPERT = "base_model.model.model.layers.0.mlp.gate_proj.experts.1.lora_B_1.weight"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda t: t.pop(SWITCH), "missing.*layers.1.mlp.up.router.weight"),
        (lambda t: t.pop(EXPERT), "missing.*experts.1.lora_B_1"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(3)}), "extra.*model.norm.weight"),
        (lambda t: t.update({SWITCH: torch.zeros(3, 5)}), "layers.1.mlp.up.router.weight has shape"),
        (lambda t: t[SWITCH].fill_(float("nan")), "layers.1.mlp.up.router.weight.*not finite"),
        (lambda t: t.update({EXPERT.replace("experts.1", "experts.2"): torch.ones(2, 2)}), "extra"),
        (lambda t: t.update({SWITCH: torch.zeros(3, 16, dtype=torch.int64)}), "not a floating-point"),
        (lambda t: t.clear(), "missing"),
        (lambda t: t.update({SWITCH: torch.zeros(1).expand(3, 16)}), "plain, whole"),
        (lambda t: t.update({SWITCH: torch.zeros(3, 16, device="meta")}), "plain, whole"),
        (lambda t: t.update({SWITCH.replace("layers.1", "layers.01"): torch.zeros(3, 16)}), "extra"),
    ],
)
def test_tampered_experts_are_refused_by_name(tmp_path, change, names):
    folder = write_official(tmp_path / "o", random_adapter())
    edit_bin(folder / "non_lora_trainables.bin", change)
    with pytest.raises(AdapterError, match=names):
        load_adapter(folder, base_config=BASE)


def test_missing_and_extra_attention_tensors_are_refused(tmp_path):
    folder = write_official(tmp_path / "o", random_adapter())
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, path)
    with pytest.raises(AdapterError, match="missing.*layers.1.attention.q_proj.A"):
        load_adapter(folder)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2)}, path)
    with pytest.raises(AdapterError, match="extra.*lm_head"):
        load_adapter(folder)
    path.unlink()
    with pytest.raises(AdapterError, match="adapter_model"):
        load_adapter(folder)


def test_a_hostile_pickle_is_refused_and_never_run(tmp_path):
    folder = write_official(tmp_path / "o", random_adapter())
    proof = tmp_path / "owned"

    class Attack:
        def __reduce__(self):
            return (os.system, (f"touch {proof}",))

    for hostile in (Attack(), {SWITCH: Attack()}):
        torch.save(hostile, folder / "non_lora_trainables.bin")
        with pytest.raises(AdapterError, match="non_lora_trainables.bin"):
            load_adapter(folder)
        (folder / "non_lora_trainables.bin").write_bytes(pickle.dumps(hostile))
        with pytest.raises(AdapterError, match="non_lora_trainables.bin"):
            load_adapter(folder)
    assert not proof.exists()


@pytest.mark.parametrize("data", [b"", b"garbage", b"PK\x03\x04broken"])
def test_damaged_files_are_refused(tmp_path, data):
    folder = write_official(tmp_path / "o", random_adapter())
    for name in ("non_lora_trainables.bin", "adapter_model.safetensors", "config.json", "adapter_config.json"):
        copy = tmp_path / f"{name}-damaged"
        shutil.copytree(folder, copy)
        (copy / name).write_bytes(data)
        with pytest.raises(AdapterError):
            load_adapter(copy)
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("file", "changes", "names"),
    [
        ("adapter_config.json", {"target_modules": ["q_proj", "gate_proj"]}, "gate_proj"),
        ("adapter_config.json", {"use_dora": True}, "use_dora"),
        ("adapter_config.json", {"rank_pattern": {"q": 2}}, "rank_pattern"),
        ("adapter_config.json", {"r": "4"}, "rank"),
        ("adapter_config.json", {"lora_alpha": float("inf")}, "alpha"),
        ("config.json", {"num_experts_per_token": 9}, "top_k"),
        ("config.json", {"num_experts": 2}, "extra"),
        ("config.json", {"num_experts": 5}, "missing"),
        ("config.json", {"share_expert": True}, "shared experts"),
        ("config.json", {"expert_selection": "magic"}, "expert_selection"),
        ("config.json", {"num_hidden_layers": 3}, "layers"),
        ("adapter_config.json", {"use_rslora": "false"}, "use_rslora"),
        ("adapter_config.json", {"lora_alpha": 10**400}, "alpha"),
        ("adapter_config.json", {"target_modules": []}, "extra"),
    ],
)
def test_inconsistent_configurations_are_refused(tmp_path, file, changes, names):
    folder = write_official(tmp_path / "o", random_adapter())
    edit_json(folder / file, **changes)
    with pytest.raises(AdapterError, match=names):
        load_adapter(folder, base_config=BASE)


@pytest.mark.parametrize("declared", [{"a": 1}, [1], "1", 1.0])
def test_a_number_of_shared_experts_that_is_none_is_refused(tmp_path, declared):
    folder = write_official(tmp_path / "o", random_adapter(num_shared_experts=1))
    edit_json(folder / "config.json", num_share_experts=declared)
    with pytest.raises(AdapterError, match="shared experts"):
        load_adapter(folder)


def test_an_adapter_for_another_base_is_refused(tmp_path):
    save_adapter(tmp_path / "a", random_adapter())
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(tmp_path / "a", base_fingerprint="0" * 64)
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(tmp_path / "a", base_config={**BASE, "num_hidden_layers": 5})
    with pytest.raises(AdapterError, match="shape"):
        load_adapter(tmp_path / "a", base_config={**BASE, "hidden_size": 32})


def test_native_config_of_another_version_or_type_is_refused(tmp_path):
    save_adapter(tmp_path / "a", random_adapter())
    path = tmp_path / "a" / "config.json"
    good = path.read_text()
    for changes in (
        {"schema": 2},
        {"format": "x"},
        {"num_layers": "2"},
        {"molora": []},
        {"molora": {"num_experts": 3, "surprise": 1}},
    ):
        path.write_text(json.dumps({**json.loads(good), **changes}))
        with pytest.raises(AdapterError):
            load_adapter(tmp_path / "a")
    with pytest.raises(AdapterError, match="not an adapter"):
        load_adapter(tmp_path)


def test_messages_come_in_both_languages(tmp_path):
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path)
    assert "适配器" in caught.value.message("zh") and "adapter" in caught.value.message("en")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the golden checkpoint lies outside the repository (../shared)")
def test_golden_checkpoint_is_read_whole():
    base = json.loads((SHARED / "base" / "config.json").read_text())
    adapter = load_adapter(SHARED / "adapter", base_config=base)
    check_tensors(adapter, base)
    assert (adapter.config.num_experts, adapter.config.top_k, adapter.config.rank, adapter.config.scale) == (
        4,
        2,
        8,
        2.0,
    )
