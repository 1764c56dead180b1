"""The engine on a ZeroGPU Space: each request runs in a worker process that the package `spaces` forks and lends a GPU.

`ZeroEngine` has the face of `Engine`. The model is placed on "cuda" in the main process, before the page opens, and never
runs there; a worker inherits it by the fork. Requests and events cross as pickles. What a worker keeps in memory (its
cache of prefixes) is gone when it ends. Refusals of ZeroGPU arrive as MingErrors.
"""

from __future__ import annotations

import importlib
import logging
import mmap
import queue
import re
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from contextvars import copy_context
from dataclasses import replace
from typing import Any

from ming_app.engine import inspection
from ming_app.engine.engine import Engine
from ming_app.engine.jobs import closed
from ming_app.engine.types import Event, Finish, Intervention, Message, SamplingParams, Timings
from ming_app.errors import BusyError, MingError, QuotaError, StoppedError, UsageError
from ming_app.molora.trace import RouterTrace

logger = logging.getLogger(__name__)

START = 8  # seconds until a worker has the model on its GPU
READING, WRITING = 500, 12  # tokens per second that a GPU surely does, without recorded steps
LEAST, MOST = 10, 110  # seconds of work asked for; two minutes a day is what a visitor without an account has
BEAT = 0.1  # seconds between two signs of life, and between two looks at what may have been stopped
ENDING = 30.0  # seconds that a worker waits for what was stopped; reading a long prompt must still end
LANES = 256  # requests at a time
_OVER = object()


class ZeroEngine(Engine):
    """An Engine whose model runs in workers. `gpu`: the decorator `spaces.GPU`."""

    def __init__(self, engine: Engine, gpu: Callable[..., Any]):
        super().__init__(engine.backend, engine.tokenizer, replace(engine.info, device="ZeroGPU"), engine.adapter)
        if hasattr(engine.backend, "fixed_steps"):
            engine.backend.fixed_steps = False  # recorded once per worker, they would cost more than they save
        # one that no thread of this process has ever served: locks are free and threads absent where it wakes up
        asleep = Engine(engine.backend, engine.tokenizer, engine.info, engine.adapter, slots=1)
        stop = self._stop = mmap.mmap(
            -1, LANES
        )  # shared with the workers; a byte for each request: its end is asked for
        self._lanes = list(range(LANES))
        self._counts = threading.Lock()
        self._open = self._begun = 0
        self._closed = False

        @gpu(duration=lambda seconds, *_rest: seconds)
        def work(_seconds: int, lane: int, task: str, arguments: tuple[Any, ...]) -> Iterator[Any]:
            yield from _serve(asleep, lambda: stop[lane] != 0, task, arguments)

        self._work = work

    def stream(
        self, messages: Sequence[Message], params: SamplingParams, cancel: threading.Event | None = None
    ) -> Iterator[Event]:
        """See `Engine.stream`. What can be refused without a GPU is refused before one is asked for."""
        limit = self.info.context_limit
        prompt = len(self.tokenizer.build(messages, limit, params.max_new_tokens).ids)
        self.changes(params.interventions, params.router_bias)
        seconds = seconds_for(prompt, min(params.max_new_tokens, limit - prompt))
        return self._answer(list(messages), params, prompt, seconds, cancel or threading.Event())

    def _answer(
        self, messages: list[Message], params: SamplingParams, prompt: int, seconds: int, cancel: threading.Event
    ) -> Iterator[Event]:
        begin, patience = time.monotonic(), params.patience
        # an answer that takes longer than the GPU is lent for ends as one whose time is up, not as one that was killed
        lent = replace(params, deadline=min(seconds - START, params.deadline or seconds), patience=None)
        until = None if patience is None else begin + patience
        event = None
        for event in self._call(seconds, "stream", (messages, lent), cancel, until):
            yield event
        if event is None:  # stopped before a worker had it
            reason = "cancelled" if cancel.is_set() else "deadline"
            yield Finish(reason, prompt, 0, Timings(0.0, 0.0, time.monotonic() - begin, 0.0), None)

    def score(
        self,
        prefix: Sequence[Message] | Sequence[int],
        continuations: Sequence[str],
        interventions: Sequence[Intervention] = (),
    ) -> list[float]:
        """See `Engine.score`."""
        turns = [item for item in prefix if isinstance(item, Message)]
        length = sum(self.count_tokens(turn.content) for turn in turns) + len(prefix) - len(turns)
        seconds = seconds_for(length, sum(map(self.count_tokens, continuations)))
        arguments = (list(prefix), list(continuations), tuple(interventions))
        [scores] = self._call(seconds, "score", arguments, threading.Event())
        return list(scores)

    def read_there(self, reading: str, trace: RouterTrace, *arguments: Any, cancel: threading.Event | None) -> Any:
        """`inspection.inspect` or `contrast` (`reading`) of the trace in a worker."""
        arguments = (reading, trace, *arguments)
        for result in list(
            self._call(seconds_for(2 * len(trace.tokens), 0), "read", arguments, cancel or threading.Event())
        ):
            return result
        raise StoppedError("Stopped before the reading was done.", "已停止，读取尚未完成。")

    def load_now(self) -> tuple[int, int]:
        """(requests that have a worker, requests that wait for one)."""
        with self._counts:
            return self._begun, self._open - self._begun

    def drain(self, seconds: float) -> bool:
        """See `Engine.drain`."""
        super().drain(0)  # from now on `draining`
        until = time.monotonic() + seconds
        while self._open and time.monotonic() < until:
            time.sleep(BEAT)
        return not self._open

    def close(self) -> None:
        """See `Engine.close`. Requests that run end by themselves."""
        self._closed = True
        super().close()

    def _call(
        self, seconds: int, task: str, arguments: tuple[Any, ...], cancel: threading.Event, until: float | None = None
    ) -> Iterator[Any]:
        """What the task gives; nothing when it is cancelled, or `until` has passed, before a worker had it.

        `spaces` is spoken to in a thread: it blocks for as long as no GPU is free.
        """
        if self._closed:
            raise closed()
        if self.draining:
            raise BusyError.closing()
        with self._counts:
            if not self._lanes:
                raise _no_gpu()
            lane = self._lanes.pop()
            self._stop[lane] = 0
            self._open += 1
        found: queue.SimpleQueue[Any] = queue.SimpleQueue()
        begun = gone = ended = False

        def run() -> None:
            nonlocal begun, ended
            try:
                with closing(self._work(seconds, lane, task, arguments)) as items:
                    for item in items:
                        if not begun:
                            begun = True
                            with self._counts:
                                self._begun += 1
                        found.put(item)
                        if gone:
                            break
            except BaseException as error:  # whoever waits must hear of it
                found.put(explained(error))
            finally:
                with self._counts:
                    ended = True
                    self._lanes.append(lane)
                    self._open -= 1
                    self._begun -= begun
                found.put(_OVER)

        # the context names the visitor, whose quota it is
        threading.Thread(target=copy_context().run, args=(run,), name="zerogpu", daemon=True).start()
        try:
            while True:
                stopped = cancel.is_set() or (until is not None and not begun and time.monotonic() > until)
                if stopped and not begun:
                    return
                if stopped:
                    self._end(lane, lambda: ended)
                try:
                    item = found.get(timeout=BEAT)
                except queue.Empty:
                    continue
                if item is _OVER:
                    return
                if isinstance(item, BaseException):
                    raise item
                if item is not None:
                    yield item
        finally:
            gone = True
            self._end(lane, lambda: ended)

    def _end(self, lane: int, ended: Callable[[], bool]) -> None:
        """Asks the worker to end, unless its lane is another's by now."""
        with self._counts:
            if not ended():
                self._stop[lane] = 1


