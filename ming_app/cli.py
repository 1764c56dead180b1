"""The command line, second face of the app: `python -m ming_app COMMAND`.

Contract: every command but `mcp` takes `--json` (exactly one JSON object on stdout, everything else on stderr; a failure is
the object {"error": {...}}), exit code 0 done, 1 failed, 2 wrong use, 130 interrupted; messages in the user's language.
Whatever is heavy is imported inside the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ming_app import __version__
from ming_app.cli_options import (
    ADDRESS_FLAGS,
    SAMPLING_FLAGS,
    SETTINGS_FLAGS,
    Parser,
    add_address,
    add_lang,
    add_region,
    check_trace_file,
    common_options,
    language,
    plain_options,
    sampling_options,
    settings_options,
)
from ming_app.console import Console, use_utf8
from ming_app.errors import MingError, UsageError
from ming_app.reading import whole_text
from ming_app.settings import Settings
from ming_app.ui.text import t as page_text

if TYPE_CHECKING:
    from ming_app.answering import Streams
    from ming_app.engine.types import Message, SamplingParams
    from ming_app.molora.trace import RouterTrace

BROKEN_PIPE = 141  # as a shell reports a reader that went away: 128 + SIGPIPE
DISCLAIMER = (page_text("en", "app.disclaimer"), page_text("zh", "app.disclaimer"))

LoadEngine = Callable[[Settings, Any], "Streams"]


def main(argv: Sequence[str] | None = None, *, load_engine: LoadEngine | None = None) -> int:
    """Runs one command; gives its exit code. `load_engine` stands in for `Engine.load` in tests of this contract."""
    words = list(sys.argv[1:] if argv is None else argv)
    use_utf8()
    own = words[: words.index("--")] if "--" in words else words
    console = Console(language(own), "--json" in own)
    try:
        with console.capture():
            return _run(words, console, load_engine or _load_engine)
    except MingError as error:
        return console.fail(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return console.interrupted()
    except Exception as error:  # a bug: say so in the promised form
        return console.crash(error)


def _run(words: list[str], console: Console, load_engine: LoadEngine) -> int:
    args = build_parser(console).parse_args(words)
    settings = Settings.load({name: getattr(args, name, None) for name in (*SETTINGS_FLAGS, *ADDRESS_FLAGS)})
    return int(args.run(args, settings, console, load_engine))


def _load_engine(settings: Settings, progress: Any) -> Streams:
    from ming_app.engine.engine import Engine

    return Engine.load(settings, progress=progress)


# -- the words a person may type --------------------------------------------------------------------------------------


def build_parser(console: Console) -> argparse.ArgumentParser:
    """The whole grammar, its help in the console's language."""
    t = console.text
    parser = Parser(
        prog="python -m ming_app",
        description=t(
            "MING-MOE: a bilingual medical model with sparse LoRA experts. " + DISCLAIMER[0],
            "MING-MOE：带稀疏 LoRA 专家的中英双语医学模型。" + DISCLAIMER[1],
        ),
    )
    parser.add_argument("--version", action="version", version=f"ming-app {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common, sampling = common_options(console), sampling_options(console)

    ask = _command(commands, "ask", cmd_ask, [common, sampling], t("answer one question", "回答一个问题"))
    ask.add_argument(
        "text", metavar="TEXT", help=t("the question; - reads it from standard input", "问题；- 表示从标准输入读取")
    )
    ask.add_argument(
        "--trace", metavar="FILE", help=t("save which experts fired (.npz or .json)", "保存专家轨迹（.npz 或 .json）")
    )

    _command(commands, "chat", cmd_chat, [common, sampling], t("talk in the terminal", "在终端中对话"))

    trace = _command(
        commands, "trace", cmd_trace, [common, sampling], t("make or read a router trace", "生成或查看路由轨迹")
    )
    trace.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        help=t(
            "trace to read, or to write with --prompt; or one of: diff A B, merge A B ... --out FILE, report FILE --out HTML, atlas --prompts FILE --out FOLDER",
            "要读取的轨迹文件（与 --prompt 同用时为写入）；或：diff A B、merge A B ... --out FILE、report FILE --out HTML、atlas --prompts FILE --out FOLDER",
        ),
    )
    trace.add_argument(
        "--prompt",
        metavar="TEXT",
        help=t("answer TEXT and trace it; - reads standard input", "回答 TEXT 并记录轨迹；- 表示标准输入"),
    )
    trace.add_argument(
        "--intervene",
        metavar="CHANGE",
        action="append",
        default=[],
        help=t(
            "change the experts for this answer: ban:2, force:0@4-11, k:1, uniform/down, off@0-3, base; may be repeated",
            "本次回答中改动专家：ban:2、force:0@4-11、k:1、uniform/down、off@0-3、base；可重复",
        ),
    )
    trace.add_argument(
        "--prompts",
        "--bank",
        metavar="FILE",
        help=t("atlas: texts or exam questions (TOML, JSON lines, text)", "atlas：文本或试题（TOML、JSON 行、纯文本）"),
    )
    trace.add_argument("--out", metavar="PATH", help=t("file or folder to write", "要写入的文件或文件夹"))
    trace.add_argument("--limit", type=int, default=0, help=t("atlas: so many texts", "atlas：文本数量"))

    verify = _command(
        commands,
        "verify",
        cmd_verify,
        [plain_options(console)],
        t("compare a checkpoint with expected logits", "将检查点与期望 logits 对比"),
    )
    for name in ("base", "adapter"):
        verify.add_argument(f"--{name}", metavar="DIR", required=True, dest=f"{name}_dir")
    verify.add_argument(
        "--expected",
        metavar="FILE",
        required=True,
        help=t("safetensors with ids, logits, experts", "含 ids、logits、专家的 safetensors 文件"),
    )

    from ming_app.models.weights_cli import add_weights_parser

    add_weights_parser(commands, t, [common])
    commands.choices["weights"].set_defaults(run=cmd_weights)

    from ming_app.exam_cli import add_exam_parser

    add_exam_parser(commands, t, [common])
    commands.choices["exam"].set_defaults(run=cmd_exam)

    from ming_app.deploy_cli import add_deploy_parser

    add_deploy_parser(commands, t, [plain_options(console)])
    commands.choices["deploy"].set_defaults(run=cmd_deploy)

    triage = _command(
        commands,
        "triage",
        cmd_triage,
        [plain_options(console)],
        t("look for signs of an emergency in a text; no model", "检查文本中的急症信号（不需要模型）"),
    )
    triage.add_argument("text", metavar="TEXT", help=t("- reads standard input", "- 表示从标准输入读取"))
    add_region(triage, console)

    serve = _command(
        commands, "serve", cmd_serve, [common], t("the page and an OpenAI-compatible API", "页面与兼容 OpenAI 的 API")
    )
    add_address(serve, console)

    tools = t(
        "tools for other assistants, over stdio (MCP): ask, explain, trace, triage",
        "供其他智能助手调用的工具（MCP，标准输入输出）：ask、explain、trace、triage",
    )
    add_lang(_command(commands, "mcp", cmd_mcp, [settings_options(console)], tools), console)

    from ming_app.bench_cli import add_bench_options

    bench = _command(commands, "bench", cmd_bench, [common], t("measure speed and memory", "测量速度与内存"))
    add_bench_options(bench, t)
    return parser


