"""Engine.stream for asyncio: events as they come, and a client that goes away frees the model within two tokens."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ming_app.engine.types import Event, Finish, Message, SamplingParams


async def events(engine: Any, messages: Sequence[Message], params: SamplingParams) -> AsyncGenerator[Event]:
    """Events up to Finish; raises what the engine raises. However this generator ends, the request ends with it."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Event | BaseException] = asyncio.Queue()
    cancel = threading.Event()

    def hand_over(item: Event | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(arrived.put_nowait, item)

    def run() -> None:
        try:
            with contextlib.closing(engine.stream(messages, params, cancel)) as stream:
                for event in stream:
                    hand_over(event)
            hand_over(RuntimeError("the engine ended without a Finish event"))  # only read if none came
        except BaseException as error:  # for the reader, who decides what to say
            hand_over(error)

    threading.Thread(target=run, name="api-stream", daemon=True).start()
    try:
        while True:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, Finish):
                return
    finally:
        cancel.set()
