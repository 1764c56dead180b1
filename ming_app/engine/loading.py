"""Settings -> Engine: find the model, fetch it, check that it fits, build what is not built yet, open the backend.

On a CPU our own engine serves (torch is not even imported); with a CUDA GPU the torch backend. Overridable by
`settings.backend`, `settings.precision` and `settings.device`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ming_app.engine.engine import Engine
from ming_app.engine.prompt import ChatTokenizer
from ming_app.engine.types import Backend, EngineInfo
from ming_app.errors import UsageError, WeightsError
from ming_app.models.base_config import read_base_config
from ming_app.models.catalog import Model, find_model
from ming_app.models.fetch import LocalModel, fetch
from ming_app.models.preflight import preflight
from ming_app.models.progress import ProgressCallback
from ming_app.models.store import Store
from ming_app.molora.checkpoint import Adapter, load_adapter
from ming_app.molora.config import MoLoRAConfig
from ming_app.settings import Settings

CPU_PRECISIONS = ("4bit", "mix", "8bit")
TORCH_PRECISIONS = ("float32", "bf16", "nf4", "int8")


def load_engine(settings: Settings, progress: ProgressCallback | None = None) -> Engine:
    """See `Engine.load`. Raises MingError."""
    model = find_model(settings.model)
    backend_name, precision, device = choose_backend(settings, model)
    if model.shape:  # a model that cannot fit is refused before anything is downloaded
        preflight(model.shape, backend_name, precision, settings, device=device, built=True)
    local = fetch(model, settings, progress)
    base_config = read_base_config(local.home)
    adapter = None
    if local.adapter is not None:
        adapter = load_adapter(local.adapter, base_fingerprint=local.fingerprint, base_config=base_config).padded()
    folder = engine_folder(settings, local, adapter, precision) if backend_name == "cpu" else None
    built = folder is None or folder.is_dir()
    molora = adapter.config if adapter else None
    need = preflight(base_config, backend_name, precision, settings, molora, device=device, built=built)
    backend: Backend
    if folder is not None:
        backend = _open_cpu(folder, local, adapter, precision, settings, progress)
    else:
        from ming_app.engine.backends.torch import TorchBackend
        from ming_app.models.load import load_torch_model

        model_ready = load_torch_model(local, adapter, precision, device, progress)
        backend = TorchBackend(model_ready, settings.context, settings.threads)
    engine = Engine(
        backend,
        ChatTokenizer.from_folder(local.home),
        _info(local, adapter, backend),
        local.adapter,
        slots=settings.streams,
        kv_tokens=need.kv_tokens,
        max_waiting=settings.max_queue,
        per_visitor=settings.per_visitor,
    )
    if settings.zerogpu and device == "cuda":
        from ming_app.engine.zerogpu import ZeroEngine, import_spaces

        return ZeroEngine(engine, import_spaces().GPU)
    return engine


def choose_backend(settings: Settings, model: Model) -> tuple[str, str, str]:
    """(backend, precision, device) for this machine and these settings. Raises UsageError for a contradiction."""
    precision, device = settings.precision, settings.device
    has_cuda = (
        settings.zerogpu or _has_cuda()
    )  # on ZeroGPU the workers have one; this process only places the model on it
    if device == "cuda" and not has_cuda:
        raise UsageError(
            "Device cuda was asked for, but torch sees no GPU here. Use device auto or cpu.",
            "指定了 cuda 设备，但 torch 未检测到 GPU。请改用 auto 或 cpu。",
        )
    if device == "auto":
        wants_cpu = settings.backend == "cpu" or precision in CPU_PRECISIONS
        device = "cpu" if wants_cpu or not has_cuda else "cuda"
    backend = settings.backend
    if backend == "auto":
        backend = "torch" if precision in TORCH_PRECISIONS or device == "cuda" else "cpu"
    if precision == "auto":
        precision = (
            model.cpu_precision if backend == "cpu" else ("bf16" if device == "cpu" or settings.zerogpu else "nf4")
        )
    allowed = CPU_PRECISIONS if backend == "cpu" else TORCH_PRECISIONS
    if precision not in allowed:
        raise UsageError(
            f"The {backend} backend offers {', '.join(allowed)}, not {precision}.",
            f"{backend} 后端支持 {'、'.join(allowed)}，不支持 {precision}。",
        )
    if backend == "cpu" and device != "cpu":
        raise UsageError(
            "The cpu backend runs on the CPU; use the torch backend on a GPU.",
            "cpu 后端只在 CPU 上运行；GPU 请使用 torch 后端。",
        )
    return backend, precision, device


def engine_folder(settings: Settings, local: LocalModel, adapter: Adapter | None, recipe: str) -> Path:
    """Where the built engine of this base, adapter and recipe lies in the cache, built or not."""
    from ming_app.engine.backends.native.spec import engine_key

    key = engine_key(local.fingerprint, adapter.fingerprint if adapter else None, recipe)
    return settings.cache_dir.expanduser().absolute() / "engines" / key


def _open_cpu(
    folder: Path,
    local: LocalModel,
    adapter: Adapter | None,
    recipe: str,
    settings: Settings,
    progress: ProgressCallback | None,
) -> Backend:
    from ming_app.engine.backends.native import keep_kernels_in

    keep_kernels_in(settings.cache_dir)
    from ming_app.engine.backends.native.backend import NativeBackend
    from ming_app.engine.backends.native.build import build_engine
    from ming_app.models.tensors import open_tensors

    def build() -> None:
        for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a build that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with open_tensors(local) as source:
            build_engine(source, adapter, recipe, folder, progress, base_fingerprint=local.fingerprint)

    with Store(settings.cache_dir.expanduser().absolute()).lock(f"engine-{folder.name}"):
        if not folder.is_dir():
            build()
        try:
            return NativeBackend.open(folder, settings.threads, settings.context, progress)
        except WeightsError:  # a build that a crash or a full disk damaged: what it was made from is still here
            build()
            return NativeBackend.open(folder, settings.threads, settings.context, progress)


def _info(local: LocalModel, adapter: Adapter | None, backend: Backend) -> EngineInfo:
    config: MoLoRAConfig | None = adapter.config if adapter else None
    return EngineInfo(
        model=local.name,
        title=local.title,
        backend=backend.name,
        precision=backend.precision,
        device=backend.device,
        num_layers=backend.num_layers,
        num_experts=config.num_experts if config else 0,
        top_k=config.top_k if config else 0,
        context_limit=backend.max_context,
        fingerprint="+".join([local.fingerprint, *([adapter.fingerprint] if adapter else [])]),
        adapter_config=config.to_dict() if config else {},
    )


def _has_cuda() -> bool:
    """Whether torch sees a CUDA device; torch is imported only where the driver's tool suggests there is one."""
    if not Path("/dev/nvidia0").exists() and shutil.which("nvidia-smi") is None:
        return False
    import torch

    return torch.cuda.is_available()
