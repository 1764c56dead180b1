"""Builds the CPU engine's folder once: tensor by tensor, streamed to disk, whole or not at all.

Peak memory is a few times the largest tensor that has to be quantised. The work happens in a folder beside the target that
is renamed at the end; an interrupted or failed build leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from ming_app.engine.backends.native import layout
from ming_app.engine.backends.native.formats import CARRIED, Blocks, arranged, from_float, from_gguf
from ming_app.engine.backends.native.layout import BLOCK, LANES, MATRICES, VECTORS
from ming_app.engine.backends.native.spec import EMBEDDINGS, WEIGHTS, BaseShape, Manifest, find_recipe
from ming_app.errors import AdapterError, WeightsError
from ming_app.models.progress import Meter, ProgressCallback
from ming_app.models.recipes import Recipe
from ming_app.molora.config import PROJECTIONS, MoLoRAConfig

if TYPE_CHECKING:
    from ming_app.models.tensors import TensorSource
    from ming_app.molora.checkpoint import Adapter, ProjectionWeights

ALIGNMENT = 4096  # of matrices in weights.bin: whole pages
RANK_BITS = 8
ATTENTION = (("q_proj", layout.Q, layout.BIAS_Q, layout.B_Q), ("k_proj", layout.K, layout.BIAS_K, layout.B_K),
             ("v_proj", layout.V, layout.BIAS_V, layout.B_V))  # fmt: skip


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
            "This adapter selects experts by sampling, which the CPU engine does not do. Use the torch backend.",
            "该适配器以采样方式选择专家，CPU 引擎不支持。请使用 torch 后端。",
        )
    meter = Meter(progress, "build", shape.layers + 2, "steps", detail=recipe)
    meter.update(0, force=True)
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        with open(staging / WEIGHTS, "wb") as weights:
            writer = _Writer(weights, source, adapter, shape, precision)
            for layer in range(shape.layers):
                writer.layer(layer)
                meter.update(layer + 1)
            writer.end()
        meter.update(shape.layers + 1)
        _write_embeddings(staging / EMBEDDINGS, source, shape)
        manifest = Manifest(
            recipe=recipe,
            base=shape,
            molora=adapter.config if adapter else None,
            base_fingerprint=base_fingerprint,
            adapter_fingerprint=adapter.fingerprint if adapter else None,
            router_bias=_router_bias(adapter, shape.layers) if adapter else None,
            matrices=writer.matrices.tolist(),
            vectors=writer.vectors.tolist(),
            files={path.name: path.stat().st_size for path in staging.iterdir()},
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


class _Writer:
    """Writes the weights of one model, layer by layer, and notes where everything lies."""

    def __init__(
        self, file: IO[bytes], source: TensorSource, adapter: Adapter | None, shape: BaseShape, recipe: Recipe
    ):
        self._file = file
        self._source = source
        self._adapter = adapter
        self._shape = shape
        self._recipe = recipe
        self._names = set(source.names())
        self.matrices = np.zeros((shape.layers * MATRICES + 2, 5), np.int64)
        self.vectors = np.full((shape.layers + 1, VECTORS), -1, np.int64)
        self._check_names()

    def layer(self, layer: int) -> None:
        """One decoder layer."""
        s, p = self._shape, f"model.layers.{layer}."
        self._vector(layer, layout.NORM_1, self._get(p + "input_layernorm.weight", s.hidden))
        self._vector(layer, layout.NORM_2, self._get(p + "post_attention_layernorm.weight", s.hidden))
        heads, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        bits = self._recipe.attention
        for (target, matrix, bias, _), rows in zip(ATTENTION, (heads, kv, kv), strict=True):
            self._linear(layer, matrix, bias, f"{p}self_attn.{target}", rows, s.hidden, bits)
        self._linear(layer, layout.OUT, layout.BIAS_O, f"{p}self_attn.o_proj", s.hidden, heads, bits)
        in_bits = self._recipe.gate_up
        self._linear(layer, layout.GATE, layout.BIAS_GATE, f"{p}mlp.gate_proj", s.ffn, s.hidden, in_bits)
        self._linear(layer, layout.UP, layout.BIAS_UP, f"{p}mlp.up_proj", s.ffn, s.hidden, in_bits)
        self._linear(layer, layout.DOWN, layout.BIAS_DOWN, f"{p}mlp.down_proj", s.hidden, s.ffn, self._recipe.down)
        if self._adapter is not None:
            self._attention_lora(layer, self._adapter)
            self._experts(layer, self._adapter)

    def end(self) -> None:
        """The last norm and the head."""
        s = self._shape
        self._vector(s.layers, 0, self._get("model.norm.weight", s.hidden))
        tied = s.tied or "lm_head.weight" not in self._names
        name = "model.embed_tokens" if tied else "lm_head"
        if "lm_head.bias" in self._names:
            self._vector(s.layers, 1, self._get("lm_head.bias", s.vocab))
        self._weight(s.layers * MATRICES, f"{name}.weight", s.vocab, s.hidden, self._recipe.head)

    def _linear(self, layer: int, matrix: int, bias: int, name: str, rows: int, inputs: int, bits: int) -> None:
        self._weight(layer * MATRICES + matrix, f"{name}.weight", rows, inputs, bits)
        if f"{name}.bias" in self._names:
            self._vector(layer, bias, self._get(f"{name}.bias", rows))

    def _weight(self, index: int, name: str, rows: int, inputs: int, bits: int) -> None:
        """A weight of the base: its own blocks where they can be kept, else quantised."""
        if self._source.shape(name) != (rows, inputs):
            raise _wrong_shape(name, self._source.shape(name), (rows, inputs))
        raw = self._source.raw(name)
        if raw is not None and raw[1] in CARRIED:
            blocks, kind = raw
            self._matrix(index, rows, inputs, lambda start, stop: from_gguf(blocks[start:stop], kind))
            return
        weight = self._get(name, rows, inputs)
        self._matrix(index, rows, inputs, lambda start, stop: from_float(weight[start:stop], bits))

    def _attention_lora(self, layer: int, adapter: Adapter) -> None:
        pairs = [(adapter.attention(layer, target), b) for target, _, _, b in ATTENTION]
        stacked = [pair[0] for pair, _ in pairs if pair is not None]
        if stacked:
            ranks = _blocks(sum(map(len, stacked)))
            self._float(layer, layout.A_QKV, _rows(np.concatenate(stacked), ranks))
            at = 0
            for pair, b in pairs:
                if pair is None:
                    continue
                columns = np.zeros((len(pair[1]), ranks), np.float32)
                columns[:, at : at + pair[1].shape[1]] = pair[1] * np.float32(adapter.config.scale)
                self._float(layer, b, columns)
                at += len(pair[0])
        pair = adapter.attention(layer, "o_proj")
        if pair is not None:
            self._float(layer, layout.A_O, _rows(pair[0], _blocks(len(pair[0]))))
            self._float(layer, layout.B_O, pair[1] * np.float32(adapter.config.scale))

    def _experts(self, layer: int, adapter: Adapter) -> None:
        ranks, scale = rank_rows(adapter.config), np.float32(adapter.config.scale)
        weights = [adapter.projection(layer, projection) for projection in PROJECTIONS]
        into = np.concatenate([_rows(_stack_a(one), ranks) for one in weights[:2]])
        self._float(layer, layout.A_IN, into)
        self._float(layer, layout.A_DOWN, _rows(_stack_a(weights[2]), ranks))
        for i, (one, matrix) in enumerate(zip(weights, (layout.B_GATE, layout.B_UP, layout.B_DOWN), strict=True)):
            self._float(layer, matrix, _stack_b(one) * scale)
            router = np.pad(one.router_weight, ((0, 0), (0, -one.router_weight.shape[1] % BLOCK)))
            self._vector(layer, layout.ROUTER + i, router, pad=False)
            scaled = one.B * scale
            self._vector(layer, layout.GRAM + i, np.einsum("eor,eos->ers", scaled, scaled), pad=False)

    def _float(self, layer: int, matrix: int, weight: np.ndarray) -> None:
        rows, inputs = weight.shape
        whole = np.ascontiguousarray(weight, np.float32)
        index = layer * MATRICES + matrix
        self._matrix(index, rows, inputs, lambda start, stop: from_float(whole[start:stop], RANK_BITS))

    def _matrix(self, index: int, rows: int, inputs: int, make: Callable[[int, int], Blocks]) -> None:
        offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.seek(offset)
        arranged(rows, inputs, make, self._file.write)
        blocks, groups = -(-inputs // BLOCK), -(-rows // LANES)
        format_ = make(0, 1).format
        self.matrices[index] = offset, format_, groups, blocks, layout.group_bytes(format_, blocks)

    def _vector(self, row: int, which: int, values: np.ndarray, *, pad: bool = True) -> None:
        """float32, filled up with zeros to whole blocks."""
        flat = values.astype(np.float32).reshape(-1)
        flat = np.pad(flat, (0, -len(flat) % BLOCK)) if pad else flat
        offset = -(-self._file.tell() // 64) * 64
        self._file.seek(offset)
        self._file.write(flat.data)
        self.vectors[row, which] = offset

    def _get(self, name: str, *shape: int) -> np.ndarray:
        array = self._source.get(name)
        if array.shape != shape:
            raise _wrong_shape(name, array.shape, shape)
        return array

    def _check_names(self) -> None:
        """Refuses a base that lacks a tensor, or has one that would be left out."""
        norms = ["input_layernorm", "post_attention_layernorm"]
        linears = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in PROJECTIONS]
        layers = [f"model.layers.{layer}." for layer in range(self._shape.layers)]
        needed = {p + f"{n}.weight" for p in layers for n in norms + linears}
        needed |= {"model.embed_tokens.weight", "model.norm.weight"}
        optional = {p + f"{n}.bias" for p in layers for n in linears} | {"lm_head.bias", "lm_head.weight"}
        if not self._shape.tied:
            needed.add("lm_head.weight")
        missing, extra = sorted(needed - self._names), sorted(self._names - needed - optional)
        for names, en, zh in ((missing, "lacks", "缺少"), (extra, "has, beyond a Qwen2 or Llama decoder,", "多出")):
            if names:
                some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
                raise WeightsError(
                    f"The CPU engine cannot run this base: it {en} {some}. Use the torch backend.",
                    f"CPU 引擎无法运行该基座：它{zh} {some}。请使用 torch 后端。",
                )


def rank_rows(config: MoLoRAConfig) -> int:
    """Rank rows of one FFN projection: E r routed (expert-major), the shared ones, zeros up to whole blocks."""
    return _blocks((config.num_experts + config.num_shared_experts) * config.rank)


def lora_rows(config: MoLoRAConfig, targets: Sequence[str]) -> int:
    """Rank rows of the attention LoRA of those targets together, up to whole blocks; 0 where there is none."""
    return _blocks(sum(target in config.attention_targets for target in targets) * config.rank)


def _blocks(n: int) -> int:
    return -(-n // BLOCK) * BLOCK


def _rows(matrix: np.ndarray, rows: int) -> np.ndarray:
    """Filled up with zero rows."""
    return np.pad(matrix, ((0, rows - len(matrix)), (0, 0)))


def _stack_a(weights: ProjectionWeights) -> np.ndarray:
    """float32 [ranks, in]"""
    routed = weights.A.reshape(-1, weights.A.shape[2])
    return routed if weights.shared_A is None else np.concatenate([routed, weights.shared_A])


def _stack_b(weights: ProjectionWeights) -> np.ndarray:
    """float32 [out, ranks]"""
    routed = weights.B.transpose(1, 0, 2).reshape(weights.B.shape[1], -1)
    return routed if weights.shared_B is None else np.concatenate([routed, weights.shared_B], axis=1)


def _write_embeddings(path: Path, source: TensorSource, shape: BaseShape) -> None:
    name = "model.embed_tokens.weight"
    if source.shape(name) != (shape.vocab, shape.hidden):
        raise _wrong_shape(name, source.shape(name), (shape.vocab, shape.hidden))
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f2", "fortran_order": False, "shape": (shape.vocab, shape.hidden)}
        )
        for piece in source.rows(name):
            file.write(np.ascontiguousarray(piece.astype("<f2")).data)


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


def _wrong_shape(name: str, shape: Sequence[int], expected: Sequence[int]) -> WeightsError:
    return WeightsError(
        f"Base tensor {name} has shape {tuple(shape)}; by the base's config.json it should be {tuple(expected)}.",
        f"基座张量 {name} 的形状是 {tuple(shape)}；按 config.json 应为 {tuple(expected)}。",
    )


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
