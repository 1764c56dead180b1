"""`python app.py`: flags and MING_* variables -> settings -> the page.

Contract: an unknown flag or value is explained in the user's language and ends with exit code 2, before anything heavy
is imported; else the exit code is that of `ui.launch.serve`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from ming_app import __version__
from ming_app.cli_options import (
    ADDRESS_FLAGS,
    SETTINGS_FLAGS,
    Parser,
    add_address,
    add_lang,
    language,
    settings_options,
)
from ming_app.console import Console, use_utf8
from ming_app.errors import MingError
from ming_app.settings import Settings

FLAGS = (*SETTINGS_FLAGS, *ADDRESS_FLAGS)


def main(argv: Sequence[str] | None = None, *, serve: Callable[[Settings], int] | None = None) -> int:
    """Serves the page until stopped; gives the exit code. `serve` stands in for `ui.launch.serve` in tests."""
    words = list(sys.argv[1:] if argv is None else argv)
    use_utf8()
    console = Console(language(words))
    try:
        args = build_parser(console).parse_args(words)
        settings = Settings.load({name: getattr(args, name) for name in FLAGS})
        return (serve or _serve)(settings)
    except MingError as error:
        return console.fail(error)
    except KeyboardInterrupt:
        return console.interrupted()


def _serve(settings: Settings) -> int:
    if settings.zerogpu:  # it must be there before torch
        from ming_app.engine.zerogpu import import_spaces

        import_spaces()
    from ming_app.ui.launch import serve

    return serve(settings)


def build_parser(console: Console) -> argparse.ArgumentParser:
    """The settings flags of the command line, and where to listen."""
    t = console.text
    parser = Parser(
        prog="python app.py",
        description=t("Serves the MING-MOE page.", "启动 MING-MOE 页面。"),
        parents=[settings_options(console)],
    )
    parser.add_argument("--version", action="version", version=f"ming-app {__version__}")
    add_lang(parser, console)
    add_address(parser, console)
    return parser
