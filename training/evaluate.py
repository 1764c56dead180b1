"""Measurements: loss on held-out rows per stream, and letter accuracy on exam files by next-token logits.

A question is put as in training (letter only, fixed wording, options in file order); after the answer prefix the
letters' logits are compared, nothing is generated. Questions with several right letters are left out and counted. The
letters are scored by a transformers model (`score_letters`) or by the engine that serves (`score_letters_served`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ming_app.engine.types import Backend
from ming_app.molora.config import MoLoRAConfig
from training.chat import ChatTokenizer, Encoded, Turn
from training.errors import DataError
from training.exam import ANSWER_PREFIX, ASK_LETTER, LETTER_JOIN, Question, exam_prompt, read_questions
from training.losses import dead_experts
from training.packing import Batch, Sample, pack
from training.step import Terms, hidden_states, packed

Tick = Callable[[int, int], None]
"""called with (done, total)"""
Scorer = Callable[[Sequence["LetterTask"]], list[np.ndarray]]
"""tasks to log-probabilities over each task's letters"""


@torch.no_grad()
def dev_loss(
    objective: Callable[[Batch], Terms],
    samples: Mapping[str, Sequence[Sample]],
    batch_tokens: int = 1024,
    *,
    packing: bool = True,
    observe: Callable[[str, Batch, Terms], None] | None = None,
) -> dict[str, float]:
    """Mean loss per answer token of each stream, natural log, every token weighing 1. `observe` is called with stream,
    micro-batch and what the objective gave."""
    result = {}
    for name, rows in samples.items():
        total, count = 0.0, 0
        for batch in pack([replace(row, loss_weight=1.0) for row in rows], batch_tokens, share=packing):
            terms = objective(batch)
            total += float(terms.loss)
            count += len(batch.targets)
            if observe:
                observe(name, batch, terms)
        result[name] = total / count if count else math.nan
    return result


def dev_report(
    objective: Callable[[Batch], Terms],
    samples: Mapping[str, Sequence[Sample]],
    config: MoLoRAConfig,
    batch_tokens: int = 1024,
    *,
    packing: bool = True,
) -> dict[str, Any]:
    """Dev loss per stream of a model that carries an adapter, and the load of its experts.

    {"loss": {stream: float}, "load": {stream: float32 [L, P, E] shares}, "smallest_load", "largest_load", "dead_experts"}
    (the last three over all streams; see losses.dead_experts).
    """
    sums: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()

    def observe(stream: str, batch: Batch, terms: Terms) -> None:
        tokens = int(batch.real.sum())
        sums[stream] = sums.get(stream, torch.zeros(())) + terms.router.load.cpu() * tokens
        counts[stream] += tokens

    loss = dev_loss(objective, samples, batch_tokens, packing=packing, observe=observe)
    overall = torch.stack(list(sums.values())).sum(0) / counts.total()
    return {
        "loss": loss,
        "load": {name: total / counts[name] for name, total in sums.items()},
        "smallest_load": float(overall[overall > 0].min()),
        "largest_load": float(overall.max()),
        "dead_experts": dead_experts(overall, config),
    }


@dataclass(frozen=True)
class LetterTask:
    """One question ready to score: `ids` up to the answer prefix, the letters' next-token ids, the right one's index."""

    question: Question
    ids: list[int]
    letter_ids: list[int]
    right: int


def letter_task(question: Question, tokenizer: ChatTokenizer, system: str) -> LetterTask:
    """Builds the prompt. Prefix and letter are tokenised together and split where the letters begin to differ, so that
    each letter is the token the model would write (" C" after "Answer:", "C" after "答案：")."""
    lang = question.lang
    if lang not in ANSWER_PREFIX:
        raise DataError(
            f"Question {question.id} is in language {lang!r}; only zh and en can be scored.",
            f"题目 {question.id} 的语言为 {lang!r}；只能评测 zh 和 en。",
        )
    answers = [tokenizer.encode_text(ANSWER_PREFIX[lang] + LETTER_JOIN[lang] + letter) for letter in question.options]
    shared = 0
    while all(len(ids) > shared and ids[shared] == answers[0][shared] for ids in answers):
        shared += 1
    turns = [Turn("user", exam_prompt(question, ASK_LETTER[lang][0]))]
    ids = [*tokenizer.encode_prompt(turns, "", system), *answers[0][:shared]]
    right = list(question.options).index(question.answer[0])
    return LetterTask(question, ids, [answer[shared] for answer in answers], right)


