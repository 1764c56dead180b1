"""Scores the options of an exam question: the probability of each letter, read from the model, with no text generated.

python -m examples.python.score_options clinical-en-001 --model ming-moe-0.5b
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from ming_app.engine.engine import Engine
from ming_app.exam.candidate import probabilities
from ming_app.exam.formats import read_bank
from ming_app.settings import Settings

BANKS = Path(__file__).resolve().parents[1] / "banks"


def main() -> None:
    """The question is one of examples/banks, by its id."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("id")
    parser.add_argument("--model", help="a name of weights/catalog.toml, a folder or a hub id")
    options = parser.parse_args()

    banks = [read_bank(path.read_bytes(), path.name) for path in sorted(BANKS.glob("*.jsonl"))]
    question = next((q for bank in banks for q in bank.questions if q.id == options.id), None)
    if question is None:
        parser.error(f"examples/banks holds no question {options.id}")
    with closing(Engine.load(Settings.load({"model": options.model}))) as engine:
        found = probabilities(engine, question, list(question.options))
    print(question.stem)
    for letter, chance in found.items():
        print(f"{'*' if letter in question.answer else ' '} {letter} {chance:6.1%}  {question.options[letter]}")
    print("* the bank's key")


if __name__ == "__main__":
    main()