def _command(
    commands: Any, name: str, run: Callable[..., int], parents: list[argparse.ArgumentParser], summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, parents=parents)
    parser.set_defaults(run=run)
    return parser


# -- commands ---------------------------------------------------------------------------------------------------------


def cmd_ask(args: argparse.Namespace, settings: Settings, console: Console, load_engine: LoadEngine) -> int:
    """Answers one question, streamed; `--trace` saves the routing of prompt and answer."""
    from ming_app.answering import answer
    from ming_app.ui.record import save_record

    question, params = _question(args.text), _sampling(args, trace=bool(args.trace))
    check_trace_file(args.trace)
    _warn(question, settings, console)
    with closing(load_engine(settings, console.progress)) as engine:
        if args.trace and not engine.info.num_experts:
            raise _no_experts()
        reply = answer(engine, _messages(args.system, question), params, on_text=console.write)
        console.line()
        values = reply.to_dict(engine.info)
    if args.trace and reply.finish.trace is not None:
        values["trace"] = str(save_record(reply.finish.trace, args.trace))
    _after_answer(console, values)
    console.result(values)
    return 0


def _warn(question: str, settings: Settings, console: Console) -> None:
    """Before the model is even loaded: signs of an emergency in the question, and whom to call."""
    from ming_app.safety.notices import warning

    said = warning([question], settings.region)
    if said is not None:
        console.note(*said)


