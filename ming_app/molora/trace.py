"""`RouterTrace`: which experts fired, for every token, layer and projection. One class, one shape; needs no model.

Axes: T tokens (prompt first, then answer), L layers, P = 3 projections (gate, up, down), k chosen experts, larger
router logit first. Saved as .npz (compact) and JSON (documented schema, `SCHEMA`); both read back as untrusted input:
nothing is unpickled, every shape, range and length is checked, and damage raises TraceError.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ming_app.errors import TraceError
from ming_app.molora.config import MAX_EXPERTS, PROJECTIONS

SCHEMA = 1
MAX_FILE_BYTES = 64 * 2**20
MAX_TOKENS = 1 << 17
MAX_CELLS = 1 << 26  # T L P k of one trace
ROLES = ("prompt", "answer")
# What json, zipfile, zlib and numpy raise for damaged bytes.
_DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,  # RecursionError and NotImplementedError too
    MemoryError,
    EOFError,
    OSError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class TraceToken:
    """One model token. `text` is what it adds to the visible text: "" for all but the last token of a character that is
    split over several byte tokens, and those tokens share `piece`, the index of the text piece they form together."""

    id: int
    text: str
    role: str
    piece: int
    logprob: float | None = None
    """Natural log of the model's probability of this token (answer tokens), before temperature."""


