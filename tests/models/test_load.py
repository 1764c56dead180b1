"""Loading a GGUF into torch: converted once for the types that run in bfloat16, read exactly for float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ming_app.errors import FetchError, WeightsError
from ming_app.models import convert as convert_module
from ming_app.models import load as load_module
from ming_app.models.card import write_card
from ming_app.models.fetch import LocalModel
from ming_app.models.load import load_torch_model
from ming_app.models.tensors import open_tensors
from tests.models.tiny_gguf import write_gguf


@pytest.fixture
def local(tmp_path: Path) -> LocalModel:
    path, home = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache" / "bases" / "ab"
    write_card(path, home, "ab" * 32)
    return LocalModel("tiny", "Tiny", path, "ab" * 32, home, None, None)


def weights(local: LocalModel, precision: str) -> dict[str, torch.Tensor]:
    return dict(load_torch_model(local, precision=precision).model.named_parameters())


def exact(local: LocalModel) -> dict[str, torch.Tensor]:
    with open_tensors(local.base) as source:
        return {name: torch.from_numpy(source.get(name)) for name in source.names()}


def test_bf16_is_converted_once_and_holds_the_rounded_weights(local, monkeypatch):
    steps: list[str] = []
    load_torch_model(local, precision="bf16", progress=lambda step: steps.append(step.stage))
    assert "convert" in steps and (local.home / "model.safetensors").is_file()
    wanted = exact(local)
    monkeypatch.setattr(convert_module, "_convert", lambda *_: pytest.fail("converted again"))
    local.base.write_bytes(b"")  # not read any more
    again = weights(local, "bf16")
    assert wanted.keys() == again.keys()
    assert all(torch.equal(again[name], value.to(torch.bfloat16)) for name, value in wanted.items())


def test_float32_reads_the_exact_values_and_writes_nothing(local):
    got = weights(local, "float32")
    assert all(torch.equal(got[name], value) for name, value in exact(local).items())
    assert not list(local.home.rglob("*.safetensors"))


def test_a_path_without_a_cache_is_read_where_it_is(local):
    before = sorted(local.base.parent.iterdir())
    load_torch_model(local.base, precision="bf16")
    assert sorted(local.base.parent.iterdir()) == before


def test_without_room_it_loads_all_the_same(local, monkeypatch):
    def full(*_: object) -> None:
        raise FetchError("full", "满")

    monkeypatch.setattr(convert_module, "require_space", full)
    got = weights(local, "bf16")
    assert all(torch.equal(got[name], value.to(torch.bfloat16)) for name, value in exact(local).items())
    assert not list(local.home.rglob("*.safetensors"))


def test_a_damaged_base_is_refused_in_every_precision(local):
    local.base.write_bytes(local.base.read_bytes()[:2000])
    for precision in load_module.COMPUTE_DTYPE:
        with pytest.raises(WeightsError):
            load_torch_model(local, precision=precision)