def seconds_for(reading: int, writing: int) -> int:
    """Seconds to ask a GPU for, to read and then to write so many tokens: rather too many than too few."""
    return START + min(max(round(reading / READING + writing / WRITING), LEAST), MOST)


def import_spaces() -> Any:
    """The package `spaces`; to be imported in the main thread, before torch. Raises UsageError where it is missing."""
    try:
        return importlib.import_module("spaces")
    except ImportError as error:
        raise UsageError(
            "On ZeroGPU the package spaces is needed, and it cannot be imported: pip install spaces.",
            "在 ZeroGPU 上运行需要 spaces 包，但无法导入：pip install spaces。",
        ) from error


# ------------------------------------------------------------------------------------------------------ in the worker


def _stream(engine: Engine, cancel: threading.Event, messages: Any, params: SamplingParams) -> Iterator[Any]:
    return engine.stream(messages, params, cancel)


def _score(engine: Engine, _cancel: threading.Event, *arguments: Any) -> Iterator[Any]:
    yield engine.score(*arguments)


def _read(engine: Engine, cancel: threading.Event, reading: str, *arguments: Any) -> Iterator[Any]:
    *given, others = arguments
    yield getattr(inspection, reading)(engine, *given, others=others, cancel=cancel)


_TASKS: dict[str, Callable[..., Iterator[Any]]] = {"stream": _stream, "score": _score, "read": _read}