def _after_answer(console: Console, values: dict[str, Any]) -> None:
    from ming_app.safety.notices import answer_notes

    rate, first = values["tokens_per_second"], values["seconds_to_first_token"]
    console.note(
        f"[{values['model']} {values['precision']}, {values['new_tokens']} tokens, {rate:.1f} tokens/s, first after {first:.2f} s, {values['finish_reason']}]",
        f"[{values['model']} {values['precision']}，{values['new_tokens']} 个词元，{rate:.1f} 词元/秒，首词元 {first:.2f} 秒，{values['finish_reason']}]",
    )
    for said in answer_notes(values["text"]):
        console.note(*said)
    console.note(*DISCLAIMER)


def cmd_chat(args: argparse.Namespace, settings: Settings, console: Console, load_engine: LoadEngine) -> int:
    """A conversation in the terminal, or over a pipe: one question a line."""
    from ming_app.repl import Repl

    params = _sampling(args, trace=True)
    with closing(load_engine(settings, console.progress)) as engine:
        info = engine.info
        console.note(
            f"{info.title}, {info.precision}, {info.device}. {DISCLAIMER[0]}",
            f"{info.title}，{info.precision}，{info.device}。{DISCLAIMER[1]}",
        )
        values = Repl(engine, console, params, whole_text(args.system), settings.region).run()
    console.result(values)
    return 0


def cmd_trace(args: argparse.Namespace, settings: Settings, console: Console, load_engine: LoadEngine) -> int:
    """Summary of a trace: of a file, without any model, or of the answer to `--prompt`, kept in FILE if one is named; or
    what trace_tools.py does with several."""
    from ming_app import trace_tools
    from ming_app.molora.trace import RouterTrace
    from ming_app.trace_report import print_summary, summarize

    if args.files and args.files[0] in trace_tools.ACTIONS and args.prompt is None:
        new_tokens = trace_tools.ATLAS_TOKENS if args.max_new_tokens is None else args.max_new_tokens
        job = trace_tools.Job(tuple(args.files[1:]), args.out, args.prompts, args.limit, new_tokens)
        console.result(trace_tools.ACTIONS[args.files[0]](job, settings, console, load_engine))
        return 0
    if len(args.files) > 1:
        raise UsageError(
            "One trace file at a time; see --help for diff and merge.",
            "一次只能读取一个轨迹文件；diff 与 merge 见 --help。",
        )
    file = args.files[0] if args.files else None
    if args.prompt is None:
        if not file:
            raise UsageError("Name a trace file, or give --prompt.", "请给出轨迹文件，或使用 --prompt。")
        trace = RouterTrace.load(file)
        values: dict[str, Any] = {"file": file}
    else:
        trace, values = _make_trace(args, file, settings, console, load_engine)
    summary = summarize(trace)
    print_summary(summary, console)
    console.result({**summary, **values})
    return 0


def _make_trace(
    args: argparse.Namespace, file: str | None, settings: Settings, console: Console, load_engine: LoadEngine
) -> tuple[RouterTrace, dict[str, Any]]:
    from ming_app.answering import answer
    from ming_app.engine.interventions import parse_intervention
    from ming_app.ui.record import save_record

    changes = tuple(parse_intervention(text) for text in args.intervene)
    question, params = _question(args.prompt), replace(_sampling(args, trace=True), interventions=changes)
    check_trace_file(file)
    _warn(question, settings, console)
    with closing(load_engine(settings, console.progress)) as engine:
        if not engine.info.num_experts:
            raise _no_experts()
        reply = answer(engine, _messages(args.system, question), params)
        values = reply.to_dict(engine.info)
    trace = reply.finish.trace
    if trace is None:
        raise RuntimeError("the engine gave no trace")
    if file:
        values["file"] = str(save_record(trace, file))
    return trace, {"file": values.get("file"), "text": values["text"], "finish_reason": values["finish_reason"]}


def cmd_verify(args: argparse.Namespace, settings: Settings, console: Console, load_engine: LoadEngine) -> int:
    """Differences between a checkpoint and the logits expected of it; exit code 1 when they are too large."""
    from ming_app.verify import print_report, verify

    report = verify(args.base_dir, args.adapter_dir, args.expected)
    print_report(report, console)
    console.result(report)
    return 0 if report["ok"] else 1


