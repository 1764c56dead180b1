"""Will it fit? Estimates of disk, memory and GPU memory, held against what this machine (or container) has free.

The estimate is arithmetic on config.json and needs no weights. `preflight` refuses in words, naming a precision or a
smaller model that would fit, before anything large is loaded. All sizes are in bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ming_app.errors import PreflightError
from ming_app.models.base_config import check_base_config
from ming_app.models.catalog import list_models
from ming_app.models.recipes import RECIPES, WEIGHT_BYTES
from ming_app.models.store import free_bytes, gigabytes
from ming_app.molora.config import MoLoRAConfig
from ming_app.settings import Settings

PRECISIONS = {"cpu": ("8bit", "mix", "4bit"), "torch": ("float32", "bf16", "int8", "nf4")}
"""From the most exact to the smallest."""

# torch: bytes per weight of (attention, gate and up, down, head). bitsandbytes adds the scales of its blocks; the head stays
# in the compute type. The CPU engine's follow from its recipes.
_TORCH_BYTES: Mapping[str, tuple[float, float, float, float]] = {
    "float32": (4, 4, 4, 4),
    "bf16": (2, 2, 2, 2),
    "int8": (1.01, 1.01, 1.01, 2),
    "nf4": (0.5625, 0.5625, 0.5625, 2),
}
_RUNTIME = {"cpu": 250_000_000, "torch": 700_000_000}  # interpreter and libraries once loaded, measured
_CUDA_CONTEXT = 800_000_000
_PREFILL = 512  # tokens that go through the model at once
_CONTEXTS = (4, 3, 2)  # how many the cache of all conversations may hold; one it must
TOLERANCE = 0.9  # an estimate is not a measurement: refuse only what is clearly too large


@dataclass(frozen=True)
class Estimate:
    """What serving needs, in bytes."""

    disk: int
    """files still to be written into the cache"""
    ram: int
    vram: int
    """0 on a CPU"""
    kv_tokens: int = 0
    """tokens of all conversations that the cache holds"""


@dataclass(frozen=True)
class Machine:
    """What is free, in bytes; None where it cannot be told."""

    disk: int | None
    ram: int | None
    vram: int | None = None


def estimate(
    config: Mapping[str, Any],
    backend: str,
    precision: str,
    kv_tokens: int,
    adapter: MoLoRAConfig | None = None,
    device: str = "cpu",
) -> Estimate:
    """Needs of a Qwen2-like or Llama-like base (config.json) with `adapter`, with a full cache of `kv_tokens`."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    layers, vocab, heads = config["num_hidden_layers"], config["vocab_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    narrow, wide = (config.get("num_key_value_heads") or heads) * head_dim, heads * head_dim
    attention, gate_up, down, head = _weight_bytes(backend, precision)
    exact = 4 if precision == "float32" else 2  # embeddings, and experts beside the base
    weights = layers * (2 * hidden * (wide + narrow) * attention + 2 * hidden * ffn * gate_up + hidden * ffn * down)
    embedding = vocab * hidden * exact
    if backend == "cpu" or not config.get("tie_word_embeddings"):  # the CPU engine keeps the head on its own
        weights += vocab * hidden * head
    experts = _adapter_parameters(adapter, layers, hidden, ffn) * exact if adapter else 0
    cache = 2 * layers * narrow * kv_tokens * (4 if precision == "float32" else 2)
    working = _PREFILL * (6 * ffn + 4 * hidden) * 4
    held = int(weights + embedding + experts)
    if device == "cuda":
        return Estimate(0, _RUNTIME["torch"] + held, held + cache + working + _CUDA_CONTEXT, kv_tokens)
    passing = vocab * hidden * 4 if backend == "torch" else 0  # the largest tensor, float32, on its way in
    disk = held if backend == "cpu" else 0
    return Estimate(disk, _RUNTIME[backend] + held + cache + working + passing, 0, kv_tokens)


def _weight_bytes(backend: str, precision: str) -> tuple[float, float, float, float]:
    """Bytes per weight of (attention, gate and up, down, head)."""
    if backend == "torch":
        return _TORCH_BYTES[precision]
    recipe = RECIPES[precision]
    wide = WEIGHT_BYTES
    return wide[recipe.attention], wide[recipe.gate_up], wide[recipe.down], wide[recipe.head]


def _adapter_parameters(adapter: MoLoRAConfig, layers: int, hidden: int, ffn: int) -> int:
    ranks = (adapter.num_experts + adapter.num_shared_experts) * adapter.rank
    per_layer = 3 * ranks * (hidden + ffn) + adapter.num_experts * (2 * hidden + ffn + 3)
    return layers * per_layer


