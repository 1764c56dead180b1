"""GGUF reading: equal to the gguf package and to transformers; hostile and damaged files refused in words."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from ming_app.errors import WeightsError
from ming_app.models import gguf as gguf_module
from ming_app.models.gguf import GGUFFile
from ming_app.models.tensors import open_tensors
from tests.models.tiny_gguf import HIDDEN, KV_HEADS, LAYERS, VOCAB, write_gguf


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-qwen2.gguf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-llama.gguf", "llama", tied=True)


def test_every_tensor_equals_the_gguf_package(qwen2, monkeypatch):
    monkeypatch.setattr(gguf_module, "CHUNK", 3000)  # several chunks per tensor
    with GGUFFile(qwen2) as file:
        reference = GGUFReader(qwen2)
        assert set(file.tensors) == {tensor.name for tensor in reference.tensors}
        for tensor in reference.tensors:
            wanted = dequantize(tensor.data, tensor.tensor_type).reshape(file.tensors[tensor.name].shape)
            found = file.get(tensor.name)
            assert found.dtype == np.float32 and found.flags.c_contiguous
            np.testing.assert_array_equal(found, wanted)
            blocks, type_name = file.raw(tensor.name)
            assert type_name == tensor.tensor_type.name
            assert blocks.tobytes() == tensor.data.tobytes()


def test_metadata_equals_the_gguf_package(qwen2):
    with GGUFFile(qwen2) as file:
        for field in GGUFReader(qwen2).fields.values():
            if not field.name.startswith("GGUF."):
                assert file.metadata[field.name] == field.contents()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_names_layout_and_config_equal_transformers(family, qwen2, llama):
    """transformers dequantises GGUF files with its own names, permutation and config: an independent reading."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    path = {"qwen2": qwen2, "llama": llama}[family]
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with open_tensors(path) as source:
        state = model.state_dict()
        for name in source.names():
            np.testing.assert_allclose(source.get(name), state[name].numpy(), atol=1e-7, err_msg=name)
            assert source.shape(name) == tuple(state[name].shape)
            assert np.concatenate(list(source.rows(name))).tobytes() == source.get(name).tobytes()
        assert set(state) - set(source.names()) <= {"lm_head.weight"}
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
            assert source.config[key] == getattr(model.config, key)
        assert source.config["rms_norm_eps"] == 1e-6
        assert source.config["rope_theta"] == 1e6


def test_raw_blocks_follow_hugging_face_row_order(llama):
    with open_tensors(llama) as source:
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
            blocks, type_name = source.raw(name)
            values = dequantize(np.ascontiguousarray(blocks), GGMLQuantizationType[type_name])
            np.testing.assert_array_equal(values, source.get(name))


def test_tied_head_gives_the_embedding(llama):
    with open_tensors(llama) as source:
        assert source.config["tie_word_embeddings"] is True
        assert "lm_head.weight" not in source.names()
        np.testing.assert_array_equal(source.get("lm_head.weight"), source.get("model.embed_tokens.weight"))
        assert source.shape("lm_head.weight") == (VOCAB, HIDDEN)


# ------------------------------------------------------------------------------------------------ hostile files


def refuse(path: Path) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        open_tensors(path).close()
    assert str(path) in caught.value.en and str(path) in caught.value.zh
    return caught.value


