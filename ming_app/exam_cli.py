"""`python -m ming_app exam`: grade (the model sits a bank), check (what a file of questions holds), convert, banks."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from ming_app.cli_options import check_trace_file
from ming_app.console import Console
from ming_app.errors import UsageError
from ming_app.settings import Settings
from ming_app.trace_tools import write_whole

ACTIONS = ("grade", "case", "check", "convert", "banks")
TRACED = 200  # questions in one trace
SHOWN = 20  # rejected rows on the terminal; JSON has all


def add_exam_parser(commands: Any, t: Callable[[str, str], str], parents: list[argparse.ArgumentParser]) -> None:
    """Adds `exam` and its actions to the grammar."""
    summary = t(
        "exam questions: let the model sit a bank, check and convert files", "试题：让模型答题、检查与转换题库文件"
    )
    parser = commands.add_parser("exam", help=summary, description=summary)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    words = {
        "grade": t("let the model answer a bank, with a report", "让模型作答题库并给出报告"),
        "case": t(
            "base and adapted model on one question, as a page to print", "基座与适配模型作答同一题，生成可打印页面"
        ),
        "check": t("read a file of questions and report every row", "读取题库文件并逐行报告"),
        "convert": t("write questions in another format", "将题目转换为其他格式"),
        "banks": t("list the banks at hand", "列出可用题库"),
    }
    made = {
        name: actions.add_parser(name, help=words[name], description=words[name], parents=parents) for name in ACTIONS
    }
    bank = t("file of questions in any supported format, or the name of a bank", "任意支持格式的题库文件，或题库名称")
    for name in ("grade", "case", "check", "convert"):
        made[name].add_argument("--bank", metavar="FILE", required=True, help=bank)
        made[name].add_argument("--format", default="", metavar="NAME", help=t("of the file", "文件格式"))
    grade = made["grade"]
    grade.add_argument("--limit", type=int, default=0, metavar="N", help=t("so many, spread evenly", "均匀抽取 N 题"))
    grade.add_argument("--no-adapter", action="store_true", help=t("the bare base", "只用基座模型"))
    grade.add_argument(
        "--compare", action="store_true", help=t("base and adapted model in one run", "同时评测基座与适配后的模型")
    )
    grade.add_argument(
        "--shuffles",
        type=int,
        default=0,
        metavar="N",
        help=t("also with options in N other orders", "另以 N 种选项顺序作答，检验一致性"),
    )
    grade.add_argument(
        "--out",
        metavar="FILE",
        help=t("every answer as a JSON line; resumes from it", "逐题结果（JSON 行），可断点续评"),
    )
    grade.add_argument(
        "--trace",
        metavar="FILE",
        help=t(
            "which experts fired on questions answered right and wrong; look at it with: trace report",
            "保存答对与答错题目的专家轨迹，用 trace report 查看",
        ),
    )
    made["case"].add_argument("--id", required=True, metavar="ID", help=t("of the question", "题目编号"))
    made["case"].add_argument(
        "--out", required=True, metavar="FILE", help=t("HTML file to write", "要写入的 HTML 文件")
    )
    made["convert"].add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help=t("ends in .jsonl, .csv, .gift, .xml or .apkg", "以 .jsonl、.csv、.gift、.xml 或 .apkg 结尾"),
    )


def run_exam(args: argparse.Namespace, settings: Settings, console: Console, load_engine: Any) -> dict[str, Any]:
    """One action; its JSON object."""
    return {"grade": _grade, "case": _case, "check": _check, "convert": _convert, "banks": _banks}[args.action](
        args, settings, console, load_engine
    )


def _read(args: argparse.Namespace) -> Any:
    """The Import of --bank: a file, or a bank by name."""
    from ming_app.exam.bank import Shelf
    from ming_app.exam.formats import Import, ReadOptions, read_bank
    from ming_app.exam.formats.reading import MAX_BYTES, too_large
    from ming_app.reading import TooLargeError, read_bounded

    path = Path(args.bank)
    if not path.is_file() and args.bank in {bank.name for bank in Shelf().list()}:
        return Import(Shelf().open(args.bank).questions, (), "jsonl", "utf-8")
    try:
        data = read_bounded(path, MAX_BYTES, named=True)
    except TooLargeError as error:
        raise too_large() from error
    except OSError as error:
        raise UsageError(
            f"{args.bank} cannot be read ({error.strerror}), and no bank has that name; see: exam banks.",
            f"无法读取 {args.bank}（{error.strerror}），也没有该名称的题库；题库列表见 exam banks。",
        ) from error
    return read_bank(data, path.name, ReadOptions(format=args.format))


def _check(args: argparse.Namespace, settings: Settings, console: Console, load_engine: Any) -> dict[str, Any]:
    read = _read(args)
    types: dict[str, int] = {}
    for question in read.questions:
        types[question.type] = types.get(question.type, 0) + 1
    console.line(
        console.text(
            f"{len(read.questions)} questions, {len(read.rejected)} rows rejected ({read.format} {read.encoding})",
            f"{len(read.questions)} 道题，拒绝 {len(read.rejected)} 行（{read.format} {read.encoding}）",
        )
    )
    for row in read.rejected[:SHOWN]:
        console.line(
            console.text(f"  line {row.line}: {row.reason.en}", f"  第 {row.line} 行：{row.reason.zh}")
            + f"  {row.excerpt}"
        )
    if len(read.rejected) > SHOWN:
        console.line(f"  … {len(read.rejected) - SHOWN}")
    return {
        "format": read.format,
        "encoding": read.encoding,
        "rows": read.rows,
        "questions": len(read.questions),
        "by_type": types,
        "columns": dict(read.columns),
        "rejected": [
            {"line": row.line, "reason": row.reason.message(console.lang), "text": row.excerpt} for row in read.rejected
        ],
    }


def _convert(args: argparse.Namespace, settings: Settings, console: Console, load_engine: Any) -> dict[str, Any]:
    from ming_app.exam.formats.writing import ENDINGS, write_bank

    out = Path(args.out)
    kind = next((kind for kind, ending in ENDINGS.items() if out.suffix == f".{ending}"), None)
    if kind is None:
        endings = ", ".join(f".{ending}" for ending in ENDINGS.values())
        raise UsageError(f"The file must end in {endings}.", f"输出文件应以 {endings} 结尾。")
    read = _read(args)
    write_whole(out, write_bank(read.questions, kind, out.stem))
    rejected = len(read.rejected)
    console.note(
        f"{len(read.questions)} questions written, {rejected} rows rejected.",
        f"已写入 {len(read.questions)} 道题，拒绝 {rejected} 行。",
    )
    return {"file": str(out), "format": kind, "questions": len(read.questions), "rejected": rejected}


def _case(args: argparse.Namespace, settings: Settings, console: Console, load_engine: Any) -> dict[str, Any]:
    """Base and adapted model on one question."""
    from ming_app.case_view import case_page, study
    from ming_app.exam.candidate import with_earlier

    found = next(((q, earlier) for q, earlier in with_earlier(_read(args).questions) if q.id == args.id), None)
    if found is None:
        raise UsageError(f"No question has the id {args.id!r}.", f"没有编号为 {args.id!r} 的题目。")
    with closing(load_engine(settings, console.progress)) as engine:
        case = study(engine, *found)
    write_whole(Path(args.out), case_page(case, console.lang).encode())
    sides = {
        name: {"choice": side.choice, "chances": side.chances, "reasons": side.reasons}
        for name, side in case.sides.items()
    }
    for name, side in case.sides.items():
        console.line(f"{name}: {side.choice} ({side.chances[side.choice]:.0%})")
    return {"file": args.out, "key": "".join(found[0].answer), **sides}


def _banks(args: argparse.Namespace, settings: Settings, console: Console, load_engine: Any) -> dict[str, Any]:
    from ming_app.exam.bank import Shelf

    found = Shelf().list()
    for bank in found:
        console.line(f"{bank.name:24} {bank.size:6}  {bank.titles[console.lang]}")
    return {"banks": [{"name": bank.name, "questions": bank.size, "titles": dict(bank.titles)} for bank in found]}


def _grade(args: argparse.Namespace, settings: Settings, console: Console, load_engine: Any) -> dict[str, Any]:
    """Reports what was read, sits the exam, prints and gives the report."""
    from ming_app.exam.candidate import AT_A_TIME, BASE, report, spread

    if args.limit < 0 or args.shuffles < 0:
        raise UsageError("--limit and --shuffles must not be negative.", "--limit 与 --shuffles 不能为负数。")
    read = _read(args)
    if read.rejected:
        console.note(
            f"{len(read.rejected)} of {read.rows} rows make no question; see: exam check.",
            f"{read.rows} 行中有 {len(read.rejected)} 行不是有效题目；详见 exam check。",
        )
    asked = spread(read.questions, args.limit)
    if not asked:
        raise UsageError("There is no question to ask.", "没有可作答的题目。")
    check_trace_file(args.trace)
    if args.no_adapter:
        settings = settings.with_(adapter="none")
    settings = settings.with_(max_queue=max(settings.max_queue, AT_A_TIME))  # what is asked at a time may wait together
    with closing(load_engine(settings, console.progress)) as engine:
        if args.trace and not engine.info.num_experts:
            raise UsageError(
                "This model has no experts, so there is nothing to trace.", "该模型没有专家，无轨迹可记录。"
            )
        both = args.compare and engine.info.num_experts > 0
        runs = {"": ()} | ({"base": BASE} if both else {})
        values: dict[str, Any] = {}
        attempts_by_key: dict[str, Any] = {}
        for name, changes in runs.items():
            attempts, too_long = _sit(args, console, engine, asked, name, changes)
            attempts_by_key = attempts_by_key or {one.key: one for one in attempts}
            found = report(attempts) | {"too_long": too_long}
            _print(found, console, name or engine.info.title)
            values |= found if not name else {name: found}
        if args.trace:
            values["trace"] = _trace(args, console, engine, asked, attempts_by_key)
        return values | {
            "model": engine.info.model,
            "precision": engine.info.precision,
            "experts": engine.info.num_experts,
            "rejected": len(read.rejected),
            "answers": args.out,
        }


def _sit(args: argparse.Namespace, console: Console, engine: Any, asked: Any, name: str, changes: Any) -> Any:
    from ming_app.exam.candidate import read_attempts, sit_exam, write_attempt
    from ming_app.models.progress import Meter

    info = engine.info
    made_by = [info.fingerprint, info.precision, info.num_experts, args.shuffles, name]
    mark = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:16]
    done = read_attempts(Path(args.out), mark) if args.out else {}
    meter = Meter(console.progress, "measure", len(asked), "steps")

    def tick(one: Any, number: int, total: int) -> None:
        if args.out and one.key not in done:
            write_attempt(Path(args.out), mark, one)
        meter.update(number, force=number == total)

    return sit_exam(engine, asked, shuffles=args.shuffles, changes=changes, done=done, tick=tick)


def _trace(args: argparse.Namespace, console: Console, engine: Any, asked: Any, attempts: dict[str, Any]) -> str:
    """The routing of the prompts of up to TRACED questions, each a text labelled right or wrong."""
    from ming_app.engine.types import SamplingParams, Start
    from ming_app.exam.wording import ask_for_letter
    from ming_app.models.progress import Meter
    from ming_app.molora.trace import Segment, merge

    known = [(question, earlier) for question, earlier in asked if question.key in attempts]
    count = min(TRACED, len(known))
    known = [known[i * len(known) // count] for i in range(count)]
    meter = Meter(console.progress, "measure", count, "steps")
    found = []
    for number, (question, earlier) in enumerate(known, 1):
        with closing(engine.stream(ask_for_letter(question, (), earlier), SamplingParams(1, temperature=0))) as events:
            start = next(event for event in events if isinstance(event, Start))
        if start.trace is not None:
            one = attempts[question.key]
            labels = {"graded": "right" if one.correct else "wrong", "language": question.lang, "type": question.type}
            found.append((start.trace, Segment(0, question.stem[:80], labels)))
        meter.update(number, force=number == count)
    merge(found).save(args.trace)
    return str(args.trace)


def _print(found: dict[str, Any], console: Console, title: str) -> None:
    def row(name: str, share: dict[str, Any]) -> str:
        low, high = share["confidence95"]
        return f"  {name:24} {share['accuracy']:6.1%}  [{low:.1%}, {high:.1%}]  n={share['n']}"

    if not found["n"]:
        console.line(console.text(f"{title}: nothing could be asked.", f"{title}：没有可作答的题目。"))
        return
    console.line(title)
    console.line(row(console.text("all", "全部"), found))
    for kind in ("by_type", "by_lang", "by_subject"):
        for name, share in list(found[kind].items())[:SHOWN]:
            console.line(row(name, share))
    if found["calibration"]:
        console.line(
            console.text("  expected calibration error ", "  期望校准误差 ") + f"{found['calibration']['ece']:.3f}"
        )
    if found["consistency"] is not None:
        console.line(
            console.text("  same option in other orders ", "  打乱选项后选择一致 ") + f"{found['consistency']:.1%}"
        )
