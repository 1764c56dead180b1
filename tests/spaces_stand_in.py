"""A stand-in for the package `spaces` that really forks: what ZeroGPU does to a program, without a GPU or its scheduler.

A generator decorated with `GPU` runs in a forked worker; arguments and results cross as pickles, an exception only as the
name of its class, and nothing that a worker changes in memory comes back. Refusals are gr.Error with the real titles.
"""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import gradio as gr
from gradio.context import LocalContext

fork = multiprocessing.get_context("fork")


class Spaces:
    """`quota`: seconds of GPU left to the visitors. `gpus`: calls at a time; the others wait."""

    def __init__(self, quota: float = float("inf"), gpus: int = 4):
        self.quota = quota
        self.free = threading.Semaphore(gpus)
        self.asked: list[tuple[float, Any]] = []
        """(seconds, the Gradio request they are charged to) of every call"""
        self.workers: list[Any] = []

    def GPU(self, *, duration: Callable[..., float]) -> Callable[[Any], Any]:  # noqa: N802
        def decorate(task: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
            def call(*args: Any) -> Iterator[Any]:
                yield from self._run(task, args, duration(*args))

            return call

        return decorate

    def alive(self) -> int:
        """Workers that have not ended."""
        return sum(worker.is_alive() for worker in self.workers)

    def _run(self, task: Callable[..., Iterator[Any]], args: tuple[Any, ...], seconds: float) -> Iterator[Any]:
        self.asked.append((seconds, LocalContext.request.get(None)))
        if seconds > self.quota:
            left = f"({seconds:.0f}s requested vs. {self.quota:.0f}s left)"
            message = f"You have exceeded your free ZeroGPU quota {left}. Try again in 3:05:42. "
            raise gr.Error(message, title="ZeroGPU quota exceeded", print_exception=False)
        with self.free:
            here, there = fork.Pipe(duplex=False)
            stop = fork.Event()
            worker = fork.Process(target=_work, args=(task, pickle.dumps(args), there, stop), daemon=True)
            worker.start()
            self.workers.append(worker)
            there.close()
            try:
                yield from _received(here, worker)
            finally:
                stop.set()
                for _ in _received(here, worker):
                    pass
                worker.join()


def _work(task: Callable[..., Iterator[Any]], args: bytes, out: Connection, stop: Any) -> None:
    try:
        results = task(*pickle.loads(args))
        for result in results:
            if stop.is_set():
                results.close()
                break
            out.send(("ok", result))
    except Exception as error:
        out.send(("error", type(error).__name__))
    out.send(("end", None))


def _received(pipe: Connection, worker: Any) -> Iterator[Any]:
    """What the worker sends until it ends; nothing more once it has."""
    while True:
        if pipe.closed:
            return
        try:
            kind, value = pipe.recv() if pipe in wait([pipe, worker.sentinel]) else ("dead", None)
        except EOFError:
            kind, value = "dead", None
        if kind == "ok":
            yield value
            continue
        pipe.close()
        if kind != "end":
            raise gr.Error(value or "GPU task aborted", title="ZeroGPU worker error", print_exception=False)
