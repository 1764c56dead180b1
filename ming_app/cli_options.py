"""The options that commands share, and the parser that explains a wrong word in the user's language.

Light: argparse and settings only. Both faces use it, `python -m ming_app` (cli.py) and `python app.py` (entry.py).
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ming_app.console import Console
from ming_app.errors import MingError, UsageError
from ming_app.settings import BACKENDS, PRECISIONS, REGIONS, Settings

SETTINGS_FLAGS = (
    "model",
    "adapter",
    "weights",
    "cache_dir",
    "backend",
    "precision",
    "device",
    "threads",
    "context",
    "lang",
    "region",
)
ADDRESS_FLAGS = ("host", "port")
TRACE_ENDINGS = (".npz", ".json")
SAMPLING_FLAGS = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def language(words: Sequence[str]) -> str:
    """ "zh" or "en", known before the words are parsed, so that a wrong word is explained in the right language."""
    flag = ""
    for i, word in enumerate(words):
        if word == "--lang" and i + 1 < len(words):
            flag = words[i + 1]
        elif word.startswith("--lang="):
            flag = word.removeprefix("--lang=")
    try:
        return Settings.load({"lang": flag or None}).message_lang()
    except MingError:  # reported again, in full, when the command runs
        return Settings(lang=flag).message_lang()


ARGPARSE_ZH = (
    (r"the following arguments are required: (.*)", r"缺少参数：\1"),
    (r"unrecognized arguments: (.*)", r"无法识别的参数：\1"),
    (r"argument (.*?): invalid choice: (.*?) \(choose from (.*)\)", r"参数 \1 的值 \2 无效，可选：\3"),
    (r"argument (.*?): invalid (?:int|float) value: (.*)", r"参数 \1 应为数字，而不是 \2"),
    (r"argument (.*?): expected (?:one|at least one) argument", r"参数 \1 后缺少取值"),
    (r"argument (.*?): not allowed with argument (.*)", r"参数 \1 不能与 \2 同时使用"),
)


class Parser(argparse.ArgumentParser):
    """Raises UsageError, in both languages, where argparse would print and leave. Flags are written in full."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # else "--jso" would mean --json to it alone

    def error(self, message: str) -> NoReturn:
        zh = next((re.sub(en, zh, message) for en, zh in ARGPARSE_ZH if re.fullmatch(en, message)), message)
        raise UsageError(f"{message}. See: {self.prog} --help", f"{zh}。用法见：{self.prog} --help")


def plain_options(console: Console) -> argparse.ArgumentParser:
    """What every command takes."""
    t = console.text
    parser = Parser(add_help=False)
    parser.add_argument(
        "--json", action="store_true", help=t("one JSON object on stdout", "在标准输出给出一个 JSON 对象")
    )
    add_lang(parser, console)
    return parser


def add_lang(parser: argparse.ArgumentParser, console: Console) -> None:
    parser.add_argument("--lang", choices=("zh", "en"), help=console.text("language of messages", "消息语言"))


def add_region(parser: argparse.ArgumentParser, console: Console) -> None:
    parser.add_argument(
        "--region",
        choices=REGIONS,
        help=console.text("whose emergency numbers a warning names", "警示中使用哪里的急救号码"),
    )


def add_address(parser: argparse.ArgumentParser, console: Console) -> None:
    """Where to listen."""
    t = console.text
    parser.add_argument(
        "--host", help=t("address to listen on; 127.0.0.1 is this machine only", "监听地址；127.0.0.1 仅限本机")
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help=t("port to listen on; 0: any free one", "监听端口；0 为任意空闲端口")
    )


def common_options(console: Console) -> argparse.ArgumentParser:
    """What every command that loads a model takes."""
    return Parser(add_help=False, parents=[plain_options(console), settings_options(console)])


def settings_options(console: Console) -> argparse.ArgumentParser:
    """Which model, where and how; also for `python app.py`. Absent ones leave the MING_* environment in force."""
    t = console.text
    parser = Parser(add_help=False)
    parser.add_argument("--model", help=t("catalogue name, local folder or hub id", "模型名、本地文件夹或 hub id"))
    parser.add_argument(
        "--adapter",
        help=t(
            'adapter folder, catalogue name or hub id; "none" for the bare base',
            "适配器文件夹、模型名或 hub id；none 表示只用基座",
        ),
    )
    parser.add_argument(
        "--weights", metavar="PATH", help=t("file or folder with the base weights", "已有基座权重的文件或文件夹")
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", type=_path, help=t("where weights and engines are kept", "权重与引擎的缓存目录")
    )
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--threads", type=int, metavar="N", help=t("CPU threads; 0: one per core", "CPU 线程数；0 为每核一个")
    )
    parser.add_argument("--context", type=int, metavar="N", help=t("context limit in tokens", "上下文上限（词元）"))
    add_region(parser, console)
    return parser


def sampling_options(console: Console) -> argparse.ArgumentParser:
    t = console.text
    parser = Parser(add_help=False)
    parser.add_argument("--system", metavar="TEXT", default="", help=t("system prompt", "系统提示词"))
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=t("longest answer in tokens", "回答的最大词元数")
    )
    heat = parser.add_mutually_exclusive_group()
    heat.add_argument(
        "--greedy",
        action="store_true",
        help=t("always the likeliest token; reproducible", "总取概率最大的词元；结果可复现"),
    )
    heat.add_argument("--temperature", type=float, metavar="T")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, metavar="X")
    parser.add_argument("--seed", type=int, metavar="S", help=t("makes sampling reproducible", "使采样可复现"))
    return parser


def _path(text: str) -> Any:
    from pathlib import Path

    return Path(text).expanduser()


def check_trace_file(file: str | None) -> None:
    """Before minutes of loading and an answer that would be lost: a trace file ends in a known way, and can be written."""
    if not file:
        return
    if not file.endswith(TRACE_ENDINGS):
        raise UsageError(
            f"A trace file ends in .npz or .json, not {file!r}.", f"轨迹文件应以 .npz 或 .json 结尾，而不是 {file!r}。"
        )
    path = Path(file)
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UsageError(
            f"The trace cannot be written to {file}: its folder is not there, or not writable. Choose another path.",
            f"无法将轨迹写入 {file}：文件夹不存在或不可写。请换一个路径。",
        )
