"""The training loop: frozen base, AdamW on float32 adapter weights, one metrics line per step.

A run can be stopped at any moment: SIGTERM and SIGINT end it after the step in hand with a checkpoint, and `resume`
continues with the same losses as if it had never stopped. A loss that is not finite stops the run and leaves the last
good checkpoint in place.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ming_app.molora.checkpoint import Adapter, save_adapter
from ming_app.molora.inject import InjectedModel, extract, inject_molora
from training.base import Base, set_training
from training.errors import DataError, TrainingError, not_written
from training.evaluate import dev_report
from training.export import run_summary
from training.files import write_text
from training.losses import dead_experts
from training.memory import FreedMemory
from training.mix import Mix
from training.packing import Batch
from training.processes import Processes, make_accelerator, whole
from training.recipe import Recipe
from training.schedule import ActiveClock, Progress, learning_rate
from training.start import upcycle, warm_start
from training.state import RunState, checkpoints, load_state, save_state
from training.step import Objective

ROUTERS_EVERY = 10  # steps between records of the routers (tables of layers x projections x experts)
MEMORY = 0.95  # weight of the past in the running mean that a loss is held against
SETTLED = 20  # steps before that mean means something

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `status` is finished or interrupted; `adapter` is set when finished."""

    status: str
    run: Path
    progress: Progress
    adapter: Path | None
    last: dict[str, Any] = field(default_factory=dict)
    """the last step's metrics"""


