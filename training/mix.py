"""The mix: rows of all streams, filtered by licence and length, held-out rows set apart, batches by position.

The order is a pure function of the recipe: batch b of block n is the same in every process, so a run resumes at
(block, batch) without any stored state. A block draws `block` rows from the streams by weight, each stream in its own
shuffled order (shuffled anew at every pass), sorts them by length and cuts them into batches with little padding.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.chat import ChatTokenizer, Encoded, Turn
from training.data import ChatRow, Damage, Question, letter_row, read_chats, read_questions, reasoning_row
from training.errors import DataError
from training.licences import Licence, licence_of, needs_tags
from training.recipe import Recipe, Stream


@dataclass
class StreamRows:
    """Rows of one stream after all filters. `questions` for exam formats (made into chats per pass), else `chats`."""

    stream: Stream
    rows: list[ChatRow | Question] = field(default_factory=list)
    held_out: list[ChatRow | Question] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
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
            "sources": {
                name: {"rows": count, "licence": self.licences[name].licence, "origin": self.licences[name].origin}
                for name, count in self.sources.most_common()
            },
        }


def read_stream(recipe: Recipe, stream: Stream) -> StreamRows:
    """Reads a stream and filters it by source, licence, cap and held-out share; lengths are looked at when drawn."""
    result = StreamRows(stream)
    tags = _bank_tags(recipe, stream)
    damage = result.damage if recipe.data.broken_lines == "skip" else None
    reader = read_chats if stream.format == "chat" else read_questions
    for row in reader(recipe.data_path(stream.file), damage):
        if stream.sources and row.source not in stream.sources:
            result.dropped["source not asked for"] += 1
            continue
        row_tags = row.tags or tags.get(row.id, {})
        licence = licence_of(row.source, row_tags)
        if recipe.data.licences != "any" and needs_tags(row.source) and not row_tags:
            result.dropped["licence unclear without bank tags"] += 1
        elif not licence.passes(recipe.data.licences):
            result.dropped["licence"] += 1
        elif stream.format == "exam_reasoning" and not row.explanation:  # type: ignore[union-attr]  # a Question
            result.dropped["no explanation"] += 1
        elif is_held_out(row.id, recipe.data.held_out):
            result.held_out.append(row)
        else:
            result.rows.append(row)
            result.licences[row.source] = licence
    result.rows = _capped(result.rows, stream.cap, result.dropped)
    result.held_out.sort(key=lambda row: _hash(row.id))
    result.sources.update(row.source for row in result.rows)
    if not result.rows:
        raise DataError(
            f"Stream {stream.name} has no rows left after filtering ({dict(result.dropped)}).",
            f"数据流 {stream.name} 过滤后没有剩余的数据（{dict(result.dropped)}）。",
        )
    return result


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


@dataclass(frozen=True)
class Sample:
    """One encoded conversation and the stream it came from."""

    encoded: Encoded
    stream: str
    source: str
    loss_weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. `ids` int64 [B, S]; `mask` bool [B, S] where the loss looks; `real` bool [B, S] not padding;
    `weights` float32 [B, S], what each looked-at token's loss counts (zero elsewhere).

    With causal attention no real token sees the padding to its right, so no attention mask is needed.
    """

    ids: np.ndarray
    mask: np.ndarray
    real: np.ndarray
    weights: np.ndarray
    streams: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return int(self.real.sum())


def make_batch(samples: Sequence[Sample]) -> Batch:
    """Pads samples to the longest one."""
    shape = (len(samples), max(len(s.encoded) for s in samples))
    ids, mask, real = np.zeros(shape, np.int64), np.zeros(shape, bool), np.zeros(shape, bool)
    weights = np.zeros(shape, np.float32)
    for row, sample in enumerate(samples):
        size = len(sample.encoded)
        ids[row, :size], mask[row, :size], real[row, :size] = sample.encoded.ids, sample.encoded.mask, True
        weights[row, :size] = sample.encoded.mask * np.float32(sample.loss_weight)
    return Batch(ids, mask, real, weights, tuple(s.stream for s in samples), tuple(s.source for s in samples))


