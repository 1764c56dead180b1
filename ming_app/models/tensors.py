"""Base weights by their Hugging Face names, float32, one tensor at a time, from a GGUF or a safetensors folder.

`open_tensors` is the one door. Nothing is read before it is asked for, nothing is kept after it is given, and no torch
is imported, so both backends, the converter and the trainer read bases through it. Files are treated as hostile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ming_app.errors import WeightsError
from ming_app.models.base_config import read_base_config, read_json
from ming_app.models.gguf import CHUNK, GGUFFile, damaged
from ming_app.models.gguf_config import gguf_config, gguf_names
from ming_app.models.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from ming_app.models.fetch import LocalModel

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


class TensorSource(Protocol):
    """A base's weights. A tied base lists no "lm_head.weight", but `get` of it gives the embedding."""

    config: dict[str, Any]
    """the Hugging Face config.json"""

    def names(self) -> list[str]:
        """Hugging Face names of the stored tensors, e.g. "model.layers.0.mlp.gate_proj.weight"."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in Hugging Face layout, linears as [out, in]."""

    def get(self, name: str) -> np.ndarray:
        """A fresh float32 array, C-contiguous, Hugging Face layout. Raises KeyError for a name not held."""

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """The same values as consecutive float32 pieces along the first axis, so that little memory is needed."""

    def raw(self, name: str) -> tuple[np.ndarray, str] | None:
        """GGUF: (uint8 [rows, bytes per row], ggml type name such as "Q4_K"), rows in Hugging Face order; else None."""

    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> TensorSource: ...

    def __exit__(self, *_: object) -> None: ...


def open_tensors(local: LocalModel | Path) -> TensorSource:
    """Open a base: a `LocalModel`, a .gguf file, or a folder with config.json and safetensors (sharded too).

    Raises WeightsError when it is damaged, incomplete, hostile or of a family that is not supported.
    """
    path = local if isinstance(local, Path) else local.base
    return FolderTensors(path) if path.is_dir() else GGUFTensors(path)


class _Source:
    """What the two kinds share: a table of names, tied heads, the context manager."""

    config: dict[str, Any]

    def _resolve(self, name: str) -> str:
        return (
            EMBEDDING if name == HEAD and self.config.get("tie_word_embeddings") and name not in self.names() else name
        )

    def names(self) -> list[str]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GGUFTensors(_Source):
    """A GGUF of the qwen2 or llama family, dequantised per tensor into Hugging Face layout."""

    def __init__(self, path: Path):
        self._file = GGUFFile(path)
        try:
            self.config = gguf_config(self._file)
            self._names = gguf_names(self._file, self.config)
        except BaseException:
            self._file.close()
            raise

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._names[self._resolve(name)]].shape

    def get(self, name: str) -> np.ndarray:
        name = self._resolve(name)
        values = self._file.get(self._names[name])
        return np.ascontiguousarray(self._unpermute(name, values))

    def rows(self, name: str) -> Iterator[np.ndarray]:
        name = self._resolve(name)
        if self._heads(name):  # permuted tensors are small, and their rows do not come in order
            yield self.get(name)
            return
        tensor = self._file.tensors[self._names[name]]
        step = max(1, CHUNK // tensor.shape[-1])
        for start in range(0, tensor.rows, step):
            yield self._file.rows(tensor.name, start, min(tensor.rows, start + step))
        self._file.release(tensor.name)

    def raw(self, name: str) -> tuple[np.ndarray, str] | None:
        name = self._resolve(name)
        blocks, type_name = self._file.raw(self._names[name])
        return self._unpermute(name, blocks), type_name

    def close(self) -> None:
        self._file.close()

    def _heads(self, name: str) -> int:
        """Heads of a tensor whose rows llama.cpp stores in another order (q and k of llama), else 0."""
        if self.config["model_type"] != "llama" or not name.endswith((".q_proj.weight", ".k_proj.weight")):
            return 0
        return self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]

    def _unpermute(self, name: str, rows: np.ndarray) -> np.ndarray:
        """llama.cpp interleaves the two rotary halves of each head; Hugging Face keeps them one after the other."""
        heads = self._heads(name)
        if not heads:
            return rows
        half = rows.shape[0] // heads // 2
        return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


class FolderTensors(_Source):
    """A Hugging Face folder: config.json and model.safetensors, or shards named by an index."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_base_config(folder)
        self._files = {name: SafetensorsFile(folder / name) for name in weight_files(folder)}
        self._where = {tensor: file for file in self._files.values() for tensor in file.tensors}
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        index = self.folder / INDEX_FILE
        listed = set(read_json(index)["weight_map"]) if index.exists() else set(self._where)
        missing = sorted(listed - set(self._where))[:3]
        if missing:
            raise damaged(self.folder, f"tensors {missing} are missing", f"缺少张量 {missing}")
        if EMBEDDING not in self._where:
            raise damaged(self.folder, f"it has no {EMBEDDING}", f"其中没有 {EMBEDDING}")

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        name = self._resolve(name)
        return self._where[name].tensors[name].shape

    def get(self, name: str) -> np.ndarray:
        name = self._resolve(name)
        return self._where[name].get(name)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        yield self.get(name)

    def raw(self, name: str) -> tuple[np.ndarray, str] | None:
        return None

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up the base in a Hugging Face folder. Raises WeightsError."""
    index = folder / INDEX_FILE
    if not index.exists():
        if (folder / SINGLE_FILE).exists():
            return [SINGLE_FILE]
        raise WeightsError(
            f"The folder {folder} holds no {SINGLE_FILE}. Bases are read from safetensors only; pickled weights (.bin) are "
            "not loaded. If this is an adapter, give it as the adapter and name its base as the model.",
            f"文件夹 {folder} 中没有 {SINGLE_FILE}。基座只从 safetensors 读取，不加载 pickle 权重（.bin）。"
            "如果这是适配器，请作为适配器指定，并把它的基座作为模型。",
        )
    table = read_json(index).get("weight_map")
    if not isinstance(table, Mapping) or not table or not all(isinstance(v, str) for v in table.values()):
        raise damaged(index, "it has no weight_map", "其中没有 weight_map")
    names = sorted(set(table.values()))
    for name in names:  # names come from a file: they must stay inside the folder
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise damaged(index, f"it names the file {name!r}", f"其中的文件名 {name!r} 不合规")
    return names
