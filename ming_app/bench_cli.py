"""`bench`: its options, and a run with its report or its comparison with the stored one. Light until it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ming_app.console import Console
from ming_app.settings import Settings


def add_bench_options(parser: argparse.ArgumentParser, t: Callable[[str, str], str]) -> None:
    """`t` chooses between English and Chinese."""
    parser.add_argument(
        "--only", metavar="NAME", action="append", help=t("a case to run; may be repeated", "只运行该项目；可重复")
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=t(
            "a few ratios against the stored ones; fails where one fell", "仅测几项比值并与已存结果比较；变差则失败"
        ),
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        help=t("write JSON and a page with plots of how cost grows", "写出 JSON 以及展示开销增长的图表页面"),
    )
    for name, default, en, zh in (
        ("repeat", 5, "measurements per case", "每项测量次数"),
        ("tokens", 64, "tokens to decode per measurement", "每次解码的词元数"),
        ("prompt-tokens", 128, "prompt before decoding", "解码前的提示词元数"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=t(f"{en} ({default})", f"{zh}（{default}）")
        )


def run(args: argparse.Namespace, settings: Settings, console: Console) -> int:
    """Exit code 1 when `--quick` found a ratio that fell. Raises MingError."""
    from ming_app.bench import print_results, run_bench
    from ming_app.bench.report import QUICK, compare, print_comparison, stored, write_report

    old = stored(settings.model) if args.quick else None
    only = args.only or (QUICK if args.quick else ())
    report = run_bench(
        settings,
        only,
        repeat=args.repeat,
        tokens=args.tokens,
        prompt_tokens=args.prompt_tokens,
        note=console.note,
    )
    if args.report:
        from ming_app.bench.growth import growth

        report["growth"] = growth(settings, console.note)
    print_results(report, console)
    compared = compare(report, old) if old else []
    print_comparison(compared, console)
    if args.report:
        page = write_report(report, Path(args.report))
        console.line(console.text(f"Report: {page}", f"报告：{page}"))
    console.result({**report, "compared": compared} if old else report)
    return 0 if all(one["ok"] for one in compared) else 1
