"""Looking closely at an answer that exists: its tokens are read again, not written anew, with everything recorded.

`inspect` gives the trace with full router probabilities, contributions and the runners-up of every answer token; `contrast`
reads the same tokens twice, as they are and under interventions, and tells how far the model's next-token distributions
move. Both run in the engine's turn and can be cancelled between two chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ming_app.engine.engine import Engine
from ming_app.engine.interventions import Compiled, described
from ming_app.engine.jobs import prompt_tokens
from ming_app.engine.types import Cache, Intervention, Message, Step
from ming_app.errors import PromptTooLongError, StoppedError, TraceError, UsageError
from ming_app.molora.config import PROJECTIONS
from ming_app.molora.trace import RouterTrace, TraceToken

CHUNK = 64  # tokens per call: [CHUNK, V] float32 logits are held twice at most
OTHERS = 5
ANSWER_PREFIX = {"zh": "答案：", "en": "Answer:"}  # what an exam answer begins with, as the adapters were trained


@dataclass(frozen=True)
class Contrast:
    """`plain` and `changed` are traces of the same n + prompt tokens. Arrays have one entry per answer token."""

    plain: RouterTrace
    changed: RouterTrace
    divergence: np.ndarray
    """float32 [n]: Kullback-Leibler divergence of the changed next-token distribution from the plain one, in nats"""

    @property
    def first_difference(self) -> int | None:
        """Index of the first answer token at which the most likely token is another one; None when there is none."""
        answers = [[t for t in trace.tokens if t.role == "answer"] for trace in (self.plain, self.changed)]
        for index, (a, b) in enumerate(zip(*answers, strict=True)):
            if a.others and b.others and a.others[0][0] != b.others[0][0]:
                return index
        return None


def inspect(
    engine: Engine,
    trace: RouterTrace,
    interventions: Sequence[Intervention] = (),
    *,
    others: int = OTHERS,
    cancel: threading.Event | None = None,
) -> RouterTrace:
    """The trace of the same tokens as the engine reads them now, with all that can be recorded.

    Raises TraceError when the tokens are not the engine's, PromptTooLongError, UsageError as `Engine.stream`, and
    StoppedError.
    """
    there = getattr(engine, "read_there", None)  # the model is in another process: so is the reading (zerogpu.py)
    if there is not None:
        result: RouterTrace = there("inspect", trace, tuple(interventions), others, cancel=cancel)
        return result
    ids = _ids(engine, trace)
    changes = engine.changes(interventions)
    collected = _Collector(engine, trace, interventions, others)
    with engine.turn():
        for steps in _read(engine, ids, [changes], cancel):
            collected.add(steps[0])
    return collected.trace()


def inspect_given(engine: Engine, messages: Sequence[Message], answer: str = "") -> RouterTrace:
    """The measured trace of a conversation and an answer that someone else wrote ("" for none). Raises as `inspect`."""
    info = engine.info
    ids = engine.tokenizer.build(messages, info.context_limit, 1).ids
    tokens = prompt_tokens(ids, engine.tokenizer.piece_stream())
    written = prompt_tokens(engine.tokenizer.encode_text(answer), engine.tokenizer.piece_stream())
    begin = tokens[-1].piece + 1
    tokens += [replace(token, role="answer", piece=token.piece + begin) for token in written]
    shape = (len(tokens), info.num_layers, len(PROJECTIONS), info.top_k)
    unread = RouterTrace(
        np.broadcast_to(np.arange(info.top_k, dtype=np.uint8), shape),
        np.zeros(shape, np.float16),
        tuple(tokens),
        max(info.num_experts, 1),
        config={**info.adapter_config, "backend": info.backend},
    )
    return inspect(engine, unread)


def contrast(
    engine: Engine,
    trace: RouterTrace,
    interventions: Sequence[Intervention],
    *,
    others: int = OTHERS,
    cancel: threading.Event | None = None,
) -> Contrast:
    """Reads the tokens plain and changed, side by side. Raises as `inspect`."""
    there = getattr(engine, "read_there", None)
    if there is not None:
        result: Contrast = there("contrast", trace, tuple(interventions), others, cancel=cancel)
        return result
    ids = _ids(engine, trace)
    pair = [engine.changes(()), engine.changes(interventions)]
    plain, changed = _Collector(engine, trace, (), others), _Collector(engine, trace, interventions, others)
    divergence: list[np.ndarray] = []
    with engine.turn():
        for a, b in _read(engine, ids, pair, cancel):
            log_a, log_b = _log_softmax(a.logits[0]), _log_softmax(b.logits[0])
            divergence.append((np.exp(log_a) * (log_a - log_b)).sum(-1))
            plain.add(a, log_a)
            changed.add(b, log_b)
    at = np.flatnonzero(trace.is_answer())
    # the distribution a token was drawn from is that after the token before it; a trace never begins with an answer
    return Contrast(plain.trace(), changed.trace(), np.concatenate(divergence)[at - 1].astype(np.float32))


def option_probabilities(
    engine: Engine, question: Sequence[Message], letters: Sequence[str], interventions: Sequence[Intervention]
) -> list[tuple[str, float, float]]:
    """(letter, probability plain, changed) of every option of an exam question; probabilities add up to 1 over them."""
    if not question or not letters:
        return []
    lang = "zh" if any("\u4e00" <= c <= "\u9fff" for c in question[-1].content) else "en"
    prefix = [*question, Message("assistant", ANSWER_PREFIX[lang])]
    texts = [letter if lang == "zh" else f" {letter}" for letter in letters]
    shares = []
    for asked in ((), interventions):
        logs = np.array(engine.score(prefix, texts, asked))
        odds = np.exp(logs - logs.max())
        shares.append(odds / odds.sum())
    return [(letter, float(a), float(b)) for letter, a, b in zip(letters, *shares, strict=True)]


def _ids(engine: Engine, trace: RouterTrace) -> np.ndarray:
    if not engine.info.num_experts:
        raise UsageError("This model has no experts to look at.", "该模型没有专家，无可查看。")
    ids = np.array([token.id for token in trace.tokens], np.int64)
    if (
        not len(ids)
        or ids.max() >= engine.backend.vocab_size
        or trace.tokens[0].role == "answer"
        or len(trace.segments) > 1
    ):
        raise TraceError(
            "This trace is not one text of this model's tokens, so it cannot be read again.",
            "该轨迹不是当前模型词元构成的单个文本，无法重新读取。",
        )
    said = "".join(token.text for token in trace.tokens)
    if engine.tokenizer.decode(ids.tolist()).rstrip("\ufffd") != said.rstrip("\ufffd"):
        raise TraceError(
            "This trace was made with another tokenizer, so this model cannot read it again.",
            "该轨迹由其他分词器生成，当前模型无法重新读取。",
        )
    if len(ids) > engine.info.context_limit:
        raise PromptTooLongError(
            f"The trace has {len(ids)} tokens; the context holds {engine.info.context_limit}.",
            f"轨迹共 {len(ids)} 个词元，超过上下文上限 {engine.info.context_limit}。",
        )
    return ids


def _read(
    engine: Engine, ids: np.ndarray, variants: Sequence[Compiled], cancel: threading.Event | None
) -> Iterator[list[Step]]:
    """Chunk by chunk one Step per variant, each with a cache of its own, all logits and all measures."""
    caches: list[Cache] = []
    for start in range(0, len(ids), CHUNK):
        if engine.closing.is_set() or (cancel is not None and cancel.is_set()):
            raise StoppedError("Stopped before the reading was done.", "已停止，读取尚未完成。")
        caches = caches or [engine.backend.new_cache(1, len(ids)) for _ in variants]
        part = ids[start : start + CHUNK]
        yield [
            engine.forward(part, cache, changes, all_logits=True, measure=True)
            for cache, changes in zip(caches, variants, strict=True)
        ]


class _Collector:
    """Puts the steps of one reading together."""

    def __init__(self, engine: Engine, trace: RouterTrace, interventions: Sequence[Intervention], others: int):
        self._engine = engine
        self._trace = trace
        self._interventions = interventions
        self._others = others
        self._parts: dict[str, list[np.ndarray]] = {}
        self._tokens: list[TraceToken] = []
        self._last: np.ndarray | None = None

    def add(self, step: Step, logs: np.ndarray | None = None) -> None:
        """`logs` float [n, V]: the step's log-probabilities, where they are known already."""
        logs = _log_softmax(step.logits[0]) if logs is None else logs
        for name in ("experts", "weights", "probabilities", "contributions"):
            self._parts.setdefault(name, []).append(getattr(step, name)[0])
        before = [self._last, *logs[:-1]]
        start = len(self._tokens)
        for token, row in zip(self._trace.tokens[start : start + len(logs)], before, strict=True):
            self._tokens.append(self._seen(token, row))
        self._last = logs[-1]

    def _seen(self, token: TraceToken, row: np.ndarray | None) -> TraceToken:
        """The token with its log-probability and runners-up under `row`; those of a prompt were not asked for."""
        if row is None or token.role != "answer":
            return replace(token, logprob=None, others=())
        best = np.argpartition(-row, self._others)[: self._others]
        best = best[np.argsort(-row[best], kind="stable")]
        texts = [self._engine.tokenizer.decode([int(i)]) for i in best]
        others = tuple((text, min(float(row[i]), 0.0)) for text, i in zip(texts, best, strict=True))
        return replace(token, logprob=min(float(row[token.id]), 0.0), others=others)

    def trace(self) -> RouterTrace:
        arrays: dict[str, Any] = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        config = {key: value for key, value in self._trace.config.items() if key != "interventions"}
        info = self._engine.info
        return replace(
            self._trace,
            **arrays,
            tokens=tuple(self._tokens),
            num_experts=info.num_experts,
            model=info.title,
            fingerprint=info.fingerprint,
            config={**config, "precision": info.precision, **described(self._interventions)},
        )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [n, V] -> float32 [n, V]."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
