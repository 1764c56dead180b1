"""The mix: rows of all streams, filtered by licence and length, held-out rows set apart, batches by position.

The order is a pure function of the recipe: batch b of block n is the same in every process, so a run resumes at
(block, batch) without any stored state. A block draws `block` rows from the streams by weight, each stream in its own
shuffled order (shuffled anew at every pass), and packs them (packing.py).
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ming_app.exam.question import Question
from training.chat import ChatTokenizer
from training.errors import DataError
from training.exam import letter_row, read_questions, reasoning_row
from training.leaks import LeakIndex
from training.licences import Licence, licence_of, needs_tags
from training.packing import Batch, Sample, pack
from training.readers import ChatRow, read_chats
from training.recipe import EXAM_FORMATS, Recipe, Stream
from training.records import Damage
from training.repeats import ending, repeating


@dataclass
class StreamRows:
    """Rows of one stream after all filters. `questions` for exam formats (made into chats per pass), else `chats`."""

    stream: Stream
    rows: list[ChatRow | Question] = field(default_factory=list)
    held_out: list[ChatRow | Question] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    licences: dict[str, Licence] = field(default_factory=dict)
    damage: Damage = field(default_factory=Damage)

    def summary(self) -> dict[str, Any]:
        """JSON-ready table row."""
        return {
            "stream": self.stream.name,
            "rows": len(self.rows),
            "held_out": len(self.held_out),
            "dropped": dict(self.dropped),
            "broken_lines": self.damage.count,
            "broken": self.damage.first,
            "languages": dict(self.languages),
            "sources": {
                name: {"rows": count, "licence": self.licences[name].licence, "origin": self.licences[name].origin}
                for name, count in self.sources.most_common()
            },
        }


def read_stream(recipe: Recipe, stream: Stream, leaks: LeakIndex | None = None) -> StreamRows:
    """Reads a stream and filters it by source, language, licence, leaks, held-out share and cap; lengths are looked at when
    drawn. Raises DataError when nothing is left."""
    result = StreamRows(stream)
    tags = _bank_tags(recipe, stream)
    damage = result.damage if recipe.data.broken_lines == "skip" else None
    path = recipe.data_path(stream.file)
    exam = stream.format in EXAM_FORMATS
    for row in read_questions(path, damage) if exam else read_chats(path, damage, stream.format):
        source = row.source or stream.source or stream.name
        row_tags = row.tags or tags.get(row.id, {})
        licence = licence_of(source, row_tags, stream.licence)
        reason = _unwanted(recipe, stream, row, source)
        if not reason and recipe.data.licences != "any" and needs_tags(source) and not row_tags:
            reason = "licence unclear without bank tags"
        elif not reason and not licence.passes(recipe.data.licences):
            reason = "licence"
        elif not reason and leaks is not None and leaks.find(row):
            reason = "in an evaluation file"
        if reason:
            result.dropped[reason] += 1
        elif is_held_out(row.id, recipe.data.held_out):
            result.held_out.append(replace(row, source=source))
        else:
            result.rows.append(replace(row, source=source))
            result.licences[source] = licence
    result.rows = _capped(result.rows, stream.cap, result.dropped)
    result.held_out.sort(key=lambda row: _hash(row.id))
    result.sources.update(row.source for row in result.rows)
    result.languages.update(row.lang for row in result.rows)
    if not result.rows:
        raise DataError(
            f"Stream {stream.name} has no rows left after filtering ({dict(result.dropped)}).",
            f"数据流 {stream.name} 过滤后没有剩余的数据（{dict(result.dropped)}）。",
        )
    return result


def _unwanted(recipe: Recipe, stream: Stream, row: ChatRow | Question, source: str) -> str:
    if stream.sources and source not in stream.sources:
        return "source not asked for"
    if recipe.data.languages and row.lang not in recipe.data.languages:
        return "language"
    if stream.format == "exam_reasoning" and not row.explanation:  # type: ignore[union-attr]  # a Question
        return "no explanation"
    return ""


def is_held_out(row_id: str, share: float) -> bool:
    """Whether a row stays out of training; depends on its id alone."""
    return int(_hash(row_id)[:8], 16) < share * 16**8


def _hash(row_id: str) -> str:
    return hashlib.sha256(f"held-out {row_id}".encode()).hexdigest()


def _bank_tags(recipe: Recipe, stream: Stream) -> dict[str, Any]:
    if not stream.bank:
        return {}
    return {question.id: question.tags for question in read_questions(recipe.data_path(stream.bank), Damage())}


def _capped(rows: list[Any], cap: int, dropped: Counter[str]) -> list[Any]:
    if not cap:
        return rows
    taken: Counter[str] = Counter()
    kept = []
    for row in sorted(rows, key=lambda row: hashlib.sha256(f"cap {row.id}".encode()).digest()):
        taken[row.source] += 1
        if taken[row.source] <= cap:
            kept.append(row)
    dropped["over the cap"] += len(rows) - len(kept)
    return sorted(kept, key=lambda row: row.id)


class Mix:
    """All streams of a recipe, tokenised when drawn."""

    def __init__(self, recipe: Recipe, tokenizer: ChatTokenizer):
        self.recipe = recipe
        self.tokenizer = tokenizer
        leaks = LeakIndex.of_files(recipe.data_path(name) for name in recipe.data.evaluation)
        self.streams = [read_stream(recipe, stream, leaks) for stream in recipe.stream]
        self._counts = _block_counts([s.stream.weight for s in self.streams], recipe.data.block)

    def summary(self) -> list[dict[str, Any]]:
        """One table row per stream: rows, held out, dropped and why, sources with licence."""
        return [stream.summary() for stream in self.streams]

    def batches(self, block: int, batch: int = 0) -> Iterator[tuple[int, int, Batch]]:
        """Endless (block, batch, rows) from a position on."""
        while True:
            cut = self._block(block)
            for index in range(batch, len(cut)):
                yield block, index, cut[index]
            block, batch = block + 1, 0

    def seen(self, block: int, batch: int) -> dict[str, dict[str, dict[str, int]]]:
        """What a run has read when it stands at (block, batch): {stream: {source: {"rows", "tokens"}}}."""
        table: dict[str, dict[str, dict[str, int]]] = {}
        for at_block, at_batch, rows in self.batches(0):
            if (at_block, at_batch) >= (block, batch):
                return table
            for sample in rows.samples:
                entry = table.setdefault(sample.stream, {}).setdefault(sample.source, {"rows": 0, "tokens": 0})
                entry["rows"] += 1
                entry["tokens"] += len(sample.encoded)
        return table

    def census(self) -> list[dict[str, Any]]:
        """`summary` with the tokens of one pass over each stream, answer tokens among them, its share of the rows and
        tokens of the mix, and rows that are too long."""
        table = []
        for rows, count in zip(self.streams, self._counts, strict=True):
            samples = [self._encode(rows.stream, row, f"census {row.id}") for row in rows.rows]
            kept = [sample for sample in samples if sample is not None]
            entry = rows.summary()
            if len(kept) < len(samples):
                entry["dropped"]["too long"] = len(samples) - len(kept)
            entry["rows"] = len(kept)
            entry["tokens"] = sum(len(sample.encoded) for sample in kept)
            entry["answer_tokens"] = sum(int(sample.encoded.mask.sum()) for sample in kept)
            entry["share_of_rows"] = count * len(kept) / len(samples)
            entry["share_of_tokens"] = count * entry["tokens"] / len(samples)
            table.append(entry)
        for share in ("share_of_rows", "share_of_tokens"):
            total = sum(entry[share] for entry in table) or 1.0
            for entry in table:
                entry[share] /= total
        return table

    def first_samples(self, count: int) -> list[Sample]:
        """Samples in the order of training, `count` of them."""
        batches = self.batches(0)
        samples: list[Sample] = []
        while len(samples) < count:
            samples += next(batches)[2].samples
        return samples[:count]

    def held_out(self) -> dict[str, list[Sample]]:
        """The held-out samples of each stream, short enough, at most `held_out_rows` each; always the same."""
        result: dict[str, list[Sample]] = {}
        for rows in self.streams:
            samples = (self._encode(rows.stream, row, f"held-out {row.id}") for row in rows.held_out)
            kept = [s for s in samples if s is not None]
            result[rows.stream.name] = kept[: self.recipe.data.held_out_rows]
        return result

    def _block(self, block: int) -> list[Batch]:
        seed = self.recipe.seed
        samples: list[Sample] = []
        for rows, count in zip(self.streams, self._counts, strict=True):
            drawn = []
            for position in range(block * count, (block + 1) * count):
                turn, index = divmod(position, len(rows.rows))
                row = rows.rows[_order(seed, rows.stream.name, turn, len(rows.rows))[index]]
                drawn.append((f"{seed} {turn} {row.id}", row))
            places = _places([row for _, row in drawn], f"{seed} {block} {rows.stream.name}")
            encoded = (self._encode(rows.stream, row, key, places.get(row.id, "")) for key, row in drawn)
            samples += [sample for sample in encoded if sample is not None]
        if not samples:
            raise DataError(
                "Every row drawn is longer than max_length; nothing is left to train on.",
                "抽取的数据全部超过 max_length，没有可训练的内容。",
            )
        budget = self.recipe.budget.batch_tokens
        return pack(samples, budget, f"{seed} {block}", share=self.recipe.data.packing)

    def _encode(self, stream: Stream, row: ChatRow | Question, seed: str, place: str = "") -> Sample | None:
        """The row as tokens, or None when it is too long. `place`: the letter its right option shall have."""
        if isinstance(row, Question):
            rng = random.Random(seed)
            row = letter_row(row, rng, place) if stream.format == "exam_letter" else reasoning_row(row, rng)
        elif stream.repeats:
            row = repeating(row, random.Random(seed))
        limit = stream.max_length or self.recipe.data.max_length
        if sum(len(turn.content) for turn in row.turns) > 8 * limit:
            return None
        system = self.recipe.data.system if row.system is None else row.system
        encoded = self.tokenizer.encode_chat(row.turns, system)
        if stream.repeats:
            encoded = ending(encoded)
        return Sample(encoded, stream.name, row.source, stream.loss_weight) if len(encoded) <= limit else None


def _places(rows: Sequence[ChatRow | Question], seed: str) -> dict[str, str]:
    """The letter for the right option of each single-answer question. Among questions of like length and as many options
    every letter comes equally often, so that no batch teaches the model to like one letter."""
    rng = random.Random(f"{seed} letters")
    places: dict[str, str] = {}
    questions = [row for row in rows if isinstance(row, Question) and not row.kind.multiple]
    bag: dict[int, list[str]] = {}
    for question in sorted(questions, key=lambda q: (len(q.stem) + sum(map(len, q.options.values())), q.id)):
        letters = list(question.options)
        left = bag.setdefault(len(letters), [])
        if not left:
            left += rng.sample(letters, len(letters))
        places[question.id] = left.pop()
    return places


def _block_counts(weights: Sequence[float], block: int) -> list[int]:
    """Rows of each stream in a block: largest remainders, at least one each."""
    total = sum(weights)
    exact = [max(1.0, block * w / total) for w in weights]
    counts = [int(x) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: max(0, block - sum(counts))]:
        counts[i] += 1
    return counts


_orders: dict[tuple[int, str, int, int], np.ndarray] = {}


def _order(seed: int, name: str, turn: int, size: int) -> np.ndarray:
    """The shuffled order of a stream's pass `turn`, kept for the last few passes only."""
    key = (seed, name, turn, size)
    if key not in _orders:
        if len(_orders) > 64:
            _orders.clear()
        digest = hashlib.sha256(f"{seed} {name} {turn}".encode()).digest()
        _orders[key] = np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(size)
    return _orders[key]
