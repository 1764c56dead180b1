"""Building the CPU engine: whole or not at all, keyed, damage found, unsupported bases and adapters refused."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cpu_tiny import DictSource, llama, qwen2, with_adapter

from ming_app.engine.backends.native import build as native_build
from ming_app.engine.backends.native.backend import NativeBackend
from ming_app.engine.backends.native.build import build_engine
from ming_app.engine.backends.native.spec import RECIPES, BaseShape, Manifest, Rope, engine_key
from ming_app.errors import AdapterError, MingError, UsageError, WeightsError
from ming_app.molora.config import MoLoRAConfig

FILES = ["embeddings.npy", "manifest.json", "weights.bin"]


@pytest.fixture(scope="module")
def parts():
    model = qwen2()
    source = DictSource(model)
    return source, with_adapter(model, MoLoRAConfig(4, 2, 4, 8.0))[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_builds_every_recipe_with_progress(parts, tmp_path, recipe):
    source, adapter = parts
    seen = []
    folder = build_engine(source, adapter, recipe, tmp_path / "deep" / "engine", seen.append, base_fingerprint="ab")
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert [p.name for p in folder.parent.iterdir()] == ["engine"]
    assert seen[-1].done == seen[-1].total == 4 and seen[0].stage == "build"
    backend = NativeBackend.open(folder, threads=1, max_context=99)
    assert (backend.precision, backend.num_experts, backend.top_k, backend.num_layers) == (recipe, 4, 2, 2)
    assert (backend.max_context, backend.vocab_size) == (99, 160)
    assert backend.manifest.molora == adapter.config
    assert (backend.manifest.base_fingerprint, backend.manifest.adapter_fingerprint) == ("ab", adapter.fingerprint)
    step = backend.forward([np.arange(5)], backend.new_cache(1, 9))
    assert np.isfinite(step.logits).all()


def test_key_changes_with_everything():
    keys = {engine_key(base, adapter, recipe) for base in "ab" for adapter in (None, "x", "y") for recipe in RECIPES}
    assert len(keys) == 18
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in keys)
    assert engine_key("a", "x", "mix") == engine_key("a", "x", "mix")
    with pytest.raises(UsageError):
        engine_key("a", None, "3bit")


def test_opening_needs_no_torch(parts, tmp_path):
    folder = build_engine(*parts, "8bit", tmp_path / "engine")
    code = (
        "import sys, numpy as np\n"
        "from ming_app.engine.backends.native.backend import NativeBackend\n"
        f"b = NativeBackend.open({str(folder)!r})\n"
        "b.forward([np.array([1, 2])], b.new_cache(1, 8))\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def rewrite(folder: Path, **changes) -> None:
    """Puts other values into the manifest, with a digest that fits."""
    replace(Manifest.read(folder), **changes).write(folder)


@pytest.mark.parametrize("damage", ["missing", "short", "manifest", "altered", "version", "tables", "empty"])
def test_damage_is_found_and_told(parts, tmp_path, damage):
    folder = build_engine(*parts, "4bit", tmp_path / "engine")
    manifest = folder / "manifest.json"
    if damage == "missing":
        (folder / "embeddings.npy").unlink()
    elif damage == "short":
        with open(folder / "weights.bin", "r+b") as file:
            file.truncate(1000)
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "altered":
        manifest.write_text(manifest.read_text().replace('"layers": 2', '"layers": 3'))
    elif damage == "version":
        rewrite(folder, format=1)
    elif damage == "tables":  # a kernel that trusted this would read past the end of the file
        matrices = [list(row) for row in Manifest.read(folder).matrices]
        matrices[3][0] = (folder / "weights.bin").stat().st_size - 100
        rewrite(folder, matrices=matrices)
    else:
        for file in folder.iterdir():
            file.unlink()
    with pytest.raises(WeightsError) as caught:
        NativeBackend.open(folder)
    assert str(folder) in caught.value.en and str(folder) in caught.value.zh


def test_failed_build_leaves_nothing_and_keeps_what_was_there(parts, tmp_path, monkeypatch):
    source, adapter = parts
    folder = build_engine(source, adapter, "8bit", tmp_path / "engine")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(native_build, "_write_embeddings", full)
    for target in (folder, tmp_path / "other"):
        with pytest.raises(MingError, match="no room") as caught:
            build_engine(source, adapter, "8bit", target)
        assert "磁盘空间不足" in caught.value.zh
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]
    NativeBackend.open(folder)


def test_stopping_a_build_leaves_nothing(parts, tmp_path):
    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(*parts, "8bit", tmp_path / "engine", stop)
    assert list(tmp_path.iterdir()) == []


def test_rebuilding_replaces_a_damaged_folder(parts, tmp_path):
    folder = build_engine(*parts, "8bit", tmp_path / "engine")
    (folder / "weights.bin").write_bytes(b"")
    build_engine(*parts, "8bit", folder)
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]
    NativeBackend.open(folder)


def test_sampling_selection_is_refused(parts, tmp_path):
    source, _ = parts
    sampling = with_adapter(qwen2(), MoLoRAConfig(4, 2, 4, 8.0, expert_selection="sampling"))[1]
    with pytest.raises(AdapterError, match="sampling"):
        build_engine(source, sampling, "8bit", tmp_path / "engine")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": True}, "sliding"),
        ({"head_dim": 24}, "head size"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        ({"hidden_size": None}, "config.json"),
        ({"rms_norm_eps": 10**400}, "config.json"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": float("inf"),
                }
            },
            "config.json",
        ),
    ],
)
def test_unsupported_bases_are_refused_by_name(tmp_path, change, word):
    source = DictSource(qwen2())
    source.config.update(change)
    with pytest.raises(WeightsError, match=word):
        build_engine(source, None, "8bit", tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_and_misshapen_tensors_are_refused(tmp_path):
    for change, word in (("drop", "lacks"), ("add", "q_norm"), ("shape", "shape"), ("bias", "shape")):
        source = DictSource(qwen2())
        name = "model.layers.1.self_attn.q_proj.weight"
        if change == "drop":
            del source._tensors[name]
        elif change == "add":
            source._tensors["model.layers.0.self_attn.q_norm.weight"] = source._tensors[name][0]
        else:
            name = name.replace("weight", change) if change == "bias" else name
            source._tensors[name] = source._tensors[name][:-1]
        with pytest.raises(WeightsError, match=word):
            build_engine(source, None, "8bit", tmp_path / "engine")


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rope_tables_equal_transformers(kind):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    entries = {"rope_type": kind, "rope_theta": 5e5}
    if kind != "default":
        entries["factor"] = 4.0
    if kind == "llama3":
        entries |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = llama(rope_parameters=entries)
    shape = BaseShape.from_config(model.config.to_dict())
    assert shape.rope.kind == kind
    import torch

    cos, sin = LlamaRotaryEmbedding(model.config)(torch.zeros(1, 300, 4), torch.arange(300)[None])
    ours = shape.rope.tables(shape.head_dim, 300)
    np.testing.assert_allclose(ours[0], cos[0, :, : shape.head_dim // 2].numpy(), atol=2e-4)
    np.testing.assert_allclose(ours[1], sin[0, :, : shape.head_dim // 2].numpy(), atol=2e-4)


def test_old_style_config_is_read():
    old = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    shape = BaseShape.from_config(old | {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert shape.rope == Rope(theta=1e6, kind="linear", factor=2.0)
    assert (shape.kv_heads, shape.head_dim, shape.tied) == (4, 16, False)


def test_kernels_are_kept_by_their_version(tmp_path, monkeypatch):
    from ming_app.engine.backends import native

    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    (tmp_path / "kernels" / "0123").mkdir(parents=True)
    first = native.own_folder(tmp_path)
    assert [one.name for one in first.parent.iterdir()] == [first.name] and first.is_relative_to(tmp_path)
    (first / "code").write_text("x")
    assert native.own_folder(tmp_path) == first and (first / "code").exists()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "elsewhere" / "__init__.py"))  # other sources
    assert native.own_folder(tmp_path) != first and not first.exists()
    file = tmp_path / "file"
    file.write_text("")
    assert "ming-kernels-" in native.own_folder(file).name  # cannot be written
