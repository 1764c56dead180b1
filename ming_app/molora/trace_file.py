"""Files of `RouterTrace`. Read as untrusted input: nothing is unpickled, every shape, range and length is checked, and
damage raises TraceError.

Schema 2. Both forms hold a header:

    format "ming-router-trace"      schema 2       model, fingerprint str      num_experts int
    projections ["gate", "up", "down"]             config {}                   segments [[start, title, {kind: label}], ...]
    tokens [[id, text, "prompt" | "answer", piece, logprob | null, [[text, logprob], ...]], ...]

and arrays, in JSON as nested lists beside it, in .npz as members (`header` is the UTF-8 of its JSON, uint8):

    experts uint8 [T, L, 3, k]                     weights float16 [T, L, 3, k]
    probabilities float16 [T, L, 3, E], optional   contributions float16 [T, L, 3, k], optional

Schema 1 lacks segments, the last entry of a token and the optional arrays; it is read too.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ming_app.errors import TraceError
from ming_app.molora.config import MAX_EXPERTS
from ming_app.molora.trace import ROLES, RouterTrace, Segment, TraceToken, bad_trace
from ming_app.reading import TooLargeError, bounded_json, read_bounded

SCHEMA = 2
READABLE = (1, 2)
MAX_FILE_BYTES = 64 * 2**20
MAX_TOKENS = 1 << 17
MAX_CELLS = 1 << 26  # numbers in one array
MAX_LISTS = 5_000_000  # in the JSON of a file
MAX_OTHERS = 20
MAX_LABELS = 20
KIND = re.compile(r"[a-z][a-z0-9_]{0,29}")
"""of a label: it names files and parts of a page"""
ARRAYS = {"experts": np.uint8, "weights": np.float16}
MEASURED = {"probabilities": np.float16, "contributions": np.float16}
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
    SyntaxError,
    tokenize.TokenError,  # both from numpy's reading of an array's header
    zipfile.BadZipFile,
    zlib.error,
)


def write_trace(trace: RouterTrace, path: str | os.PathLike[str]) -> Path:
    """Writes .npz or .json by the file's ending, to a temporary name first. Raises TraceError for other endings."""
    path = Path(path)
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        header = np.frombuffer(json.dumps(header_of(trace), ensure_ascii=False).encode(), np.uint8)
        np.savez_compressed(buffer, header=header, **_arrays(trace))
        data = buffer.getvalue()
    elif path.suffix == ".json":
        data = json.dumps(to_json(trace), ensure_ascii=False).encode()
    else:
        raise bad_trace(f"a trace file ends in .npz or .json, not {path.suffix!r}")
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


def read_trace(path: str | os.PathLike[str]) -> RouterTrace:
    """Reads a file of `write_trace`. Raises TraceError for anything damaged, hostile, too large or of another version."""
    path = Path(path)
    try:
        data = read_bounded(path, MAX_FILE_BYTES, named=True)
    except TooLargeError as error:
        raise bad_trace(f"{path.name} is larger than {MAX_FILE_BYTES >> 20} MiB") from error
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}.", f"无法读取 {path}：{error.strerror}。") from error
    try:
        return _trace(*(_read_npz(data) if data[:2] == b"PK" else _read_json(data)))
    except TraceError:
        raise
    except _DAMAGE as error:
        raise bad_trace(f"{path.name} is damaged or not a router trace ({type(error).__name__})") from error


def to_json(trace: RouterTrace) -> dict[str, Any]:
    """What a .json file holds: the header and the arrays as nested lists."""
    return {**header_of(trace), **{name: _plain(array).tolist() for name, array in _arrays(trace).items()}}


def _arrays(trace: RouterTrace) -> dict[str, Any]:
    return {name: getattr(trace, name) for name in (*ARRAYS, *MEASURED) if getattr(trace, name) is not None}


def header_of(trace: RouterTrace) -> dict[str, Any]:
    """All but the arrays, JSON-ready."""
    return {
        "format": "ming-router-trace",
        "schema": SCHEMA,
        "model": trace.model,
        "fingerprint": trace.fingerprint,
        "num_experts": trace.num_experts,
        "projections": list(trace.projections),
        "config": trace.config,
        "segments": [[segment.start, segment.title, dict(segment.labels)] for segment in trace.segments],
        "tokens": [[t.id, t.text, t.role, t.piece, t.logprob, [list(o) for o in t.others]] for t in trace.tokens],
    }


