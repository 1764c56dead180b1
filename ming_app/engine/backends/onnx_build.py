"""Builds the CPU engine's folder once: tensor by tensor, streamed to disk, whole or not at all.

Peak memory is a few times the largest tensor of the base (its embedding). The work happens in a folder beside the
target that is renamed at the end; an interrupted or failed build leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ming_app.engine.backends.onnx_spec import (
    EMBEDDINGS,
    GRAPH,
    PROBE,
    WEIGHTS,
    BaseShape,
    Manifest,
    find_recipe,
    runtime_version,
)
from ming_app.errors import AdapterError, WeightsError
from ming_app.models.progress import Meter, ProgressCallback
from ming_app.molora.config import PROJECTIONS

if TYPE_CHECKING:
    from ming_app.models.tensors import TensorSource
    from ming_app.molora.checkpoint import Adapter

PIECE_ROWS = 4096  # of the embedding, converted at a time


def build_engine(
    source: TensorSource,
    adapter: Adapter | None,
    recipe: str,
    out_dir: str | os.PathLike[str],
    progress: ProgressCallback | None = None,
    *,
    base_fingerprint: str = "",
) -> Path:
    """Builds `out_dir` (named by `engine_key`) from a base, an adapter or None, and a recipe; returns its path.

    A folder that is there already is replaced. Raises UsageError (recipe), WeightsError (base not supported, no room
    on the disk, folder not writable) and AdapterError (expert selection "sampling").
    """
    target = Path(out_dir)
    precision = find_recipe(recipe)
    shape = BaseShape.from_config(source.config)
    if adapter is not None and adapter.config.expert_selection != "top_k":
        raise AdapterError(
            "This adapter selects experts by sampling, which the ONNX engine does not do. Use the torch backend.",
            "该适配器以采样方式选择专家，ONNX 引擎不支持。请使用 torch 后端。",
        )
    from ming_app.engine.backends.onnx_graph import DecoderGraph, GraphWriter, WeightStore  # imports onnx: for building
    from ming_app.engine.backends.onnx_probe import ProbeGraph

    meter = Meter(progress, "build", shape.layers + 2, "steps", detail=recipe)
    meter.update(0, force=True)
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        with open(staging / WEIGHTS, "wb") as weights:
            store = WeightStore(weights)
            DecoderGraph(GraphWriter(store), source, adapter, shape, precision).write(staging / GRAPH, meter)
            if adapter:
                ProbeGraph(GraphWriter(store), source, adapter, shape, precision).write(staging / PROBE)
        meter.update(shape.layers + 1)
        _write_embeddings(staging / EMBEDDINGS, source, shape)
        manifest = Manifest(
            recipe=recipe,
            base=shape,
            molora=adapter.config if adapter else None,
            base_fingerprint=base_fingerprint,
            adapter_fingerprint=adapter.fingerprint if adapter else None,
            router_bias=_router_bias(adapter, shape.layers) if adapter else None,
            files={path.name: path.stat().st_size for path in staging.iterdir()},
            runtime=runtime_version(),
        )
        manifest.write(staging)
        _publish(staging, target)
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    meter.update(shape.layers + 2, force=True)
    return target


def _write_embeddings(path: Path, source: TensorSource, shape: BaseShape) -> None:
    table = source.get("model.embed_tokens.weight")
    if table.shape != (shape.vocab, shape.hidden):
        raise WeightsError(
            f"The base's embedding has shape {table.shape}; by its config.json it should be {(shape.vocab, shape.hidden)}.",
            f"基座词嵌入的形状是 {table.shape}；按 config.json 应为 {(shape.vocab, shape.hidden)}。",
        )
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f2", "fortran_order": False, "shape": (shape.vocab, shape.hidden)}
        )
        for start in range(0, shape.vocab, PIECE_ROWS):
            file.write(np.ascontiguousarray(table[start : start + PIECE_ROWS].astype("<f2")).data)


def _router_bias(adapter: Adapter, layers: int) -> list[list[list[float]]]:
    return [[adapter.projection(layer, p).router_bias.tolist() for p in PROJECTIONS] for layer in range(layers)]


def _publish(staging: Path, target: Path) -> None:
    """Puts the finished folder in place; what stood there moves aside first, for a folder cannot be overwritten."""
    staging.chmod(0o755)
    if target.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.replace(target, aside / target.name)
        shutil.rmtree(aside, ignore_errors=True)
    os.replace(staging, target)


def _cannot_write(target: Path, error: OSError) -> WeightsError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(target.parent).free if target.parent.exists() else 0
        return WeightsError(
            f"There is no room to build the engine in {target.parent} ({free / 1e9:.1f} GB free). Free some disk space, or move the cache with MING_CACHE_DIR.",
            f"{target.parent} 所在磁盘空间不足（剩余 {free / 1e9:.1f} GB），无法构建引擎。请清理磁盘，或用 MING_CACHE_DIR 更换缓存目录。",
        )
    return WeightsError(
        f"The engine could not be built in {target}: {reason}. Check that the folder can be written, or move the cache with MING_CACHE_DIR.",
        f"无法在 {target} 构建引擎：{reason}。请检查该目录是否可写，或用 MING_CACHE_DIR 更换缓存目录。",
    )
