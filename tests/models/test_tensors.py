"""Safetensors folders: equal to the safetensors library, sharded and in every type; hostile ones refused; conversion."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ming_app.errors import FetchError, UsageError, WeightsError
from ming_app.models import store
from ming_app.models.card import write_card
from ming_app.models.convert import ensure_safetensors
from ming_app.models.fetch import LocalModel
from ming_app.models.gguf import GGUFFile
from ming_app.models.safetensors_file import SafetensorsFile, to_bytes
from ming_app.models.tensors import open_tensors
from tests.models.tiny_gguf import write_gguf

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402 - needs torch

CONFIG = {
    **{"model_type": "qwen2", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32},
    **{"num_attention_heads": 2, "tie_word_embeddings": True},
}
NAMES = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight")


def folder_of(path: Path, dtype, shards: int = 1) -> dict:
    """A small Hugging Face folder; gives its tensors."""
    torch.manual_seed(0)
    shapes = ((16, 8), (8,), (24, 8))
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in zip(NAMES, shapes, strict=True)}
    (path / "config.json").write_text(json.dumps({**CONFIG, "rope_parameters": {"rope_theta": 5e5}}))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return tensors
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(NAMES)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in NAMES if where[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_folder_equals_the_safetensors_library(tmp_path, dtype, shards):
    tensors = folder_of(tmp_path, getattr(torch, dtype), shards)
    with open_tensors(tmp_path) as source:
        assert sorted(source.names()) == sorted(tensors)
        for name, tensor in tensors.items():
            found = source.get(name)
            assert found.dtype == np.float32 and found.flags.c_contiguous and found.flags.writeable
            np.testing.assert_array_equal(found, tensor.float().numpy())
            assert source.shape(name) == tuple(tensor.shape)
            assert source.raw(name) is None
        np.testing.assert_array_equal(source.get("lm_head.weight"), source.get(NAMES[0]))
        assert source.config["rope_theta"] == 5e5


def test_unknown_names_are_key_errors(tmp_path):
    folder_of(tmp_path, torch.float32)
    with open_tensors(tmp_path) as source, pytest.raises(KeyError):
        source.get("model.layers.7.mlp.up_proj.weight")


def test_bfloat16_rounding_equals_torch():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, scale, 2000) for scale in (1e-30, 1e-3, 1, 1e30)]).astype(np.float32)
    halves = np.arange(0x3F800000, 0x3F900000, 0x4000, dtype=np.uint32).view(np.float32)  # exact ties
    values = np.concatenate([values, halves, [0.0, -0.0]]).astype(np.float32)
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert bytes(to_bytes(values, "bfloat16")) == wanted


# ------------------------------------------------------------------------------------------------ hostile files


def table(**entries) -> bytes:
    data = json.dumps(entries).encode()
    return struct.pack("<Q", len(data)) + data + bytes(64)


def entry(dtype="F32", shape=(4,), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"123",
        struct.pack("<Q", 1 << 60) + bytes(64),
        struct.pack("<Q", 200_000_000) + bytes(64),
        struct.pack("<Q", 5) + b"[1,2]" + bytes(64),
        struct.pack("<Q", 5) + b"{nope" + bytes(64),
        struct.pack("<Q", 4000) + b"[" * 4000,
        table(a=entry(offsets=(0, 1 << 60), shape=(1 << 58,))),
        table(a=entry(offsets=(0, 12))),
        table(a=entry(offsets=(-16, 0))),
        table(a=entry(shape=(-4,))),
        table(a=entry(shape=(True, 4))),
        table(a=entry(shape="ab")),
        table(a=entry(dtype="I64", offsets=(0, 32))),
        table(a={"dtype": "F32"}),
        table(a=3),
    ],
)
def test_hostile_safetensors_are_refused(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsError) as caught:
        SafetensorsFile(path)
    assert str(path) in caught.value.zh


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(table(a=entry()))
    inside = tmp_path / "base"
    inside.mkdir()
    (inside / "config.json").write_text(json.dumps(CONFIG))
    for name in ("../secret.safetensors", "/etc/passwd", "model.bin", 3):
        (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(WeightsError):
            open_tensors(inside)


def test_missing_pieces_are_named(tmp_path):
    with pytest.raises(WeightsError, match="config.json"):
        open_tensors(tmp_path)
    folder_of(tmp_path, torch.float32, shards=2)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(WeightsError, match="model-1"):
        open_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match="pickled"):
        open_tensors(tmp_path)


def test_an_index_that_promises_more_than_the_shards_hold_is_refused(tmp_path):
    folder_of(tmp_path, torch.float32, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    table_ = json.loads(index.read_text())
    table_["weight_map"]["model.layers.1.mlp.up_proj.weight"] = "model-0.safetensors"
    index.write_text(json.dumps(table_))
    with pytest.raises(WeightsError, match="layers.1"):
        open_tensors(tmp_path)


def test_a_folder_without_an_embedding_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"lora_A": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="embed_tokens"):
        open_tensors(tmp_path)


# --------------------------------------------------------------------------------------------------- conversion


@pytest.fixture
def local(tmp_path) -> LocalModel:
    gguf = write_gguf(tmp_path / "tiny.gguf")
    home = tmp_path / "cache" / "bases" / "0123456789abcdef"
    write_card(gguf, home, "0123456789abcdef" * 4)
    return LocalModel("tiny", "Tiny", gguf, "0123456789abcdef" * 4, home, None, None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_conversion_holds_the_same_weights(local, dtype):
    steps = []
    folder = ensure_safetensors(local, dtype, steps.append)
    state = load_file(folder / "model.safetensors")
    with open_tensors(local) as source:
        assert set(state) == set(source.names())
        for name in source.names():
            assert torch.equal(state[name], torch.from_numpy(source.get(name)).to(getattr(torch, dtype))), name
    assert steps[-1].stage == "convert" and steps[-1].done == steps[-1].total
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert ensure_safetensors(local, dtype) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_transformers_loads_the_converted_folder(local):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ensure_safetensors(local), dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_stopped_conversion_leaves_nothing_and_starts_again(local):
    def stop(step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_safetensors(local, progress=stop)
    assert not list(local.home.glob("*.safetensors")) and not list(local.home.glob(".*.tmp"))
    assert (ensure_safetensors(local) / "model.safetensors").exists()


def test_what_a_killed_conversion_left_is_removed(local):
    left = local.home / ".model.safetensors.1-1.tmp"
    left.write_bytes(b"half")
    ensure_safetensors(local)
    assert not left.exists()


def test_conversion_refuses_infinities_and_full_disks(local, monkeypatch):
    monkeypatch.setattr(store, "free_bytes", lambda path: 1000)
    with pytest.raises(FetchError, match="full"):
        ensure_safetensors(local)
    monkeypatch.undo()
    with GGUFFile(local.base) as file:
        place = file.tensors["blk.0.attn_norm.weight"].offset
    with local.base.open("r+b") as out:
        out.seek(place)
        out.write(struct.pack("<f", float("inf")))
    with pytest.raises(WeightsError, match="layers.0.input_layernorm"):
        ensure_safetensors(local)
    assert not list(local.home.glob("*.safetensors"))
    with pytest.raises(UsageError):
        ensure_safetensors(local, "int4")


def test_a_folder_base_is_its_own_conversion(tmp_path):
    folder_of(tmp_path, torch.float32)
    local = LocalModel("x", "X", tmp_path, "0" * 64, tmp_path, None, None)
    assert ensure_safetensors(local) == tmp_path


def test_reading_weights_imports_neither_torch_nor_transformers():
    code = (
        "import sys, ming_app.models.tensors, ming_app.models.fetch, ming_app.models.card, ming_app.models.preflight, "
        "ming_app.models.convert, ming_app.models.weights_cli; print([m for m in ('torch','transformers','gradio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
