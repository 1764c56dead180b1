"""Our engine's side of the figures: one user at several lengths of context, many at a time, scoring, memory.

By way of the engine's public functions; greedy, and running past end tokens so that lengths are equal. Prompts begin with a
number of their own where reading is measured: the engine would remember them otherwise.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ming_app.answering import answer
from ming_app.bench.peers import Setup, peak_rss
from ming_app.console import Console
from ming_app.engine.types import Finish, Message, SamplingParams, Start

if TYPE_CHECKING:
    from ming_app.engine.engine import Engine
    from ming_app.engine.prompt import ChatTokenizer

QUESTION = (
    "Explain step by step how blood pressure is measured at home, what the two numbers mean and when to see a doctor. "
    "请说明居家测量血压的步骤、两个数值的含义，以及何时需要就医。"
)
CHAT = ("发烧三天，伴有咳嗽，应该注意什么？", "Which foods are rich in iron?", "和前面的问题相比，哪个更紧急？")
CHAT_TOKENS = 128
STREAM_TOKENS = 48
SCORED = 24
LONG_PROMPT, SHORT_PROMPT = 768, 48  # tokens of those who wait and of the one behind them


def sized_messages(tokenizer: ChatTokenizer, tokens: int, mark: str = "") -> tuple[list[Message], list[int]]:
    """A question that begins with `mark`, cut to a prompt of at most `tokens` tokens (and at least the frame of a turn),
    and its ids."""
    ids = tokenizer.encode_text(QUESTION)
    filler = (mark + QUESTION * (tokens // len(ids) + 2)).strip()
    low, high = 1, len(filler)
    while low < high:  # the longest beginning that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(_prompt(tokenizer, filler[:middle])) <= tokens else (low, middle - 1)
    return [Message("user", filler[:low])], _prompt(tokenizer, filler[:low])


def _prompt(tokenizer: ChatTokenizer, text: str) -> list[int]:
    return tokenizer.build([Message("user", text)], 1 << 20, 1).ids


def engine_peer(setup: Setup) -> Callable[[str], float]:
    """Loads the engine; measures by name (see cases.py)."""
    from ming_app.engine.engine import Engine

    engine = Engine.load(setup.settings, Console(setup.settings.message_lang()).progress)
    engine.tokenizer.stop_ids = frozenset()
    serving = _Serving(engine, setup)

    def measure(what: str) -> float:
        name, _, number = what.partition(":")
        figures: dict[str, Callable[[], float]] = {
            "decode": lambda: serving.decode(int(number or setup.prompt_tokens)),
            "decode-no-trace": lambda: serving.decode(setup.prompt_tokens, trace=False),
            "prefill": serving.prefill,
            "streams": lambda: serving.streams(int(number)),
            "first": lambda: serving.first_word(int(number)),
            "score": serving.score,
            "score-pairs": serving.score_pairs,
            "chat-rss": serving.chat_memory,
            "bandwidth": serving.bandwidth,
            "weight-bytes": serving.weight_bytes,
        }
        return figures[name]()

    return measure


class _Serving:
    def __init__(self, engine: Engine, setup: Setup):
        self._engine = engine
        self._setup = setup
        self._marks = (f"{i}. " for i in itertools.count(1))

    def decode(self, context: int, *, trace: bool = True) -> float:
        """Tokens per second of one answer after a prompt of so many tokens."""
        messages, _ = sized_messages(self._engine.tokenizer, context)
        return self._run(messages, self._setup.tokens, trace=trace).timings.tokens_per_second

    def prefill(self) -> float:
        """Tokens of a prompt read per second."""
        messages, ids = sized_messages(self._engine.tokenizer, self._setup.prefill_tokens, next(self._marks))
        start, finish = self._start(messages, 1)
        return (len(ids) - start.reused_tokens) / finish.timings.prefill_seconds

    def streams(self, count: int) -> float:
        """Tokens per second of `count` answers together, while all of them are being written."""
        messages = [
            sized_messages(self._engine.tokenizer, self._setup.prompt_tokens, next(self._marks))[0]
            for _ in range(count)
        ]
        times: list[list[float]] = [[] for _ in range(count)]

        def ask(index: int) -> None:
            params = SamplingParams(max_new_tokens=STREAM_TOKENS + 40, temperature=0.0)
            for _ in self._engine.stream(messages[index], params):
                times[index].append(time.monotonic())

        self._together(ask, count)
        begin, end = max(one[1] for one in times), min(one[-2] for one in times)
        return sum(begin < t <= end for one in times for t in one) / (end - begin)

    def first_word(self, ahead: int) -> float:
        """Seconds until the first token of a short prompt that comes while `ahead` long ones are being read."""
        tokenizer, done = self._engine.tokenizer, threading.Event()
        long = [sized_messages(tokenizer, LONG_PROMPT, next(self._marks))[0] for _ in range(ahead)]
        short, _ = sized_messages(tokenizer, SHORT_PROMPT, next(self._marks))
        finishes: list[Finish] = []

        def ask(index: int) -> None:
            if index < ahead:
                self._run(long[index], 2, cancel=done)
                return
            time.sleep(0.2 if ahead else 0)
            finishes.append(self._run(short, 2))
            done.set()

        self._together(ask, ahead + 1)
        return finishes[0].timings.first_token_seconds

    def score(self) -> float:
        """Exam questions per second, as `exam grade` asks them."""
        from ming_app.exam.candidate import sit_exam

        questions = self._questions()
        begin = time.monotonic()
        sit_exam(self._engine, [(question, ()) for question in questions])
        return len(questions) / (time.monotonic() - begin)

    def score_pairs(self) -> float:
        """The same, every pair of question and letter read by itself, one after the other, nothing remembered."""
        from ming_app.engine.inspection import ANSWER_PREFIX
        from ming_app.exam.wording import LETTER_JOIN, ask_for_letter

        questions = self._questions()[: SCORED // 6]
        begin = time.monotonic()
        for question in questions:
            for letter in question.options:
                mark = Message("system", f"{next(self._marks)}You answer exam questions.")
                prefix = [mark, *ask_for_letter(question, list(question.options), ())]
                prefix.append(Message("assistant", ANSWER_PREFIX[question.lang]))
                self._engine.score(prefix, [LETTER_JOIN[question.lang] + letter])
        return len(questions) / (time.monotonic() - begin)

    def chat_memory(self) -> float:
        """Bytes of memory at their highest after a short chat."""
        history: list[Message] = []
        for text in CHAT:
            history.append(Message("user", text))
            reply = answer(self._engine, history, SamplingParams(max_new_tokens=CHAT_TOKENS, seed=0))
            history.append(Message("assistant", reply.text))
        return float(peak_rss())

    def weight_bytes(self) -> float:
        """Bytes of weights that one token reads."""
        return float(getattr(self._engine.backend, "bytes_per_token", float("nan")))

    def bandwidth(self) -> float:
        """Bytes per second that as many threads as the engine has can read of the same weights."""
        read = getattr(self._engine.backend, "read_weights", None)
        if read is None:
            return float("nan")
        times = []
        for _ in range(3):
            begin = time.monotonic()
            size = read()
            times.append(time.monotonic() - begin)
        return float(size / statistics.median(times))

    def _questions(self) -> list[Any]:
        """Single-answer questions of our banks, others each time."""
        from dataclasses import replace

        from ming_app.exam.bank import Shelf

        shelf = Shelf()
        ours = [q for listed in shelf.list() for q in shelf.open(listed.name).questions]
        single = [q for q in ours if not q.kind.multiple and not q.group_id][:SCORED]
        return [replace(q, stem=next(self._marks) + q.stem) for q in single]

    def _run(
        self, messages: list[Message], tokens: int, *, trace: bool = True, cancel: threading.Event | None = None
    ) -> Finish:
        params = SamplingParams(max_new_tokens=tokens, temperature=0.0, trace=trace)
        return answer(self._engine, messages, params, cancel=cancel).finish

    def _start(self, messages: list[Message], tokens: int) -> tuple[Start, Finish]:
        found = answer(self._engine, messages, SamplingParams(max_new_tokens=tokens, temperature=0.0))
        assert found.start is not None  # nobody cancels it
        return found.start, found.finish

    def _together(self, ask: Callable[[int], None], count: int) -> None:
        threads = [threading.Thread(target=ask, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
