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
from training.base import Base
from training.errors import TrainingError, not_written
from training.evaluate import dev_loss
from training.export import run_summary
from training.files import write_text
from training.memory import FreedMemory
from training.mix import Mix
from training.packing import Batch
from training.recipe import Recipe
from training.schedule import ActiveClock, Progress, learning_rate
from training.state import RunState, checkpoints, load_state, save_state
from training.step import Objective

LOAD_EVERY = 10  # steps between records of the expert load (a table of layers x projections x experts)

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

    def __init__(self, recipe: Recipe, base: Base, run: Path, *, resume: bool = False, report: Report | None = None):
        """Raises TrainingError when `run` holds checkpoints already and `resume` is not asked for, or when `resume` finds
        none or another recipe's."""
        if checkpoints(run) and not resume:
            raise TrainingError(
                f"{run} holds a run already. Continue it with --resume, or choose another folder with --run.",
                f"{run} 中已有训练记录。请用 --resume 继续，或用 --run 指定其他文件夹。",
            )
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        torch.manual_seed(recipe.seed)
        self.recipe, self.base, self.folder, self.report = recipe, base, run, report
        self.mix = Mix(recipe, base.tokenizer)
        self.injected: InjectedModel = inject_molora(base.model, recipe.adapter)
        self.objective = Objective(base.model, self.injected.state, recipe.adapter.top_k)
        self.parameters = self.injected.adapter_parameters()
        o = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=o.lr, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay, foreach=True
        )
        self.progress = Progress()
        if resume:
            self._resume()
        self._stop = False
        self._memory = FreedMemory() if base.device.type == "cpu" else None
        self._last_save = self._last_eval = self.progress.active_seconds
        self._loads: list[Tensor] = []

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Trains until the budget is used up or a signal arrives."""
        write_text(self.folder / "recipe.json", json.dumps(self.recipe.to_dict(), indent=1, ensure_ascii=False))
        self._log({"event": "start", "mix": self.mix.summary(), **self.progress.to_dict()})
        clock = ActiveClock(self.base.device)
        batches = self.mix.batches(self.progress.block, self.progress.batch)
        last: dict[str, Any] = {}
        self.base.model.train()  # LoRA dropout acts
        with self._signals():
            while not self._stop and self.progress.share(self.recipe.budget) < 1:
                last = self._step(batches, clock)
                self._between_steps(clock)
        self._checkpoint()
        if self._stop:
            self._log({"event": "interrupted", **self.progress.to_dict()})
            return Outcome("interrupted", self.folder, self.progress, None, last)
        self._evaluate()
        adapter = save_adapter(self.folder / "adapter", self.adapter())
        self._log({"event": "finished", **self.progress.to_dict()})
        return Outcome("finished", self.folder, self.progress, adapter, last)

    def _step(self, batches: Iterator[tuple[int, int, Batch]], clock: ActiveClock) -> dict[str, Any]:
        began, p = time.monotonic(), self.progress
        taken = [next(batches) for _ in range(self.recipe.budget.accumulate)]
        lr = learning_rate(self.recipe.optimizer, p.share(self.recipe.budget))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums = self._accumulate([batch for _, _, batch in taken])
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimizer.clip))
        if not math.isfinite(sums["loss"]) or not math.isfinite(norm):
            self._log({"event": "not finite", "step": p.step + 1, "loss": str(sums["loss"]), "gradient": str(norm)})
            raise TrainingError(
                f"Step {p.step + 1} gave loss {sums['loss']} and gradient norm {norm}. The run was stopped; the last good checkpoint "
                "is kept. Lower the learning rate, then resume in a new run folder.",
                f"第 {p.step + 1} 步的损失为 {sums['loss']}、梯度范数为 {norm}，训练已停止；最近一次正常的检查点已保留。"
                "请降低学习率后，在新的文件夹中重新训练。",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(batch.tokens for _, _, batch in taken)
        p.step += 1
        p.tokens += tokens
        p.rows += sum(len(batch.samples) for _, _, batch in taken)
        p.loss_tokens += sums.pop("loss_tokens")
        p.block, p.batch = taken[-1][0], taken[-1][1] + 1
        active, wall = clock.lap(), time.monotonic() - began
        p.active_seconds += active
        p.wall_seconds += wall
        metrics = {
            "step": p.step,
            **sums,
            "lr": lr,
            "gradient": norm,
            "tokens": p.tokens,
            "tokens_per_second": tokens / wall,
        }
        metrics |= {"share": p.share(self.recipe.budget), "active_seconds": p.active_seconds}
        if p.step % LOAD_EVERY == 0:
            load = torch.stack(self._loads).mean(0)
            self._loads.clear()
            metrics["expert_load"] = [[[round(x, 4) for x in e] for e in layer] for layer in load.tolist()]
        self._log(metrics)
        if self.report:
            self.report({**metrics, "seconds_left": p.seconds_left(self.recipe.budget)})
        return metrics

    def _accumulate(self, batches: list[Batch]) -> dict[str, Any]:
        """Forward and backward of one step's micro-batches; tokens the loss looks at weigh as their streams say."""
        looked_at = sum(len(batch.targets) for batch in batches)
        weight = max(sum(float(batch.weights.sum()) for batch in batches), 1e-9)
        read = sum(int(batch.real.sum()) for batch in batches)
        sums = {"loss": 0.0, "balance": 0.0, "z": 0.0, "router_entropy": 0.0, "loss_tokens": looked_at}
        coefficients = self.recipe.router
        for batch in batches:
            terms = self.objective(batch)
            loss, router, share = terms.loss / weight, terms.router, int(batch.real.sum()) / read
            (loss + share * (coefficients.balance * router.balance + coefficients.z * router.z)).backward()
            sums["loss"] += float(loss.detach())
            sums["balance"] += share * float(router.balance.detach())
            sums["z"] += share * float(router.z.detach())
            sums["router_entropy"] += share * float(router.entropy.mean())
            self._loads.append(router.load.cpu())
        return sums

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
        """The adapter as it is now, with a summary of the run so far."""
        summary = run_summary(self.mix, self.folder, self.progress.to_dict())
        return extract(self.injected, base_fingerprint=self.base.fingerprint, summary=summary)

    def _checkpoint(self) -> None:
        state = RunState(self.progress, self.recipe.identity(), self.base.fingerprint)
        path = save_state(self.folder, self.parameters, self.optimizer, state)
        self._last_save = self.progress.active_seconds
        self._log({"event": "checkpoint", "path": path.name})

    def _resume(self) -> None:
        state = load_state(self.folder, self.parameters, self.optimizer)
        if state.recipe_identity != self.recipe.identity() or state.base_fingerprint != self.base.fingerprint:
            raise TrainingError(
                f"The run in {self.folder} was started with another recipe or base; only budget limits, saving, device and "
                "threads may change. Start anew with another --run folder.",
                f"{self.folder} 中的训练使用的是另一份配方或另一个基座；续训时只能修改预算上限、保存、设备和线程。请换一个 --run 文件夹重新开始。",
            )
        self.progress = state.progress

    def _evaluate(self) -> None:
        rng = torch.get_rng_state()
        self.base.model.eval()
        result = dev_loss(self.base.model, self.mix.held_out(), self.recipe.budget.batch_tokens)
        self.base.model.train()
        torch.set_rng_state(rng)
        self._last_eval = self.progress.active_seconds
        self._log({"event": "dev", "step": self.progress.step, "dev_loss": result})

    def _log(self, line: dict[str, Any]) -> None:
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
