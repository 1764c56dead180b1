"""Small files that would fill the memory or never end: each is refused in seconds, in little memory."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import openpyxl
import pytest

from ming_app.errors import MingError
from ming_app.molora.checkpoint import load_adapter
from ming_app.molora.trace import RouterTrace
from ming_app.reading import read_bounded

ROOT = Path(__file__).parents[2]
MOST = 300  # MiB that one bomb may cost; the bombs of this file would cost gigabytes
SECONDS = 25.0
HEADER = {
    "format": "ming-router-trace",
    "schema": 2,
    "model": "",
    "fingerprint": "",
    "num_experts": 4,
    "projections": ["gate", "up", "down"],
    "config": {},
    "segments": [],
    "tokens": [],
}


def packed(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def wide_json_trace() -> bytes:
    """A text among a million numbers: an array of numpy's own choosing would have room for it in every cell."""
    cells = ", ".join(["0"] * 1_000_000)
    return (json.dumps({**HEADER, "weights": [[[[0]]]]})[:-1] + f', "experts": ["{"x" * 2000}", {cells}]}}').encode()


def traces() -> dict[str, bytes]:
    head = npy(
        f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(json.dumps(HEADER))},), }}",
        json.dumps(HEADER).encode(),
    )
    small = npy("{'descr': '<f2', 'fortran_order': False, 'shape': (1, 1, 3, 1), }", bytes(6))
    huge = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({1 << 40}, 1, 3, 1), }}")
    many = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({80 << 20}, 1, 1, 1), }}", bytes(80 << 20))
    objects = npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 3, 1), }", b"cos\nsystem\n(S'true'\ntR.")
    empty = (json.dumps(HEADER)[:-1] + ', "more": [' + "[]," * (20 << 20) + "0]}").encode()
    lists = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(empty)},), }}", empty)
    small_experts = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 3, 1), }", bytes(3))
    made = {"huge": huge, "many": many, "objects": objects}
    return {
        "trace-wide.json": wide_json_trace(),
        "trace-deep.json": b"[" * 1_000_000,
        "trace-lists.npz": packed({"header.npy": lists, "weights.npy": small, "experts.npy": small_experts}),
        **{
            f"trace-{name}.npz": packed({"header.npy": head, "weights.npy": small, "experts.npy": experts})
            for name, experts in made.items()
        },
    }


def workbook(*, part: bytes) -> bytes:
    book = openpyxl.Workbook()
    book.active.append(["question", "A", "B", "answer"])
    first = io.BytesIO()
    book.save(first)
    with zipfile.ZipFile(first) as old:
        members = {name: old.read(name) for name in old.namelist()}
    return packed({**members, "xl/media/image1.png": part})


def banks() -> dict[str, bytes]:
    laughs = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    xml = f'<?xml version="1.0"?><!DOCTYPE q [<!ENTITY a "ha">{laughs}]><quiz><question><text>&i;</text></question></quiz>'
    return {
        "bank-laughs.xml": xml.encode(),
        "bank-bomb.xlsx": workbook(part=bytes(320 << 20)),
        "bank-deep.json": b'[{"stem":' + b"[" * 1_000_000,
        "bank-wide.csv": b"question,A,B,answer\n" + b"," * 5_000_000,
    }


def gguf_bomb() -> bytes:
    """A header that announces as many texts as may be, and ends."""
    key = b"tokenizer.ggml.tokens"
    return b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, len(key)) + key + struct.pack("<IIQ", 9, 8, 4_000_000)


def bomb_files() -> dict[str, bytes]:
    lying = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    return {
        **traces(),
        **banks(),
        "talk-lists.json": b'{"ming_conversations": 1, "conversations": [' + b"[]," * (6 << 20) + b"0]}",
        "bank-lists.json": b'[{"stem": [' + b"[]," * (6 << 20) + b"0]}]",
        "talk-deep.json": b'{"ming_conversations":' + b"[" * 1_000_000,
        "gguf-texts": gguf_bomb(),
        "tensors-lying": struct.pack("<Q", len(lying)) + lying,
        "tensors-long": struct.pack("<Q", 1 << 62) + lying,
    }