def cut_batches(samples: Sequence[Sample], batch_tokens: int) -> list[list[Sample]]:
    """Samples sorted by length and cut so that rows x longest stays within `batch_tokens` (one row at least)."""
    batches: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: len(s.encoded)):
        if batches and (len(batches[-1]) + 1) * len(sample.encoded) <= batch_tokens:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


class Mix:
    """All streams of a recipe, tokenised when drawn."""

    def __init__(self, recipe: Recipe, tokenizer: ChatTokenizer):
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.streams = [read_stream(recipe, stream) for stream in recipe.stream]
        self._counts = _block_counts([s.stream.weight for s in self.streams], recipe.data.block)

    def summary(self) -> list[dict[str, Any]]:
        """One table row per stream: rows, held out, dropped and why, sources with licence."""
        return [stream.summary() for stream in self.streams]

    def batches(self, block: int, batch: int = 0) -> Iterator[tuple[int, int, Batch]]:
        """Endless (block, batch, rows) from a position on."""
        while True:
            cut = self._block(block)
            for index in range(batch, len(cut)):
                yield block, index, make_batch(cut[index])
            block, batch = block + 1, 0

    def seen(self, block: int, batch: int) -> dict[str, dict[str, dict[str, int]]]:
        """What a run has read when it stands at (block, batch): {stream: {source: {"rows", "tokens"}}}."""
        table: dict[str, dict[str, dict[str, int]]] = {}
        for at_block, at_batch, rows in self.batches(0):
            if (at_block, at_batch) >= (block, batch):
                return table
            for stream, source, size in zip(rows.streams, rows.sources, rows.real.sum(1).tolist(), strict=True):
                entry = table.setdefault(stream, {}).setdefault(source, {"rows": 0, "tokens": 0})
                entry["rows"] += 1
                entry["tokens"] += size
        return table

    def held_out(self) -> dict[str, list[Sample]]:
        """The held-out samples of each stream, short enough, at most `held_out_rows` each; always the same."""
        result: dict[str, list[Sample]] = {}
        for rows in self.streams:
            samples = (self._encode(rows.stream, row, f"held-out {row.id}") for row in rows.held_out)
            kept = [s for s in samples if s is not None]
            result[rows.stream.name] = kept[: self.recipe.data.held_out_rows]
        return result

    def _block(self, block: int) -> list[list[Sample]]:
        seed = self.recipe.seed
        samples: list[Sample] = []
        for rows, count in zip(self.streams, self._counts, strict=True):
            for position in range(block * count, (block + 1) * count):
                turn, index = divmod(position, len(rows.rows))
                order = _order(seed, rows.stream.name, turn, len(rows.rows))
                row = rows.rows[order[index]]
                sample = self._encode(rows.stream, row, f"{seed} {turn} {row.id}")
                if sample is not None:
                    samples.append(sample)
        batches = cut_batches(samples, self.recipe.budget.batch_tokens)
        random.Random(f"{seed} batches {block}").shuffle(batches)
        if not batches:
            raise DataError(
                "Every row drawn is longer than max_length; nothing is left to train on.",
                "抽取的数据全部超过 max_length，没有可训练的内容。",
            )
        return batches

    def _encode(self, stream: Stream, row: ChatRow | Question, seed: str) -> Sample | None:
        """The row as tokens, or None when it is too long."""
        if isinstance(row, Question):
            make = letter_row if stream.format == "exam_letter" else reasoning_row
            row = make(row, random.Random(seed))
        limit = stream.max_length or self.recipe.data.max_length
        if sum(len(turn.content) for turn in row.turns) > 8 * limit:
            return None
        encoded = self.tokenizer.encode_chat([Turn(t.role, t.content) for t in row.turns], self.recipe.data.system)
        return Sample(encoded, stream.name, row.source, stream.loss_weight) if len(encoded) <= limit else None


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
