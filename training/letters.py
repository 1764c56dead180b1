"""Letters of exam questions scored by log-probability: by a transformers model, or by the engine that serves.

A question is put as in training (letter only, fixed wording, options in file order); after the answer prefix the
letters' logits are compared, nothing is generated. Questions with several right letters cannot be scored so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ming_app.engine.inspection import ANSWER_PREFIX
from ming_app.engine.types import Backend
from ming_app.exam.question import Question
from ming_app.exam.wording import LETTER_JOIN, ask_for_letter
from training.chat import ChatTokenizer, Encoded, Turn
from training.errors import DataError
from training.exam import read_questions
from training.packing import Sample, pack
from training.step import hidden_states, packed

Tick = Callable[[int, int], None]
"""called with (done, total)"""
Scorer = Callable[[Sequence["LetterTask"]], list[np.ndarray]]
"""tasks to log-probabilities over each task's letters"""


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
    turns = [Turn(turn.role, turn.content) for turn in ask_for_letter(question)]
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
        states = hidden_states(model, batch)[last].float()
        for state, sample in zip(states, batch.samples, strict=True):
            index = place[id(sample)]
            logits = _logits(model.lm_head, state, tasks[index].letter_ids)
            scores[index] = logits.log_softmax(-1).cpu().numpy()
        done += len(batch.samples)
        if tick:
            tick(done, len(tasks))
    return scores


def _logits(head: Any, state: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """float32 logits of some tokens: as bf16 two letters would often tie."""
    bias = None if head.bias is None else head.bias[ids].float()
    return torch.nn.functional.linear(state, head.weight[ids].float(), bias)


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


def read_exam(path: str | Path, limit: int = 0) -> tuple[list[Question], int]:
    """Single-answer questions of a bank, and how many multiple-answer ones were left out.

    With a `limit`, that many spread evenly over the file (banks are often sorted by source); 0: all.
    """
    questions = list(read_questions(path))
    single = [question for question in questions if not question.kind.multiple]
    left_out = len(questions) - len(single)
    if 0 < limit < len(single):
        single = [single[i * len(single) // limit] for i in range(limit)]
    return single, left_out
