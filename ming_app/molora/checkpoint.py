"""Adapters on disk: our native format and the official MING layout, both read as untrusted input.

Native folder: `adapter.safetensors` + `config.json` (schema version, MoLoRAConfig, base fingerprint, training summary).
Tensor names and shapes (L layers, E experts, rank r, n shared experts):

    layers.{l}.mlp.{gate|up|down}.A              [E, r, in]      E: that layer's, where the layers differ
    layers.{l}.mlp.{gate|up|down}.B              [E, out, r]
    layers.{l}.mlp.{gate|up|down}.router.weight  [E, in]        .router.bias [E]
    layers.{l}.mlp.{gate|up|down}.shared.A       [r n, in]      .shared.B    [out, r n]      (only with n > 0)
    layers.{l}.attention.{q_proj|...}.A          [r, in]        .B           [out, r]

Official folder: see `official.py`. Nothing is ever unpickled as an object, every tensor is accounted for, and whatever is
missing, extra, of a wrong shape or not finite is refused by name (AdapterError). In memory all tensors are float32.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ming_app.errors import AdapterError
from ming_app.molora.config import PROJECTIONS, MoLoRAConfig
from ming_app.reading import read_bounded

SCHEMA = 1
MAX_CONFIG_BYTES = 1 << 20
MAX_ADAPTER_BYTES = 8 << 30
MAX_LAYERS = 1024
NEVER = -1e4  # router bias of an expert that must not be picked: far below any logit, and finite in half precision
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class ProjectionWeights(NamedTuple):
    """The MoLoRA of one FFN linear, float32."""

    A: np.ndarray
    """[E, r, in]"""
    B: np.ndarray
    """[E, out, r]"""
    router_weight: np.ndarray
    """[E, in]"""
    router_bias: np.ndarray
    """[E]"""
    shared_A: np.ndarray | None
    """[r n, in]"""
    shared_B: np.ndarray | None
    """[out, r n]"""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One complete adapter in memory. `tensors` maps the native names above to float32 arrays."""

    config: MoLoRAConfig
    num_layers: int
    tensors: Mapping[str, np.ndarray]
    base_fingerprint: str = ""
    """SHA-256 of the base it was trained on; "" when the layout does not say (official)"""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """training summary: sources, tokens, measured figures"""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 hex over configuration and tensors (names, shapes, bfloat16 values), whatever file they came from."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name in sorted(self.tensors):
            array = self.tensors[name]
            digest.update(f"{name}{array.shape}".encode())
            digest.update(array.astype(ml_dtypes.bfloat16).tobytes())
        return digest.hexdigest()

    def padded(self) -> Adapter:
        """The same function with as many experts in every layer: those added are zero and no router ever picks them.
        Backends, traces and the official layout know one E only. An adapter whose layers are alike is returned as it is."""
        if not self.config.experts_per_layer:
            return self
        tensors = dict(self.tensors)
        for name, array in self.tensors.items():
            if ".mlp." in name and ".shared." not in name and len(array) < self.config.num_experts:
                more = ((0, self.config.num_experts - len(array)), *[(0, 0)] * (array.ndim - 1))
                tensors[name] = np.pad(array, more, constant_values=NEVER if name.endswith(".router.bias") else 0.0)
        return replace(self, config=self.config.padded(), tensors=tensors)

    def projection(self, layer: int, name: str) -> ProjectionWeights:
        """Experts and router of one FFN linear; `name` is gate, up or down."""
        parts = ("A", "B", "router.weight", "router.bias")
        a, b, weight, bias = (self.tensors[projection_key(layer, name, part)] for part in parts)
        shared = (self.tensors.get(projection_key(layer, name, part)) for part in ("shared.A", "shared.B"))
        return ProjectionWeights(a, b, weight, bias, *shared)

    def attention(self, layer: int, target: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(A [r, in], B [out, r]) of one attention linear; its delta is config.scale * B @ A. None when it has none."""
        if target not in self.config.attention_targets:
            return None
        return self.tensors[attention_key(layer, target, "A")], self.tensors[attention_key(layer, target, "B")]


def projection_key(layer: int, projection: str, part: str) -> str:
    """Native tensor name of an FFN part: A, B, router.weight, router.bias, shared.A, shared.B."""
    return f"layers.{layer}.mlp.{projection}.{part}"


def attention_key(layer: int, target: str, part: str) -> str:
    """Native tensor name of an attention LoRA matrix: A or B."""
    return f"layers.{layer}.attention.{target}.{part}"


def load_adapter(
    folder: str | os.PathLike[str],
    *,
    base_fingerprint: str | None = None,
    base_config: Mapping[str, Any] | None = None,
) -> Adapter:
    """Reads a native or official adapter folder.

    `base_fingerprint`: SHA-256 of the base it will run on; a native adapter made for another base is refused.
    `base_config`: the base's config.json, against which layer count and shapes are checked.
    Raises AdapterError, naming what is wrong.
    """
    folder = Path(folder)
    if (folder / "adapter.safetensors").is_file():
        adapter = _load_native(folder)
    elif (folder / "adapter_config.json").is_file() or (folder / "non_lora_trainables.bin").is_file():
        from ming_app.molora.official import load_official

        adapter = load_official(folder)
    else:
        raise AdapterError(
            f"{folder} is not an adapter: neither adapter.safetensors (native) nor adapter_config.json (official MING layout) is there.",
            f"{folder} 不是适配器文件夹：既没有 adapter.safetensors（本项目格式），也没有 adapter_config.json（MING 官方格式）。",
        )
    if base_fingerprint and adapter.base_fingerprint and adapter.base_fingerprint != base_fingerprint:
        raise AdapterError(
            f"This adapter was made for another base: it names base {adapter.base_fingerprint[:16]}…, the base here is "
            f"{base_fingerprint[:16]}…. Use the adapter that belongs to this base.",
            f"该适配器属于另一个基座：它对应基座 {adapter.base_fingerprint[:16]}…，而当前基座是 {base_fingerprint[:16]}…。"
            "请使用与该基座配套的适配器。",
        )
    check_tensors(adapter, base_config)
    return adapter


def save_adapter(folder: str | os.PathLike[str], adapter: Adapter, dtype: str = "bfloat16") -> Path:
    """Writes the native format. A new folder appears whole or not at all; in an existing one (a model card may live
    there) each file is replaced in one step, config.json last. `dtype`: bfloat16 or float32. Raises AdapterError."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    check_tensors(adapter, None)
    target = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype]
    config = {
        "format": "ming-molora",
        "schema": SCHEMA,
        "molora": adapter.config.to_dict(),
        "num_layers": adapter.num_layers,
        "base_fingerprint": adapter.base_fingerprint,
        "training": dict(adapter.summary),
    }
    with staged_folder(folder, ("adapter.safetensors", "config.json")) as staging:
        arrays = {name: np.ascontiguousarray(array.astype(target)) for name, array in sorted(adapter.tensors.items())}
        save_file(arrays, staging / "adapter.safetensors")
        (staging / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


@contextmanager
def staged_folder(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A temporary folder beside `folder` to write the files `names` into. At the end a new `folder` appears whole or not at
    all; in an existing one each file is replaced in one step, in the order of `names`. Raises AdapterError."""
    staging: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield staging
        if folder.exists():
            for name in names:
                os.replace(staging / name, folder / name)
        else:
            staging.chmod(0o755)
            os.replace(staging, folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise AdapterError(
            f"The adapter could not be written to {folder}: {reason}.", f"无法将适配器写入 {folder}：{reason}。"
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def check_tensors(adapter: Adapter, base_config: Mapping[str, Any] | None) -> None:
    """Raises AdapterError unless `tensors` are exactly those the configuration asks for: names, shapes, finite values.

    With `base_config` (HF config.json) the shapes must be the base's; without, the layers must agree with each other.
    """
    expected = expected_shapes(adapter, base_config)
    refuse_names("missing", sorted(set(expected) - set(adapter.tensors)))
    refuse_names("extra", sorted(set(adapter.tensors) - set(expected)))
    for name, shape in expected.items():
        array = adapter.tensors[name]
        if array.shape != shape:
            raise AdapterError(
                f"Adapter tensor {name} has shape {array.shape}, it should be {shape}.",
                f"适配器张量 {name} 的形状是 {array.shape}，应为 {shape}。",
            )
        if not np.isfinite(array).all():
            raise AdapterError(
                f"Adapter tensor {name} holds values that are not finite (NaN or infinity).",
                f"适配器张量 {name} 含有非有限值（NaN 或无穷）。",
            )


def expected_shapes(adapter: Adapter, base_config: Mapping[str, Any] | None) -> dict[str, tuple[int, ...]]:
    """Native name -> shape of every tensor a complete adapter of this configuration has."""
    c = adapter.config
    if base_config is not None:
        layers = int(base_config["num_hidden_layers"])
        if adapter.num_layers != layers:
            raise AdapterError(
                f"The adapter has {adapter.num_layers} layers, the base has {layers}: it was made for another base.",
                f"适配器有 {adapter.num_layers} 层，而基座有 {layers} 层：它属于另一个基座。",
            )
        widths = _widths_of_base(base_config)
    else:
        widths = _widths_of_tensors(adapter)
    shapes: dict[str, tuple[int, ...]] = {}
    shared = c.num_shared_experts * c.rank
    for layer in range(adapter.num_layers):
        experts = c.at(layer, adapter.num_layers).num_experts
        for projection in PROJECTIONS:
            n_in, n_out = widths[projection]
            parts: dict[str, tuple[int, ...]] = {
                "A": (experts, c.rank, n_in),
                "B": (experts, n_out, c.rank),
                "router.weight": (experts, n_in),
                "router.bias": (experts,),
            }
            if shared:
                parts |= {"shared.A": (shared, n_in), "shared.B": (n_out, shared)}
            shapes |= {projection_key(layer, projection, part): shape for part, shape in parts.items()}
        for target in c.attention_targets:
            n_in, n_out = widths[target]
            shapes[attention_key(layer, target, "A")] = (c.rank, n_in)
            shapes[attention_key(layer, target, "B")] = (n_out, c.rank)
    return shapes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an untrusted file of bounded size. Raises AdapterError."""
    try:
        value = json.loads(read_bounded(path, MAX_CONFIG_BYTES).decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path.name} cannot be read: {error}.", f"无法读取 {path.name}：{error}。") from error
    return value


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file as float32. Raises AdapterError for damage, size or an unexpected dtype."""
    from safetensors import SafetensorError, deserialize

    try:
        tensors = {}
        for name, view in deserialize(read_bounded(path, MAX_ADAPTER_BYTES)):
            if view["dtype"] not in _DTYPES:
                raise ValueError(f"tensor {name} has dtype {view['dtype']}, expected {', '.join(_DTYPES)}")
            array = np.frombuffer(view["data"], _DTYPES[view["dtype"]]).reshape(view["shape"])
            tensors[name] = array.astype(np.float32)
        return tensors
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(
            f"{path.name} is damaged or not an adapter: {error}.", f"{path.name} 已损坏或不是适配器文件：{error}。"
        ) from error


def refuse_names(kind: str, names: list[str]) -> None:
    """Raises AdapterError that lists `names` as "missing" or "extra" keys; does nothing for an empty list."""
    if not names:
        return
    shown = ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "")
    what_zh = "缺少张量" if kind == "missing" else "含有多余的张量"
    raise AdapterError(f"The adapter has {kind} tensors: {shown}.", f"适配器{what_zh}：{shown}。")


def _load_native(folder: Path) -> Adapter:
    config = read_json(folder / "config.json")
    if config.get("format") != "ming-molora" or config.get("schema") != SCHEMA:
        raise AdapterError(
            f"config.json says format {config.get('format')!r}, schema {config.get('schema')!r}; this program reads ming-molora, schema {SCHEMA}.",
            f"config.json 的格式为 {config.get('format')!r}、版本 {config.get('schema')!r}；本程序只支持 ming-molora 版本 {SCHEMA}。",
        )
    layers, molora, summary = config.get("num_layers"), config.get("molora"), config.get("training", {})
    fingerprint = config.get("base_fingerprint", "")
    if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS or not isinstance(molora, dict):
        raise AdapterError("config.json lacks num_layers or molora.", "config.json 缺少 num_layers 或 molora。")
    if not isinstance(summary, dict) or not isinstance(fingerprint, str):
        raise AdapterError(
            "config.json: training or base_fingerprint has the wrong type.",
            "config.json 中 training 或 base_fingerprint 类型错误。",
        )
    tensors = read_safetensors(folder / "adapter.safetensors")
    return Adapter(MoLoRAConfig.from_dict(molora), layers, tensors, fingerprint, summary)


def _widths_of_base(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """linear -> (in, out) of a base, from its config.json."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or hidden // heads)
    kv = int(config.get("num_key_value_heads") or heads) * head
    return {
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "down": (inner, hidden),
        "q_proj": (hidden, heads * head),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (heads * head, hidden),
    }


def _widths_of_tensors(adapter: Adapter) -> dict[str, tuple[int, int]]:
    """linear -> (in, out) as layer 0 has them; other layers are then held to these."""
    widths: dict[str, tuple[int, int]] = {}
    names = [(p, projection_key(0, p, "A"), projection_key(0, p, "B")) for p in PROJECTIONS]
    names += [(t, attention_key(0, t, "A"), attention_key(0, t, "B")) for t in adapter.config.attention_targets]
    for linear, a_name, b_name in names:
        refuse_names("missing", [name for name in (a_name, b_name) if name not in adapter.tensors])
        a, b = adapter.tensors[a_name], adapter.tensors[b_name]
        if a.ndim < 2 or b.ndim < 2:
            raise AdapterError(
                f"Adapter tensors of {linear} have the wrong rank.", f"适配器中 {linear} 的张量维数错误。"
            )
        widths[linear] = (a.shape[-1], b.shape[-2])
    return widths
