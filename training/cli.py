"""`python -m training data | train | evaluate | bench | export`.

Contract: `--json` gives exactly one JSON object on stdout, everything else goes to stderr; exit code 0 done, 1 failed
or stopped before the end, 2 wrong use. Messages in the user's language.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ming_app.console import Console, use_utf8
from ming_app.errors import MingError, UsageError
from ming_app.settings import Settings
from training.files import write_text
from training.recipe import PRECISIONS, Recipe, read_recipe

if TYPE_CHECKING:
    from ming_app.molora.checkpoint import Adapter
    from training.base import Base
    from training.chat import ChatTokenizer
    from training.served import Load

REPORT_EVERY = 10  # steps between progress lines where stderr is no terminal


def main(argv: Sequence[str] | None = None, load: Load | None = None) -> int:
    """Runs one command; gives its exit code. `load`: the engine that `evaluate` asks, in place of one in this process."""
    use_utf8()
    parser = _parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as stopped:  # argparse has printed its usage
        return 2 if stopped.code else 0
    options.load = load
    console = Console("en", options.json)
    try:
        console.lang = Settings.load({"lang": options.lang}).message_lang()
        with console.capture():
            result, code = options.run(options, console)
        if result:
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
    train.add_argument("--recipe", required=True, help="TOML file, see training/recipes")
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
        "evaluate", parents=[common], help="exams, NLP tasks, answers and loss, base against adapter"
    )
    evaluate.add_argument("--model", help="catalogue name, folder or hub id (default: the recipe's base)")
    evaluate.add_argument("--adapter", help="adapter folder, or none (default: the adapter that belongs to the model)")
    evaluate.add_argument("--suite", help="TOML file, see training/suites")
    evaluate.add_argument("--exam", action="append", default=[], help="exam bank (JSON lines); may be repeated")
    evaluate.add_argument("--recipe", help="measure the loss on this recipe's held-out rows")
    evaluate.add_argument("--limit", type=int, default=0, help="so many rows per file, spread evenly over it")
    evaluate.add_argument("--skip-base", action="store_true", help="measure the adapter only")
    evaluate.add_argument(
        "--precision",
        help="of the served engine; exams are then measured on it too (default: exams and loss on the base as in"
        " training, answers by the engine in its usual precision)",
    )
    evaluate.add_argument("--out", help="folder for evaluation.json, report.md and report.html")
    evaluate.set_defaults(run=_evaluate)

    bench = commands.add_parser(
        "bench", parents=[common], help="a step's time and memory: MoLoRA, PEFT's LoRA, dense experts"
    )
    bench.add_argument("--model", default="ming-moe-0.5b", help="catalogue name, folder or hub id of the base")
    bench.add_argument("--precision", choices=PRECISIONS, default="bf16")
    bench.add_argument("--tokens", type=int, default=1024, help="tokens of a micro-batch")
    bench.add_argument("--repeat", type=int, default=5)
    bench.add_argument(
        "--only", action="append", default=[], help="molora, lora, dense, molora_E2 ...; may be repeated"
    )
    bench.set_defaults(run=_bench)

    export = commands.add_parser("export", parents=[common], help="newest checkpoint of a run -> adapter folder")
    export.add_argument("--recipe", required=True)
    export.add_argument("--run", dest="folder", help="run folder (default: runs/<name of the recipe>)")
    export.add_argument("--out", required=True, help="adapter folder to write")
    export.add_argument(
        "--layout", choices=("native", "official"), default="native", help="official: as the authors' code loads it"
    )
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
    trainer = Trainer(recipe, base, run, resume=options.resume, report=bar)
    outcome = trainer.run()
    bar.close()
    finished = outcome.status == "finished"
    if not trainer.processes.main:  # one of several processes speaks and writes
        return {}, 0 if finished else 1
    curves = write_curves(run)
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
    from training.evaluation import Plan, evaluate
    from training.evaluation_report import evaluation_page, evaluation_text
    from training.served import OneEngine
    from training.suite import Exam, Suite, read_suite

    suite = read_suite(options.suite) if options.suite else Suite("command line", home=Path())
    recipe = read_recipe(options.recipe) if options.recipe else None
    more = tuple(Exam(str(Path(path).resolve())) for path in options.exam)
    suite = replace(suite, exam=(*suite.exam, *more))
    name = options.model or (recipe.base if recipe else "")
    if not name or not (recipe or suite.exam or suite.nlp or suite.generation):
        raise UsageError(
            "Say what to measure: --model with --suite, --exam or --recipe.",
            "请指定评测内容：--model 加 --suite、--exam 或 --recipe。",
        )
    plan = Plan(name, options.adapter, suite, recipe, options.limit, options.precision, not options.skip_base)
    result = evaluate(plan, console, options.load or OneEngine)
    text = evaluation_text(result)
    console.line(text)
    if options.out:
        out = Path(options.out)
        write_text(out / "evaluation.json", json.dumps(result, indent=1, ensure_ascii=False))
        write_text(out / "report.md", text)
        write_text(out / "report.html", evaluation_page(result))
        console.note(f"Written: {out}.", f"已写入：{out}。")
    return result, 0


# -- bench -------------------------------------------------------------------------------------------------------------


def _bench(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], int]:
    from training.bench import bench
    from training.report import table

    result = bench(options.model, options.precision, options.tokens, options.repeat, options.only, console)
    head = ("variant", "seconds", "tokens/s", "kept GB", "peak GB")
    rows = [
        (
            name,
            f"{r['seconds']:.2f}",
            f"{r['tokens_per_second']:.0f}",
            f"{r['kept_gb']:.2f}",
            r["peak_gb"] and f"{r['peak_gb']:.2f}",
        )
        for name, r in result["results"].items()
    ]
    console.line(table(head, rows))
    console.line()
    console.line(table(("ratio", ""), [(name, f"{value:.3f}") for name, value in result["ratios"].items()]))
    return result, 0


# -- export ------------------------------------------------------------------------------------------------------------


def _export(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], int]:
    from ming_app.molora.checkpoint import save_adapter
    from ming_app.molora.official_save import save_official
    from training.card import model_card
    from training.export import export_adapter

    recipe = read_recipe(options.recipe)
    base = _load(recipe.base, recipe, console)
    out = Path(options.out)
    adapter = export_adapter(recipe, base, _run_folder(recipe, options.folder))
    if options.layout == "official":
        save_official(out, adapter, base.config, base.name)
    else:
        save_adapter(out, adapter)
    card = model_card(recipe.name, base.title, adapter, _read_evaluation(options.evaluation, adapter))
    write_text(out / "MODEL_CARD.md", card)
    console.note(f"Adapter written to {out}.", f"适配器已写入 {out}。")
    size = sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".safetensors", ".bin"))
    return {"adapter": str(out), "bytes": size, "fingerprint": adapter.fingerprint, "summary": dict(adapter.summary)}, 0


def _read_evaluation(path: str | None, adapter: Adapter) -> dict[str, Any] | None:
    """What `evaluate --json` printed, checked to be about this base and this adapter."""
    if path is None:
        return None
    try:
        evaluation = json.loads(Path(path).read_text(encoding="utf-8"))
        same = evaluation["fingerprint"] == adapter.base_fingerprint
        measured = evaluation["adapter_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not the JSON of this version's `training evaluate`; measure again.",
            f"{path} 不是当前版本 `training evaluate` 输出的 JSON；请重新评测。",
        ) from error
    if not same:
        raise UsageError(f"{path} was measured on another base.", f"{path} 是在另一个基座上测得的。")
    if measured not in (None, adapter.fingerprint):
        raise UsageError(f"{path} was measured on another adapter.", f"{path} 是在另一个适配器上测得的。")
    return evaluation
