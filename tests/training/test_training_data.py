"""Readers, exam questions as chats, licences, the mix."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import chat, question, write_lines
from tiny import tokenizer_json

from training.chat import ChatTokenizer
from training.errors import DataError
from training.exam import letter_row, read_questions, reasoning_row, shuffle_options
from training.licences import licence_of
from training.mix import Mix, is_held_out, read_stream
from training.readers import read_chats
from training.recipe import read_recipe
from training.records import Damage


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(tokenizer_json())


def test_broken_line_is_named_or_counted(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", [chat(0), {"id": "x", "messages": [{"role": "user", "content": "?"}]}, chat(2)]
    )
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        list(read_chats(path))
    damage = Damage()
    assert [row.id for row in read_chats(path, damage)] == ["qa-0", "qa-2"]
    assert damage.count == 1 and "a.jsonl:2" in damage.first[0]


@pytest.mark.parametrize("content", [b"\x1f\x8b broken gzip", b"not json\n", b'{"messages": 3}\n', b"[" * 9000 + b"\n"])
def test_hostile_files_end_in_a_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ("a.jsonl.gz" if content.startswith(b"\x1f") else "a.jsonl")
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        list(read_chats(path))
    assert raised.value.zh and raised.value.en


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_questions(tmp_path / "none.jsonl"))


def test_shuffled_options_keep_the_right_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "b.jsonl", [question(i, answer=["B", "D"] if i % 2 else ["A"]) for i in range(20)])
    orders = set()
    for item in read_questions(path):
        right = {item.options[letter] for letter in item.answer}
        shuffled = shuffle_options(item, random.Random(item.id))
        assert list(shuffled.options) == list(item.options)
        assert {shuffled.options[letter] for letter in shuffled.answer} == right
        assert list(shuffled.answer) == sorted(shuffled.answer)
        orders.add(tuple(text[5] for text in shuffled.options.values()))
    assert len(orders) > 5


def test_options_that_refer_to_others_are_not_shuffled(tmp_path: Path) -> None:
    for text in ("All of the above", "以上都是", "A和B", "Both a and c"):
        options = {"A": "one", "B": "two", "C": text}
        path = write_lines(tmp_path / "b.jsonl", [question(0, options=options, answer=["C"])])
        (item,) = read_questions(path)
        assert all(shuffle_options(item, random.Random(seed)).options == options for seed in range(5)), text


def test_exam_rows(tmp_path: Path) -> None:
    rows = [question(0, explanation="因为"), question(1, lang="en", source="MedQA")]
    zh, en = read_questions(write_lines(tmp_path / "b.jsonl", rows))
    assert reasoning_row(zh, random.Random(0)).turns[-1].content == "解析：因为\n\n答案：A"
    answer = letter_row(en, random.Random(0)).turns[-1].content
    assert answer.startswith("Answer: ") and answer[-1] in "ABCDE"


def test_licences_of_sources_and_parts() -> None:
    assert licence_of("MedQuAD").licence == "CC BY 4.0"
    assert not licence_of("CNMLEQA-3k").passes("stated")
    assert not licence_of("Medbullets").passes("stated")
    assert not licence_of("never heard of").passes("stated") and licence_of("never heard of").passes("any")
    assert licence_of("MedQA", {"split": "dev"}).passes("open")
    assert not licence_of("MedQA", {"split": "train"}).passes("stated")
    assert licence_of("CMExam").passes("stated") and not licence_of("CMExam").passes("open")


def test_licence_filter_in_a_stream(write_recipe, corpus: Path) -> None:
    rows = [chat(i, source) for i, source in enumerate(["MedQuAD", "CNMLEQA-3k", "MedQA"] * 20)]
    write_lines(corpus / "qa.jsonl", rows)
    tags = [question(0, id=f"qa-{i}", tags={"split": "train" if i % 2 else "dev"}) for i in range(60)]
    write_lines(corpus / "tags.jsonl", tags)
    recipe = read_recipe(write_recipe())
    stream = read_stream(recipe, recipe.stream[0])
    assert set(stream.sources) == {"MedQuAD"}
    assert stream.dropped == {"licence": 20, "licence unclear without bank tags": 20}
    recipe = read_recipe(write_recipe(('file = "qa.jsonl"', 'file = "qa.jsonl"\nbank = "tags.jsonl"')))
    stream = read_stream(recipe, recipe.stream[0])
    assert set(stream.sources) == {"MedQuAD", "MedQA"}
    assert all(int(row.id[3:]) % 2 == 0 for row in stream.rows if row.source == "MedQA")


def test_held_out_rows_are_never_drawn(write_recipe, tokenizer: ChatTokenizer) -> None:
    recipe = read_recipe(write_recipe())
    mix = Mix(recipe, tokenizer)
    held = {row.id for stream in mix.streams for row in stream.held_out}
    assert held and all(is_held_out(row_id, 0.2) for row_id in held)
    assert not held & {row.id for stream in mix.streams for row in stream.rows}
    assert {name: len(rows) for name, rows in mix.held_out().items()} == {"qa": 4, "letters": 4}


def test_mix_is_a_function_of_the_position(write_recipe, tokenizer: ChatTokenizer) -> None:
    recipe = read_recipe(write_recipe())
    whole = list(itertools.islice(Mix(recipe, tokenizer).batches(0), 12))
    block, index, expected = whole[7]
    _, _, again = next(Mix(recipe, tokenizer).batches(block, index))
    np.testing.assert_array_equal(again.ids, expected.ids)
    shares = Counter(stream for _, _, batch in whole for stream in (s.stream for s in batch.samples))
    assert 1.5 < shares["qa"] / shares["letters"] < 2.7
    other = read_recipe(write_recipe(seed=4))
    assert any(
        (a.ids.shape != b.ids.shape) or (a.ids != b.ids).any()
        for (_, _, a), (_, _, b) in zip(whole, Mix(other, tokenizer).batches(0), strict=False)
    )


def test_a_stream_weighs_its_answer_tokens(write_recipe, tokenizer: ChatTokenizer) -> None:
    mix = Mix(
        read_recipe(write_recipe(('format = "exam_letter"', 'format = "exam_letter"\nloss_weight = 10'))), tokenizer
    )
    seen = set()
    for _, _, batch in islice(mix.batches(0), 4):
        streams = [batch.samples[i].stream for i in batch.sample_of[batch.learn_at]]
        assert batch.weights.tolist() == [10.0 if stream == "letters" else 1.0 for stream in streams]
        seen |= set(streams)
    assert seen == {"qa", "letters"}


def test_right_letters_are_spread_evenly_in_every_block(write_recipe, tokenizer: ChatTokenizer) -> None:
    mix = Mix(read_recipe(write_recipe(("block = 12", "block = 60"))), tokenizer)
    asked = tokenizer.encode_text("答案：")
    letters: Counter[int] = Counter()
    for block, _, batch in mix.batches(0):
        if block > 0:
            break
        for sample in batch.samples:
            if sample.stream == "letters":
                learnt = sample.encoded.ids[sample.encoded.mask].tolist()
                letters[learnt[len(asked)]] += 1
    assert len(letters) == 5 and max(letters.values()) - min(letters.values()) <= 1


def test_too_long_rows_are_left_out(write_recipe, tokenizer: ChatTokenizer) -> None:
    mix = Mix(read_recipe(write_recipe(("max_length = 240", "max_length = 9"))), tokenizer)
    with pytest.raises(DataError, match="longer than max_length"):
        next(mix.batches(0))
