"""A tiny base and a small bilingual corpus of our own, written to disk once for the training tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tiny import write_base

LETTERS = "ABCDE"

RECIPE = """
name = "tiny"
base = {base}
seed = {seed}
device = "cpu"
threads = 1

[adapter]
num_experts = 4
top_k = 2
rank = 4
alpha = 8.0

[data]
folder = "."
system = ""
max_length = 240
held_out = 0.2
held_out_rows = 4
block = 12

[[stream]]
name = "qa"
file = "qa.jsonl"
weight = 2.0

[[stream]]
name = "letters"
file = "bank.jsonl.gz"
format = "exam_letter"
weight = 1.0

[budget]
steps = {steps}
batch_tokens = 480

[optimizer]
lr = {lr}

[router]
balance = 0.01

[save]
every_steps = {every}
"""


def write_lines(path: Path, rows: list[dict]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def chat(number: int, source: str = "MedQuAD") -> dict:
    messages = [
        {"role": "user", "content": f"What is vitamin {number % 7}?"},
        {"role": "assistant", "content": f"Vitamin {number % 7} is good."},
    ]
    return {"id": f"qa-{number}", "lang": "en", "source": source, "messages": messages}


def question(number: int, source: str = "CMExam", **changes) -> dict:
    options = {letter: f"item {letter.lower()}{number}" for letter in LETTERS}
    row = {"id": f"q-{number}", "lang": "zh", "source": source, "stem": f"第{number}题", "options": options}
    return {**row, "answer": [LETTERS[number % 5]], "explanation": None, "tags": {}, **changes}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny-base", num_hidden_layers=2)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with qa.jsonl (chats) and bank.jsonl.gz (exam questions)."""
    write_lines(tmp_path / "qa.jsonl", [chat(i) for i in range(40)])
    write_lines(tmp_path / "bank.jsonl.gz", [question(i) for i in range(60)])
    return tmp_path


@pytest.fixture
def write_recipe(corpus: Path, tiny_folder: Path):
    """Writes recipe.toml beside the corpus, with changes to the text, and gives its path."""

    def write(*changes: tuple[str, str], steps: int = 6, lr: float = 5e-3, every: int = 0, seed: int = 3) -> Path:
        text = RECIPE.format(base=json.dumps(str(tiny_folder)), steps=steps, lr=lr, every=every, seed=seed)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = corpus / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
