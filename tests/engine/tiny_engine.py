"""A tiny model with random weights on our CPU engine, for tests of what happens around a model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ming_app.engine.backends.native.backend import NativeBackend
from ming_app.engine.backends.native.build import build_engine
from ming_app.engine.engine import Engine
from ming_app.engine.prompt import ChatTokenizer
from ming_app.engine.types import EngineInfo
from ming_app.models.tensors import open_tensors
from tests.tiny import make_adapter, write_base

CONTEXT = 512


@contextmanager
def tiny_engine(folder: Path, *, pause: float = 0.0, **options: Any) -> Iterator[Engine]:
    """An Engine of 2 layers and 4 experts, whose steps take `pause` seconds longer; `options` are the Engine's. Closed at
    the end."""
    base = write_base(folder / "base")
    adapter = make_adapter(base)
    with open_tensors(base) as source:
        built = build_engine(source, adapter, "8bit", folder / "built" / "engine")
    backend = NativeBackend.open(built, threads=1, max_context=CONTEXT)
    if pause:
        forward = backend.forward

        def slow(*args: Any, **changes: Any) -> Any:
            time.sleep(pause)
            return forward(*args, **changes)

        backend.forward = slow  # type: ignore[method-assign]
    info = EngineInfo("tiny", "Tiny", "cpu", "8bit", "cpu", 2, 4, 2, CONTEXT, "ab", adapter.config.to_dict())
    engine = Engine(backend, ChatTokenizer.from_folder(base), info, **options)
    try:
        yield engine
    finally:
        engine.close()
