"""Runs a suite: loads what must be measured, one model at a time, base against adapter.

{"model", "base", "fingerprint", "adapter", "adapter_fingerprint", "precision",
 "exam" | "nlp" | "generation": {file: {"base": ..., "adapter": ...}}, "dev": {"base": ..., "adapter": ...}}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ming_app.console import Console
from ming_app.models.progress import Meter
from ming_app.settings import Settings
from training.base import Base, load_base
from training.chat import ChatTokenizer
from training.letters import LetterTask, Scorer, score_letters
from training.memory import FreedMemory
from training.recipe import Recipe
from training.served import Load, OneEngine
from training.suite import Suite, measure_exam, measure_generation, measure_nlp

BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True)
class Plan:
    """What to measure on which model."""

    model: str
    adapter: str | None
    """folder, "none", or None: the one that belongs to the model"""
    suite: Suite
    recipe: Recipe | None = None
    limit: int = 0
    precision: str | None = None
    """of the engine; None: exams on the training form as in training, answers in the engine's usual precision"""
    with_base: bool = True


def evaluate(plan: Plan, console: Console, load: Load = OneEngine) -> dict[str, Any]:
    """Measures everything; `load` gives the engine that serves. Raises MingError for whatever stands in the way."""
    from ming_app.models.catalog import find_model
    from ming_app.models.fetch import fetch
    from ming_app.molora.checkpoint import load_adapter

    suite = _limited(plan.suite, plan.limit)
    local = fetch(find_model(plan.model), Settings.load({"adapter": plan.adapter}), console.progress)
    kinds = [BASE] if plan.with_base or local.adapter is None else []
    kinds += [ADAPTER] if local.adapter is not None else []
    result: dict[str, Any] = {
        "model": plan.model,
        "base": local.title,
        "fingerprint": local.fingerprint,
        "adapter": str(local.adapter) if local.adapter else None,
        "adapter_fingerprint": load_adapter(local.adapter).fingerprint if local.adapter else None,
        "precision": {},
        "exam": {},
        "dev": {},
        "nlp": {},
        "generation": {},
    }
    if plan.recipe or (suite.exam and not plan.precision):
        _training_form(plan, suite, local.adapter, kinds, result, console)
    if suite.nlp or suite.generation or (suite.exam and plan.precision):
        tokenizer = ChatTokenizer.from_folder(local.home)
        for kind in kinds:
            _served(plan, suite, kind, local.adapter, tokenizer, result, console, load)
    return result


def _training_form(
    plan: Plan, suite: Suite, folder: Path | None, kinds: list[str], result: dict[str, Any], console: Console
) -> None:
    """Exams and held-out loss as in training: transformers' model, attention LoRA unmerged."""
    from ming_app.molora.checkpoint import load_adapter
    from ming_app.molora.inject import inject_molora, load_into
    from training.evaluate import dev_loss, dev_report
    from training.mix import Mix
    from training.step import Objective

    device, precision, packing = ("auto", "auto", True)
    if plan.recipe:
        device, precision, packing = plan.recipe.device, plan.recipe.precision, plan.recipe.data.packing
    base: Base = load_base(plan.model, device, precision, console.progress, packing=packing)
    if base.device.type == "cpu":
        FreedMemory()
    adapter = folder and load_adapter(folder, base_fingerprint=base.fingerprint, base_config=base.config)
    held_out = Mix(plan.recipe, base.tokenizer).held_out() if plan.recipe else {}
    samples = {name: rows for name, rows in held_out.items() if rows}
    exams = () if plan.precision else suite.exam
    result["precision"] |= dict.fromkeys(
        [*(["loss"] if plan.recipe else []), *(["exam"] if exams else [])], base.precision
    )
    scorer = partial(_scored, console, partial(score_letters, base.model))
    for kind in kinds:
        state, top_k = None, 1
        if kind == ADAPTER and adapter:
            injected = inject_molora(base.model, adapter.config)
            load_into(injected, adapter)
            state, top_k = injected.state, adapter.config.top_k
        if samples:
            console.note(f"Measuring the loss of the {kind}.", f"正在测量损失：{kind}。")
            objective = Objective(base.model, state, top_k, by_sample=state is not None)
            if kind == ADAPTER and adapter:
                report = dev_report(objective, samples, adapter.config, packing=packing)
                report["load"] = {name: load.tolist() for name, load in report["load"].items()}
            else:
                report = {"loss": dev_loss(objective, samples, packing=packing)}
            result["dev"][kind] = report
        _exams(suite, exams, kind, scorer, base.tokenizer, result, console)


def _served(
    plan: Plan,
    suite: Suite,
    kind: str,
    folder: Path | None,
    tokenizer: ChatTokenizer,
    result: dict[str, Any],
    console: Console,
    load: Load,
) -> None:
    """Answers, and exams when a precision was asked for, by the engine that serves."""
    adapter = str(folder) if kind == ADAPTER and folder else "none"
    settings = Settings.load({"model": plan.model, "adapter": adapter, "precision": plan.precision})
    served = load(settings, console.progress)
    try:
        if plan.precision:
            scorer = partial(_scored, console, served.letters)
            _exams(suite, suite.exam, kind, scorer, tokenizer, result, console)
        parts: list[tuple[str, Any, Callable[..., Any]]] = [("nlp", part, measure_nlp) for part in suite.nlp]
        parts += [("generation", part, measure_generation) for part in suite.generation]
        for name, part, measure in parts:
            console.note(f"Answers of the {kind} to {part.file}.", f"正在生成回答：{kind}，{part.file}。")
            figures = measure(suite, part, served.answers, tokenizer, _tick(console))
            result[name].setdefault(_label(part, getattr(suite, name)), {})[kind] = figures
        result["precision"] |= dict.fromkeys(["answers", *(["exam"] if plan.precision else [])], served.precision)
    finally:
        served.close()


def _exams(
    suite: Suite,
    exams: tuple[Any, ...],
    kind: str,
    scorer: Scorer,
    tokenizer: ChatTokenizer,
    result: dict[str, Any],
    console: Console,
) -> None:
    for exam in exams:
        name = _label(exam, exams)
        console.note(f"Measuring the {kind} on {name}.", f"正在用 {name} 评测 {kind}。")
        result["exam"].setdefault(name, {})[kind] = measure_exam(suite, exam, scorer, tokenizer)


def _label(part: Any, parts: Sequence[Any]) -> str:
    """The file's name, or its path as the suite writes it where another file of the same kind has that name."""
    name = Path(part.file).name
    return name if sum(Path(other.file).name == name for other in parts) == 1 else str(part.file)


def _scored(console: Console, scorer: Callable[..., list[np.ndarray]], tasks: list[LetterTask]) -> list[np.ndarray]:
    return scorer(tasks, tick=_tick(console))


def _tick(console: Console) -> Callable[[int, int], None]:
    meter: Meter | None = None

    def tick(done: int, total: int) -> None:
        nonlocal meter
        meter = meter or Meter(console.progress, "measure", total, "steps")
        meter.update(done)

    return tick


def _limited(suite: Suite, limit: int) -> Suite:
    if not limit:
        return suite
    return replace(
        suite,
        exam=tuple(replace(part, limit=limit) for part in suite.exam),
        nlp=tuple(replace(part, limit=limit) for part in suite.nlp),
        generation=tuple(replace(part, limit=limit) for part in suite.generation),
    )
