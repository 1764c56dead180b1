"""`Bank`: the questions a person practises with, and the shelf of banks: ours in examples/banks, and imported ones.

An imported bank is kept as one file: a first line with its title and the SHA-256 of the rest, then our JSON lines. What
matches its hash was checked when it was imported and is read without checking every field again, 60,000 questions in a
second or two; what does not match is read as any foreign file.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from ming_app.errors import MingError
from ming_app.exam.formats import BankFileError, read_bank, write_bank
from ming_app.exam.question import LETTERS, TAGS, Question

EXAMPLES = Path(__file__).parents[2] / "examples" / "banks"
SUFFIX = ".bank.jsonl"
MEMORY_QUESTIONS = 30_000
"""in imported banks of one visitor where nothing is kept on disk"""


@dataclass(frozen=True)
class Bank:
    """Questions in their order, groups together. `name` identifies the bank, `titles` (zh, en) show it."""

    name: str
    titles: Mapping[str, str]
    questions: tuple[Question, ...]

    def title(self, lang: str) -> str:
        return self.titles.get(lang) or next(iter(self.titles.values()), self.name)

    @cached_property
    def places(self) -> dict[str, int]:
        """question key -> place in `questions`"""
        return {question.key: at for at, question in enumerate(self.questions)}

    def get(self, key: str) -> Question | None:
        at = self.places.get(key)
        return None if at is None else self.questions[at]

    def values(self, tag: str) -> list[tuple[str, int]]:
        """What a tag ("type" and "lang" count as tags) can be, and of how many questions, most frequent first."""
        return Counter(filter(None, (tag_of(question, tag) for question in self.questions))).most_common()

    @property
    def tags(self) -> list[str]:
        """The tags by which this bank can be filtered."""
        return [tag for tag in TAGS if any(question.tags.get(tag) for question in self.questions)]

    def select(self, wanted: Mapping[str, Collection[str]], keys: Collection[str] | None = None) -> list[Question]:
        """Questions whose tags are among the wanted ones (an empty collection wants all), and whose key is among `keys`.

        A question of a group brings its whole group: alone it could not be understood.
        """
        asked = {tag: set(values) for tag, values in wanted.items() if values}
        chosen = set() if keys is None else set(keys)
        groups: set[str] = set()
        single: set[int] = set()
        for at, question in enumerate(self.questions):
            fits = all(tag_of(question, tag) in values for tag, values in asked.items())
            if fits and (keys is None or question.key in chosen):
                single.add(at)
                groups |= {question.group_id} - {""}
        return [q for at, q in enumerate(self.questions) if at in single or q.group_id in groups]


def tag_of(question: Question, tag: str) -> str:
    """A tag of a question; "type" and "lang" are tags too."""
    return getattr(question, tag) if tag in ("type", "lang") else question.tags.get(tag, "")


def units(questions: Sequence[Question]) -> list[list[Question]]:
    """Questions one by one, groups together: what may change places as a whole."""
    found: list[list[Question]] = []
    for question in questions:
        if question.group_id and found and found[-1][-1].group_id == question.group_id:
            found[-1].append(question)
        else:
            found.append([question])
    return found


def shuffled(questions: Sequence[Question], seed: int) -> list[Question]:
    """Another order of the units, the same for the same seed; questions of a group keep theirs."""
    parts = units(questions)
    random.Random(seed).shuffle(parts)
    return [question for part in parts for question in part]


def weakest_first(questions: Sequence[Question], weakness: Callable[[Question], float]) -> list[Question]:
    """Units by their weakest question, weakest first."""
    parts = sorted(units(questions), key=lambda part: -max(map(weakness, part)))
    return [question for part in parts for question in part]


REFERS = re.compile(
    r"以上|上述|均|[A-F]\s*[+、和与]\s*[A-F]|\b(above|both|all of|none of|[a-f] (and|&|or) [a-f])\b", re.I
)
"""an option that speaks of others cannot move"""
_NAMES_LETTERS = re.compile(
    r"(?<![A-Za-z])(?:[A-J]\s*(?:[.、．:：)）]|项|选项|错|对|正确|不对|不选|is\b|are\b)|[(（][A-J][)）])"
    r"|选\s*[A-J](?![A-Za-z])|(?i:\b(?:option|choice|answer)s?\s*\(?[A-J]\b)"
)
"""what looks as if an explanation spoke of options by their letters (a vitamin may look so too: it is shown as printed)"""


def option_order(question: Question, seed: int | None) -> tuple[str, ...]:
    """The letters of the options in the order to show them; as printed without a seed, for true/false and for options
    that a group shares, where options speak of one another, and where the explanation names letters."""
    letters = list(question.options)
    fixed = (
        question.type == "TF"
        or question.shared_options
        or any(REFERS.search(text) for text in question.options.values())
    )
    if seed is None or fixed or _NAMES_LETTERS.search(question.explanation):
        return tuple(letters)
    random.Random(f"{seed}:{question.key}").shuffle(letters)
    return tuple(letters)


# -- the shelf --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """A bank that can be opened."""

    name: str
    titles: Mapping[str, str]
    size: int
    path: Path
    ours: bool
    """one of examples/banks"""

    def __hash__(self) -> int:
        return hash((self.name, self.path))


class Shelf:
    """Banks by name: ours, and those in `folder` (None: nothing is kept on disk, imported banks live in memory)."""

    def __init__(self, folder: Path | None = None, examples: Path = EXAMPLES):
        self.folder = folder
        self._examples = examples
        self._memory: dict[str, Bank] = {}

    def list(self) -> list[Listed]:
        """Ours first, then imported ones by title; files that are no banks are left out."""
        imported = [
            Listed(bank.name, bank.titles, len(bank.questions), Path(), False) for bank in self._memory.values()
        ]
        if self.folder is not None and self.folder.is_dir():
            imported += filter(None, (_listed(path) for path in self.folder.glob("*" + SUFFIX)))
        return [*_examples(self._examples), *sorted(imported, key=lambda bank: bank.name)]

    def open(self, name: str) -> Bank:
        """Raises BankFileError for a bank that is not there or cannot be read."""
        if name in self._memory:
            return self._memory[name]
        found = next((bank for bank in self.list() if bank.name == name), None)
        if found is None:
            raise BankFileError(f"There is no bank called {name!r} any more.", f"题库 {name!r} 已不存在。")
        return _open_example(found) if found.ours else _open_kept(found)

    def add(self, title: str, questions: Sequence[Question]) -> Bank:
        """Keeps an imported bank; one of the same title is replaced (progress follows the questions, not the file).

        Raises BankFileError for more than MEMORY_QUESTIONS in memory, MingError when the disk refuses.
        """
        title = " ".join(title.split())[:80] or "bank"
        bank = Bank(_name(title), {"en": title, "zh": title}, tuple(questions))
        if self.folder is None:
            others = sum(len(kept.questions) for name, kept in self._memory.items() if name != bank.name)
            if others + len(bank.questions) > MEMORY_QUESTIONS:
                raise BankFileError(
                    f"On this server one visitor's banks may hold {MEMORY_QUESTIONS:,} questions together; yours would have {others + len(bank.questions):,}. Remove one first, or run the app on your own machine.",
                    f"在此服务器上，每位访客导入的题库合计最多 {MEMORY_QUESTIONS:,} 题，导入后将达 {others + len(bank.questions):,} 题。请先删除其他题库，或在自己的电脑上运行本程序。",
                )
            self._memory[bank.name] = bank
            return bank
        body = write_bank(bank.questions, "jsonl")
        head = {"bank": title, "size": len(bank.questions), "sha256": _digest(body)}
        _write(self.folder / (bank.name + SUFFIX), json.dumps(head, ensure_ascii=False).encode() + b"\n" + body)
        return bank

    def remove(self, name: str) -> None:
        """Forgets an imported bank; progress stays."""
        self._memory.pop(name, None)
        if self.folder is not None:
            (self.folder / (name + SUFFIX)).unlink(missing_ok=True)


def _name(title: str) -> str:
    """A file name that no title can lead elsewhere."""
    plain = re.sub(r"[^\w-]+", "-", title)[:40].strip("-")
    return f"{plain or 'bank'}-{hashlib.sha256(title.encode()).hexdigest()[:8]}"


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as part:
            part.write(data)
            part.flush()
            os.fsync(part.fileno())
        os.replace(part.name, path)
    except OSError as error:
        raise MingError(
            f"The bank could not be kept in {path.parent}: {error.strerror}. Free some room or set MING_DATA_DIR.",
            f"无法将题库保存到 {path.parent}：{error.strerror}。请清理空间或设置 MING_DATA_DIR。",
        ) from error


def _listed(path: Path) -> Listed | None:
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline(4096))
        title, size = str(head["bank"])[:80], int(head["size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Listed(path.name.removesuffix(SUFFIX), {"en": title, "zh": title}, size, path, False)


def _open_kept(listed: Listed) -> Bank:
    try:
        head, _, body = listed.path.read_bytes().partition(b"\n")
        trusted = json.loads(head).get("sha256") == _digest(body)
    except (OSError, ValueError) as error:
        raise BankFileError(
            f"The bank {listed.name!r} cannot be read. Import it again.", f"题库 {listed.name!r} 无法读取，请重新导入。"
        ) from error
    questions = tuple(_trusted(body)) if trusted else read_bank(body, listed.path.name).questions
    return Bank(listed.name, listed.titles, questions)


def _trusted(body: bytes) -> Iterator[Question]:
    for line in body.splitlines():
        values = json.loads(line)
        values["answer"] = tuple(values["answer"])
        yield Question(**{"id": "", **values})


def _examples(folder: Path) -> list[Listed]:
    """Ours, as examples/banks/banks.toml names them; none in an installed package without examples."""
    index = folder / "banks.toml"
    if not index.is_file():
        return []
    titles = tomllib.loads(index.read_text(encoding="utf-8"))
    return [
        Listed(name, title, _lines(folder / f"{name}.jsonl"), folder / f"{name}.jsonl", True)
        for name, title in titles.items()
    ]


@lru_cache(maxsize=64)
def _lines(path: Path) -> int:
    return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


@lru_cache(maxsize=16)
def _open_example(listed: Listed) -> Bank:
    read = read_bank(listed.path.read_bytes(), listed.path.name)
    return Bank(listed.name, listed.titles, read.questions)


def letters_shown(order: Sequence[str], letters: Collection[str]) -> str:
    """Letters of the file as the letters they are shown under, in order."""
    return "".join(LETTERS[at] for at, letter in enumerate(order) if letter in letters)