def _serve(
    engine: Engine, stopped: Callable[[], bool], task: str, arguments: tuple[Any, ...]
) -> Generator[Any, None, None]:
    """What the task gives, and None whenever it gives nothing for a while. An error comes as an item: `spaces` lets no
    other through than Gradio's own."""
    import torch

    torch.set_num_threads(1)  # OpenMP's threads stayed behind in the main process; to wait for them is to wait for ever
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    cancel = threading.Event()

    def run() -> None:
        try:
            for item in _TASKS[task](engine, cancel, *arguments):
                found.put(item)
        except MingError as error:
            found.put(error)
        except BaseException as error:
            kind = type(error).__name__
            logger.error("a worker failed: %s\n%s", kind, "".join(traceback.format_tb(error.__traceback__)))
            found.put(_broken(kind))
        finally:
            found.put(_OVER)

    thread = threading.Thread(target=run, name="zerogpu-worker", daemon=True)
    thread.start()
    yield None  # there is a worker
    try:
        while True:
            if stopped():
                cancel.set()
            try:
                item = found.get(timeout=BEAT)
            except queue.Empty:
                item = None
            if item is _OVER:
                return
            yield item
    finally:
        cancel.set()
        thread.join(ENDING)


# ---------------------------------------------------------------------------------------------- what ZeroGPU refuses

_OWN = ("or run the app on your own computer, as the README says", "也可按 README 的说明在自己的电脑上运行")


def explained(error: BaseException) -> MingError:
    """A failure of `spaces` (gr.Error with a title, httpx errors, RuntimeError) in words for the visitor."""
    if isinstance(error, MingError):
        return error
    title, text = str(getattr(error, "title", "")), str(getattr(error, "message", ""))
    if "No GPU was available" in text:
        return _no_gpu()
    match title:
        case "ZeroGPU quota exceeded":
            return _quota(text)
        case "ZeroGPU pending credits exceeded":
            return QuotaError(
                "Your other requests that still run hold all the GPU time that you have left. Try again when they have ended.",
                "您正在运行的其他请求已占用剩余的全部 GPU 时间。请等它们结束后再试。",
            )
        case "ZeroGPU illegal duration":
            return QuotaError(
                f"This request needs a GPU for longer than ZeroGPU lends one. Ask for a shorter answer, {_OWN[0]}.",
                f"此请求所需的 GPU 时间超过 ZeroGPU 单次允许的上限。请缩短回答长度，{_OWN[1]}。",
            )
        case "ZeroGPU client error" if "proxy token" in text:
            return MingError(
                "The Space's session has expired. Reload the page and ask again.",
                "Space 的会话已过期。请刷新页面后重新提问。",
            )
        case "ZeroGPU worker error":
            return _broken(text)
    logger.error("ZeroGPU failed: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    kind = type(error).__name__
    return MingError(
        f"ZeroGPU did not lend a GPU for this request ({kind}). Try again in a minute.",
        f"ZeroGPU 未能为此请求分配 GPU（{kind}）。请一分钟后再试。",
    )


def _quota(text: str) -> QuotaError:
    """The day's GPU time is used up: the visitor's, or, where the visitor is not known, the Space's."""
    if "Space app" in text:
        return QuotaError(
            f"This Space's own GPU time for today is used up. Reload the page so that it can use yours, {_OWN[0]}.",
            f"本 Space 自身今天的 GPU 时间已用完。请刷新页面以使用您自己的额度，{_OWN[1]}。",
        )
    en, zh = "Your free GPU time for today is used up", "您今天的免费 GPU 时间已用完"
    left = re.search(r"\((\d+)s requested vs\. (\d+)s left\)", text)
    if left and int(left[2]) > 0:
        en = f"This request asks for {left[1]} s of GPU time, and you have {left[2]} s left today; a shorter answer may fit"
        zh = f"此请求需要 {left[1]} 秒 GPU 时间，您今天还剩 {left[2]} 秒；缩短回答长度或许可行"
    wait = re.search(r"Try again in (?:(\d+) days?, )?(\d+):(\d\d):\d\d", text)
    later = ("later", "稍后")
    if wait:
        hours = 24 * int(wait[1] or 0) + int(wait[2])
        later = (f"in {hours:02}:{wait[3]} (hours:minutes)", f"{hours} 小时 {int(wait[3])} 分钟后")
    return QuotaError(
        f"{en}. Sign in to Hugging Face for more, try again {later[0]}, {_OWN[0]}.",
        f"{zh}。登录 Hugging Face 可获得更多额度，或{later[1]}再试，{_OWN[1]}。",
    )


def _no_gpu() -> MingError:
    return MingError(
        "No GPU is free at the moment: all those that this Space may borrow are in use. Try again in a minute.",
        "目前没有空闲的 GPU：本 Space 可借用的 GPU 都在使用中。请一分钟后再试。",
    )


def _broken(kind: str) -> MingError:
    return MingError(
        f"The GPU worker ended before this request was done ({kind}). Only this request is lost: try again, if need be with a shorter question.",
        f"GPU 工作进程在完成此请求之前已终止（{kind}）。仅此请求受影响：请重试，必要时缩短问题。",
    )
