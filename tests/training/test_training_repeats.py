"""Answers that repeat themselves, of which only the end is learnt."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import numpy as np
import pytest
from conftest import chat
from tiny import tokenizer_json

from training.chat import ChatTokenizer, Turn
from training.errors import RecipeError
from training.mix import Mix
from training.readers import ChatRow
from training.recipe import read_recipe
from training.repeats import COPIES, LEARNT, ending, repeating


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(tokenizer_json())


def looped(answer: str, seed: int, lang: str = "zh") -> str:
    turns = (Turn("user", "?"), Turn("assistant", "before"), Turn("user", "?"), Turn("assistant", answer))
    row = repeating(ChatRow("a", "s", lang, turns, {}), random.Random(seed))
    assert row.turns[:3] == turns[:3]
    return row.turns[3].content


@pytest.mark.parametrize(
    ("answer", "pieces"),
    [
        ("多喝水。注意休息！必要时就医。", ["多喝水。", "注意休息！", "必要时就医。"]),
        (
            "Drink water. Rest well! Dose: 0.5 mg. See a doctor.",
            ["Drink water.", "Rest well!", "Dose: 0.5 mg.", "See a doctor."],
        ),
        ("Signs: - Fever - Cough - Pain", ["Signs:", "- Fever", "- Cough", "- Pain"]),
        ("一句没有标点的回答", ["一句没有标点的回答"]),
    ],
)
def test_what_is_repeated_are_whole_sentences_and_items(answer: str, pieces: list[str]) -> None:
    found = [looped(answer, seed) for seed in range(200)]
    bare = [re.sub(r"\s", "", text) for text in found]
    wanted = {re.sub(r"\s", "", piece) for piece in pieces}
    spans = wanted | {a + b for a, b in pairwise(re.sub(r"\s", "", piece) for piece in pieces)}
    repeated = {match[1] for text in bare if (match := re.search(r"(.+?)\1+$", text))}
    assert wanted <= repeated <= spans  # sentences, and two at a time
    for text in bare:  # before it stands the answer up to there, as it is
        assert re.sub(r"\s", "", answer).startswith(re.sub(r"(.+?)\1+$", r"\1", text))
    assert found == [looped(answer, seed) for seed in range(200)]


def test_numbers_of_a_list_go_on_counting() -> None:
    answer = "症状包括：\n\n1. 发热。\n\n2. 咳嗽。\n\n3. 胸痛。"
    for seed in range(100):
        numbers = [int(n) for n in re.findall(r"(\d+)\.", looped(answer, seed))]
        assert numbers == list(range(1, len(numbers) + 1))


def test_latin_sentences_do_not_run_together() -> None:
    assert looped("Rest well.", 0) in {"Rest well." + " Rest well." * n for n in range(1, COPIES + 1)}


def test_only_the_end_is_learnt(tokenizer: ChatTokenizer) -> None:
    whole = tokenizer.encode_chat([Turn("user", "Hi?"), Turn("assistant", "Good. Good.")], "")
    end = ending(whole)
    assert np.array_equal(end.ids, whole.ids) and end.mask.sum() == LEARNT and end.mask[-LEARNT:].all()
    assert end.ids[-1] == tokenizer.end_id


def test_a_stream_of_a_recipe(write_recipe, tokenizer: ChatTokenizer) -> None:
    mix = Mix(read_recipe(write_recipe(('file = "qa.jsonl"', 'file = "qa.jsonl"\nrepeats = true'))), tokenizer)
    samples = mix.first_samples(40)
    repeats = [sample for sample in samples if sample.stream == "qa"]
    assert repeats and all(sample.encoded.mask.sum() == LEARNT for sample in repeats)
    said = chat(0)["messages"][1]["content"].removeprefix("Vitamin 0")
    assert all(tokenizer.decode(sample.encoded.ids.tolist()).count(said) > 1 for sample in repeats)
    assert all(sample.encoded.mask.sum() > LEARNT for sample in samples if sample.stream == "letters")


def test_exam_questions_do_not_repeat(write_recipe) -> None:
    with pytest.raises(RecipeError, match="repeats"):
        read_recipe(write_recipe(('format = "exam_letter"', 'format = "exam_letter"\nrepeats = true')))
