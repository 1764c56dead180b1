"""`verify`: how far the float32 reference is from the logits, experts and weights somebody else computed.

Expected file (safetensors), R rows of S tokens, V vocabulary, N decoded tokens, k experts per token:

    input_ids [R, S] int; prefill_logits [R, S, V], each row run alone; attention_mask [R, S] of 0 and 1 where rows differ in length
    decode_ids [N] int and decode_logits [N, V]: greedy continuation of row 0 with a KV cache
    experts.<layer>.<proj> [S, k] int and weights.<layer>.<proj> [S, k] for row 0, larger router logit first

`decode_*` and `experts.*`/`weights.*` may be absent: what was not compared is reported as null. The file is read as hostile.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ming_app.console import Console
from ming_app.errors import AdapterError, MingError
from ming_app.molora.config import PROJECTIONS

if TYPE_CHECKING:
    from ming_app.engine.backends.torch import TorchBackend
    from ming_app.models.load import TorchModel

TOLERANCE = 5e-4
"""largest difference that passes: float32 rounding of another order of the same sums stays a tenth of it"""
MAX_BYTES = 4 << 30
_INTS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
_FLOATS = ("F64", "F32", "F16")


class ExpectedFileError(MingError):
    """The file of expected values is damaged, hostile, incomplete or made for another model."""


@dataclass(frozen=True)
class Expected:
    """The checked content of an expected file."""

    rows: list[np.ndarray]
    """int64 [S_r] per row"""
    logits: list[np.ndarray]
    """float32 [S_r, V] per row"""
    decode_ids: np.ndarray | None
    decode_logits: np.ndarray | None
    experts: Mapping[tuple[int, int], np.ndarray]
    """(layer, projection index) -> int64 [S_0, k]"""
    weights: Mapping[tuple[int, int], np.ndarray]


def verify(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], expected: str | os.PathLike[str]
) -> dict[str, Any]:
    """The object of `verify --json`: maximal absolute differences (float32), equalities, and `ok` by TOLERANCE.

    Raises ExpectedFileError, AdapterError or WeightsError, naming what is wrong with which file.
    """
    from ming_app.engine.backends.torch import TorchBackend
    from ming_app.models.load import load_torch_model
    from ming_app.models.tensors import open_tensors
    from ming_app.molora.checkpoint import load_adapter

    tensors = read_expected(expected)
    _exists(Path(base), "base", "基座")
    _exists(Path(adapter), "adapter", "适配器")
    with open_tensors(Path(base)) as source:
        config = dict(source.config)
    loaded = load_torch_model(Path(base), load_adapter(adapter, base_config=config).padded(), precision="float32")
    longest = int(config.get("max_position_embeddings") or 1 << 20)
    backend = TorchBackend(loaded, max_context=longest)
    values = check_expected(tensors, backend, longest)
    report: dict[str, Any] = {
        **_prefill(values, backend, loaded),
        "batched_max_abs_logit_diff": _batched(values, backend),
        **_decode(values, backend),
    }
    report["ok"] = _passes(report)
    report["tolerance"] = TOLERANCE
    report["rows"] = len(values.rows)
    return report


def _prefill(values: Expected, backend: TorchBackend, loaded: TorchModel) -> dict[str, Any]:
    """Each row alone; routing of row 0, its weights in float32 as the router gave them."""
    worst = 0.0
    routing: dict[str, Any] = {"experts_equal": None, "weights_max_abs_diff": None}
    for i, (ids, logits) in enumerate(zip(values.rows, values.logits, strict=True)):
        step = backend.forward([ids], backend.new_cache(1, len(ids)), all_logits=True)
        worst = _worse(worst, _difference(step.logits[0], logits))
        if i or loaded.injected is None:
            continue
        state = loaded.injected.state
        if values.experts:
            routing["experts_equal"] = all(
                np.array_equal(state.experts[cell].cpu().numpy().reshape(want.shape), want)
                for cell, want in values.experts.items()
            )
        for cell, want in values.weights.items():
            got = state.weights[cell].cpu().numpy().reshape(want.shape)
            routing["weights_max_abs_diff"] = _worse(routing["weights_max_abs_diff"] or 0.0, _difference(got, want))
    return {"max_abs_logit_diff": worst, **routing}


def _batched(values: Expected, backend: TorchBackend) -> float:
    """All rows in one forward, ragged where their lengths differ."""
    step = backend.forward(
        values.rows, backend.new_cache(len(values.rows), max(map(len, values.rows))), all_logits=True
    )
    worst = 0.0
    for got, want in zip(step.logits, values.logits, strict=True):
        worst = _worse(worst, _difference(got, want))
    return worst


def _decode(values: Expected, backend: TorchBackend) -> dict[str, Any]:
    """Greedy steps over a KV cache. The expected ids are fed, so that one different choice does not hide the rest; the
    ids are equal exactly when free-running greedy decoding would have given them."""
    if values.decode_ids is None or values.decode_logits is None:
        return {"decode_max_abs_logit_diff": None, "decode_ids_equal": None}
    ids = values.rows[0]
    cache = backend.new_cache(1, len(ids) + len(values.decode_ids))
    worst, equal = 0.0, True
    for token, want in zip(values.decode_ids, values.decode_logits, strict=True):
        got = backend.forward([ids], cache).logits[0]
        worst = _worse(worst, _difference(got, want))
        equal = equal and int(np.argmax(got)) == int(token)
        ids = np.array([token], np.int64)
    return {"decode_max_abs_logit_diff": worst, "decode_ids_equal": equal}


def _difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(np.asarray(got, np.float64) - want).max())


def _worse(a: float, b: float) -> float:
    """The larger; NaN wins, so that it cannot hide behind `max`."""
    return b if b > a or b != b else a


def _passes(report: Mapping[str, Any]) -> bool:
    compared = {name: value for name, value in report.items() if value is not None}
    return all(value is True if name.endswith("_equal") else value <= TOLERANCE for name, value in compared.items())


def _exists(path: Path, en: str, zh: str) -> None:
    if not path.exists():
        raise AdapterError(f"The {en} {path} does not exist.", f"{zh} {path} 不存在。")


# -- the expected file ------------------------------------------------------------------------------------------------


def read_expected(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Every tensor of the file: ints as int64, floats as float32. Raises ExpectedFileError."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _bad(f"{path.name} is larger than {MAX_BYTES >> 30} GiB", f"{path.name} 超过 {MAX_BYTES >> 30} GiB")
        tensors = {}
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict: it has no iterator
                kind = file.get_slice(name).get_dtype()
                if kind not in _INTS + _FLOATS:
                    raise _bad(f"{name} has type {kind}", f"{name} 的类型是 {kind}")
                tensors[name] = file.get_tensor(name).astype(np.int64 if kind in _INTS else np.float32)
        return tensors
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise _bad(f"{path.name} cannot be read ({error})", f"无法读取 {path.name}（{error}）") from error


def check_expected(tensors: Mapping[str, np.ndarray], backend: TorchBackend, longest: int) -> Expected:
    """Names, shapes, ranges and finiteness against the model. Raises ExpectedFileError."""
    ids, logits = (_tensor(tensors, name) for name in ("input_ids", "prefill_logits"))
    if ids.ndim != 2 or not ids.size or ids.dtype != np.int64:
        raise _bad(
            f"input_ids must be whole numbers [R, S], got {ids.dtype} {ids.shape}",
            f"input_ids 应为整数 [R, S]，实际为 {ids.dtype} {ids.shape}",
        )
    _shape("prefill_logits", logits, (*ids.shape, backend.vocab_size))
    mask = tensors.get("attention_mask", np.ones_like(ids))
    _shape("attention_mask", mask, ids.shape)
    chosen = mask.astype(bool)
    if not chosen.any(axis=1).all():
        raise _bad("attention_mask leaves a row empty", "attention_mask 使某一行为空")
    rows = [row[keep] for row, keep in zip(ids, chosen, strict=True)]
    decode_ids, decode_logits = tensors.get("decode_ids"), tensors.get("decode_logits")
    if (decode_ids is None) != (decode_logits is None):
        raise _bad("decode_ids and decode_logits must come together", "decode_ids 与 decode_logits 必须同时提供")
    steps = 0
    if decode_ids is not None and decode_logits is not None:
        if decode_ids.ndim != 1 or not decode_ids.size or decode_ids.dtype != np.int64:
            raise _bad("decode_ids must be whole numbers [N]", "decode_ids 应为整数 [N]")
        steps = len(decode_ids)
        _shape("decode_logits", decode_logits, (steps, backend.vocab_size))
    for name, array in (("input_ids", np.concatenate(rows)), ("decode_ids", decode_ids)):
        if array is not None and (array.min() < 0 or array.max() >= backend.vocab_size):
            raise _bad(
                f"{name} has ids outside 0..{backend.vocab_size - 1}",
                f"{name} 含有超出 0..{backend.vocab_size - 1} 的编号",
            )
    if max(max(map(len, rows)), len(rows[0]) + steps) > longest:
        raise _bad(f"a row is longer than the base's {longest} positions", f"某一行超过基座的 {longest} 个位置")
    return Expected(
        rows=rows,
        logits=[row[keep] for row, keep in zip(logits, chosen, strict=True)],
        decode_ids=decode_ids,
        decode_logits=decode_logits,
        experts=_cells(tensors, "experts", backend, chosen[0]),
        weights=_cells(tensors, "weights", backend, chosen[0]),
    )


def _cells(
    tensors: Mapping[str, np.ndarray], kind: str, backend: TorchBackend, chosen: np.ndarray
) -> dict[tuple[int, int], np.ndarray]:
    """(layer, projection index) -> [S_0, k] from the names `<kind>.<layer>.<proj>`."""
    cells = {}
    names = {
        f"{kind}.{layer}.{p}{end}": (layer, i)
        for layer in range(backend.num_layers)
        for i, p in enumerate(PROJECTIONS)
        for end in ("", "_proj")
    }
    for name, array in tensors.items():
        if not name.startswith(kind + "."):
            continue
        if name not in names:
            raise _bad(f"{name} names no layer and projection of this model", f"{name} 不对应本模型的任何层与投影")
        _shape(name, array, (len(chosen), backend.top_k))
        cells[names[name]] = array[chosen]
    return cells


def _tensor(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise _bad(f"{name} is missing", f"缺少 {name}")
    return tensors[name]


def _shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise _bad(
            f"{name} has shape {array.shape}, it should be {shape}", f"{name} 的形状是 {array.shape}，应为 {shape}"
        )
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise _bad(f"{name} holds NaN or infinity", f"{name} 含有 NaN 或无穷")


def _bad(en: str, zh: str) -> ExpectedFileError:
    return ExpectedFileError(f"The file of expected values does not fit: {en}.", f"期望值文件有误：{zh}。")


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """One line per figure and the verdict."""
    for name, value in report.items():
        if name != "ok":
            shown = "-" if value is None else f"{value:.2e}" if isinstance(value, float) else str(value)
            console.line(f"{name:<28} {shown}")
    verdict = ("equal within the tolerance", "在容差内一致") if report["ok"] else ("NOT equal", "不一致")
    console.line(console.text(*verdict))
