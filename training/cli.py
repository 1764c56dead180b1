"""`python -m training data | train | evaluate | export`.

Contract: `--json` gives exactly one JSON object on stdout, everything else goes to stderr; exit code 0 done, 1 failed
or stopped before the end, 2 wrong use. Messages in the user's language.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ming_app.console import Console, use_utf8
from ming_app.errors import MingError, UsageError
from ming_app.settings import Settings
from training.files import write_text
from training.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from ming_app.molora.checkpoint import Adapter
    from training.base import Base
    from training.chat import ChatTokenizer
    from training.evaluate import Scorer

REPORT_EVERY = 10  # steps between progress lines where stderr is no terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives its exit code."""
    use_utf8()
    parser = _parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as stopped:  # argparse has printed its usage
        return 2 if stopped.code else 0
    console = Console("en", options.json)
    try:
        console.lang = Settings.load({"lang": options.lang}).message_lang()
        with console.capture():
            result, code = options.run(options, console)
        console.result(result)
        return code
    except MingError as error:
        return console.fail(error)
    except KeyboardInterrupt:
        return console.interrupted()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object on stdout")
    common.add_argument("--lang", choices=("en", "zh"), help="language of messages")

    train = commands.add_parser("train", parents=[common], help="train an adapter by a recipe")
    train.add_argument("--recipe", required=True, help="TOML file, see examples/recipes")
    train.add_argument("--run", dest="folder", help="run folder (default: runs/<name of the recipe>)")
    train.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    train.set_defaults(run=_train)

    data = commands.add_parser(
        "data", parents=[common], help="what a recipe's mix holds: rows, tokens, languages, licences"
    )
    data.add_argument("--recipe", required=True)
    data.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N samples with the tokens that are learnt"
    )
    data.set_defaults(run=_data)

    evaluate = commands.add_parser(
        "evaluate", parents=[common], help="dev loss and exam accuracy, base against adapter"
    )
    evaluate.add_argument("--recipe", help="measure the loss on this recipe's held-out rows")
    evaluate.add_argument("--base", help="catalogue name, folder or hub id (default: the recipe's)")
    evaluate.add_argument("--adapter", help="adapter folder; without it only the base is measured")
    evaluate.add_argument("--exam", action="append", default=[], help="exam bank (JSON lines); may be repeated")
    evaluate.add_argument("--limit", type=int, default=0, help="so many questions per bank, spread evenly over it")
    evaluate.add_argument("--skip-base", action="store_true", help="measure the adapter only")
    evaluate.add_argument(
        "--served",
        action="append",
        default=[],
        metavar="PRECISION",
        help="measure the exams with the engine that serves, in this precision (4bit, mix, 8bit, nf4, ...), instead of"
        " the training base in bf16; may be repeated",
    )
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", parents=[common], help="newest checkpoint of a run -> adapter folder")
    export.add_argument("--recipe", required=True)
    export.add_argument("--run", dest="folder", help="run folder (default: runs/<name of the recipe>)")
    export.add_argument("--out", required=True, help="adapter folder to write")
    export.add_argument("--evaluation", help="JSON of `training evaluate`: its figures go into MODEL_CARD.md")
    export.set_defaults(run=_export)
    return parser


def _run_folder(recipe: Recipe, given: str | None) -> Path:
    return Path(given) if given else Path("runs") / recipe.name


def _load(name: str, recipe: Recipe | None, console: Console) -> Base:
    import torch

    from training.base import load_base

    if recipe and recipe.threads:
        torch.set_num_threads(recipe.threads)
    if not recipe:
        return load_base(name, progress=console.progress)
    return load_base(name, recipe.device, recipe.precision, console.progress, packing=recipe.data.packing)