@dataclass(frozen=True)
class RouterTrace:
    """Routing of one request. `experts` uint8 [T, L, P, k], `weights` float16 [T, L, P, k] (softmax over the chosen)."""

    experts: np.ndarray
    weights: np.ndarray
    tokens: tuple[TraceToken, ...]
    num_experts: int
    model: str = ""
    """Human name of the model that made it."""
    fingerprint: str = ""
    """SHA-256 fingerprints of base and adapter, joined by '+'."""
    config: dict[str, Any] = field(default_factory=dict)
    """MoLoRAConfig.to_dict() of the adapter, and `precision`, `backend` of the engine."""
    projections: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        e, w = np.asarray(self.experts), np.asarray(self.weights)
        if e.ndim != 4 or e.shape != w.shape:
            raise _bad(f"experts {e.shape} and weights {w.shape} must both be [T, L, P, k]")
        if e.dtype != np.uint8 or w.dtype != np.float16:
            raise _bad(f"experts must be uint8 and weights float16, got {e.dtype} and {w.dtype}")
        if len(self.tokens) != e.shape[0]:
            raise _bad(f"{len(self.tokens)} tokens for {e.shape[0]} rows")
        if e.shape[2] != len(self.projections) or tuple(self.projections) != PROJECTIONS:
            raise _bad(f"projections must be {PROJECTIONS}, got {tuple(self.projections)[:8]} for axis of {e.shape[2]}")
        if not 1 <= self.num_experts <= MAX_EXPERTS or (e.size and int(e.max()) >= self.num_experts):
            raise _bad(f"expert ids must be below num_experts={self.num_experts}")
        if not np.isfinite(w).all() or (w.size and (w.min() < 0 or w.max() > 1.001)):
            raise _bad("weights must be finite and between 0 and 1")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_layers(self) -> int:
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts.shape[3]

    def top_expert(self, layer: int, projection: str) -> np.ndarray:
        """uint8 [T]: the expert with the larger router logit at one layer and projection."""
        return self.experts[:, layer, self.projections.index(projection), 0]

    def pieces(self) -> list[tuple[str, list[int]]]:
        """Visible text pieces in order, each with the indices of the tokens that form it."""
        grouped: dict[int, tuple[str, list[int]]] = {}
        for i, token in enumerate(self.tokens):
            text, members = grouped.setdefault(token.piece, ("", []))
            grouped[token.piece] = (text + token.text, [*members, i])
        return list(grouped.values())

    # -- files ---------------------------------------------------------------------------------------------------

    def _header(self) -> dict[str, Any]:
        return {
            "format": "ming-router-trace",
            "schema": SCHEMA,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "num_experts": self.num_experts,
            "projections": list(self.projections),
            "config": self.config,
            "tokens": [[t.id, t.text, t.role, t.piece, t.logprob] for t in self.tokens],
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes .npz or .json by the file's ending, to a temporary name first. Raises TraceError for other endings."""
        path = Path(path)
        if path.suffix == ".npz":
            buffer = io.BytesIO()
            header = np.frombuffer(json.dumps(self._header(), ensure_ascii=False).encode(), np.uint8)
            np.savez_compressed(buffer, header=header, experts=self.experts, weights=self.weights)
            data = buffer.getvalue()
        elif path.suffix == ".json":
            weights = np.round(self.weights.astype(float), 4)
            body = {**self._header(), "experts": self.experts.tolist(), "weights": weights.tolist()}
            data = json.dumps(body, ensure_ascii=False).encode()
        else:
            raise _bad(f"a trace file ends in .npz or .json, not {path.suffix!r}")
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise TraceError(
                f"The trace could not be written to {path}: {error.strerror}.",
                f"无法写入轨迹文件 {path}：{error.strerror}。",
            ) from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RouterTrace:
        """Reads what `save` wrote. Raises TraceError for anything damaged, hostile, too large or of another version."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise _bad(f"{path.name} is larger than {MAX_FILE_BYTES >> 20} MiB")
            data = path.read_bytes()
        except OSError as error:
            raise TraceError(
                f"{path} cannot be read: {error.strerror}.", f"无法读取 {path}：{error.strerror}。"
            ) from error
        try:
            header, experts, weights = _read_npz(data) if data[:2] == b"PK" else _read_json(data)
            return cls._from_parts(header, experts, weights)
        except TraceError:
            raise
        except _DAMAGE as error:
            raise _bad(f"{path.name} is damaged or not a router trace ({type(error).__name__})") from error

    @classmethod
    def _from_parts(cls, header: Any, experts: np.ndarray, weights: np.ndarray) -> RouterTrace:
        if not isinstance(header, dict) or header.get("format") != "ming-router-trace":
            raise _bad("the file is not a router trace")
        if header.get("schema") != SCHEMA:
            raise _bad(f"schema version {header.get('schema')!r} is not known (this program reads {SCHEMA})")
        rows = header["tokens"]
        if not isinstance(rows, list) or len(rows) > MAX_TOKENS:
            raise _bad("the token list is missing or too long")
        if not isinstance(header["config"], dict) or not isinstance(header["num_experts"], int):
            raise _bad("config or num_experts has the wrong type")
        return cls(
            experts=experts,
            weights=weights,
            tokens=tuple(_read_token(row) for row in rows),
            num_experts=header["num_experts"],
            model=str(header["model"])[:200],
            fingerprint=str(header["fingerprint"])[:200],
            config=header["config"],
            projections=tuple(header["projections"]),
        )


def _read_token(row: Any) -> TraceToken:
    token_id, text, role, piece, logprob = row
    whole = isinstance(token_id, int) and isinstance(piece, int) and 0 <= token_id < 2**31 and 0 <= piece < 2**31
    if not whole or not isinstance(text, str) or len(text) > 1000 or role not in ROLES:
        raise _bad("a token row is malformed")
    if logprob is not None and not (isinstance(logprob, int | float) and -1e6 < logprob <= 1e-3):
        raise _bad("a token's log-probability is out of range")
    return TraceToken(token_id, text, role, piece, logprob)


def _read_npz(data: bytes) -> tuple[Any, np.ndarray, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: info.file_size for info in archive.infolist()}
        if set(members) != {"header.npy", "experts.npy", "weights.npy"}:
            raise _bad("the archive must hold header, experts and weights")
        if (
            members["experts.npy"] > MAX_CELLS + 4096
            or members["weights.npy"] > 2 * MAX_CELLS + 4096
            or members["header.npy"] > MAX_FILE_BYTES
        ):
            raise _bad("the archive unpacks to more than a trace may hold")
        for name in members:
            _check_npy_size(archive, name, members[name])
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        header, experts, weights = archive["header"], archive["experts"], archive["weights"]
    return json.loads(header.astype(np.uint8, casting="safe").tobytes().decode()), experts, weights


def _check_npy_size(archive: zipfile.ZipFile, name: str, size: int) -> None:
    """Raises TraceError when an array's header claims more than its member holds: numpy would allocate what it claims."""
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        if math.prod(shape) * dtype.itemsize != size - member.tell() or dtype.hasobject:
            raise _bad(f"{name} does not hold what its header says")


def _read_json(data: bytes) -> tuple[Any, np.ndarray, np.ndarray]:
    body = json.loads(data.decode())
    if not isinstance(body, dict) or "experts" not in body:
        raise _bad("the file is not a router trace")
    experts, weights = np.asarray(body.pop("experts")), np.asarray(body.pop("weights"), dtype=np.float64)
    if experts.size > MAX_CELLS or experts.ndim != 4:
        raise _bad("experts must be a [T, L, P, k] list")
    if experts.size and (experts.dtype.kind not in "iu" or experts.min() < 0 or experts.max() >= MAX_EXPERTS):
        raise _bad("expert ids must be small whole numbers")
    return body, experts.astype(np.uint8), weights.astype(np.float16)


def _bad(reason: str) -> TraceError:
    return TraceError(f"Router trace: {reason}.", f"路由轨迹文件有问题：{reason}。")