class Trainer:
    """One run. Make it, then call `run()` once."""

    def __init__(
        self,
        recipe: Recipe,
        base: Base,
        run: Path,
        *,
        resume: bool = False,
        report: Report | None = None,
        processes: Processes | None = None,
    ):
        """Raises TrainingError when `run` holds checkpoints already and `resume` is not asked for, or when `resume` finds
        none or another recipe's."""
        if checkpoints(run) and not resume:
            raise TrainingError(
                f"{run} holds a run already. Continue it with --resume, or choose another folder with --run.",
                f"{run} 中已有训练记录。请用 --resume 继续，或用 --run 指定其他文件夹。",
            )
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.recipe, self.base, self.folder, self.report = recipe, base, run, report
        self.processes = processes or Processes(make_accelerator(base.device.type, recipe.save.trackers, str(run)))
        torch.manual_seed(recipe.seed)
        self.mix = Mix(recipe, base.tokenizer)
        self._held_out = {name: rows for name, rows in self.mix.held_out().items() if rows}
        unmeasured = [name for name in recipe.save.best_by if name not in self._held_out]
        if unmeasured:
            raise DataError(
                f"save.best_by names streams without a held-out row that is short enough: {', '.join(unmeasured)}.",
                f"save.best_by 中的数据流没有可用的留出数据：{'、'.join(unmeasured)}。",
            )
        self.injected: InjectedModel = inject_molora(base.model, recipe.adapter)
        if not resume:
            self._start()
        if recipe.gradient_checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
        o = recipe.optimizer
        self.objective, self.optimizer = self.processes.prepare(
            Objective(base.model, self.injected.state, recipe.adapter.top_k),
            torch.optim.AdamW(
                self.injected.adapter_parameters(), lr=o.lr, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay
            ),
        )
        self.parameters = self.injected.adapter_parameters()  # again: sharding puts others in their places
        self.progress = Progress()
        self.best: float | None = None
        if resume:
            self._resume()
        self._stop = False
        self._memory = FreedMemory() if base.device.type == "cpu" else None
        self._last_save = self._last_eval = self.progress.active_seconds
        self._records: list[tuple[Tensor, Tensor]] = []
        self._evaluated = -1  # step of the last dev evaluation
        self._usual = 0.0  # running mean of the loss, for `explosion`

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Trains until the budget is used up or a signal arrives."""
        if self.processes.main:
            write_text(self.folder / "recipe.json", json.dumps(self.recipe.to_dict(), indent=1, ensure_ascii=False))
        about = {
            "processes": self.processes.count,
            "device": self.base.device.type,
            "threads": torch.get_num_threads(),
            "precision": self.base.precision,
            "mix": self.mix.summary(),
        }
        self._log({"event": "start", **about, **self.progress.to_dict()})
        if self.recipe.save.trackers:
            self.processes.accelerator.init_trackers(self.recipe.name)
        clock = ActiveClock(self.base.device)
        batches = self.mix.batches(self.progress.block, self.progress.batch)
        last: dict[str, Any] = {}
        stopped = False
        set_training(self.base.model, True)  # LoRA dropout acts
        with self._signals():
            while not stopped and self.progress.share(self.recipe.budget) < 1:
                last = self._step(batches, clock)
                stopped = self.processes.any(self._stop)  # one that was told to stop stops all
                self._between_steps(clock)
        self._checkpoint()
        if stopped:
            self._log({"event": "interrupted", **self.progress.to_dict()})
            return Outcome("interrupted", self.folder, self.progress, None, last)
        if self._evaluated != self.progress.step:
            self._evaluate()
            self._checkpoint()  # it knows the best loss: the run may be gone on with
        folder = self.folder / "adapter"
        adapter = self.adapter()
        if self.processes.main:
            save_adapter(folder, adapter)
        self._log({"event": "finished", **self.progress.to_dict()})
        if self.recipe.save.trackers:
            self.processes.accelerator.end_training()
        return Outcome("finished", self.folder, self.progress, folder, last)

    def _step(self, batches: Iterator[tuple[int, int, Batch]], clock: ActiveClock) -> dict[str, Any]:
        began, p = time.monotonic(), self.progress
        taken = [next(batches) for _ in range(self.recipe.budget.accumulate)]
        lr = learning_rate(self.recipe.optimizer, p.share(self.recipe.budget))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums = self._accumulate([batch for _, _, batch in taken])
        norm = self.processes.clip(self.parameters, self.recipe.optimizer.clip)
        self._refuse_bad_numbers(sums["loss"], norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(batch.tokens for _, _, batch in taken)
        p.step += 1
        p.tokens += tokens
        p.rows += sum(len(batch.samples) for _, _, batch in taken)
        p.loss_tokens += sum(len(batch.targets) for _, _, batch in taken)
        p.block, p.batch = taken[-1][0], taken[-1][1] + 1
        active = torch.tensor([clock.lap() / self.processes.count], dtype=torch.float64)
        wall = time.monotonic() - began
        p.active_seconds += float(self.processes.sum(active))  # their mean: all must agree on how far the run is
        p.wall_seconds += wall
        metrics = {
            "step": p.step,
            **sums,
            "lr": lr,
            "gradient": norm,
            "tokens": p.tokens,
            "tokens_per_second": tokens / wall,
            "share": p.share(self.recipe.budget),
            "active_seconds": p.active_seconds,
        }
        if p.step % ROUTERS_EVERY == 0:
            metrics |= self._routers()
        self._log(metrics)
        if self.recipe.save.trackers:
            numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            self.processes.accelerator.log(numbers, step=p.step)
        if self.report and self.processes.main:
            self.report({**metrics, "seconds_left": p.seconds_left(self.recipe.budget)})
        return metrics

    def _accumulate(self, batches: list[Batch]) -> dict[str, Any]:
        """Forward and backward of one step's micro-batches; tokens the loss looks at weigh as their streams say."""
        weight = max(sum(float(batch.weights.sum()) for batch in batches), 1e-9)
        read = sum(int(batch.real.sum()) for batch in batches)
        coefficients = self.recipe.router
        sums = torch.zeros(4, dtype=torch.float64)
        mine = self.processes.share(batches)
        for i, batch in enumerate(mine):
            share = int(batch.real.sum()) / read
            with self.processes.gradients(self.objective, last=i == len(mine) - 1):
                terms = self.objective(batch)
                loss, router = terms.loss / weight, terms.router
                self.processes.backward(
                    loss + share * (coefficients.balance * router.balance + coefficients.z * router.z)
                )
            entropy = router.entropy.mean()
            sums += torch.stack([loss, share * router.balance, share * router.z, share * entropy]).detach().cpu()
            self._records.append((router.load.cpu(), router.entropy.cpu()))
        return dict(zip(("loss", "balance", "z", "router_entropy"), self.processes.sum(sums).tolist(), strict=True))

    def _refuse_bad_numbers(self, loss: float, norm: float) -> None:
        """Raises TrainingError for a loss or gradient that is not finite, or a loss far above what it was."""
        step, explosion = self.progress.step + 1, self.recipe.optimizer.explosion
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and not (explosion and step > SETTLED and self._usual and loss > explosion * self._usual):
            self._usual = loss if not self._usual else MEMORY * self._usual + (1 - MEMORY) * loss
            return
        event = "exploded" if finite else "not finite"
        self._log({"event": event, "step": step, "loss": str(loss), "gradient": str(norm), "usual": self._usual})
        raise TrainingError(
            f"Step {step} gave loss {loss:.4g} and gradient norm {norm:.4g} (loss before: {self._usual:.4g}). The run was stopped; the "
            "last good checkpoint is kept. Lower the learning rate, then train anew in another run folder.",
            f"第 {step} 步的损失为 {loss:.4g}、梯度范数为 {norm:.4g}（此前损失约 {self._usual:.4g}），训练已停止；最近一次正常的检查点已保留。"
            "请降低学习率后，在新的文件夹中重新训练。",
        )

    def _routers(self) -> dict[str, Any]:
        """Load of every expert and entropy of every router since the last record, this process's micro-batches."""
        load, entropy = (torch.stack(tables).mean(0) for tables in zip(*self._records, strict=True))
        self._records.clear()
        return {
            "expert_load": _rounded(load),
            "entropy_by_layer": _rounded(entropy),
            "dead_experts": dead_experts(load, self.recipe.adapter),
        }

    def _between_steps(self, clock: ActiveClock) -> None:
        save, now, step = self.recipe.save, self.progress.active_seconds, self.progress.step
        due = save.every_minutes and now - self._last_save >= 60 * save.every_minutes
        if due or (save.every_steps and step % save.every_steps == 0):
            self._checkpoint()
        if save.eval_every_minutes and now - self._last_eval >= 60 * save.eval_every_minutes:
            self._evaluate()
        if self._memory:
            self._memory.after_step()
        clock.lap()  # saving and measuring are not training

    # -- checkpoints, measurements ---------------------------------------------------------------------------------------

    def adapter(self) -> Adapter:
        """The adapter as it is now, with a summary of the run so far. Every process must ask."""
        summary = run_summary(self.mix, self.folder, self.progress.to_dict()) if self.processes.main else {}
        return extract(self.injected, base_fingerprint=self.base.fingerprint, summary=summary, whole=whole)

    def _start(self) -> None:
        start, base = self.recipe.start, self.base
        about: Any = {"base_fingerprint": base.fingerprint, "base_config": base.config}
        if start.adapter:
            warm_start(self.injected, self.recipe.path(start.adapter), **about)
        if start.lora:
            upcycle(self.injected, self.recipe.path(start.lora), **about)

    def _checkpoint(self) -> None:
        state = RunState(self.progress, self.recipe.identity(), self.base.fingerprint, self.best)
        path = save_state(self.folder, self.parameters, self.optimizer, state, write=self.processes.main)
        self._last_save = self.progress.active_seconds
        self._log({"event": "checkpoint", "path": path.name})

    def _resume(self) -> None:
        state = load_state(self.folder, self.parameters, self.optimizer)
        if state.recipe_identity != self.recipe.identity() or state.base_fingerprint != self.base.fingerprint:
            raise TrainingError(
                f"The run in {self.folder} was started with another recipe or base; only budget limits, saving, explosion, device, threads "
                "and gradient checkpointing may change. Start anew with another --run folder.",
                f"{self.folder} 中的训练使用的是另一份配方或另一个基座；续训时只能修改预算上限、保存、explosion、设备、线程和梯度检查点。"
                "请换一个 --run 文件夹重新开始。",
            )
        self.progress, self.best = state.progress, state.best

    def _evaluate(self) -> None:
        """Dev loss and expert load of every stream that has held-out rows; the adapter with the best mean loss is kept in
        `best`."""
        self._last_eval, self._evaluated = self.progress.active_seconds, self.progress.step
        if not self._held_out:
            return
        rng = torch.get_rng_state()
        set_training(self.base.model, False)
        batch_tokens, packing = self.recipe.budget.batch_tokens, self.recipe.data.packing
        report = dev_report(self.objective, self._held_out, self.recipe.adapter, batch_tokens, packing=packing)
        set_training(self.base.model, True)
        torch.set_rng_state(rng)
        names = self.recipe.save.best_by or tuple(report["loss"])
        score = sum(report["loss"][name] for name in names) / len(names)
        better = self.best is None or score < self.best
        loads = {name: _rounded(load) for name, load in report["load"].items()}
        about = {"dev_loss": report["loss"], "load": loads, "dead_experts": report["dead_experts"]}
        self._log({"event": "dev", "step": self.progress.step, **about, "score": score, "best": better})
        if better:
            self.best = score
            adapter = self.adapter()
            if self.processes.main:
                save_adapter(self.folder / "best", adapter)

    def _log(self, line: dict[str, Any]) -> None:
        if not self.processes.main:
            return
        try:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise not_written(self.folder / "metrics.jsonl", error) from error

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask for a stop after the step in hand; a second one acts as usual."""

        def ask(number: int, _frame: Any) -> None:
            self._stop = True
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

        if threading.current_thread() is not threading.main_thread():  # Python lets only the main thread catch signals
            yield
            return
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _rounded(table: Tensor) -> list[Any]:
    return [_rounded(row) for row in table] if table.dim() > 1 else [round(x, 4) for x in table.tolist()]