# -- train -------------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], int]:
    from training.curves import write_curves
    from training.trainer import Trainer

    recipe = read_recipe(options.recipe)
    run = _run_folder(recipe, options.folder)
    base = _load(recipe.base, recipe, console)
    bar = _Bar(console)
    outcome = Trainer(recipe, base, run, resume=options.resume, report=bar).run()
    bar.close()
    curves = write_curves(run)
    finished = outcome.status == "finished"
    if finished:
        console.note(
            f"Finished: {outcome.adapter}, curves in {curves}.", f"训练完成：{outcome.adapter}，曲线见 {curves}。"
        )
    else:
        console.note(
            f"Stopped after step {outcome.progress.step}; a checkpoint is in {run}. Continue with --resume.",
            f"已在第 {outcome.progress.step} 步后停止，检查点保存在 {run}。可用 --resume 继续。",
        )
    result = {
        "status": outcome.status,
        "run": str(run),
        "adapter": str(outcome.adapter) if outcome.adapter else None,
        "metrics": str(run / "metrics.jsonl"),
        "curves": str(curves),
        "progress": outcome.progress.to_dict(),
        "loss": outcome.last.get("loss"),
    }
    return result, 0 if finished else 1


class _Bar:
    """Progress on stderr: a line redrawn in place on a terminal, else a line every few steps."""

    def __init__(self, console: Console):
        self.console = console
        self.terminal = sys.stderr.isatty()

    def __call__(self, metrics: dict[str, Any]) -> None:
        if not self.terminal and metrics["step"] % REPORT_EVERY != 1:
            return
        filled = round(metrics["share"] * 20)
        left = metrics["seconds_left"]
        time_left = "?" if left is None else f"{left // 60:.0f}:{left % 60:02.0f}"
        line = (
            f"{metrics['share']:4.0%} [{'#' * filled}{'.' * (20 - filled)}] "
            + self.console.text("step", "步")
            + f" {metrics['step']}  loss {metrics['loss']:.3f}  lr {metrics['lr']:.1e}  {metrics['tokens_per_second']:.0f} tokens/s  "
            + self.console.text(f"{time_left} left", f"剩余 {time_left}")
        )
        print(
            f"\r\x1b[K{line}" if self.terminal else line, end="" if self.terminal else "\n", file=sys.stderr, flush=True
        )

    def close(self) -> None:
        """Leaves the last line standing."""
        if self.terminal:
            print(file=sys.stderr)


# -- data --------------------------------------------------------------------------------------------------------------


def _data(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], int]:
    from training.mix import Mix
    from training.report import data_table, shown_samples

    recipe = read_recipe(options.recipe)
    mix = Mix(recipe, _tokenizer(recipe.base, console))
    console.note("Counting the tokens of every row.", "正在统计每条数据的词元数。")
    rows = mix.census()
    console.line(data_table(rows))
    samples = shown_samples(mix, options.show)
    for sample in samples:
        console.line(f"\n[{sample['stream']} | {sample['source']} | {sample['tokens']}]\n{sample['marked']}")
    return {"recipe": recipe.name, "streams": rows, "samples": samples}, 0


def _tokenizer(base: str, console: Console) -> ChatTokenizer:
    """The base's tokenizer, without its weights in memory."""
    from ming_app.models.catalog import find_model
    from ming_app.models.fetch import fetch
    from training.chat import ChatTokenizer

    return ChatTokenizer.from_folder(fetch(find_model(base), Settings.load({"adapter": "none"}), console.progress).home)


# -- evaluate ----------------------------------------------------------------------------------------------------------


def _evaluate(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], int]:
    from ming_app.molora.checkpoint import load_adapter
    from ming_app.molora.inject import inject_molora, load_into
    from training.evaluate import dev_loss, dev_report, score_letters
    from training.mix import Mix
    from training.step import Objective

    recipe = read_recipe(options.recipe) if options.recipe else None
    name = options.base or (recipe.base if recipe else "")
    if not name or not (recipe or options.exam):
        raise UsageError(
            "Say what to measure: --recipe, or --base with --exam.", "请指定评测内容：--recipe，或 --base 加 --exam。"
        )
    if options.served:
        return _evaluate_served(name, recipe, options, console), 0
    base = _load(name, recipe, console)
    packing = recipe.data.packing if recipe else True
    adapter = (
        load_adapter(options.adapter, base_fingerprint=base.fingerprint, base_config=base.config)
        if options.adapter
        else None
    )
    scorer = partial(score_letters, base.model)
    samples = Mix(recipe, base.tokenizer).held_out() if recipe else {}
    result: dict[str, Any] = {
        "base": name,
        "fingerprint": base.fingerprint,
        "adapter": options.adapter,
        "dev": {},
        "exam": {},
    }
    if not (options.skip_base and adapter):
        if samples:
            result["dev"]["base"] = {"loss": dev_loss(Objective(base.model), samples, packing=packing)}
        _exams(result, "base", scorer, base.tokenizer, options, recipe, console)
    if adapter:
        injected = inject_molora(base.model, adapter.config)
        load_into(injected, adapter)
        if samples:
            objective = Objective(base.model, injected.state, adapter.config.top_k)
            report = dev_report(objective, samples, adapter.config, packing=packing)
            result["dev"]["adapter"] = {**report, "load": {name: x.tolist() for name, x in report["load"].items()}}
        _exams(result, "adapter", scorer, base.tokenizer, options, recipe, console)
    console.line(json.dumps(_without_tables(result), indent=1, ensure_ascii=False))
    return result, 0


