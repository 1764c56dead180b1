"""Model cards of the bundled adapters: a hub's metadata, all sections, and the figures of the adapter's own summary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from ming_app.models.catalog import Model, list_models
from ming_app.molora.checkpoint import Adapter, load_adapter
from training.card import model_card

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = {model.name: model for model in list_models() if model.adapter_folder is not None}
SECTIONS = ("Trained on", "How", "Measured", "Intended use", "Out of scope", "Limits", "How to use", "Citation")


@pytest.fixture(params=BUNDLED, scope="module")
def bundled(request: pytest.FixtureRequest) -> tuple[Model, Adapter, str]:
    model = BUNDLED[request.param]
    assert model.adapter_folder is not None
    text = (model.adapter_folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    return model, load_adapter(model.adapter_folder), text


def test_the_metadata_is_what_a_hub_reads(bundled: tuple[Model, Adapter, str]) -> None:
    model, _, text = bundled
    values = yaml.safe_load(text.split("---")[1])
    base = next(s.repo for s in model.sources if hasattr(s, "repo")).removesuffix("-GGUF")
    assert values["base_model"] == base and values["base_model_relation"] == "adapter"
    assert values["license"] == "apache-2.0" and values["language"] == ["zh", "en"]
    assert (
        values["pipeline_tag"] == "text-generation"
        and values["library_name"] == "ming-app"
        and "medical" in values["tags"]
    )
    assert ModelCard(text).data.base_model == base  # huggingface_hub reads it too


def test_the_card_is_whole(bundled: tuple[Model, Adapter, str]) -> None:
    _, _, text = bundled
    assert tuple(re.findall(r"^## (.+)$", text, re.MULTILINE)) == SECTIONS
    assert "nan" not in text and "120" in text and "research use" in text


def test_the_card_says_what_the_summary_says(bundled: tuple[Model, Adapter, str]) -> None:
    """Made anew from config.json and the adapter, every line stands in the card; what was measured is apart."""
    model, adapter, text = bundled
    title = model.title.partition("(")[2].rstrip(")")
    made = model_card(model.name, title, adapter, None).replace("frozen base, AdamW", "frozen base in bf16, AdamW")
    assert [line for line in made.splitlines() if line not in text.splitlines()] == []
    assert (ROOT / f"training/recipes/{adapter.summary['recipe']}.toml").is_file()
    measured = text[text.index("## Measured") : text.index("## Intended use")]
    for stream in adapter.summary["held_out"]:
        assert f"| {stream} | " in measured
    if adapter.summary["dev_loss"]:  # measured twice, in the run and after it, on the same rows
        for stream, loss in adapter.summary["dev_loss"].items():
            shown = float(re.findall(rf"^\| {stream} \| [\d.]+ \| ([\d.]+) \|", measured, re.MULTILINE)[0])
            assert abs(shown - loss) < 0.02, stream
