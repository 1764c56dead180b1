"""Reads and writes safetensors files without torch: headers checked as hostile, tensors mapped lazily, bf16 by bit shift.

The safetensors package reads bfloat16 only into torch, and the CPU engine must start without torch; the format itself
is an 8-byte length, a JSON table and raw bytes. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ming_app.models.gguf import damaged
from ming_app.reading import require_regular

MAX_HEADER = 100_000_000  # the format's own limit
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class SafeTensor:
    """Where one tensor lies in its file."""

    dtype: str
    """"F32", "F16", "BF16" or "F64\""""
    shape: tuple[int, ...]
    offset: int
    """bytes from the start of the file"""
    nbytes: int


class SafetensorsFile:
    """An open .safetensors file. Raises WeightsError for anything that is not sound or not floating point."""

    def __init__(self, path: Path):
        self.path = path
        try:
            require_regular(path)
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise damaged(path, "it is empty", "文件是空的") from error
        except OSError as error:
            raise damaged(path, f"it cannot be opened ({error.strerror})", f"无法打开（{error.strerror}）") from error
        try:
            self.tensors = self._header()
        except BaseException:
            self._map.close()
            raise

    def _header(self) -> dict[str, SafeTensor]:
        size = len(self._map)
        length = struct.unpack("<Q", self._map[:8])[0] if size >= 8 else size
        if length > min(MAX_HEADER, size - 8):
            raise damaged(self.path, "its header is cut short or too long", "文件头不完整或过长")
        try:
            table = json.loads(self._map[8 : 8 + length])
            if not isinstance(table, dict):
                raise ValueError("the header is not a table")
            table.pop("__metadata__", None)
            return {name: self._entry(name, entry, 8 + length) for name, entry in table.items()}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise damaged(self.path, f"its header is damaged ({error})", f"文件头已损坏（{error}）") from error

    def _entry(self, name: str, entry: Mapping, base: int) -> SafeTensor:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in _BYTES:
            raise ValueError(f"tensor {name!r} has the type {dtype!r}; only floating-point weights are read")
        numbers = (*shape, start, end)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers) or len(shape) > 8:
            raise ValueError(f"tensor {name!r} has an impossible shape or place")
        count = _BYTES[dtype]
        for n in shape:
            count *= n
        if end - start != count or base + end > len(self._map):
            raise ValueError(f"tensor {name!r} does not fit its place in the file")
        return SafeTensor(dtype, shape, base + start, count)

    def get(self, name: str) -> np.ndarray:
        """The tensor as a fresh C-contiguous float32 array."""
        tensor = self.tensors[name]
        width = _BYTES[tensor.dtype]
        stored = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}[tensor.dtype]
        data = np.frombuffer(self._map[tensor.offset : tensor.offset + tensor.nbytes], stored, tensor.nbytes // width)
        if tensor.dtype == "BF16":
            wide = data.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32).reshape(tensor.shape)
        return data.astype(np.float32).reshape(tensor.shape)

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()


def to_bytes(values: np.ndarray, dtype: str) -> bytes | memoryview:
    """float32 -> the bytes of "float32", "float16" or "bfloat16" (rounded to nearest, ties to even). Finite input."""
    if dtype == "float32":
        return np.ascontiguousarray(values, np.float32).data.cast("B")
    if dtype == "float16":
        return np.ascontiguousarray(values, np.float16).data.cast("B")
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return rounded.astype(np.uint16).data.cast("B")


def write_safetensors(
    file: BinaryIO, shapes: Mapping[str, tuple[int, ...]], chunks: Iterable[tuple[str, np.ndarray]], dtype: str
) -> Iterator[int]:
    """Stream a safetensors file: the header first, then float32 `chunks` (name, values) in the order of `shapes`.

    A tensor may come in several chunks, so no tensor need be whole in memory. Yields the bytes written so far.
    """
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + width * int(np.prod(shape, dtype=np.int64))
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)  # the format asks for aligned data
    file.write(struct.pack("<Q", len(header)) + header)
    written = 0
    for _, values in chunks:
        written += file.write(to_bytes(values, dtype))
        yield written
    if written != end:
        raise ValueError(f"{written} bytes of tensors were written, {end} were announced")