def _evaluate_served(name: str, recipe: Recipe | None, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Letter accuracy in every precision asked for: {"exam": {file: {"base 4bit": ..., "adapter 4bit": ...}}}."""
    from ming_app.engine.engine import Engine
    from training.evaluate import score_letters_served

    if not options.exam:
        raise UsageError("--served measures exams: add --exam FILE.", "--served 只评测考试题：请加 --exam 文件。")
    adapters = {"base": "none", "adapter": options.adapter}
    if options.skip_base or not options.adapter:
        del adapters["base" if options.adapter else "adapter"]
    result: dict[str, Any] = {"base": name, "adapter": options.adapter, "exam": {}}
    tokenizer = _tokenizer(name, console)
    for precision in options.served:
        for what, adapter in adapters.items():
            settings = Settings.load({"model": name, "adapter": adapter, "precision": precision})
            engine = Engine.load(settings, console.progress)
            scorer = partial(score_letters_served, engine.backend)
            _exams(result, f"{what} {precision}", scorer, tokenizer, options, recipe, console)
            engine.close()
    console.line(json.dumps(result, indent=1, ensure_ascii=False))
    return result


def _exams(
    result: dict[str, Any],
    what: str,
    scorer: Scorer,
    tokenizer: ChatTokenizer,
    options: argparse.Namespace,
    recipe: Recipe | None,
    console: Console,
) -> None:
    from training.chat import DEFAULT_SYSTEM
    from training.evaluate import letter_accuracy

    for path in options.exam:
        console.note(f"Measuring {what} on {Path(path).name}", f"正在用 {Path(path).name} 评测 {what}")
        system = recipe.data.system if recipe else DEFAULT_SYSTEM
        accuracy = letter_accuracy(scorer, tokenizer, path, system=system, limit=options.limit)
        result["exam"].setdefault(Path(path).name, {})[what] = accuracy.to_dict()


def _without_tables(result: dict[str, Any]) -> dict[str, Any]:
    """For people: without the load of every single expert."""
    dev = {what: {k: v for k, v in values.items() if k != "load"} for what, values in result["dev"].items()}
    return {**result, "dev": dev}


# -- export ------------------------------------------------------------------------------------------------------------


def _export(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], int]:
    from training.card import model_card
    from training.export import export_adapter

    recipe = read_recipe(options.recipe)
    base = _load(recipe.base, recipe, console)
    out = Path(options.out)
    adapter = export_adapter(recipe, base, _run_folder(recipe, options.folder), out)
    card = model_card(recipe.name, base.title, adapter, _read_evaluation(options.evaluation, adapter))
    write_text(out / "MODEL_CARD.md", card)
    console.note(f"Adapter written to {out}.", f"适配器已写入 {out}。")
    size = (out / "adapter.safetensors").stat().st_size
    return {"adapter": str(out), "bytes": size, "fingerprint": adapter.fingerprint, "summary": dict(adapter.summary)}, 0


def _read_evaluation(path: str | None, adapter: Adapter) -> dict[str, Any] | None:
    """What `evaluate --json` printed, checked to be about this base."""
    if path is None:
        return None
    try:
        evaluation = json.loads(Path(path).read_text(encoding="utf-8"))
        same = evaluation["fingerprint"] == adapter.base_fingerprint
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not the JSON of `training evaluate`.", f"{path} 不是 `training evaluate` 输出的 JSON。"
        ) from error
    if not same:
        raise UsageError(f"{path} was measured on another base.", f"{path} 是在另一个基座上测得的。")
    return evaluation
