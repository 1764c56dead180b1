"""Turns a GGUF base, once, into a safetensors folder in the cache, a few rows of a tensor at a time.

The torch backend and the trainer start from that folder; the CPU engine reads the GGUF itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ming_app.errors import UsageError
from ming_app.models.card import FILES
from ming_app.models.gguf import damaged
from ming_app.models.progress import Meter, ProgressCallback
from ming_app.models.safetensors_file import DTYPE_NAMES, write_safetensors
from ming_app.models.store import Store, replacing, require_space, storage_errors
from ming_app.models.tensors import SINGLE_FILE, TensorSource, open_tensors

if TYPE_CHECKING:
    from ming_app.models.fetch import LocalModel

_WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}


def ensure_safetensors(local: LocalModel, dtype: str = "bfloat16", progress: ProgressCallback | None = None) -> Path:
    """A Hugging Face folder with the base of `local` as safetensors; converted at the first call, ready at the later ones.

    A base that is such a folder already is returned as it is. `dtype`: "bfloat16", "float16" or "float32".
    Peak memory is a few rows of one tensor. Raises WeightsError for a damaged base, FetchError for a full disk.
    """
    if dtype not in DTYPE_NAMES:
        raise UsageError(
            f"{dtype!r} is not a weight type; choose one of {', '.join(DTYPE_NAMES)}.",
            f"{dtype!r} 不是权重类型；请从 {'、'.join(DTYPE_NAMES)} 中选择。",
        )
    if local.base.is_dir():
        return local.base
    folder = local.home if dtype == "bfloat16" else local.home / dtype
    target = folder / SINGLE_FILE
    if target.exists():
        return folder
    cache = Store(local.home.parents[1])
    with cache.lock(f"convert-{local.fingerprint[:16]}-{dtype}"):
        if not target.exists():  # another process may have done it while this one waited
            with storage_errors(folder):
                _convert(local, folder, dtype, progress)
    return folder


def _convert(local: LocalModel, folder: Path, dtype: str, progress: ProgressCallback | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if folder != local.home:
            shutil.copyfile(local.home / name, folder / name)
    with open_tensors(local) as source:
        shapes = {name: source.shape(name) for name in source.names()}
        total = _WIDTH[dtype] * sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
        require_space(folder, total + (1 << 20))
        for left in folder.glob(
            f".{SINGLE_FILE}.*.tmp"
        ):  # of a run that was killed: the lock says nobody writes it now
            left.unlink()
        meter = Meter(progress, "convert", total, "bytes", detail=local.name)
        with replacing(folder / SINGLE_FILE) as file:
            for written in write_safetensors(file, shapes, _pieces(source, local.base), dtype):
                meter.update(written)


def _pieces(source: TensorSource, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    for name in source.names():
        for rows in source.rows(name):
            # damage that a download's hash cannot see (a file given by hand) shows as infinities
            if not np.isfinite(rows).all():
                raise damaged(path, f"tensor {name} holds values that are not numbers", f"张量 {name} 含有非有限数值")
            yield name, rows
