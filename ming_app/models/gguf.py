"""Reads GGUF files, treated as hostile: header, metadata and quantised tensors, lazily, by memory map.

`GGUFFile` gives metadata as plain Python values and tensors as float32 rows or as raw quantised blocks. It knows the
container only; names and layouts of model families are in `tensors.py`. The header is parsed here because the gguf
package's reader takes seconds on a vocabulary of 150,000 and trusts counts and sizes; its dequantisation is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ming_app.errors import WeightsError
from ming_app.reading import require_regular

MAX_TENSORS = 100_000
MAX_KEYS = 10_000
MAX_ARRAY = 4_000_000  # entries; the largest vocabularies hold about 300,000 tokens
MAX_NAME = 1024
MAX_DIMS = 4
CHUNK = 1 << 22  # elements dequantised at a time: bounds the temporaries, and 16 MB of float32 stays near the cache

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is in numpy order: rows first, the quantised dimension last."""

    name: str
    shape: tuple[int, ...]
    type: int
    """ggml type number"""
    type_name: str
    offset: int
    """bytes from the start of the file"""
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (all quantised blocks along the last dimension)."""
        return self.nbytes // self.rows

    @property
    def rows(self) -> int:
        """Rows when every leading dimension is flattened; 1 for a vector."""
        return int(np.prod(self.shape[:-1], dtype=np.int64)) if len(self.shape) > 1 else 1


class GGUFFile:
    """An open GGUF file. Raises WeightsError for anything that is not a sound GGUF. Use as a context manager."""

    def __init__(self, path: Path):
        self.path = path
        try:
            require_regular(path)
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # mmap's word for an empty file
            raise damaged(path, "it is empty", "文件是空的") from error
        except OSError as error:
            raise damaged(path, f"it cannot be opened ({error.strerror})", f"无法打开（{error.strerror}）") from error
        try:
            self.metadata, self.tensors = _Header(path, self._map).read()
        except BaseException:
            self._map.close()
            raise

    def raw(self, name: str) -> tuple[np.ndarray, str]:
        """(uint8 [rows, row_bytes], type name): the blocks as they are in the file. The array does not outlive the file."""
        tensor = self.tensors[name]
        data = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        return data.reshape(tensor.rows, tensor.row_bytes), tensor.type_name

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the flattened [rows, last dimension] tensor as float32, a fresh array."""
        blocks, _ = self.raw(name)
        return _dequantise(self.path, self.tensors[name], blocks[start:stop])

    def get(self, name: str) -> np.ndarray:
        """The whole tensor as float32 in its numpy shape, dequantised chunk by chunk."""
        tensor = self.tensors[name]
        width = tensor.shape[-1]
        out = np.empty((tensor.rows, width), np.float32)
        step = max(1, CHUNK // width)
        for start in range(0, tensor.rows, step):
            out[start : start + step] = self.rows(name, start, start + step)
        self.release(name)
        return out.reshape(tensor.shape)

    def release(self, name: str) -> None:
        """Let the system drop the pages of a tensor that has been read, so that they do not count as our memory."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        tensor = self.tensors[name]
        start = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.offset + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def close(self) -> None:
        """Unmap the file. Arrays from `raw` that are still alive keep the map until they go."""
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def damaged(path: Path, en: str, zh: str) -> WeightsError:
    """The error for a file that is not what it should be; `en` and `zh` are clauses without a full stop."""
    return WeightsError(
        f"The weights file {path} cannot be used: {en}. Fetch it again, or give another file.",
        f"无法使用权重文件 {path}：{zh}。请重新获取，或换用其他文件。",
    )


def _dequantise(path: Path, tensor: GGUFTensor, blocks: np.ndarray) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        # a nonsense scale in a damaged block overflows; the reader of the tensor decides what to do about it
        with np.errstate(all="ignore"):
            values = dequantize(blocks, GGMLQuantizationType(tensor.type))
    except (NotImplementedError, ValueError) as error:
        raise damaged(
            path,
            f"tensor {tensor.name} has the type {tensor.type_name}, which cannot be read",
            f"张量 {tensor.name} 的类型 {tensor.type_name} 无法读取",
        ) from error
    return values if values.dtype == np.float32 else values.astype(np.float32)


class _Header:
    """A cursor over the bytes of a GGUF header in which every read is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path, self._data, self._at, self._size = path, data, 0, len(data)

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        if self._data[:4] != b"GGUF":
            raise damaged(self._path, "it is not a GGUF file", "它不是 GGUF 文件")
        self._at = 4
        version = self._unpack("<I")
        if version not in (2, 3):
            raise damaged(self._path, f"GGUF version {version} is not supported", f"不支持 GGUF 版本 {version}")
        tensor_count, key_count = self._unpack("<Q"), self._unpack("<Q")
        self._limit("tensors", tensor_count, min(MAX_TENSORS, self._left() // 24))
        self._limit("metadata entries", key_count, min(MAX_KEYS, self._left() // 12))
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string(MAX_NAME)
            if key in metadata:
                raise self._bad(f"metadata entry {key!r} appears twice")
            metadata[key] = self._value(self._unpack("<I"))
        described = [self._tensor() for _ in range(tensor_count)]
        return metadata, self._place(described, metadata.get("general.alignment", 32))

    def _place(self, described: list[tuple], alignment: Any) -> dict[str, GGUFTensor]:
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._bad(f"alignment {alignment!r} is not a power of two")
        base = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_, type_name, offset, nbytes in described:
            if name in tensors:
                raise self._bad(f"tensor {name!r} appears twice")
            if offset % alignment or base + offset + nbytes > self._size:
                raise damaged(
                    self._path,
                    f"tensor {name!r} ends at byte {base + offset + nbytes}, but the file has {self._size} (a download cut short?)",
                    f"张量 {name!r} 应止于第 {base + offset + nbytes} 字节，但文件只有 {self._size} 字节（下载不完整？）",
                )
            tensors[name] = GGUFTensor(name, shape, type_, type_name, base + offset, nbytes)
        return tensors

    def _tensor(self) -> tuple:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string(MAX_NAME)
        dims = self._unpack("<I")
        if not 1 <= dims <= MAX_DIMS:
            raise self._bad(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(self._unpack("<Q") for _ in range(dims))[::-1]
        type_, offset = self._unpack("<I"), self._unpack("<Q")
        try:
            kind = GGMLQuantizationType(type_)
        except ValueError:
            raise self._bad(f"tensor {name!r} has the unknown type {type_}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        count = 1
        for size in shape:
            count *= size
        if min(shape) < 1 or count > self._size * 64 or shape[-1] % block:
            raise self._bad(f"tensor {name!r} has the impossible shape {list(shape)} for type {kind.name}")
        return name, shape, type_, kind.name, offset, count // block * block_bytes

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string(self._left())
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._bad(f"metadata type {kind} is unknown")
        item, count = self._unpack("<I"), self._unpack("<Q")
        self._limit("array entries", count, MAX_ARRAY)
        if item == _STRING:
            return [self._string(self._left()) for _ in range(count)]
        if item not in _SCALARS:  # arrays of arrays are allowed by the format and used by nobody
            raise self._bad(f"arrays of metadata type {item} are not supported")
        values = np.frombuffer(self._take(count * struct.calcsize(_SCALARS[item])), _SCALARS[item])
        return values.tolist()

    def _string(self, longest: int) -> str:
        length = self._unpack("<Q")
        self._limit("characters", length, longest)
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._bad("a text is not UTF-8") from None

    def _unpack(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, count: int) -> bytes:
        if count > self._left():
            raise damaged(
                self._path,
                "it ends in the middle of its header (a download cut short?)",
                "文件在文件头中途结束（下载不完整？）",
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def _left(self) -> int:
        return self._size - self._at

    def _limit(self, what: str, count: int, limit: int) -> None:
        if count > limit:
            raise self._bad(f"its header speaks of {count} {what}, more than {limit}")

    def _bad(self, en: str) -> WeightsError:
        return damaged(self._path, f"its header is damaged ({en})", f"文件头已损坏（{en}）")
