"""What a built CPU engine is: the shape of its base, its recipe of precisions, its key and its manifest.

Needs numpy only. A build is a folder of these files:

    manifest.json       shapes, recipe, fingerprints, where things lie, sizes of the other files; written last
    weights.bin         the matrices in blocks and the float32 vectors, memory-mapped
    embeddings.npy      float16 [V, H], memory-mapped
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ming_app.errors import UsageError, WeightsError
from ming_app.models.recipes import RECIPES as RECIPES
from ming_app.models.recipes import Recipe
from ming_app.molora.config import MoLoRAConfig

FORMAT = 4
"""Version of the files; a change makes old builds unreachable, since it is part of `engine_key`."""
MANIFEST, WEIGHTS, EMBEDDINGS = "manifest.json", "weights.bin", "embeddings.npy"
MAX_MANIFEST_BYTES = 16 << 20
FAMILIES = ("qwen2", "llama", "mistral")
"""model_type of the decoders that it can run"""


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UsageError."""
    if name not in RECIPES:
        raise UsageError(
            f"{name!r} is not a precision of the CPU engine; choose one of {', '.join(RECIPES)}.",
            f"{name!r} 不是 CPU 引擎支持的精度；请从 {'、'.join(RECIPES)} 中选择。",
        )
    return RECIPES[name]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: `kind` default, linear or llama3, with that kind's numbers."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def tables(self, head_dim: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, float32 [positions, head_dim / 2]."""
        frequency = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            frequency = frequency / self.factor
        elif self.kind == "llama3":  # Llama 3.1: long wavelengths are stretched, short ones kept, a ramp between
            turns = self.original_context * frequency / (2 * math.pi)
            span = self.high_freq_factor - self.low_freq_factor
            keep = np.clip((turns - self.low_freq_factor) / span, 0, 1)
            frequency = keep * frequency + (1 - keep) * frequency / self.factor
        angles = np.arange(positions, dtype=np.float64)[:, None] * frequency
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@dataclass(frozen=True)
class BaseShape:
    """Sizes of a Qwen2-like or Llama-like decoder, in the names of the field."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    max_positions: int
    tied: bool
    rope: Rope = field(default_factory=Rope)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BaseShape:
        """From an HF config.json, of old (rope_theta) or new (rope_parameters) style. Raises WeightsError."""
        try:
            if config.get("model_type") not in FAMILIES:  # others differ in ways that tensor names do not show
                raise _unsupported(f"a base of type {config.get('model_type')!r}")
            if config.get("model_type") == "mistral" and config.get("sliding_window"):
                raise _unsupported("sliding-window attention")
            if config.get("hidden_act", "silu") not in ("silu", "swish"):
                raise _unsupported(f"activation {config['hidden_act']}")
            if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
                raise _unsupported("sliding-window attention")
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            head_dim = int(config.get("head_dim") or hidden // heads)
            if head_dim % 16:
                raise _unsupported(f"a head size of {head_dim} (it must be a multiple of 16)")
            return cls(
                layers=int(config["num_hidden_layers"]),
                hidden=hidden,
                ffn=int(config["intermediate_size"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=head_dim,
                vocab=int(config["vocab_size"]),
                norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                max_positions=int(config.get("max_position_embeddings", 2048)),
                tied=bool(config.get("tie_word_embeddings", False)),
                rope=_rope_from_config(config),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise WeightsError(
                f"The base's config.json lacks or garbles an entry the engine needs: {error}.",
                f"基座的 config.json 缺少或写错了引擎需要的条目：{error}。",
            ) from error


def _rope_from_config(config: Mapping[str, Any]) -> Rope:
    entries = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = entries.get("rope_type", entries.get("type", "default")) or "default"
    if kind not in ("default", "linear", "llama3"):
        raise _unsupported(f"rope scaling {kind!r}")
    if float(entries.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) or 1) != 1:
        raise _unsupported("partial rotary embeddings")
    return Rope(
        theta=float(entries.get("rope_theta", config.get("rope_theta", 10_000.0))),
        kind=kind,
        factor=float(entries.get("factor", 1.0)),
        low_freq_factor=float(entries.get("low_freq_factor", 1.0)),
        high_freq_factor=float(entries.get("high_freq_factor", 4.0)),
        original_context=int(entries.get("original_max_position_embeddings", 8192)),
    )


def _unsupported(what: str) -> WeightsError:
    return WeightsError(
        f"The CPU engine cannot run this base: {what} is not supported. Use the torch backend.",
        f"CPU 引擎无法运行该基座：不支持 {what}。请使用 torch 后端。",
    )


def engine_key(base_fingerprint: str, adapter_fingerprint: str | None, recipe: str) -> str:
    """Name of the cache folder of a build, 32 hex digits: changes with base, adapter, recipe and format."""
    parts = [FORMAT, base_fingerprint, adapter_fingerprint, recipe, asdict(find_recipe(recipe))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json."""

    recipe: str
    base: BaseShape
    molora: MoLoRAConfig | None
    """None for a bare base"""
    base_fingerprint: str
    adapter_fingerprint: str | None
    router_bias: list[list[list[float]]] | None
    """b_s of every router [L, P, E]; the backend adds it, with the request's own bias, outside the graph"""
    matrices: list[list[int]]
    """see `layout.Store`"""
    vectors: list[list[int]]
    files: dict[str, int]
    """name -> size in bytes of every other file of the build"""
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Writes manifest.json."""
        body = asdict(self)
        body["molora"] = self.molora.to_dict() if self.molora else None
        body["sha256"] = _digest(body)
        (folder / MANIFEST).write_text(json.dumps(body, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads manifest.json and checks that the build is whole and of this format. Raises WeightsError."""
        path = folder / MANIFEST
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise ValueError("manifest.json is too large")
            body = json.loads(path.read_text(encoding="utf-8"))
            if body.pop("sha256") != _digest(body):
                raise ValueError("manifest.json was altered")
            body["base"]["rope"] = Rope(**body["base"]["rope"])
            body["base"] = BaseShape(**body["base"])
            body["molora"] = MoLoRAConfig.from_dict(body["molora"]) if body["molora"] else None
            manifest = cls(**body)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(folder, str(error)) from error
        if manifest.format != FORMAT:
            raise damaged(folder, f"format {manifest.format}")
        for name, size in manifest.files.items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise damaged(folder, f"{name} is missing or has a wrong size")
        return manifest


def damaged(folder: Path, reason: str) -> WeightsError:
    """The error for a build that cannot be used; building it again is the cure."""
    return WeightsError(
        f"The built engine in {folder} is damaged or incomplete ({reason}). Delete the folder; it is built again on the next start.",
        f"{folder} 中的引擎文件已损坏或不完整（{reason}）。请删除该文件夹，下次启动时会重新构建。",
    )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