def _plain(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.uint8 else np.round(array.astype(float), 4)


def _trace(header: Any, arrays: dict[str, np.ndarray]) -> RouterTrace:
    if not isinstance(header, dict) or header.get("format") != "ming-router-trace":
        raise bad_trace("the file is not a router trace")
    if header.get("schema") not in READABLE:
        raise bad_trace(f"schema version {header.get('schema')!r} is not known (this program reads {READABLE})")
    json.dumps(header, ensure_ascii=False).encode()  # refuses text that is no Unicode (lone surrogates)
    ordered = np.sort(arrays["experts"], axis=-1) if arrays["experts"].ndim == 4 else arrays["experts"]
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise bad_trace("the experts of a cell must differ")
    rows, segments = header["tokens"], header.get("segments", [])
    if not isinstance(rows, list) or len(rows) > MAX_TOKENS or not isinstance(segments, list):
        raise bad_trace("the token list or the segment list is missing or too long")
    if not isinstance(header["config"], dict) or not isinstance(header["num_experts"], int):
        raise bad_trace("config or num_experts has the wrong type")
    return RouterTrace(
        **arrays,
        tokens=tuple(_token(row) for row in rows),
        num_experts=header["num_experts"],
        model=str(header["model"])[:200],
        fingerprint=str(header["fingerprint"])[:200],
        config=header["config"],
        projections=tuple(header["projections"]),
        segments=tuple(_segment(row) for row in segments),
    )


def _token(row: Any) -> TraceToken:
    token_id, text, role, piece, logprob, *rest = row
    whole = isinstance(token_id, int) and isinstance(piece, int) and 0 <= token_id < 2**31 and 0 <= piece < 2**31
    if not whole or not _short(text, 1000) or role not in ROLES:
        raise bad_trace("a token row is malformed")
    others = rest[0] if rest else []
    if not isinstance(others, list) or len(others) > MAX_OTHERS or not all(_short(other, 1000) for other, _ in others):
        raise bad_trace("a token's alternatives are malformed")
    if not all(_is_logprob(value) for value in [*([] if logprob is None else [logprob]), *(v for _, v in others)]):
        raise bad_trace("a token's log-probability is out of range")
    return TraceToken(token_id, text, role, piece, logprob, tuple((other, float(value)) for other, value in others))


def _segment(row: Any) -> Segment:
    start, title, labels = row
    right = isinstance(start, int) and _short(title, 1000) and isinstance(labels, dict) and len(labels) <= MAX_LABELS
    if not right or not all(KIND.fullmatch(kind) and _short(label, 200) for kind, label in labels.items()):
        raise bad_trace("a segment is malformed")
    return Segment(start, title, labels)


def _short(text: Any, longest: int) -> bool:
    return isinstance(text, str) and len(text) <= longest


def _is_logprob(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e6 < value <= 1e-3


def _read_npz(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        needed = {"header", *ARRAYS}
        if not needed <= set(members) <= needed | set(MEASURED) or len(members) != len(archive.infolist()):
            raise bad_trace("the archive must hold header, experts and weights, and nothing unknown")
        for name, info in members.items():
            room = MAX_FILE_BYTES if name == "header" else MAX_CELLS * np.dtype({**ARRAYS, **MEASURED}[name]).itemsize
            if info.file_size > room + 4096:
                raise bad_trace("the archive unpacks to more than a trace may hold")
        for info in members.values():
            _check_npy_size(archive, info)
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in members}
    header = arrays.pop("header").astype(np.uint8, casting="safe").tobytes().decode()
    return bounded_json(header, MAX_LISTS), arrays


def _check_npy_size(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Raises TraceError when an array's header claims more than its member holds: numpy would allocate what it claims."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        if math.prod(shape) * dtype.itemsize != info.file_size - member.tell() or dtype.hasobject:
            raise bad_trace(f"{info.filename} does not hold what its header says")


def _read_json(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    body = bounded_json(data.decode(), MAX_LISTS)
    if not isinstance(body, dict) or "experts" not in body:
        raise bad_trace("the file is not a router trace")
    experts = np.asarray(
        body.pop("experts"), np.float64
    )  # of its own accord numpy gives every cell the longest text's width
    if experts.size > MAX_CELLS or experts.ndim != 4:
        raise bad_trace("experts must be a [T, L, P, k] list")
    if experts.size and (experts.min() < 0 or experts.max() >= MAX_EXPERTS or (experts % 1).any()):
        raise bad_trace("expert ids must be small whole numbers")
    arrays = {"experts": experts.astype(np.uint8)}
    for name, dtype in ({"weights": np.float16} | MEASURED).items():
        if name in body or name == "weights":
            array = np.asarray(body.pop(name), dtype=np.float64)
            if array.size > MAX_CELLS:
                raise bad_trace(f"{name} is too large")
            with np.errstate(over="ignore"):  # what becomes infinite is refused with the rest
                arrays[name] = array.astype(dtype)
    return body, arrays