def preflight(
    config: Mapping[str, Any],
    backend: str,
    precision: str,
    settings: Settings,
    adapter: MoLoRAConfig | None = None,
    *,
    device: str = "cpu",
    built: bool = False,
    machine: Machine | None = None,
) -> Estimate:
    """The estimate, if it fits. `built`: the engine's files are in the cache already, so no disk is needed. Where
    `settings.kv_tokens` leaves it open, the cache holds as many contexts as there is room for, at most four.

    Raises PreflightError that says what is needed, what is free, and what would fit; WeightsError for a config.json that
    is not a base's.
    """
    check_base_config(config)
    machine = machine or measure_machine(settings.cache_dir, device)
    context = min(settings.context, config.get("max_position_embeddings") or settings.context)

    def need(kv_tokens: int) -> Estimate:
        found = estimate(config, backend, precision, kv_tokens, adapter, device)
        return replace(found, disk=0) if built else found

    for contexts in () if settings.kv_tokens else _CONTEXTS:
        if not _shortage(need(contexts * context), machine, 1.0):
            return need(contexts * context)
    least = max(settings.kv_tokens, context)
    short = _shortage(need(least), machine)
    if short:
        raise _refusal(short, backend, precision, _alternatives(config, backend, least, adapter, device, machine))
    return need(least)


def _shortage(need: Estimate, machine: Machine, tolerance: float = TOLERANCE) -> tuple[str, str, int, int] | None:
    """(what in English, in Chinese, bytes needed, bytes free) of the first thing that is too small."""
    table = (
        ("disk space", "磁盘空间", need.disk, machine.disk, 1.0),
        ("memory", "内存", need.ram, machine.ram, tolerance),
        ("GPU memory", "显存", need.vram, machine.vram, tolerance),
    )
    for en, zh, wanted, there, share in table:
        if there is not None and wanted * share > there:
            return en, zh, wanted, there
    return None


def _alternatives(
    config: Mapping[str, Any],
    backend: str,
    kv_tokens: int,
    adapter: MoLoRAConfig | None,
    device: str,
    machine: Machine,
) -> list[str]:
    """What would fit: precisions of the same model first (the most exact two), then a smaller model of the catalogue."""
    backends = ["torch"] if device == "cuda" else [backend, *({"cpu", "torch"} - {backend})]
    fitting = []
    for kind in backends:
        for precision in PRECISIONS[kind]:
            need = estimate(config, kind, precision, kv_tokens, adapter, device)
            if not _shortage(need, machine):
                fitting.append(f"--backend {kind} --precision {precision} ({gigabytes(need.vram or need.ram)})")
    if fitting:
        return fitting[:2]
    for model in sorted(list_models(), key=lambda model: model.size, reverse=True):
        smallest = PRECISIONS[backend][-1]
        if model.shape and not _shortage(estimate(model.shape, backend, smallest, kv_tokens, adapter, device), machine):
            return [f"--model {model.name} --precision {smallest}"]
    return []


def _refusal(short: tuple[str, str, int, int], backend: str, precision: str, fitting: list[str]) -> PreflightError:
    en, zh, wanted, there = short
    fits_en = f"This would fit: {' or '.join(fitting)}." if fitting else "No model of the catalogue fits here."
    fits_zh = f"以下选择可以运行：{' 或 '.join(fitting)}。" if fitting else "目录中没有能在此运行的模型。"
    return PreflightError(
        f"The model in {precision} ({backend}) needs about {gigabytes(wanted)} of {en}, but {gigabytes(there)} is free. {fits_en}",
        f"以 {precision}（{backend}）运行该模型约需 {gigabytes(wanted)} {zh}，但只剩 {gigabytes(there)}。{fits_zh}",
    )


# ------------------------------------------------------------------------------------------ what the machine has


def measure_machine(cache_dir: Path, device: str = "cpu") -> Machine:
    """Free disk under the cache, memory that can be had without swapping (within the container's limit), GPU memory."""
    try:
        disk: int | None = free_bytes(cache_dir.expanduser().absolute())
    except OSError:
        disk = None
    return Machine(disk, available_memory(), _cuda_memory() if device == "cuda" else None)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can still take: the system's, or less in a container (cgroup v2 and v1)."""
    import psutil

    return min([psutil.virtual_memory().available, *_cgroup_rooms(root)])


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """Room left in every memory cgroup that this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            yield from _rooms_upwards(mount, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _rooms_upwards(mount / "memory", path, *names)


def _rooms_upwards(mount: Path, path: str, limit: str, usage: str, inactive: str) -> Iterator[int]:
    """A limit may stand at any level, and inside a container the path may be the host's: look at every ancestor."""
    folder = mount / path.lstrip("/")
    for level in (folder, *folder.parents):
        try:
            most, used = (level / limit).read_text().strip(), int((level / usage).read_text())
            pages = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
            if most != "max" and int(most) < 1 << 60:  # v1 writes a huge number for no limit
                yield max(0, int(most) - used + int(pages.get(inactive, 0)))
        except (OSError, ValueError):
            pass
        if level == mount:
            return


def _cuda_memory() -> int | None:
    """Free bytes of the current GPU, asked only where torch has been loaded for one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info()[0])
