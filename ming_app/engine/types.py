"""The engine's contract: messages and sampling parameters in, events out. Imports only numpy and our trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from ming_app.errors import MingError, UsageError
from ming_app.molora.config import PROJECTIONS
from ming_app.molora.trace import RouterTrace, TraceToken

DEADLINE = 300.0
"""seconds that a server gives one answer, so that a queue always moves on"""
PATIENCE = 900.0
"""seconds that a server lets a request wait for its turn"""


@dataclass(frozen=True)
class Message:
    """One turn. `role` is system, user or assistant; `content` is plain text, never interpreted as control tokens."""

    role: str
    content: str


@dataclass(frozen=True)
class Intervention:
    """One change of the adapter for one request; see interventions.py. `value`: the expert (ban, force) or k."""

    KINDS: ClassVar[tuple[str, ...]] = ("ban", "force", "k", "uniform", "off", "base")
    kind: str
    value: int | None = None
    layers: tuple[int, int] | None = None
    """first and last, both included; None: all"""
    projections: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        unknown = [name for name in self.projections if name not in PROJECTIONS]
        if self.kind not in self.KINDS or unknown or not self.projections:
            raise UsageError(
                f"An intervention is one of {', '.join(self.KINDS)}, on some of {', '.join(PROJECTIONS)}.",
                f"干预类型应为 {'、'.join(self.KINDS)} 之一，作用于 {'、'.join(PROJECTIONS)} 中的若干个。",
            )


@dataclass(frozen=True)
class SamplingParams:
    """How to decode. `temperature` 0 is greedy and reproducible; a `seed` makes sampling reproducible."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 40
    """0 keeps all"""
    min_p: float = 0.0
    repetition_penalty: float = 1.05
    seed: int | None = None
    deadline: float | None = None
    """seconds after its turn came after which the answer is cut with reason "deadline" """
    patience: float | None = None
    """seconds that it may wait for its turn; then it ends with reason "deadline" """
    visitor: str = ""
    """who asks, for turns that go round and a bound on what one visitor has unfinished; "" is not bounded. Never shown"""
    trace: bool = True
    router_bias: np.ndarray | None = None
    """float32 [L, P, E] added to the router logits of this request: -inf-like bans an expert, large forces it"""
    stop: tuple[str, ...] = ()
    """texts that end the answer before them; at most 8 of at most 100 characters"""
    interventions: tuple[Intervention, ...] = ()
    """what this request changes in the adapter, on top of `router_bias`"""
    alternatives: int = 0
    """how many of the most likely tokens are told beside each one that was chosen; at most 20"""

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (1, 1 << 20),
            "temperature": (0, 5),
            "top_p": (0.01, 1),
            "top_k": (0, 1 << 20),
            "min_p": (0, 1),
            "repetition_penalty": (0.5, 3),
            "alternatives": (0, 20),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            kinds = int if name in ("max_new_tokens", "top_k", "alternatives") else int | float
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                raise UsageError(
                    f"{name} is {value!r}; it must be between {low} and {high}.",
                    f"{name} 的值是 {value!r}；应在 {low} 到 {high} 之间。",
                )
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 1 << 63):
            raise UsageError("seed must be a whole number from 0 up.", "seed 应为不小于 0 的整数。")
        if len(self.stop) > 8 or not all(isinstance(text, str) and 0 < len(text) <= 100 for text in self.stop):
            raise UsageError(
                "stop takes at most 8 texts of 1 to 100 characters.", "stop 最多 8 段文字，每段 1 到 100 个字符。"
            )
        for name in ("deadline", "patience"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise UsageError(f"{name} must be a positive number of seconds.", f"{name} 应为正的秒数。")


@dataclass(frozen=True)
class Queued:
    """Before Start, where a request has to wait; again when its place changes and, with 0 seconds, when its turn has come."""

    before: int
    """requests whose turn comes first"""
    seconds: float
    """how long it may take until its turn, by how long answers took lately"""


@dataclass(frozen=True)
class Start:
    """First event once its turn has come: the prompt has been read. `trace` holds the routing of the prompt (None when not traced)."""

    prompt_tokens: int
    max_new_tokens: int
    """after capping by the room left in the context"""
    context_limit: int
    dropped_turns: int
    """oldest turns that did not fit and were left out; the page says so"""
    trace: RouterTrace | None
    reused_tokens: int = 0
    """tokens of the prompt that were still in memory from an earlier request"""


@dataclass(frozen=True)
class Token:
    """One text piece: whole characters. `tokens` are the model tokens that form it, usually one.

    `experts` uint8 [n, L, P, k] and `weights` float16 [n, L, P, k] are their routing (None when not traced).
    """

    text: str
    tokens: tuple[TraceToken, ...]
    logprob: float
    """sum over `tokens`"""
    experts: np.ndarray | None
    weights: np.ndarray | None
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()
    """for each of `tokens`: (id, natural log-probability), the most likely first, as many as were asked for"""


@dataclass(frozen=True)
class Timings:
    """Seconds and rates of one request."""

    prefill_seconds: float
    first_token_seconds: float
    total_seconds: float
    tokens_per_second: float
    """decode only: new tokens after the first over the time they took; 0 when there is at most one"""


@dataclass(frozen=True)
class Finish:
    """Last event. `reason`: stop (the model ended), length, cancelled, deadline, closing (the server stops). `trace` covers prompt and answer."""

    reason: str
    prompt_tokens: int
    new_tokens: int
    timings: Timings
    trace: RouterTrace | None


Event = Queued | Start | Token | Finish


@dataclass(frozen=True)
class Outcome:
    """How a request to `stream` ended; for counters. Says nothing of who asked or what."""

    reason: str
    """a Finish reason, "error", or "full", "visitor", "closing" for one that was refused"""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    waited_seconds: float = 0.0
    first_token_seconds: float = 0.0
    """from the request on; 0 where no token came"""
    total_seconds: float = 0.0


@dataclass(frozen=True)
class EngineInfo:
    """What is being served; shown in the page's badge and in `--json` outputs."""

    model: str
    title: str
    backend: str
    """"cpu" or "torch" """
    precision: str
    """"4bit", "mix", "8bit", "float32", "bf16", "nf4", "int8" """
    device: str
    num_layers: int
    num_experts: int
    """0 when served without an adapter"""
    top_k: int
    context_limit: int
    fingerprint: str = ""
    adapter_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Gates:
    """How B rows mix their experts where they differ from the adapter's training."""

    top_k: np.ndarray
    """uint8 [B, L, P], 1..E: experts chosen"""
    uniform: np.ndarray
    """bool [B, L, P]: those chosen weigh alike"""
    strength: np.ndarray
    """float32 [B, L, P]: factor of their sum; 0 switches them off"""
    attention: np.ndarray
    """float32 [B, L]: factor of the layer's attention LoRA"""

    @classmethod
    def unchanged(cls, batch: int, layers: int, projections: int, top_k: int) -> Gates:
        """As trained."""
        cells = (batch, layers, projections)
        return cls(
            np.full(cells, top_k, np.uint8),
            np.zeros(cells, bool),
            np.ones(cells, np.float32),
            np.ones(cells[:2], np.float32),
        )

    def changes_nothing(self, top_k: int) -> bool:
        """Whether all rows mix as trained with this k."""
        plain = (self.top_k == top_k).all() and (self.strength == 1).all() and (self.attention == 1).all()
        return bool(plain and not self.uniform.any())


@dataclass(frozen=True)
class Step:
    """Result of one backend call over B rows.

    `logits`: float32 [B, V] of each row's last token, or a list of [s_b, V] with all_logits.
    `experts[b]` uint8 [s_b, L, P, k], `weights[b]` float16 [s_b, L, P, k]; both None without adapter. With gates, k is
    the largest of them, and experts beyond a cell's own k have weight 0. `probabilities[b]` float16 [s_b, L, P, E] and
    `contributions[b]` float16 [s_b, L, P, k] (see RouterTrace) where they were asked for.
    """

    logits: Any
    experts: list[np.ndarray] | None
    weights: list[np.ndarray] | None
    probabilities: list[np.ndarray] | None = None
    contributions: list[np.ndarray] | None = None
    log_totals: np.ndarray | None = None
    """float [B]: log of the sum of the exponentials of each row's logits, where the backend has it; not with all_logits"""


class CacheFullError(MingError):
    """The memory set aside for conversations is full."""


class Cache(Protocol):
    """KV cache of B rows. `lengths` int64 [B]: tokens held per row."""

    lengths: np.ndarray
    capacity: int

    def truncate(self, row: int, length: int) -> None:
        """Forgets all but the first `length` tokens of a row."""

    def share(self, source: int, target: int, length: int) -> int:
        """Gives the empty row `target` the first tokens of `source`; how many it now holds, at most `length`."""

    def fits(self, rows: Sequence[int], counts: Sequence[int]) -> bool:
        """Whether there is memory for `counts[i]` more tokens of every `rows[i]`."""


class Backend(Protocol):
    """Runs the model: ids, a cache and an additive router bias in; logits and router rows out. Knows no text.

    Rows may have different lengths, both in the cache and in `ids`; each row gives what it gives alone.
    """

    num_layers: int
    num_experts: int
    top_k: int
    vocab_size: int
    max_context: int
    name: str
    precision: str
    device: str

    def new_cache(self, batch: int, capacity: int, tokens: int | None = None) -> Any:
        """A Cache: `batch` rows of up to `capacity` tokens, and `tokens` in all of them together (None: all full)."""

    def forward(
        self,
        ids: Sequence[np.ndarray],
        cache: Any,  # the Cache that this backend's own new_cache made
        *,
        rows: Sequence[int] | None = None,
        router_bias: np.ndarray | None = None,
        gates: Gates | None = None,
        all_logits: bool = False,
        measure: bool = False,
    ) -> Step:
        """Appends ids[b] (int64 [s_b], s_b >= 1) to row rows[b] of the cache, each row at most once; None: to all rows.

        `router_bias` float32 [B, L, P, E] or None; `gates` of B rows or None; `measure`: record probabilities and
        contributions too. Raises ValueError when a row would exceed the cache's capacity, CacheFullError when all of them
        exceed its memory; the cache is then unchanged.
        """

    def close(self) -> None:
        """Frees weights and session; the backend cannot be used afterwards."""
