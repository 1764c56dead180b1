"""Keeps evaluation questions out of training: same text, or nearly the same, under any id and in any stream.

Text is compared as a string of letters, digits and Han characters (NFKC, lower case, all else removed). A training row
leaks an evaluation question when

    its question has the same stem and the same options in any order, or
    its text (prompt, answer) holds at least `OVERLAP` of the telling n-grams of the evaluation stem,

where n-grams that several evaluation questions share (the wording of a task) tell nothing, and a stem with too few others
is compared whole, by the first rule only. Evaluation files may be exam banks
or conversations (then the first user turn stands for the stem).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ming_app.exam.question import Question
from training.exam import read_questions
from training.readers import ChatRow, language_of, read_chats
from training.records import read_rows

NGRAM = {"zh": 8, "en": 24}
"""characters of an n-gram: about five Chinese words, four English ones"""
OVERLAP = 0.7
FEWEST = 6  # telling n-grams that a stem must have
COMMON = 4  # an n-gram of so many evaluation questions is wording, not content


def normalise(text: str) -> str:
    """NFKC, lower case, letters and digits only."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())


def ngrams(normalised: str, size: int) -> np.ndarray:
    """uint64 hashes of all n-grams of `size` characters, in order; empty when the text is shorter."""
    points = np.frombuffer(normalised.encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(points) < size:
        return np.empty(0, np.uint64)
    powers = np.array([pow(0x9E3779B97F4A7C15, i + 1, 1 << 64) for i in range(size)], np.uint64)
    mixed = points * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(29)  # neighbouring code points must not give neighbouring hashes
    return np.lib.stride_tricks.sliding_window_view(mixed, size) @ powers


class LeakIndex:
    """Evaluation questions by their text. `find` says which one a training row gives away."""

    def __init__(self, questions: Iterable[tuple[str, Question | ChatRow]] = ()):
        """`questions`: (name, question)."""
        self._whole: dict[tuple[str, ...], str] = {}
        self._names: list[str] = []
        grams: dict[str, list[tuple[int, set[int]]]] = {lang: [] for lang in NGRAM}
        for name, row in questions:
            stem = row.stem if isinstance(row, Question) else row.turns[0].content
            self._whole.setdefault(_key(row), name)
            lang = language_of(stem)
            grams[lang].append((len(self._names), set(ngrams(normalise(stem), NGRAM[lang]).tolist())))
            self._names.append(name)
        self._tables = {lang: _Table(items) for lang, items in grams.items()}

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> LeakIndex:
        """Raises DataError for a file that is neither a bank nor conversations, or cannot be read."""
        return cls(_named(paths))

    def find(self, row: Question | ChatRow) -> str:
        """File and id of an evaluation question that `row` gives away, or ""."""
        same = self._whole.get(_key(row))
        if same:
            return same
        text = normalise(_text(row))
        found = (table.find(ngrams(text, NGRAM[lang])) for lang, table in self._tables.items())
        return next((self._names[item] for item in found if item is not None), "")

    def __len__(self) -> int:
        return len(self._whole)


class _Table:
    """Which evaluation questions hold an n-gram; wordings that several have in common tell nothing and are left out."""

    def __init__(self, items: Sequence[tuple[int, set[int]]]):
        frequency = Counter(gram for _, grams in items for gram in grams)
        self.owners: dict[int, list[int]] = {}
        self.needed: dict[int, float] = {}
        for item, grams in items:
            telling = [gram for gram in grams if frequency[gram] < COMMON]
            if len(telling) >= FEWEST:
                self.needed[item] = OVERLAP * len(telling)
                for gram in telling:
                    self.owners.setdefault(gram, []).append(item)
        self.known = np.array(sorted(self.owners), np.uint64)

    def find(self, grams: np.ndarray) -> int | None:
        """The first question of which enough n-grams are among `grams`."""
        if not len(self.known):
            return None
        shared = set(grams[self.known[np.searchsorted(self.known, grams) % len(self.known)] == grams].tolist())
        counts = Counter(item for gram in shared for item in self.owners[gram])
        return next((item for item, count in counts.items() if count >= self.needed[item]), None)


def _named(paths: Iterable[Path]) -> Iterator[tuple[str, Question | ChatRow]]:
    for path in paths:
        bank = next(iter(read_rows(path, lambda row, _: "stem" in row)), False)
        rows: Iterator[Question | ChatRow] = read_questions(path) if bank else read_chats(path)
        for row in rows:
            yield f"{path.name} {row.id}", row


def _key(row: Question | ChatRow) -> tuple[str, ...]:
    if isinstance(row, Question):
        return (normalise(row.stem), *sorted(normalise(text) for text in row.options.values()))
    return (normalise(row.turns[0].content),)


def _text(row: Question | ChatRow) -> str:
    if isinstance(row, Question):
        return f"{row.stem}\n{row.explanation}"
    return "\n".join(turn.content for turn in row.turns)