@torch.no_grad()
def score_letters(
    model: Any, tasks: Sequence[LetterTask], batch_tokens: int = 2048, tick: Tick | None = None
) -> list[np.ndarray]:
    """Log-probabilities over each task's letters (they sum to 1 among themselves), float32 [options], in task order."""
    scores: list[np.ndarray] = [np.empty(0)] * len(tasks)
    samples = [_asked(task) for task in tasks]
    place = {id(sample): i for i, sample in enumerate(samples)}
    done = 0
    for batch in pack(samples, batch_tokens, share=packed(model)):
        last = torch.from_numpy(batch.learn_at).to(model.lm_head.weight.device)
        logits = model.lm_head(hidden_states(model, batch)[last]).float().cpu()
        for row, sample in zip(logits, batch.samples, strict=True):
            index = place[id(sample)]
            scores[index] = row[tasks[index].letter_ids].log_softmax(-1).numpy()
        done += len(batch.samples)
        if tick:
            tick(done, len(tasks))
    return scores


def _asked(task: LetterTask) -> Sample:
    """The prompt and one letter as the token to be predicted: packing then finds the state before it."""
    ids = np.asarray([*task.ids, task.letter_ids[0]], np.int32)
    return Sample(Encoded(ids, np.arange(len(ids)) == len(ids) - 1), "", "")


def score_letters_served(backend: Backend, tasks: Sequence[LetterTask], tick: Tick | None = None) -> list[np.ndarray]:
    """The same by a serving backend, in its precision. Questions are read one after the other in one cache, which keeps
    what a prompt has in common with the one before (system message, wording)."""
    scores: list[np.ndarray] = []
    cache = backend.new_cache(1, max((len(task.ids) for task in tasks), default=1))
    held: list[int] = []
    for done, task in enumerate(tasks, 1):
        shared = 0
        while shared < min(len(held), len(task.ids) - 1) and held[shared] == task.ids[shared]:
            shared += 1
        cache.truncate(0, shared)
        logits = backend.forward([np.array(task.ids[shared:], np.int64)], cache).logits[0][task.letter_ids]
        scores.append(logits - np.logaddexp.reduce(logits))
        held = task.ids
        if tick:
            tick(done, len(tasks))
    return scores


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers among `n` single-answer questions."""

    right: int
    n: int
    left_out: int
    """questions with several right letters"""
    chosen: dict[str, int]
    """how often each letter was chosen: a model that always says "A" shows here"""

    @property
    def value(self) -> float:
        return self.right / self.n if self.n else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the 95 % Wilson interval."""
        low, high = wilson(self.right, self.n)
        return {
            "accuracy": self.value,
            "right": self.right,
            "n": self.n,
            "confidence95": [low, high],
            "left_out": self.left_out,
            "chosen": self.chosen,
        }


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def read_exam(path: str | Path, limit: int = 0) -> tuple[list[Question], int]:
    """Single-answer questions of a bank, and how many multiple-answer ones were left out.

    With a `limit`, that many spread evenly over the file (banks are often sorted by source); 0: all.
    """
    questions = list(read_questions(path))
    single = [question for question in questions if not question.multiple]
    left_out = len(questions) - len(single)
    if 0 < limit < len(single):
        single = [single[i * len(single) // limit] for i in range(limit)]
    return single, left_out


def letter_accuracy(
    scorer: Scorer, tokenizer: ChatTokenizer, path: str | Path, *, system: str, limit: int = 0
) -> Accuracy:
    """Letter accuracy on an exam bank of whatever `scorer` scores with."""
    questions, left_out = read_exam(path, limit)
    tasks = [letter_task(question, tokenizer, system) for question in questions]
    scores = scorer(tasks)
    picks = [int(score.argmax()) for score in scores]
    right = sum(pick == task.right for pick, task in zip(picks, tasks, strict=True))
    chosen = Counter(chr(ord("A") + pick) for pick in picks)
    return Accuracy(right, len(tasks), left_out, dict(sorted(chosen.items())))
