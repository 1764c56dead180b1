"""How close the quantised engines stay to float32: the peer behind the cases kl-*, same-token-* and same-experts-*.

The float32 torch backend and every recipe read the same ids: the example questions, each with the start of an answer. Per
position: KL divergence of the next-token distributions, whether the most likely token is the same, and whether the same
set of experts fires (per layer and projection).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ming_app.engine.types import Backend, Message, SamplingParams, Step, Token

if TYPE_CHECKING:
    from ming_app.bench.peers import Setup
    from ming_app.engine.engine import Engine
    from ming_app.settings import Settings

RECIPES = ("4bit", "mix", "8bit")
MEASURES = ("kl", "same-token", "same-experts")
ANSWER_TOKENS = 48
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "prompts.toml"


@dataclass(frozen=True)
class Closeness:
    """Means over all positions of all texts."""

    kl: float
    """nats, of the float32 distribution from the quantised one"""
    same_token: float
    same_experts: float | None
    """None without an adapter"""


class Reads(Protocol):
    """The part of a Backend that is compared."""

    def new_cache(self, batch: int, capacity: int, /) -> Any:
        """Room for one text."""

    def forward(self, ids: Sequence[np.ndarray], cache: Any, /, *, all_logits: bool) -> Step:
        """Its logits, and experts where there are any."""


def compare(reference: Reads, other: Reads, texts: Sequence[np.ndarray]) -> Closeness:
    """Both backends read `texts` (int64 ids) one after the other."""
    divergence, token, experts = [], [], []
    for ids in texts:
        want = reference.forward([ids], reference.new_cache(1, len(ids)), all_logits=True)
        got = other.forward([ids], other.new_cache(1, len(ids)), all_logits=True)
        p, q = _log_softmax(want.logits[0]), _log_softmax(got.logits[0])
        divergence.append((np.exp(p) * (p - q)).sum(-1))
        token.append(p.argmax(-1) == q.argmax(-1))
        if want.experts is not None and got.experts is not None:
            same = np.sort(want.experts[0], -1) == np.sort(got.experts[0], -1)
            experts.append(same.all(-1).mean((1, 2)))
    mean = lambda parts: float(np.concatenate(parts).mean())  # noqa: E731  # a local abbreviation
    return Closeness(mean(divergence), mean(token), mean(experts) if experts else None)


def example_texts(engine: Engine) -> list[np.ndarray]:
    """The example questions as prompts, each followed by the greedy start of this engine's answer."""
    texts = []
    for question in example_questions():
        prompt = [Message("user", question)]
        params = SamplingParams(max_new_tokens=ANSWER_TOKENS, temperature=0, trace=False)
        ids = engine.tokenizer.build(prompt, engine.info.context_limit, ANSWER_TOKENS).ids
        for event in engine.stream(prompt, params):
            if isinstance(event, Token):
                ids += [token.id for token in event.tokens]
        texts.append(np.array(ids, np.int64))
    return texts


def example_questions() -> list[str]:
    """Texts of examples/prompts.toml, both languages."""
    table = tomllib.loads(EXAMPLES.read_text(encoding="utf-8"))
    return [entry["text"] for entries in table.values() for entry in entries]


def fidelity_peer(setup: Setup) -> Callable[[str], float]:
    """Measures "kl:mix" and the like; each recipe is compared once and remembered. "llama" is llama.cpp on the same file,
    to be compared on the bare base, for it cannot carry the adapter."""
    from ming_app.engine.engine import Engine

    results: dict[str, Closeness] = {}
    settings = setup.settings.with_(device="cpu")
    reference = Engine.load(settings.with_(backend="torch", precision="float32"))
    texts: list[np.ndarray] = []

    def measure(what: str) -> float:
        name, _, recipe = what.partition(":")
        if not texts:
            texts.extend(example_texts(Engine.load(settings.with_(backend="cpu", precision=RECIPES[0]))))
        if recipe not in results:
            other = _Llama(setup) if recipe == "llama" else _engine(settings, recipe)
            results[recipe] = compare(reference.backend, other, texts)
        value = getattr(results[recipe], name.replace("-", "_"))
        return float("nan") if value is None else float(value)

    return measure


def _engine(settings: Settings, recipe: str) -> Backend:
    from ming_app.engine.engine import Engine

    return Engine.load(settings.with_(backend="cpu", precision=recipe)).backend


class _Llama:
    """As much of a Backend as `compare` needs, over llama.cpp."""

    def __init__(self, setup: Setup):
        from llama_cpp import Llama

        from ming_app.models.catalog import find_model
        from ming_app.models.fetch import fetch

        local, threads = fetch(find_model(setup.settings.model), setup.settings), setup.settings.threads
        context = setup.settings.context
        self._llama = Llama(
            str(local.base), n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False
        )

    def new_cache(self, _batch: int, _capacity: int) -> None:
        """llama.cpp keeps its own."""
        self._llama.reset()

    def forward(self, ids: Sequence[np.ndarray], _cache: None, *, all_logits: bool) -> Step:
        """All logits of the one row."""
        assert all_logits  # as `compare` asks
        self._llama.eval(ids[0].tolist())
        return Step([np.array(self._llama.scores[: len(ids[0])], np.float32)], None, None)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