def cmd_weights(args: argparse.Namespace, settings: Settings, console: Console, load_engine: LoadEngine) -> int:
    """What weights are here and where they came from; see ming_app.models.weights_cli."""
    from ming_app.models.weights_cli import run_weights, weights_text

    result = run_weights(args, settings, console.progress)
    console.line(weights_text(result, console.text))
    console.result(result)
    return 0


def cmd_exam(args: argparse.Namespace, settings: Settings, console: Console, load_engine: LoadEngine) -> int:
    """Exam questions: the model as candidate, files checked and converted; see ming_app.exam_cli."""
    from ming_app.exam_cli import run_exam

    console.result(run_exam(args, settings, console, load_engine))
    return 0


def cmd_deploy(args: argparse.Namespace, settings: Settings, console: Console, load_engine: LoadEngine) -> int:
    """The app as a Hugging Face Space; see ming_app.deploy_cli."""
    from ming_app.deploy_cli import run_deploy

    console.result(run_deploy(args, console))
    return 0


def cmd_triage(args: argparse.Namespace, settings: Settings, console: Console, load_engine: LoadEngine) -> int:
    """Red flags in a text. Exit code 0 whether there is one or not: the object says."""
    from ming_app.safety.notices import triage

    found = triage(_question(args.text), settings.region, settings.message_lang() if settings.lang else "")
    if found["red_flag"]:
        console.line(f"[{found['category']}] {found['message']}")
    else:
        console.line(
            console.text(
                "No sign of an emergency was found. This is no all-clear: in doubt, see a doctor.",
                "未发现急症信号。这不代表没有危险，如有疑虑请就医。",
            )
        )
    console.result(found)
    return 0


def cmd_serve(args: argparse.Namespace, settings: Settings, console: Console, load_engine: LoadEngine) -> int:
    """Page and API until stopped."""
    from ming_app.serve.server import serve

    serve(settings)
    console.result({"stopped": True})
    return 0


def cmd_mcp(args: argparse.Namespace, settings: Settings, console: Console, load_engine: LoadEngine) -> int:
    """Tools for another assistant until it closes stdin. No `--json`: stdout is the protocol's."""
    from ming_app.ui.loader import EngineLoader

    try:
        from ming_app.mcp_server import serve_stdio
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mcp":
            raise
        raise MingError(
            "The mcp package is missing or older than version 2. Install it: pip install -r requirements-mcp.txt",
            "缺少 mcp 包，或其版本低于 2。请安装：pip install -r requirements-mcp.txt",
        ) from error
    serve_stdio(EngineLoader(lambda progress: load_engine(settings, progress)), settings)
    return 0


def cmd_bench(args: argparse.Namespace, settings: Settings, console: Console, load_engine: LoadEngine) -> int:
    """Speed and memory of this machine, each case beside the one it is compared with; see ming_app.bench_cli."""
    from ming_app.bench_cli import run

    return run(args, settings, console)


# -- shared by the commands -------------------------------------------------------------------------------------------


def _question(text: str) -> str:
    """The text to answer; "-" reads standard input. UTF-8 whatever the locale; other bytes are replaced. UsageError when empty."""
    if text == "-":
        text = sys.stdin.read()
    else:
        with contextlib.suppress(UnicodeEncodeError):  # a locale without UTF-8 hands the bytes over as surrogates
            text = os.fsencode(text).decode("utf-8", "replace")
    text = text.encode("utf-8", "replace").decode("utf-8").strip()
    if not text:
        raise UsageError("The question is empty.", "问题为空。")
    return text


def _messages(system: str, text: str) -> list[Message]:
    from ming_app.engine.types import Message

    return [*([Message("system", whole_text(system))] if system else []), Message("user", text)]


def _sampling(args: argparse.Namespace, *, trace: bool) -> SamplingParams:
    from ming_app.engine.types import SamplingParams

    given = {name: getattr(args, name) for name in SAMPLING_FLAGS if getattr(args, name) is not None}
    if args.greedy:
        given["temperature"] = 0.0
    return SamplingParams(**given, trace=trace)


def _no_experts() -> UsageError:
    return UsageError("This model has no experts, so there is nothing to trace.", "该模型没有专家，无轨迹可记录。")
