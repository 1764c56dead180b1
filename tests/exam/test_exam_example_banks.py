"""Our own banks: structure, balance, and that no guesser who knows no medicine does better than chance."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from ming_app.exam.bank import EXAMPLES, Shelf
from ming_app.exam.formats import read_bank
from ming_app.exam.measures import wilson
from ming_app.exam.question import LETTERS, TYPES, Question, squeezed

FILES = sorted(EXAMPLES.glob("*.jsonl"))
READ = {path.stem: read_bank(path.read_bytes(), path.name) for path in FILES}
ALL = [question for read in READ.values() for question in read.questions]
SINGLE = [q for q in ALL if not q.kind.multiple and q.type != "TF"]


def test_every_row_is_a_question_and_every_bank_is_on_the_shelf() -> None:
    assert [read.rejected for read in READ.values()] == [()] * len(FILES)
    listed = Shelf().list()
    assert sorted(bank.name for bank in listed) == sorted(READ) and all(bank.ours for bank in listed)
    assert {bank.name: bank.size for bank in listed} == {name: len(read.questions) for name, read in READ.items()}
    assert all(set(bank.titles) == {"zh", "en"} for bank in listed)
    assert len(Shelf().open(listed[0].name).questions) == listed[0].size


def test_there_are_enough_of_every_kind() -> None:
    assert len(ALL) >= 120
    for lang in ("zh", "en"):
        assert {q.type for q in ALL if q.lang == lang} == set(TYPES), lang
        assert len({q.tags["subject"] for q in ALL if q.lang == lang}) >= 12, lang


@pytest.mark.parametrize("question", ALL, ids=lambda q: q.id)
def test_each_question_is_complete(question: Question) -> None:
    assert question.explanation and question.reference and question.source and question.licence
    assert {"subject", "difficulty", "competency"} <= set(question.tags)
    assert question.tags["difficulty"] in ("easy", "medium", "hard")
    assert len(question.options) == (2 if question.type == "TF" else 5)
    assert bool(question.group_id) == bool(question.kind.shares)
    assert bool(question.shared_stem) == (question.kind.shares == "stem")
    texts = [question.stem, question.shared_stem, question.explanation, *question.options.values()]
    han = sum("\u4e00" <= char <= "\u9fff" for char in "".join(texts))
    assert (han > 20) == (question.lang == "zh")
    tell = r"以上|上述|all of the above|none of the above|both [A-E] and"
    assert not any(re.search(tell, text, re.I) for text in question.options.values())
    letters = r"选项?\s*[A-E](?![A-Za-z])|[A-E]\s*(?:项|选项)|\boption [A-E]\b"
    assert not re.search(letters, question.explanation)
    if question.kind.multiple:
        assert 2 <= len(question.answer) <= 4


def test_no_duplicates() -> None:
    assert len({q.id for q in ALL}) == len(ALL) == len({q.key for q in ALL})
    stems = Counter(squeezed(q.shared_stem + q.stem) for q in ALL)
    assert [stem for stem, n in stems.items() if n > 1] == []


def test_groups_are_whole() -> None:
    for read in READ.values():
        sizes = Counter(q.group_id for q in read.questions if q.group_id)
        assert sizes and all(2 <= n <= 5 for n in sizes.values())


@pytest.mark.parametrize("name", READ)
def test_keys_are_balanced(name: str) -> None:
    own = [q for q in READ[name].questions if q in SINGLE]
    for letter in "ABCDE":
        share = sum(q.answer == (letter,) for q in own) / len(own)
        assert 0.12 <= share <= 0.28, (letter, share)
    judged = [q for q in READ[name].questions if q.type == "TF"]
    assert not judged or 0.3 <= sum(q.answer == ("A",) for q in judged) / len(judged) <= 0.7


def guess_longest(question: Question) -> str:
    return max(question.options, key=lambda letter: (len(question.options[letter]), random.Random(letter).random()))


def guess_shortest(question: Question) -> str:
    return min(question.options, key=lambda letter: len(question.options[letter]))


def guess_most_frequent(question: Question) -> str:
    return Counter(q.answer[0] for q in SINGLE if q is not question).most_common(1)[0][0]


def guess_the_letter_after_the_last(question: Question) -> str:
    at = SINGLE.index(question)
    before = SINGLE[at - 1].answer[0] if at else "E"
    return LETTERS[(LETTERS.index(before) + 1) % 5]


def guess_the_words_of_the_stem(question: Question) -> str:
    """The option with most pairs of characters in common with stem and case."""
    text = squeezed(question.shared_stem + question.stem)
    pairs = {text[i : i + 2] for i in range(len(text) - 1)}

    def shared(letter: str) -> float:
        option = squeezed(question.options[letter])
        return sum(option[i : i + 2] in pairs for i in range(len(option) - 1)) / len(option)

    return max(question.options, key=shared)


@pytest.mark.parametrize(
    "guess",
    [guess_longest, guess_shortest, guess_most_frequent, guess_the_letter_after_the_last, guess_the_words_of_the_stem],
)
def test_guessers_score_at_chance(guess) -> None:
    """Chance is one in five: it lies in the interval of what the guesser scores, or the guesser does worse."""
    right = sum(guess(question) == question.answer[0] for question in SINGLE)
    low, _ = wilson(right, len(SINGLE))
    assert low <= 0.2, f"{right} of {len(SINGLE)}"


def test_the_worked_cases_are_of_our_questions_and_need_no_network() -> None:
    pages = sorted((EXAMPLES.parent / "cases").glob("*.html"))
    assert len(pages) == 2
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert any(q.stem in text and q.explanation in text for q in ALL if q.id.startswith("pharmacy-tcm"))
        assert not re.search(r"(?:src|href)=|https?://", text)