def header(tensors: int = 0, keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


HUGE = 1 << 60
KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"PK\x03\x04" + bytes(100),
        header(version=1),
        header(version=0x03000000),
        header(tensors=HUGE),
        header(keys=HUGE),
        header(tensors=5, rest=bytes(24)),
        header(keys=1, rest=struct.pack("<Q", HUGE) + bytes(64)),
        header(keys=1, rest=KEY + struct.pack("<I", 99) + bytes(64)),
        header(keys=1, rest=KEY + struct.pack("<IQ", 8, HUGE) + bytes(64)),
        header(keys=1, rest=KEY + struct.pack("<IIQ", 9, 8, HUGE) + bytes(64)),
        header(keys=1, rest=KEY + struct.pack("<IIQ", 9, 4, 3_000_000) + bytes(64)),
        header(keys=1, rest=KEY + struct.pack("<IIQ", 9, 9, 1) + bytes(64)),
        header(keys=1, rest=struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1) + bytes(64)),
        header(keys=2, rest=(KEY + struct.pack("<IB", 0, 1)) * 2 + bytes(64)),
        header(tensors=1, rest=KEY + struct.pack("<I", 0) + bytes(64)),
        header(tensors=1, rest=KEY + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0) + bytes(64)),
        header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 0, 0, 0) + bytes(64)),
        header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 4, 12345, 0) + bytes(64)),
        header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(64)),
        header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 4, 0, 7) + bytes(64)),
        header(tensors=1, rest=KEY + struct.pack("<IQIQ", 1, 4, 0, HUGE) + bytes(64)),
        header(tensors=2, rest=(KEY + struct.pack("<IQIQ", 1, 4, 0, 0)) * 2 + bytes(64)),
    ],
)
def test_hostile_headers_are_refused(tmp_path, data):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    refuse(path)


def test_a_file_cut_anywhere_is_refused(qwen2, tmp_path):
    whole = qwen2.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in np.linspace(1, len(whole) - 1, 60, dtype=int):
        cut.write_bytes(whole[:size])
        refuse(cut)


def test_flipped_header_bytes_never_escape_as_another_error(qwen2, tmp_path):
    whole = bytearray(qwen2.read_bytes())
    rng = np.random.default_rng(5)
    path = tmp_path / "flipped.gguf"
    for at in rng.integers(0, 14_000, 120):
        kept = whole[at]
        whole[at] ^= int(rng.integers(1, 256))
        path.write_bytes(whole)
        with contextlib.suppress(WeightsError):
            open_tensors(path).close()
        whole[at] = kept


def drop_tensor(writer, data) -> None:
    del data["blk.1.ffn_up.weight"]


def add_tensor(writer, data) -> None:
    data["blk.0.ffn_gate_exps.weight"] = data["blk.0.ffn_up.weight"]


def reshape_tensor(writer, data) -> None:
    data["output_norm.weight"] = (np.ones(HIDDEN // 2, np.float32), GGMLQuantizationType.F32)


def scaled_rope(writer, data) -> None:
    data["rope_freqs.weight"] = (np.ones(32, np.float32), GGMLQuantizationType.F32)


def too_many_layers(writer, data) -> None:
    writer.add_block_count(LAYERS + 1)


def odd_heads(writer, data) -> None:
    writer.add_head_count_kv(KV_HEADS + 1)


def float_layers(writer, data) -> None:
    writer.add_float32("qwen2.block_count", 2.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (drop_tensor, "missing"),
        (add_tensor, "unexpected"),
        (reshape_tensor, "shape"),
        (scaled_rope, "Hugging Face folder"),
        (too_many_layers, "missing"),
        (odd_heads, "do not fit"),
        (float_layers, "block_count"),
    ],
)
def test_wrong_contents_are_named(tmp_path, change, word):
    assert word in refuse(write_gguf(tmp_path / "bad.gguf", change=change)).en


def test_other_families_are_refused_by_name(tmp_path):
    assert "mamba" in refuse(write_gguf(tmp_path / "bad.gguf", "mamba")).en


def test_a_type_that_cannot_be_read_is_named(tmp_path):
    def change(writer, data) -> None:
        data["output_norm.weight"] = (np.ones(HIDDEN, np.int32).view(np.float32), GGMLQuantizationType.I32)

    with (
        open_tensors(write_gguf(tmp_path / "int.gguf", change=change)) as source,
        pytest.raises(WeightsError, match="I32"),
    ):
        source.get("model.norm.weight")


def test_an_unreadable_path_is_refused(tmp_path):
    refuse(tmp_path / "missing.gguf")