def packed_bin(folder: Path) -> Path:
    """An official adapter whose .bin is packed: 80 KB that torch would unpack to 80 MB, or to as many as claimed."""
    import torch

    folder.mkdir()
    plain = folder / "plain"
    torch.save({"model.layers.0.mlp.gate_proj.switch.weight": torch.zeros(20_000_000)}, plain)
    with zipfile.ZipFile(plain) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    plain.unlink()
    (folder / "non_lora_trainables.bin").write_bytes(packed(members))
    (folder / "config.json").write_text('{"num_hidden_layers": 1}')
    (folder / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1, "target_modules": []}')
    return folder


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("bombs")
    for name, data in bomb_files().items():
        (folder / name).write_bytes(data)
    packed_bin(folder / "adapter-packed")
    run = subprocess.run(
        [sys.executable, "-m", "tests.security.bombs", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    line = next((line for line in run.stdout.splitlines() if line.startswith("BOMBS ")), None)
    assert line, run.stderr[-2000:]
    return json.loads(line.removeprefix("BOMBS "))


def test_bombs_are_refused_in_little_memory_and_time(opened: dict[str, dict]) -> None:
    assert len(opened) == len(bomb_files()) + 1
    for name, became in opened.items():
        assert "Error: " in became["outcome"] and "ESCAPED" not in became["outcome"], (name, became)
        assert became["more"] < MOST and became["seconds"] < SECONDS, (name, became)


def test_object_arrays_are_never_unpickled(opened: dict[str, dict]) -> None:
    assert opened["trace-objects.npz"]["outcome"].startswith("TraceError")


def test_a_packed_bin_is_not_unpacked(opened: dict[str, dict]) -> None:
    assert "refused (ValueError)" in opened["adapter-packed"]["outcome"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize(
    "name", ["config.json", "adapter.safetensors", "adapter_config.json", "non_lora_trainables.bin"]
)
def test_links_to_what_never_ends_are_not_read(tmp_path: Path, kind: str, name: str) -> None:
    from ming_app.models.base_config import read_base_config

    for other in ("config.json", "adapter.safetensors" if name == "adapter.safetensors" else "adapter_config.json"):
        (tmp_path / other).write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "device":
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(MingError):
        load_adapter(tmp_path)
    if name == "config.json":
        with pytest.raises(MingError):
            read_base_config(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_weights_that_never_end_are_not_read(tmp_path: Path, kind: str) -> None:
    from ming_app.engine.prompt import ChatTokenizer
    from ming_app.models.gguf import GGUFFile
    from ming_app.models.safetensors_file import SafetensorsFile

    path = tmp_path / "tokenizer.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for read in (GGUFFile, SafetensorsFile):
        with pytest.raises(MingError):
            read(path)
    with pytest.raises(MingError):
        ChatTokenizer.from_folder(tmp_path)


def test_a_link_to_a_file_elsewhere_tells_nothing_of_it(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root:x:0:0:SECRET")
    (tmp_path / "adapter").mkdir()
    for name in ("config.json", "adapter.safetensors"):
        (tmp_path / "adapter" / name).symlink_to(secret)
    with pytest.raises(MingError) as refused:
        load_adapter(tmp_path / "adapter")
    assert "SECRET" not in refused.value.en + refused.value.zh


def test_what_a_person_names_may_be_a_pipe_but_has_a_limit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than"):
        read_bounded(Path("/dev/zero"), 1 << 20, named=True)
    with pytest.raises(OSError, match="regular"):
        read_bounded(Path("/dev/zero"), 1 << 20)
    with pytest.raises(MingError, match="larger than"):
        RouterTrace.load("/dev/zero")
    (tmp_path / "file").write_bytes(b"abc")
    assert read_bounded(tmp_path / "file", 3) == b"abc"


def test_expert_ids_of_a_json_trace_are_small_whole_numbers(tmp_path: Path) -> None:
    token = [0, "a", "answer", 0, None, []]
    for cell in (0.5, -1, 300, "x", None, float("nan")):
        body = {**HEADER, "tokens": [token], "experts": [[[[cell]] * 3]], "weights": [[[[1.0]] * 3]]}
        (tmp_path / "t.json").write_text(json.dumps(body))
        with pytest.raises(MingError):
            RouterTrace.load(tmp_path / "t.json")
    body["experts"] = [[[[1]] * 3]]
    (tmp_path / "t.json").write_text(json.dumps(body))
    assert RouterTrace.load(tmp_path / "t.json").experts.dtype == np.uint8
