"""A base's config.json is anybody's file: every number that sizes something is refused by name when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ming_app.errors import WeightsError
from ming_app.models.base_config import check_base_config, read_base_config
from ming_app.models.catalog import list_models
from ming_app.models.load import empty_model
from ming_app.models.preflight import preflight
from ming_app.models.tensors import open_tensors
from ming_app.settings import Settings

GOOD = {
    **{"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}


def folder(path: Path, config: object) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "entries",
    [{}, {"num_key_value_heads": None}, {"head_dim": None}, {"head_dim": 128}, {"hidden_size": 66, "head_dim": 16}],
)
def test_what_can_exist_passes(entries, tmp_path):
    check_base_config({**GOOD, **entries})
    assert read_base_config(folder(tmp_path, {**GOOD, **entries}))["num_hidden_layers"] == 2


def test_the_catalogue_passes():
    for model in list_models():
        check_base_config(model.shape)


@pytest.mark.parametrize(
    "entry",
    [
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2.5, "abc", "8", True, [4], {}, float("nan"), 10**30])
def test_an_impossible_number_is_refused_by_name(entry, value, tmp_path):
    bad = {**GOOD, entry: value}
    with pytest.raises(WeightsError, match=entry) as caught:
        read_base_config(folder(tmp_path, bad))
    assert entry in caught.value.zh and any("\u4e00" <= c <= "\u9fff" for c in caught.value.zh)
    with pytest.raises(WeightsError, match=entry):
        preflight(bad, "cpu", "4bit", Settings())
    with pytest.raises(WeightsError, match=entry):
        open_tensors(tmp_path)


@pytest.mark.parametrize("missing", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_size_is_named(missing):
    with pytest.raises(WeightsError, match=f"lacks {missing}"):
        check_base_config({name: value for name, value in GOOD.items() if name != missing})


def test_another_family_is_refused_with_its_name():
    with pytest.raises(WeightsError, match="gpt2"):
        preflight({"model_type": "gpt2", "n_embd": 768}, "cpu", "4bit", Settings())


@pytest.mark.parametrize("entries", [{"num_attention_heads": 3}, {"num_key_value_heads": 3}])
def test_heads_must_divide(entries):
    with pytest.raises(WeightsError, match="multiple"):
        check_base_config({**GOOD, **entries})


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"a": '])
def test_what_is_no_json_table_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match="JSON"):
        read_base_config(tmp_path)


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_size": "abc"},
        {"num_attention_heads": 0},
        {"hidden_size": -8},
        {"hidden_act": "not an activation"},
        {"rope_scaling": 7},
        {"model_type": None},
        {"model_type": "no-such-family"},
    ],
)
def test_an_architecture_that_cannot_be_built_is_explained(entries):
    with pytest.raises(WeightsError, match="cannot be built"):
        empty_model({**GOOD, **entries}, torch.float32)
