"""A message as the rules read it: one writing, misspellings put right, cut into sentences and clauses.

`plain` brings Chinese to simplified characters and English to small letters without apostrophes; what rules match, and
every offset, belongs to the plain text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MAX_CHARS = 8_000
"""what is read of one message: its beginning and its end"""

_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufe00-\ufe0f]")
_WIDE = str.maketrans({"，": ",", "；": ";", "：": ":", "？": "?", "！": "!", "（": "(", "）": ")", "’": "'", "‘": "'"})
_CJK = re.compile(r"[\u3400-\u9fff]")


@lru_cache(maxsize=1)
def _to_simplified() -> Any:
    import opencc

    return opencc.OpenCC("t2s")


def plain(text: str, *, numbers: bool = False) -> str:
    """NFKC, no invisible characters, simplified Chinese, small letters, ASCII punctuation, no apostrophes. Without `numbers`
    long ones are zeros."""
    text = _shortened(text)
    text = _shortened(unicodedata.normalize("NFKC", text.translate(_WIDE)))
    text = _INVISIBLE.sub("", text)
    if _CJK.search(text):
        text = _to_simplified().convert(text)
    text = text.lower().translate(_WIDE).replace("'", "").replace("`", "")
    text = re.sub(r"[ \t\u3000]+", " ", text)
    if not numbers:
        text = re.sub(r"\d{9,}", "00000000", text)
    text = re.sub(r"([a-z])\1{2,}", r"\1\1", text)  # "sooo"
    return re.sub(r"(\D)\1{11,}", lambda run: run[0][:12], text)  # patterns need not search through runs


def _shortened(text: str) -> str:
    """The beginning and the end of a text that is too long."""
    if len(text) <= MAX_CHARS:
        return text
    return text[: MAX_CHARS // 2] + "\n" + text[-MAX_CHARS // 2 :]


def has_chinese(text: str) -> bool:
    return _CJK.search(text) is not None


def language(text: str) -> str:
    """ "zh" where a fifth of the letters are Chinese, else "en"."""
    cjk = len(_CJK.findall(text))
    return "zh" if cjk and cjk * 4 >= sum(map(str.isalpha, text)) - cjk else "en"


class Speller:
    """Puts misspelt English words right where they are close to a word of the rules and are no words themselves."""

    def __init__(self, words: frozenset[str], real: frozenset[str], swaps: Mapping[str, str]):
        """`words`: what rules look for. `real`: words that look like a misspelling of one and are none. `swaps`: whole
        misspellings, Chinese or English, with what they mean."""
        self._words = sorted(word for word in words if len(word) >= 5)
        self._known = words | real
        self._swaps = {wrong: right for wrong, right in swaps.items() if has_chinese(wrong)}
        self._short = {wrong: right for wrong, right in swaps.items() if not has_chinese(wrong)}
        self._cached = lru_cache(maxsize=20_000)(self._correct)

    def __call__(self, text: str) -> str:
        for wrong, right in self._swaps.items():
            if wrong in text:
                text = text.replace(wrong, right)
        return re.sub(r"[a-z]+", lambda found: self._cached(found[0]), text)

    def _correct(self, word: str) -> str:
        if word in self._short:
            return self._short[word]
        if len(word) < 5 or word in self._known:
            return word
        from rapidfuzz import process
        from rapidfuzz.distance import OSA

        most = 1 if len(word) < 8 else 2
        found = process.extractOne(word, self._words, scorer=OSA.distance, score_cutoff=most)
        return found[0] if found is not None and found[0][0] == word[0] else word


@dataclass(frozen=True)
class Clause:
    """A piece of a sentence: [start, end) of the text, and the sentence it belongs to, [begin, finish)."""

    start: int
    end: int
    begin: int
    finish: int


_SENTENCE = re.compile(r"[^.!?。\n]*(?:\.(?=\d)[^.!?。\n]*)*(?:[.!?。\n]+|$)")
_BREAK = re.compile(
    r"[,;:()]+|…+|\b(?:but|although|though|however|except|yet|because|since|while|then)\b"
    r"|\band\b(?=\W+(?:i|im|ive|my|he|hes|she|shes|his|her|they|we|its|it|the|now|cant|cannot|can|feel\w*|ha[sd]|have|is|are|am|was)\b)"
    r"|但是?|不过|可是|然而|只是|就是|还有|并且|而且|然后|结果|现在"
)


def clauses(text: str) -> Iterator[Clause]:
    """All clauses of a plain text, in order."""
    for sentence in _SENTENCE.finditer(text):
        begin, finish = sentence.span()
        if begin == finish:
            continue
        at = begin
        for cut in _BREAK.finditer(text, begin, finish):
            if cut.start() > at:
                yield Clause(at, cut.start(), begin, finish)
                at = cut.start() if cut[0][0].isalnum() else cut.end()
        if at < finish:
            yield Clause(at, finish, begin, finish)
